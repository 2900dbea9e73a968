"""What a station does and may do next: the states of OPC 40100-1, and triggers that wait for their parts."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from threading import Condition

from ulid import ULID

from daemon.messages import Capture, Clock, Frame, Reason, Scalar, Trigger, Unreadable

UNACKNOWLEDGED = 8
"""Results that may wait to be acknowledged, as on the common smart cameras."""
WAITING = 64
"""Triggers that may be without a verdict, those that came while busy among them."""
_GRAIN = timedelta(milliseconds=20)
"""File systems stamp a file up to a few ticks of the kernel's clock early."""

_BUSY = "the part of an earlier trigger has not come yet"
_UNHEARD = f"{UNACKNOWLEDGED} results are not acknowledged"
_AGES_AGO = "the daemon ended before the part came"


class Mode(StrEnum):
    """What a station does, by its OPC 40100-1 name."""

    HALTED = "Halted"
    READY = "Ready"
    SINGLE = "SingleExecution"
    CONTINUOUS = "ContinuousExecution"


class OverrunError(Exception):
    """A trigger that not even gets a verdict: too many are without one."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a trigger says of its part; "" and nothing where it says nothing."""

    trigger_id: str
    part_id: str = ""
    batch_id: str = ""
    meta: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(slots=True)
class Reservation:
    """A trigger that waits for its part, or for its turn to be refused, for which `refusal` has the reason in words."""

    trigger: Trigger
    refusal: tuple[Reason, str] | None = None
    deadline: float | None = None


class Execution:
    """The mode of one station, its triggers in their order, and the results that wait to be acknowledged.

    A trigger is promised the number of its verdict before its part comes. So while one waits, parts that nobody
    triggered are held back, and all take their numbers in the order in which `admit` has let them in.

    Any thread may call; one reserves, one admits, one numbers.

    Args:
        station: its name.
        mode: the first mode.
        last_seq: number of the last verdict on disk.
        timeout_s: how long a trigger waits for its part.
        acknowledged: whether results of triggers must be acknowledged.
        aborted: triggers to which an earlier run has promised the next numbers; they are refused.
    """

    def __init__(
        self,
        station: str,
        mode: Mode,
        last_seq: int,
        *,
        timeout_s: float = 5.0,
        acknowledged: bool = False,
        aborted: Sequence[Trigger] = (),
    ) -> None:
        self._station = station
        self._mode = mode
        self._given = last_seq
        self._timeout_s = timeout_s
        self._acknowledged = acknowledged
        self._waiting = deque(Reservation(trigger, (Reason.ABORTED, _AGES_AGO), 0.0) for trigger in aborted)
        self._promised = last_seq + len(aborted)
        self._held: list[Frame | Unreadable] = []
        self._admitted = 0
        self._unheard: dict[int, str] = {}
        self._changed = Condition()

    @property
    def mode(self) -> Mode:
        """The mode now. A station is ready again when a trigger has its part, before that has its verdict."""
        with self._changed:
            return Mode.SINGLE if self._mode is Mode.READY and self._waiting else self._mode

    @property
    def unacknowledged(self) -> int:
        """How many results wait to be acknowledged."""
        return len(self._unheard)

    def wanted(self, wait_s: float = 0.0) -> bool:
        """Whether parts are to be judged; waits up to `wait_s` seconds for that. Satisfies `sources.base.Demand`."""
        with self._changed:
            return self._changed.wait_for(self._wants, wait_s)

    @property
    def since(self) -> datetime | None:
        """When the trigger that waits for its part came, less what clocks may differ by; None where all are wanted."""
        with self._changed:
            capturing = [one.trigger.at for one in self._waiting if one.refusal is None and one.deadline is not None]
            return None if self._mode is Mode.CONTINUOUS or not capturing else capturing[0] - _GRAIN

    def become(self, mode: Mode, *, abort: bool = False) -> None:
        """Go over to another mode; out of Ready, triggers that wait for their parts are refused.

        With `abort` they are in any case, and no acknowledgement is waited for any more.
        """
        with self._changed:
            if abort or mode is not Mode.READY:
                why = "aborted by command" if abort else f"the station went over to {mode}"
                for waiting in self._waiting:
                    waiting.refusal = waiting.refusal or (Reason.ABORTED, why)
            if abort:
                self._unheard.clear()
            self._mode = mode
            self._changed.notify_all()

    @contextmanager
    def reserve(self, asked: Asked, now: datetime) -> Iterator[Reservation]:
        """Promise a trigger its verdict's number. It takes effect at the end of the context, and not if that raises.

        Raises:
            OverrunError: too many are without a verdict; nothing is promised.
        """
        with self._changed:
            if len(self._waiting) >= WAITING:
                raise OverrunError(f"{WAITING} triggers are without a verdict")
            capturing = any(earlier.refusal is None for earlier in self._waiting)
            unheard = len(self._unheard) >= UNACKNOWLEDGED
            seq = self._given + self._admitted + len(self._waiting) + 1
            trigger = Trigger(
                str(ULID.from_datetime(now)), seq, now, asked.trigger_id, asked.part_id, asked.batch_id, asked.meta
            )
            why = _BUSY if capturing else _UNHEARD
            mine = Reservation(trigger, (Reason.TRIGGER_WHILE_BUSY, why) if capturing or unheard else None)
            self._waiting.append(mine)
        try:
            yield mine
        except BaseException:
            with self._changed:
                self._waiting.remove(mine)
            raise
        with self._changed:
            self._promised = seq
            mine.deadline = time.monotonic() + self._timeout_s
            self._changed.notify_all()

    def admit(self, item: Frame | Unreadable | None) -> list[Frame | Unreadable]:
        """Which parts go on now, in order, given the next that came from the source or None; each is numbered once.

        A part that came before the trigger was received is not the trigger's. It is let in after it. A halted station
        lets none in but those that answer for triggers.
        """
        with self._changed:
            if item is not None:
                self._held.append(item)
            admitted: list[Frame | Unreadable] = []
            while self._waiting and (mine := self._waiting[0]).deadline is not None:
                refusal = mine.refusal
                answer = None if refusal else self._answer(mine.trigger)
                if answer is None and refusal is None and time.monotonic() > mine.deadline:
                    refusal = (Reason.ACQUISITION_TIMEOUT, f"no part came within {self._timeout_s:g} s of its trigger")
                if refusal is not None:
                    answer = self._refuse(mine.trigger, *refusal)
                if answer is None:
                    break
                self._waiting.popleft()
                admitted.append(answer)
                if self._acknowledged and (refusal is None or refusal[0] is Reason.ACQUISITION_TIMEOUT):
                    self._unheard[mine.trigger.seq] = answer.capture.id
            if not self._waiting and self._mode is not Mode.HALTED:
                admitted += self._held
                self._held = []
            self._admitted += len(admitted)
            return admitted

    @contextmanager
    def losing(self) -> Iterator[bool]:
        """Whether an admitted part may be let go of now: no promised number counts it, and within none is promised."""
        with self._changed:
            yield not self._waiting and self._promised <= self._given

    def lose(self) -> None:
        """An admitted part that nobody triggered was let go of without a verdict, while `losing`."""
        with self._changed:
            self._admitted -= 1

    def number(self, item: Frame | Unreadable) -> int:
        """The number of an admitted part's verdict, in the order of admission.

        Raises:
            AssertionError: it is not the number that was promised.
        """
        with self._changed:
            self._admitted -= 1
            self._given += 1
            trigger = item.capture.trigger
            if trigger is not None and trigger.seq != self._given:
                raise AssertionError(f"{self._station} promised {trigger.seq} to {trigger}, not {self._given}")
            return self._given

    def waiting(self, seq: int = 0, capture_id: str = "") -> int | None:
        """The number of the result of that number or id, if it waits to be acknowledged."""
        with self._changed:
            return next((one for one, its_id in self._unheard.items() if one == seq or its_id == capture_id), None)

    def acknowledge(self, seq: int) -> None:
        """The result of this number has been heard."""
        with self._changed:
            self._unheard.pop(seq, None)

    def _wants(self) -> bool:
        capturing = any(one.refusal is None and one.deadline is not None for one in self._waiting)
        return self._mode is Mode.CONTINUOUS or capturing

    def _answer(self, trigger: Trigger) -> Frame | Unreadable | None:
        """Take the first part that came since the trigger, with what the trigger says of it."""
        for place, item in enumerate(self._held):
            if item.capture.arrived_at >= trigger.at - _GRAIN:
                del self._held[place]
                capture = replace(
                    item.capture,
                    part_id=trigger.part_id or item.capture.part_id,
                    batch_id=trigger.batch_id or item.capture.batch_id,
                    meta={**trigger.meta, **item.capture.meta, **trigger.meta},  # of too much the first keys are kept
                    trigger=trigger,
                )
                return replace(item, capture=capture)
        return None

    def _refuse(self, trigger: Trigger, cause: Reason, why: str) -> Unreadable:
        capture = Capture(
            id=trigger.id,
            station=self._station,
            part_id=trigger.part_id,
            captured_at=trigger.at,
            arrived_at=datetime.now(UTC),  # the gate is told: it waits for this trigger's answer
            seen_at=time.monotonic(),
            origin="",
            clock=Clock.HOST_ARRIVAL,
            batch_id=trigger.batch_id,
            meta=trigger.meta,
            trigger=trigger,
        )
        return Unreadable(capture, why, cause)
