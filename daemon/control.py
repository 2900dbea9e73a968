"""Obeys commands: each once, whatever the network repeats, and each answered."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from threading import Thread

import structlog
from ulid import ULID

from daemon.announcements import EventKind, encode_shift
from daemon.contract import Identity, Message
from daemon.execution import Asked, Execution, Mode, OverrunError
from daemon.health import StationHealth
from daemon.messages import Trigger
from daemon.outbox import Answer, Outbox, OutboxError, Promise
from daemon.recipes import Recipe, Recipes
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
    unpack,
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


def unkept(outbox: Outbox, station: str) -> list[Trigger]:
    """The triggers to which an earlier run has promised the numbers that come next.

    A number before them went with that run to a part that nobody triggered. That part, if it comes again, gets another:
    the number is left to a trigger that says nothing.
    """
    promised = {trigger.seq: trigger for trigger in map(unpack, outbox.promises(station))}
    now = datetime.now(UTC)
    numbers = range(outbox.last_seq(station) + 1, max(promised, default=0) + 1)
    return [promised.get(number) or Trigger(str(ULID.from_datetime(now)), number, now, "") for number in numbers]


def standing(outbox: Outbox, station: str, first: Mode, recipes: Recipes) -> Mode:
    """What a station does after a start: what a command has last told it, or else the first mode.

    A station that was halted, by a person in its light barrier perhaps, must not begin again for a restart. One whose
    prepared recipe is gone is halted, for any other would judge by the wrong product.
    """
    prepared = outbox.prepared(station)
    if prepared is not None and prepared != recipes.current.name:
        log.warning(
            "the prepared recipe is not in the configuration any more, so the station is halted; send prepare_recipe, "
            "then reset, and start if it is to judge all that comes",
            station=station,
            prepared=prepared,
        )
        return Mode.HALTED
    told = outbox.mode(station)
    if told is not None and told != first:
        log.warning("a command has told the station what to do, which still holds", station=station, mode=told)
    return first if told is None else Mode(told)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a command will be answered, and what is done once that is on disk.

    It leads `to` a mode, prepares a `recipe`, and closes the shift, where it does. What is `wanted` must be loaded
    first.
    """

    code: Code
    message: str = ""
    do: Callable[[], object] | None = None
    to: Mode | None = None
    recipe: str | None = None
    wanted: Identity | None = None
    closes_shift: bool = False


class _Loading:
    """A recipe that a command wants prepared, on its way into memory in a thread of its own."""

    def __init__(self, recipes: Recipes, wanted: Identity, request: Request, received: Received) -> None:
        self.request = request
        self.received = received
        self.wanted = wanted
        self.recipe: Recipe | None = None
        self.fault = ""
        self._recipes = recipes
        # A load that hangs must not hold up the end of the process.
        self._thread = Thread(target=self._load, name=f"load {wanted.recipe}", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def _load(self) -> None:
        try:
            self.recipe = self._recipes.load(self.wanted.recipe)
        except Exception as error:  # noqa: BLE001 -- the root of a thread; whoever asked is told
            self.fault = str(error)


class Control:
    """What obeys the commands of one station. One thread.

    Args:
        note: takes down that something happened: its kind, subject, detail and user.
    """

    def __init__(
        self,
        identity: Identity,
        execution: Execution,
        recipes: Recipes,
        health: StationHealth,
        outbox: Outbox,
        note: Callable[[EventKind, str, str, str], None],
    ) -> None:
        self._identity = identity
        self._execution = execution
        self._recipes = recipes
        self._health = health
        self._outbox = outbox
        self._note = note
        self._loading: _Loading | None = None

    def obey(self, received: Received, send: Callable[[Message], None]) -> bool:
        """Obey one message on a command's topic, and answer; True if all that is retained is to be published anew."""
        now = datetime.now(UTC)
        astray = None
        try:
            response(self._identity, received, b"")
        except RefusedError as refused:  # an answer may go to the usual place only
            astray, received = str(refused), Received(received.topic, received.payload, received.retained)

        def reply(payload: bytes) -> None:
            send(response(self._identity, received, payload))

        try:
            request = _understand(received, astray)
            self._obey(request, received, reply, now)
        except RefusedError as refused:
            self._refuse(refused, received.topic, reply, now)
            return False
        return request.action is Action.REPUBLISH

    def conclude(self, send: Callable[[Message], None]) -> None:
        """Prepare the recipe that has been loaded meanwhile, if one has, and answer whoever asked for it."""
        loading = self._loading
        if loading is None or not loading.is_over or self._execution.mode is Mode.SINGLE:
            return
        current = self._recipes.find(loading.wanted.recipe, None)
        if loading.recipe is None:
            plan = _Plan(Code.INTERNAL, f"it cannot be loaded, and is not prepared: {loading.fault}")
        elif current != loading.recipe.identity:
            plan = _Plan(Code.NOT_FOUND, "the configuration was changed meanwhile; ask again")
        else:
            plan = self._preparation(loading.recipe)
        with suppress(OutboxError):  # a full disk, say; it is tried again
            self._finish(
                loading.request,
                plan,
                lambda payload: send(response(self._identity, loading.received, payload)),
                datetime.now(UTC),
            )
            self._loading = None

    def _obey(self, request: Request, received: Received, reply: Callable[[bytes], None], now: datetime) -> None:
        try:
            idle = request.action in _IDLE
            known = None if idle else self._outbox.answered(self._identity.station, request.cmd_id, epoch_ms(now))
            if known is not None:
                reply(known)
            elif request.expires_ms is not None and request.expires_ms < epoch_ms(now):
                raise RefusedError(Code.EXPIRED, _EXPIRED, request.cmd_id, request.action.value)
            elif idle:
                reply(self._encode(request, _Plan(Code.DONE), now))
            elif self._loading is not None and self._loading.request.cmd_id == request.cmd_id:
                reply(self._encode(request, _Plan(Code.ACCEPTED, _LOADED), now))
            elif request.action is Action.TRIGGER:
                self._trigger(request, reply, now)
            else:
                plan = self._plan(request)
                if plan.wanted is not None:
                    self._loading = _Loading(self._recipes, plan.wanted, request, received)
                    reply(self._encode(request, plan, now))
                else:
                    self._finish(request, plan, reply, now)
        except OutboxError as error:
            why = f"it cannot be recorded, and so is not obeyed: {error}"
            reply(self._encode(request, _Plan(Code.INTERNAL, why), now))

    def _trigger(self, request: Request, reply: Callable[[bytes], None], now: datetime) -> None:
        mode, args = self._execution.mode, request.args
        if mode not in {Mode.READY, Mode.SINGLE}:
            way = "reset" if mode is Mode.HALTED else "stop"
            why = f"a station in {mode} takes no triggers; send {way} and wait for Ready"
            payload = self._encode(request, _Plan(Code.WRONG_STATE, why), now)
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
                payload = self._encode(request, _Plan(code, why), now, seq=mine.trigger.seq)
                promise = Promise(mine.trigger.id, self._identity.station, pack(mine.trigger))
                self._outbox.answer(self._answer(request, payload, now), promise)
                reply(payload)
        except OverrunError as error:
            self._health.trigger_lost()
            reply(self._encode(request, _Plan(Code.BUSY, str(error)), now))

    def _finish(self, request: Request, plan: _Plan, reply: Callable[[bytes], None], now: datetime) -> None:
        """Do what changes the station, once the answer to it is on disk."""
        payload = self._encode(request, plan, now)
        closing = (now, partial(encode_shift, self._identity, "reset_stats")) if plan.closes_shift else None
        self._outbox.answer(self._answer(request, payload, now), recipe=plan.recipe, mode=plan.to, closing=closing)
        if plan.do is not None:
            plan.do()
        reply(payload)
        if request.action in _AUDITED:
            station = self._identity.station
            log.info("a command", station=station, action=request.action, result=plan.code.name, user=request.user)
            by = f" by {request.user}" if request.user else ""
            detail = f"{plan.code.name}{by}: {plan.message}".removesuffix(": ")
            self._note(EventKind.COMMAND, request.action.value, detail, request.user)

    def _plan(self, request: Request) -> _Plan:
        args, mode = request.args, self._execution.mode
        match request.action:
            case Action.START | Action.STOP | Action.ABORT | Action.HALT | Action.RESET as action:
                return self._go_over(action, mode)
            case Action.PREPARE_RECIPE:
                return self._prepare(args.get("recipe"), args.get("index"))
            case Action.ACK_RESULT:
                waiting = self._execution.waiting(int(args.get("seq", 0)), args.get("id", ""))
                if waiting is None:
                    return _Plan(Code.NOT_FOUND, "no such result waits to be acknowledged")
                return _Plan(Code.DONE, do=partial(self._execution.acknowledge, waiting))
            case Action.RESET_STATS:
                return _Plan(Code.DONE, closes_shift=True)
            case Action.CHALLENGE:
                return self._challenge()
            case Action.TRIGGER | Action.GET_STATE | Action.REPUBLISH:
                raise AssertionError(f"{request.action} is obeyed elsewhere")

    def _go_over(self, action: Action, mode: Mode) -> _Plan:
        come_from, to = _TRANSITIONS[action]
        if mode not in come_from:
            wanted = " or ".join(sorted(come_from))
            return _Plan(Code.WRONG_STATE, f"the station is in {mode}; {action} is for {wanted}")
        if action is Action.STOP and mode is Mode.SINGLE:  # it is ready as soon as the trigger has its part
            return _Plan(Code.DONE)
        abort = action is Action.ABORT
        return _Plan(Code.DONE, do=partial(self._execution.become, to, abort=abort), to=to)

    def _challenge(self) -> _Plan:
        quality = self._recipes.current.quality
        test = quality.report().challenge
        if test is None:
            return _Plan(Code.NOT_FOUND, "no challenge test is configured; see [station.challenge]")
        return _Plan(Code.DONE, f"send all {test.expected} parts of the set", quality.begin_challenge)

    def _prepare(self, name: str | None, index: int | None) -> _Plan:
        wanted = self._recipes.find(name, index)
        if wanted is None:
            names = ", ".join(f"{one.recipe_index} {one.recipe}" for one in self._recipes.identities)
            return _Plan(Code.NOT_FOUND, f"there is no such recipe; there are {names}")
        if self._loading is not None:
            return _Plan(Code.BUSY, f"{self._loading.wanted.recipe} is being loaded")
        if self._execution.mode is Mode.SINGLE:
            return _Plan(Code.BUSY, "a trigger waits for its part, which the present recipe is for")
        recipe = self._recipes.loaded(wanted.recipe)
        return _Plan(Code.ACCEPTED, _LOADED, wanted=wanted) if recipe is None else self._preparation(recipe)

    def _preparation(self, recipe: Recipe) -> _Plan:
        prepared = f"{recipe.identity.recipe_index} {recipe.name}"
        return _Plan(Code.DONE, prepared, partial(self._recipes.prepare, recipe), recipe=recipe.name)

    def _refuse(self, refused: RefusedError, topic: str, reply: Callable[[bytes], None], now: datetime) -> None:
        log.warning("a command is refused", station=self._identity.station, topic=topic, reason=str(refused))
        named = refused.cmd_id, refused.action
        reply(encode_response(self._identity, named, refused.code, str(refused), self._state, now))

    def _encode(self, request: Request, plan: _Plan, now: datetime, *, seq: int = 0) -> bytes:
        named, state = (request.cmd_id, request.action.value), self._state
        if plan.to is not None and state in list(Mode):
            state = plan.to.value
        return encode_response(self._identity, named, plan.code, plan.message, state, now, seq=seq)

    def _answer(self, request: Request, payload: bytes, now: datetime) -> Answer:
        return Answer(self._identity.station, request.cmd_id, epoch_ms(now), payload)

    @property
    def _state(self) -> str:
        return self._health.state(0).state


def _understand(received: Received, astray: str | None) -> Request:
    request = parse(received)
    if astray is not None:
        raise RefusedError(Code.BAD_ARGS, astray, request.cmd_id, request.action.value)
    return request


_LOADED = "its model is being loaded; DONE follows, and until then the recipe that was prepared goes on"
_EXPIRED = "it came after its expires_ms; compare the clocks of both machines"
_TRANSITIONS = {
    Action.START: ({Mode.READY, Mode.CONTINUOUS}, Mode.CONTINUOUS),
    Action.STOP: ({Mode.READY, Mode.SINGLE, Mode.CONTINUOUS}, Mode.READY),
    Action.ABORT: ({Mode.READY, Mode.SINGLE, Mode.CONTINUOUS}, Mode.READY),
    Action.HALT: (set(Mode), Mode.HALTED),
    Action.RESET: ({Mode.READY, Mode.HALTED}, Mode.READY),
}
"""From which modes a command leads to which: those of OPC 40100-1, and nothing happens where it is so already."""
