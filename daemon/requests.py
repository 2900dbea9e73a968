"""What a station may be asked over MQTT, and what it answers. Pure: bytes in, a request or its refusal out.

A request is held against its published schema, inspectd.command/1 or, on the fast path, inspectd.trigger/1. Unlike what
a station says, it may have no other keys: a misspelt one that is overlooked would be a part without its id.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from daemon import schemas
from daemon.contract import META_LIMIT, Identity, Message
from daemon.messages import Trigger
from daemon.wire import encode, epoch_ms, text

REQUEST, TRIGGER, RESPONSE = "cmd/request", "cmd/trigger", "cmd/response"
"""The leaves of commands: what is asked, the fast path of triggers, and the answers."""
REQUEST_LIMIT = 1024
"""Bytes."""
ID_LIMIT = 64
"""Bytes that an id takes in JSON: a longer one would come back cut, and be nobody's."""
CORRELATION_LIMIT = 256
"""Bytes; what the common soft PLCs send."""

_IDS = ("cmd_id", "trigger_id", "part_id", "batch_id")
_MESSAGE = 384
_ANSWER_EXPIRY_S = 60


class Action(StrEnum):
    """All that a station may be asked. Names are never reused."""

    TRIGGER = "trigger"
    START = "start"
    STOP = "stop"
    ABORT = "abort"
    HALT = "halt"
    RESET = "reset"
    PREPARE_RECIPE = "prepare_recipe"
    ACK_RESULT = "ack_result"
    RESET_STATS = "reset_stats"
    CHALLENGE = "challenge"
    GET_STATE = "get_state"
    REPUBLISH = "republish"


class Code(IntEnum):
    """How a request ended. Numbers are never reused."""

    DONE = 0
    ACCEPTED = 1
    BUSY = 10
    WRONG_STATE = 11
    UNKNOWN_ACTION = 12
    BAD_ARGS = 13
    NOT_FOUND = 14
    EXPIRED = 16
    RETAINED_REFUSED = 17
    INTERNAL = 50


@dataclass(frozen=True, slots=True)
class Received:
    """One message on a command's topic, as MQTT brought it. `reply_to` and `correlation` are MQTT 5's."""

    topic: str
    payload: bytes
    retained: bool = False
    reply_to: str | None = None
    correlation: bytes | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is understood. Of `args` those are there that the action knows and that were given.

    After `expires_ms`, milliseconds since 1970 UTC, it is not to be obeyed; None: whenever it comes.
    """

    cmd_id: str
    action: Action
    args: Mapping[str, Any] = field(default_factory=dict)
    user: str = ""
    expires_ms: int | None = None


class RefusedError(Exception):
    """A request that is not obeyed: why, and what is known of it."""

    def __init__(self, code: Code, message: str, cmd_id: str = "", action: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.cmd_id = cmd_id
        self.action = action


def parse(received: Received) -> Request:
    """Understand a message on a command's topic.

    Raises:
        RefusedError: it is retained, or no request that is known.
    """
    schema = "trigger" if received.topic.endswith(f"/{TRIGGER}") else "command"
    content = _object(received.payload)
    if schema == "trigger":
        content.setdefault("action", Action.TRIGGER.value)
    named = _said(content, "cmd_id"), _said(content, "action")
    if received.retained:
        raise RefusedError(Code.RETAINED_REFUSED, _RETAINED, *named)
    if named[1] not in list(Action):
        raise RefusedError(Code.UNKNOWN_ACTION, f'"action" must be one of {", ".join(Action)}', *named)
    if fault := best_match(_VALIDATORS[schema].iter_errors(content)):
        place = ".".join(str(step) for step in fault.absolute_path)
        raise RefusedError(Code.BAD_ARGS, f"{place}: {fault.message}" if place else fault.message, *named)
    args = content if schema == "trigger" else content.get("args", {})
    if len(encode(args.get("meta", {}))) > META_LIMIT:
        raise RefusedError(Code.BAD_ARGS, f"meta: takes more than {META_LIMIT} bytes", *named)
    for key in _IDS:
        if _said(said := {**args, **content}, key) != said.get(key, ""):
            raise RefusedError(Code.BAD_ARGS, f"{key}: takes more than {ID_LIMIT} bytes", *named)
    return Request(content["cmd_id"], Action(named[1]), args, content.get("user", ""), content.get("expires_ms"))


def encode_response(
    identity: Identity, named: tuple[str, str], code: Code, message: str, state: str, at: datetime, *, seq: int = 0
) -> bytes:
    """The answer to a request of an id and action, schema inspectd.response/1, at most 1,024 bytes.

    `seq` is the number that was promised to a trigger's verdict; 0 where none was.
    """
    cmd_id, action = named
    content = {
        "schema": "inspectd.response/1",
        "cmd_id": text(cmd_id, ID_LIMIT),
        "action": text(action, ID_LIMIT),
        "code": code.value,
        "result": code.name,
        "message": text(message, _MESSAGE),
        "seq": seq,
        "state": state,
        "station": identity.station,
        "boot_id": identity.boot_id,
        "ts_ms": epoch_ms(at),
    }
    return encode(content)


def response(identity: Identity, received: Received, payload: bytes) -> Message:
    """An answer on its way to whoever asked: where MQTT 5's request says, else on the station's own topic.

    Raises:
        RefusedError: the place that was asked for is not for answers.
    """
    topic = received.reply_to or identity.topic(RESPONSE)
    if received.reply_to is not None and not _is_free(received.reply_to, identity):
        raise RefusedError(
            Code.BAD_ARGS,
            f"{text(received.reply_to, ID_LIMIT)!r} is no topic for answers; let it have neither wildcards nor the "
            f"topic prefix of inspectd, or let it be {identity.topic(RESPONSE)} or one below it",
        )
    if received.correlation is not None and len(received.correlation) > CORRELATION_LIMIT:
        raise RefusedError(Code.BAD_ARGS, f"correlation data of more than {CORRELATION_LIMIT} bytes")
    # Elsewhere a broker may not let us write, and to refuse what must be acknowledged costs the connection.
    qos = 1 if topic.startswith(identity.topic("")) else 0
    return Message(topic, payload, qos, expires_s=_ANSWER_EXPIRY_S, correlation=received.correlation)


def pack(trigger: Trigger) -> bytes:
    """A trigger as it outlives a restart."""
    return encode({**asdict(trigger), "at": trigger.at.isoformat(), "meta": dict(trigger.meta)})


def unpack(packed: bytes) -> Trigger:
    """The trigger that was packed."""
    content = json.loads(packed)
    return Trigger(**{**content, "at": datetime.fromisoformat(content["at"]).astimezone(UTC)})


def _object(payload: bytes) -> dict[str, Any]:
    if len(payload) > REQUEST_LIMIT:
        raise RefusedError(Code.BAD_ARGS, f"{len(payload)} bytes; a command has at most {REQUEST_LIMIT}")
    try:
        content = json.loads(payload)
        encode(content)  # neither infinite numbers nor halves of characters, which JSON lets through
    except (ValueError, RecursionError) as error:
        raise RefusedError(Code.BAD_ARGS, f"no JSON in UTF-8: {error}") from None
    if not isinstance(content, dict):
        raise RefusedError(Code.BAD_ARGS, 'no JSON object; send one like {"cmd_id":"17","action":"get_state"}')
    return content


def _said(content: Mapping[str, Any], key: str) -> str:
    return text(content[key], ID_LIMIT) if isinstance(content.get(key), str) else ""


def _is_free(topic: str, identity: Identity) -> bool:
    """Whether answers may go there: not where they would be taken for something that a station says."""
    if not 0 < len(topic) <= CORRELATION_LIMIT or re.search(r"[+#\0]", topic) or topic.startswith("$"):
        return False
    own = identity.topic(RESPONSE)
    return topic == own or topic.startswith(f"{own}/") or not topic.startswith(f"{identity.prefix}/")


_RETAINED = (
    "a retained command would be obeyed again at every reconnect; publish without retain, and delete this one by "
    "publishing an empty retained message"
)
_VALIDATORS = {name: Draft202012Validator(json.loads(schemas.read(name))) for name in ("command", "trigger")}
