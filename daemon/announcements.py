"""What a station tells of itself: who it is, what it counted, what is wrong with it, and what happened.

Pure, and under the rules of `contract`: fixed keys, floats with a point, no null, texts cut so that sizes hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from ulid import ULID

from daemon.alarms import Alarm, Change
from daemon.contract import TOPICS, Identity, Message
from daemon.messages import Outcome
from daemon.stats import Drop, Shift, Stats, Window
from daemon.wire import NOT_MEASURED, encode, epoch_ms, iso, number, text

BIRTH_LIMIT = ACTIVE_LIMIT = 4096
"""Bytes; what the common soft PLCs take."""

_MODEL, _PLACE, _DETAIL, _SUBJECT = 64, 384, 384, 128
"""The most bytes that a text takes as it stands in the JSON."""
_COUNTED = (Outcome.PASS, Outcome.FAIL, Outcome.UNCERTAIN, Outcome.ERROR)
_DETAILS = (384, 192, 96, 48, 24)
"""The same of the details of all active alarms, tried in turn."""


@dataclass(frozen=True, slots=True)
class Birth:
    """What `birth` says beside the identity.

    Attributes:
        version: of the program.
        source_kind: "folder", say.
        source_place: the folder's path or the camera's name.
        actuation_ttl_ms: how long the message to the reject gate may be acted on.
        max_packet_bytes: the largest MQTT packet that is sent.
        config_sha256: fingerprint of the configuration, 64 digits.
        leaves: those of TOPICS that this station publishes.
        recipes: names of the station's recipes; their numbers count from 1.
        commands: names of the commands that it obeys.
    """

    version: str
    source_kind: str
    source_place: str
    actuation_ttl_ms: int
    max_packet_bytes: int
    config_sha256: str
    leaves: Sequence[str]
    recipes: Sequence[str]
    commands: Sequence[str]


class EventKind(StrEnum):
    """What may happen that must be known afterwards. Names are never reused."""

    STARTED = "started"
    STOPPED = "stopped"
    CHALLENGE = "challenge"
    COMMAND = "command"
    SHIFT = "shift"
    GAP = "gap"
    QUARANTINED = "quarantined"
    RELOAD = "reload"
    CHAIN_MENDED = "chain_mended"
    CHAIN_BROKEN = "chain_broken"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes:
        id: a ULID.
        kind: what it was.
        subject: what it was about: a version, a command, the status of the challenge test; may be empty.
        detail: the rest in words.
        first_seq: the first verdict that it is about; 0 where it is about none.
        last_seq: the last one.
        at: when, UTC.
        chain: hash of its entry in the audit trail, 64 digits; empty where it has none.
    """

    id: str
    kind: EventKind
    subject: str
    detail: str
    at: datetime
    first_seq: int = 0
    last_seq: int = 0
    chain: str = ""


def encode_birth(identity: Identity, birth: Birth, at: datetime) -> Message:
    """Retained particulars, schema inspectd.birth/1, at most 4,096 bytes: all that finds the rest without a manual.

    Of very many recipes it names the first and counts them all.

    Raises:
        KeyError: a leaf is not in TOPICS.
    """
    recipes = list(birth.recipes)
    content = {
        "schema": "inspectd.birth/1",
        "software": "inspectd",
        "version": text(birth.version, _MODEL),
        "node": identity.node,
        "station": identity.station,
        "boot_id": identity.boot_id,
        "base": identity.base,
        "recipe": identity.recipe,
        "recipe_index": identity.recipe_index,
        "recipes": recipes,
        "recipe_count": len(recipes),
        "model": text(identity.model, _MODEL),
        "model_sha256": identity.model_sha256,
        "calibration": identity.calibration,
        "fpr_target": number(identity.fpr_target),
        "source_kind": birth.source_kind,
        "source_place": text(birth.source_place, _PLACE, keep_end=True),
        "actuation_ttl_ms": birth.actuation_ttl_ms,
        "max_packet_bytes": birth.max_packet_bytes,
        "config_sha256": birth.config_sha256,
        "topics": [{"leaf": leaf, "schema": TOPICS[leaf]} for leaf in birth.leaves],
        "commands": list(birth.commands),
        "ts_ms": epoch_ms(at),
    }
    while len(payload := encode(content)) > BIRTH_LIMIT and recipes:
        recipes.pop()
    return Message(identity.topic("birth"), payload, retain=True)


def encode_stats(identity: Identity, stats: Stats, at: datetime, window: Window = Window.SHIFT) -> Message:
    """Retained figures of one window, schema inspectd.stats/1, at most 1,024 bytes."""
    outcomes, latencies, percentiles = stats.outcomes, stats.latencies, stats.percentiles
    content = {
        "schema": "inspectd.stats/1",
        "window": window.value,
        "frames_in": stats.frames_in,
        "inspected": stats.inspected,
        "pass": outcomes[Outcome.PASS],
        "fail": outcomes[Outcome.FAIL],
        "uncertain": outcomes[Outcome.UNCERTAIN],
        "error": outcomes[Outcome.ERROR],
        "dropped": {cause.value: stats.dropped[cause] for cause in Drop},
        "pending": stats.pending,
        "too_late": stats.too_late,
        "triggers": stats.triggers,
        "answered": stats.answered,
        "trigger_errors": stats.trigger_errors,
        "yield": number(NOT_MEASURED if stats.yielded is None else stats.yielded),
        "rate_per_min": number(stats.rate_per_min, 1),
        "t_min_ms": number(latencies.least if latencies else NOT_MEASURED, 3),
        "t_max_ms": number(latencies.greatest if latencies else NOT_MEASURED, 3),
        "t_avg_ms": number(latencies.mean if latencies else NOT_MEASURED, 3),
        "p50_ms": number(percentiles.p50 if percentiles else NOT_MEASURED, 3),
        "p95_ms": number(percentiles.p95 if percentiles else NOT_MEASURED, 3),
        "p99_ms": number(percentiles.p99 if percentiles else NOT_MEASURED, 3),
        "since_ts_ms": epoch_ms(stats.since),
        "ts_ms": epoch_ms(at),
    }
    leaf = "stats" if window is Window.SHIFT else "totals"
    return Message(identity.topic(leaf), encode(content), qos=0, retain=True, expires_s=60)


def encode_alarm(identity: Identity, change: Change, at: datetime) -> Message:
    """An alarm raised or cleared, schema inspectd.alarm/1, at most 1,536 bytes; must arrive."""
    content = {
        "schema": "inspectd.alarm/1",
        "node": identity.node,
        "station": identity.station,
        "boot_id": identity.boot_id,
        "state": "active" if change.active else "cleared",
        **_alarm(change.alarm, _DETAIL),
        "ts": iso(at),
        "ts_ms": epoch_ms(at),
    }
    return Message(identity.topic("alarm/event"), encode(content))


def encode_active(identity: Identity, alarms: Sequence[Alarm], at: datetime) -> Message:
    """Retained list of what is wrong, in the order given, schema inspectd.alarms/1, at most 4,096 bytes.

    No alarm is left out; where many are active, their details are cut shorter.
    """
    payload = b""
    for limit in _DETAILS:
        content = {
            "schema": "inspectd.alarms/1",
            "priority": min((alarm.definition.priority for alarm in alarms), default=0),
            "active": [_alarm(alarm, limit) for alarm in alarms],
            "ts_ms": epoch_ms(at),
        }
        if len(payload := encode(content)) <= ACTIVE_LIMIT:
            break
    return Message(identity.topic("alarm/active"), payload, retain=True)


def encode_event(identity: Identity, event: Event) -> Message:
    """Something that happened, schema inspectd.event/1, at most 1,536 bytes; must arrive."""
    content = {
        "schema": "inspectd.event/1",
        "id": event.id,
        "node": identity.node,
        "station": identity.station,
        "boot_id": identity.boot_id,
        "kind": event.kind.value,
        "subject": text(event.subject, _SUBJECT),
        "detail": text(event.detail, _DETAIL),
        "first_seq": event.first_seq,
        "last_seq": event.last_seq,
        "chain": event.chain,
        "ts": iso(event.at),
        "ts_ms": epoch_ms(event.at),
    }
    return Message(identity.topic("event"), encode(content))


def encode_shift(identity: Identity, why: str, shift: Shift) -> bytes:
    """The event that tells the figures of a shift that is over, as words `name=value`; why it is over."""
    stats = shift.stats
    figures = {
        "since": iso(stats.since),
        "inspected": stats.inspected,
        **{outcome.name.lower(): stats.outcomes[outcome] for outcome in _COUNTED},
        "dropped": sum(stats.dropped.values()),
        "too_late": stats.too_late,
        "triggers": stats.triggers,
        "trigger_errors": stats.trigger_errors,
        "yield": number(NOT_MEASURED if stats.yielded is None else stats.yielded),
    }
    detail = " ".join(f"{name}={value}" for name, value in figures.items())
    id_ = str(ULID.from_datetime(shift.until))
    event = Event(id_, EventKind.SHIFT, why, detail, shift.until, shift.first_seq, shift.last_seq)
    return encode_event(identity, event).payload


def _alarm(alarm: Alarm, detail_limit: int) -> dict[str, Any]:
    definition = alarm.definition
    return {
        "alarm_id": alarm.id.value,
        "instance": alarm.instance,
        "priority": definition.priority,
        "text": definition.text,
        "detail": text(alarm.detail, detail_limit),
        "advice": definition.advice,
        "count": alarm.count,
        "since_ts_ms": epoch_ms(alarm.since),
    }
