"""Obeys commands: each once, whatever the network repeats, and each answered."""

from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from daemon.announcements import EventKind
from daemon.contract import Identity, Message
from daemon.execution import Asked, Execution, Mode, OverrunError
from daemon.health import StationHealth
from daemon.outbox import Answer, Outbox, OutboxError, Promise
from daemon.recipes import Recipes
from daemon.requests import (
    Action,
    Code,
    Received,
    RefusedError,
    Request,
    encode_response,
    pack,
    parse,
    response,
)
from daemon.wire import epoch_ms

log = structlog.get_logger()

_AUDITED = {
    Action.START,
    Action.STOP,
    Action.ABORT,
    Action.HALT,
    Action.RESET,
    Action.PREPARE_RECIPE,
    Action.RESET_STATS,
    Action.CHALLENGE,
}
_IDLE = {Action.GET_STATE, Action.REPUBLISH}
"""Those that may well be obeyed twice, and whose answer must be of now."""


class Control:
    """What obeys the commands of one station. One thread.

    Args:
        note: takes down that something happened: its kind, subject and detail.
    """

    def __init__(
        self,
        identity: Identity,
        execution: Execution,
        recipes: Recipes,
        health: StationHealth,
        outbox: Outbox,
        note: Callable[[EventKind, str, str], None],
    ) -> None:
        self._identity = identity
        self._execution = execution
        self._recipes = recipes
        self._health = health
        self._outbox = outbox
        self._note = note

    def obey(self, received: Received, send: Callable[[Message], None]) -> bool:
        """Obey one message on a command's topic, and answer; True if all that is retained is to be published anew."""
        now = datetime.now(UTC)
        try:
            response(self._identity, received, b"")
        except RefusedError as refused:  # an answer may go to the usual place only
            received = Received(received.topic, received.payload, received.retained)
            self._refuse(refused, received, send, now)
            return False
        try:
            request = parse(received, now)
        except RefusedError as refused:
            self._refuse(refused, received, send, now)
            return False

        def reply(payload: bytes) -> None:
            send(response(self._identity, received, payload))

        try:
            self._obey(request, reply, now)
        except OutboxError as error:
            why = f"it cannot be recorded, and so is not obeyed: {error}"
            reply(self._encode(request, Code.INTERNAL, why, now))
        return request.action is Action.REPUBLISH

    def _obey(self, request: Request, reply: Callable[[bytes], None], now: datetime) -> None:
        if request.action in _IDLE:
            reply(self._encode(request, Code.DONE, "", now))
            return
        known = self._outbox.answered(self._identity.station, request.cmd_id)
        if known is not None:
            reply(known)
        elif request.action is Action.TRIGGER:
            self._trigger(request, reply, now)
        else:
            code, message = self._perform(request, now)
            payload = self._encode(request, code, message, now)
            self._outbox.answer(self._answer(request, payload, now))
            reply(payload)
            if request.action in _AUDITED:
                by = f" by {request.user}" if request.user else ""
                self._note(EventKind.COMMAND, request.action.value, f"{code.name}{by}: {message}".removesuffix(": "))

    def _trigger(self, request: Request, reply: Callable[[bytes], None], now: datetime) -> None:
        mode, args = self._execution.mode, request.args
        if mode not in {Mode.READY, Mode.SINGLE}:
            why = f"a station in {mode} takes no triggers; send stop and wait for Ready"
            payload = self._encode(request, Code.WRONG_STATE, why, now)
            self._outbox.answer(self._answer(request, payload, now))
            reply(payload)
            return
        asked = Asked(
            args.get("trigger_id", request.cmd_id),
            args.get("part_id", ""),
            args.get("batch_id", ""),
            args.get("meta", {}),
        )
        try:
            with self._execution.reserve(asked, now) as mine:
                code, why = (Code.BUSY, mine.refusal[1]) if mine.refusal else (Code.ACCEPTED, "")
                payload = self._encode(request, code, why, now, seq=mine.trigger.seq)
                promise = Promise(mine.trigger.id, self._identity.station, pack(mine.trigger))
                self._outbox.answer(self._answer(request, payload, now), promise)
                reply(payload)
        except OverrunError as error:
            self._health.missed()
            reply(self._encode(request, Code.BUSY, str(error), now))

    def _perform(self, request: Request, now: datetime) -> tuple[Code, str]:
        """Do what changes the station, and say how it went."""
        args, mode = request.args, self._execution.mode
        match request.action:
            case Action.START | Action.STOP | Action.ABORT | Action.HALT | Action.RESET as action:
                return self._go_over(action, mode)
            case Action.PREPARE_RECIPE:
                return self._prepare(args.get("recipe"), args.get("index"))
            case Action.ACK_RESULT:
                heard = self._execution.acknowledge(int(args.get("seq", 0)), args.get("id", ""))
                return (Code.DONE, "") if heard else (Code.NOT_FOUND, "no such result waits to be acknowledged")
            case Action.RESET_STATS:
                self._health.counters.reset(now)
                return Code.DONE, ""
            case Action.CHALLENGE:
                quality = self._recipes.current.quality
                if not quality.begin_challenge():
                    return Code.NOT_FOUND, "no challenge test is configured; see [station.challenge]"
                test = quality.report().challenge
                return Code.DONE, test.detail if test else ""
            case Action.TRIGGER | Action.GET_STATE | Action.REPUBLISH:
                raise AssertionError(f"{request.action} is obeyed elsewhere")

    def _go_over(self, action: Action, mode: Mode) -> tuple[Code, str]:
        come_from, to = _TRANSITIONS[action]
        if mode not in come_from:
            wanted = " or ".join(sorted(come_from))
            return Code.WRONG_STATE, f"the station is in {mode}; {action} is for {wanted}"
        if action is Action.ABORT:
            self._execution.abort()
        self._execution.become(to)
        log.info("a command changes what the station does", station=self._identity.station, was=mode, now=to)
        return Code.DONE, ""

    def _prepare(self, name: str | None, index: int | None) -> tuple[Code, str]:
        recipe = self._recipes.find(name, index)
        if recipe is None:
            names = ", ".join(f"{one.identity.recipe_index} {one.name}" for one in self._recipes)
            return Code.NOT_FOUND, f"there is no such recipe; there are {names}"
        if self._execution.mode is Mode.SINGLE:
            return Code.BUSY, "a trigger waits for its part, which the present recipe is for"
        self._outbox.prepare(self._identity.station, recipe.name)
        self._recipes.prepare(recipe)
        log.info("recipe prepared", station=self._identity.station, recipe=recipe.name)
        return Code.DONE, f"{recipe.identity.recipe_index} {recipe.name}"

    def _refuse(
        self, refused: RefusedError, received: Received, send: Callable[[Message], None], now: datetime
    ) -> None:
        log.warning("a command is refused", station=self._identity.station, topic=received.topic, reason=str(refused))
        named = refused.cmd_id, refused.action
        payload = encode_response(self._identity, named, refused.code, str(refused), self._state, now)
        send(response(self._identity, received, payload))

    def _encode(self, request: Request, code: Code, message: str, now: datetime, *, seq: int = 0) -> bytes:
        named = request.cmd_id, request.action.value
        return encode_response(self._identity, named, code, message, self._state, now, seq=seq)

    def _answer(self, request: Request, payload: bytes, now: datetime) -> Answer:
        return Answer(self._identity.station, request.cmd_id, epoch_ms(now), payload)

    @property
    def _state(self) -> str:
        return self._health.state(0).state


_TRANSITIONS = {
    Action.START: ({Mode.READY, Mode.CONTINUOUS}, Mode.CONTINUOUS),
    Action.STOP: ({Mode.READY, Mode.SINGLE, Mode.CONTINUOUS}, Mode.READY),
    Action.ABORT: ({Mode.READY, Mode.SINGLE, Mode.CONTINUOUS}, Mode.READY),
    Action.HALT: (set(Mode), Mode.HALTED),
    Action.RESET: ({Mode.READY, Mode.HALTED}, Mode.READY),
}
"""From which modes a command leads to which: those of OPC 40100-1, and nothing happens where it is so already."""
