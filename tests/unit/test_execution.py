"""A station's modes, its triggers and the numbers that they were promised, whatever comes in between."""

import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daemon.execution import UNACKNOWLEDGED, WAITING, Asked, Execution, Mode, OverrunError, Reservation
from daemon.messages import Capture, Frame, Reason, Trigger, Unreadable

IMAGE = np.zeros((2, 2, 3), np.uint8)
FOR_EVER = 36_000.0
BEFORE = timedelta(seconds=-1)
AFTER = timedelta(seconds=1)


class LostError(Exception):
    """Whatever keeps a promise from being kept on disk."""


def part(name: str, at: datetime, **more: object) -> Frame:
    capture = Capture(name, "top", name, at, at, time.monotonic(), f"/in/{name}.png")
    return Frame(replace(capture, **more), IMAGE)  # type: ignore[arg-type]


def ready(**options: object) -> Execution:
    return Execution("top", Mode.READY, 0, **{"timeout_s": FOR_EVER, **options})  # type: ignore[arg-type]


def reserve(execution: Execution, trigger_id: str = "T", **said: object) -> Reservation:
    with execution.reserve(Asked(trigger_id, **said), datetime.now(UTC)) as mine:  # type: ignore[arg-type]
        return mine


def causes(items: list[Frame | Unreadable]) -> list[Reason | None]:
    """Why each has no pixels; None if it has."""
    return [item.cause if isinstance(item, Unreadable) else None for item in items]


def promised(items: list[Frame | Unreadable]) -> list[int]:
    """What the trigger of each was promised; 0 without a trigger."""
    return [item.capture.trigger.seq if item.capture.trigger else 0 for item in items]


def test_a_part_carries_what_its_trigger_says_of_it_and_else_what_its_source_says() -> None:
    execution = ready()
    at = datetime.now(UTC)
    reserve(execution, "T1", part_id="SN-1", batch_id="B-1", meta={"a": 1, "oven": "north"})
    (told,) = execution.admit(part("file7", at + AFTER, batch_id="B-0", meta={"a": 0, "lens": 4}))
    capture = told.capture
    assert (capture.id, capture.part_id, capture.batch_id) == ("file7", "SN-1", "B-1")
    assert list(capture.meta.items()) == [("a", 1), ("oven", "north"), ("lens", 4)]
    assert capture.trigger is not None
    assert (capture.trigger.trigger_id, capture.trigger.seq) == ("T1", 1)
    assert execution.number(told) == 1
    reserve(execution, "T2")
    (plain,) = execution.admit(part("file8", at + AFTER, batch_id="B-0", meta={"lens": 4}))
    assert (plain.capture.part_id, plain.capture.batch_id, plain.capture.meta) == ("file8", "B-0", {"lens": 4})
    assert execution.number(plain) == 2


def test_a_part_that_came_before_the_trigger_is_judged_after_it_and_without_it() -> None:
    execution = ready()
    reserve(execution)
    at = datetime.now(UTC)
    assert execution.admit(part("old", at + BEFORE)) == []
    assert execution.admit(None) == []
    mine, old = execution.admit(part("new", at + AFTER))
    assert [mine.capture.id, old.capture.id] == ["new", "old"]
    assert promised([mine, old]) == [1, 0]
    assert [execution.number(mine), execution.number(old)] == [1, 2]
    assert execution.mode is Mode.READY


def test_a_trigger_without_a_part_ends_in_time_with_all_that_it_said() -> None:
    execution = ready(timeout_s=0.0)
    reserve(execution, "T1", part_id="SN-1", batch_id="B-1", meta={"a": 1})
    time.sleep(0.001)
    (answer,) = execution.admit(None)
    assert causes([answer]) == [Reason.ACQUISITION_TIMEOUT]
    capture, trigger = answer.capture, answer.capture.trigger
    assert trigger is not None
    assert (capture.part_id, capture.batch_id, capture.meta) == ("SN-1", "B-1", {"a": 1})
    assert (trigger.trigger_id, capture.id) == ("T1", trigger.id)
    assert execution.number(answer) == 1


def test_a_part_that_is_there_when_the_time_is_over_is_the_triggers_all_the_same() -> None:
    execution = ready(timeout_s=0.0)
    reserve(execution)
    time.sleep(0.001)
    assert causes(execution.admit(part("new", datetime.now(UTC)))) == [None]


def test_while_one_trigger_waits_others_are_refused_in_their_turn_with_their_own_numbers() -> None:
    execution = ready()
    first, second, third = reserve(execution, "T1"), reserve(execution, "T2"), reserve(execution, "T3")
    assert [one.trigger.seq for one in (first, second, third)] == [1, 2, 3]
    assert [one.refusal is None for one in (first, second, third)] == [True, False, False]
    assert execution.admit(None) == []
    admitted = execution.admit(part("new", datetime.now(UTC)))
    assert causes(admitted) == [None, Reason.TRIGGER_WHILE_BUSY, Reason.TRIGGER_WHILE_BUSY]
    assert promised(admitted) == [1, 2, 3]
    assert [execution.number(item) for item in admitted] == [1, 2, 3]


def test_a_station_is_ready_again_when_a_trigger_has_its_part_though_it_is_not_numbered_yet() -> None:
    execution = ready()
    reserve(execution)
    assert execution.mode.value == "SingleExecution"
    (first,) = execution.admit(part("one", datetime.now(UTC)))
    assert execution.mode is Mode.READY
    second = reserve(execution)
    assert (second.trigger.seq, second.refusal) == (2, None)
    (also,) = execution.admit(part("two", datetime.now(UTC)))
    assert [execution.number(first), execution.number(also)] == [1, 2]


def test_a_promise_that_could_not_be_kept_was_never_made() -> None:
    execution = ready()
    with suppress(LostError), execution.reserve(Asked("T1"), datetime.now(UTC)):
        assert execution.admit(part("early", datetime.now(UTC))) == []
        raise LostError
    assert execution.mode is Mode.READY
    assert not execution.wanted()
    admitted = execution.admit(None)
    assert [item.capture.id for item in admitted] == ["early"]
    assert promised(admitted) == [0]
    assert reserve(execution).trigger.seq == 2


def test_no_part_is_wanted_before_a_trigger_is_on_disk_and_one_that_waits_is_woken_then() -> None:
    execution = ready()
    seen = Event()
    waiting = Thread(target=lambda: seen.set() if execution.wanted(60.0) else None)
    waiting.start()
    with execution.reserve(Asked("T"), datetime.now(UTC)):
        assert not execution.wanted()
        assert not seen.is_set()
    waiting.join(30)
    assert seen.is_set()
    assert execution.wanted()


def test_in_continuous_execution_parts_are_wanted_always_and_halted_never() -> None:
    execution = Execution("top", Mode.CONTINUOUS, 41)
    assert execution.wanted()
    (item,) = execution.admit(part("a", datetime.now(UTC)))
    assert execution.number(item) == 42
    execution.become(Mode.HALTED)
    assert not execution.wanted()
    assert execution.admit(part("read before", datetime.now(UTC))) == []
    execution.become(Mode.READY)
    assert [execution.number(item) for item in execution.admit(None)] == [43]


@pytest.mark.parametrize(("mode", "abort"), [(Mode.HALTED, False), (Mode.CONTINUOUS, False), (Mode.READY, True)])
def test_triggers_that_wait_are_aborted_and_keep_their_numbers(mode: Mode, *, abort: bool) -> None:
    execution = ready()
    reserve(execution, "T1")
    reserve(execution, "T2")
    execution.admit(part("old", datetime.now(UTC) + BEFORE))
    execution.become(mode, abort=abort)
    admitted = execution.admit(None)
    old = [] if mode is Mode.HALTED else [None]
    assert causes(admitted) == [Reason.ABORTED, Reason.TRIGGER_WHILE_BUSY, *old]
    assert promised(admitted) == [1, 2, 0][: len(admitted)]
    assert [execution.number(item) for item in admitted] == [1, 2, 3][: len(admitted)]
    assert execution.mode is mode


def test_a_station_that_stops_waits_on_for_the_part_of_its_trigger() -> None:
    execution = ready()
    reserve(execution)
    execution.become(Mode.READY)
    assert execution.mode is Mode.SINGLE
    assert causes(execution.admit(part("new", datetime.now(UTC)))) == [None]


def test_what_an_earlier_run_has_promised_is_refused_before_anything_else() -> None:
    at = datetime.now(UTC)
    left = [Trigger(f"{n:026d}", n, at, f"T{n}", part_id=f"SN-{n}") for n in (8, 9)]
    execution = Execution("top", Mode.CONTINUOUS, 7, aborted=left)
    admitted = execution.admit(part("a", at))
    assert causes(admitted) == [Reason.ABORTED, Reason.ABORTED, None]
    assert [execution.number(item) for item in admitted] == [8, 9, 10]
    assert [item.capture.part_id for item in admitted] == ["SN-8", "SN-9", "a"]


def test_too_many_triggers_without_a_verdict_are_not_even_promised_one() -> None:
    execution = ready()
    for _ in range(WAITING):
        reserve(execution)
    with pytest.raises(OverrunError, match=str(WAITING)):
        reserve(execution)
    admitted = execution.admit(part("new", datetime.now(UTC)))
    assert promised(admitted) == list(range(1, WAITING + 1))
    assert reserve(execution).trigger.seq == WAITING + 1


# Acknowledgement


def judge_one(execution: Execution, name: str) -> Frame | Unreadable:
    assert reserve(execution).refusal is None
    (item,) = execution.admit(part(name, datetime.now(UTC)))
    execution.number(item)
    return item


def test_eight_results_that_nobody_acknowledged_are_enough() -> None:
    execution = ready(acknowledged=True)
    for n in range(UNACKNOWLEDGED):
        judge_one(execution, f"part{n}")
    assert execution.unacknowledged == UNACKNOWLEDGED
    over = reserve(execution)
    assert over.refusal is not None
    (refused,) = execution.admit(part("extra", datetime.now(UTC)))[:1]
    assert causes([refused]) == [Reason.TRIGGER_WHILE_BUSY]
    assert execution.unacknowledged == UNACKNOWLEDGED  # a refusal waits for no acknowledgement


def test_a_result_is_acknowledged_once_by_its_number_or_its_id() -> None:
    execution = ready(acknowledged=True)
    judge_one(execution, "one")
    judge_one(execution, "two")
    assert execution.waiting(seq=3) is None
    assert execution.waiting(capture_id="three") is None
    assert execution.waiting(capture_id="two") == 2
    execution.acknowledge(2)
    assert execution.waiting(seq=2) is None
    assert execution.waiting(seq=1) == 1
    execution.acknowledge(1)
    execution.acknowledge(1)
    assert execution.unacknowledged == 0


def test_results_count_from_when_their_trigger_has_its_part_however_long_judging_takes() -> None:
    execution = ready(acknowledged=True)
    for n in range(UNACKNOWLEDGED):
        assert reserve(execution).refusal is None
        execution.admit(part(f"part{n}", datetime.now(UTC)))
    assert execution.unacknowledged == UNACKNOWLEDGED
    assert reserve(execution).refusal is not None


def test_parts_that_nobody_triggered_take_no_place_of_results_to_be_acknowledged() -> None:
    execution = ready(acknowledged=True)
    execution.become(Mode.CONTINUOUS)
    for n in range(UNACKNOWLEDGED):
        execution.admit(part(f"part{n}", datetime.now(UTC)))
    execution.become(Mode.READY)
    assert execution.unacknowledged == 0
    assert reserve(execution).refusal is None


def test_after_an_abort_no_acknowledgement_is_waited_for() -> None:
    execution = ready(acknowledged=True)
    judge_one(execution, "one")
    reserve(execution)
    execution.become(Mode.READY, abort=True)
    assert execution.unacknowledged == 0
    assert causes(execution.admit(None)) == [Reason.ABORTED]
    assert execution.unacknowledged == 0


def test_without_acknowledgement_no_result_waits_for_it() -> None:
    execution = ready()
    for n in range(UNACKNOWLEDGED + 1):
        judge_one(execution, f"part{n}")
    assert execution.unacknowledged == 0


# Any order


class AnyOrder(RuleBasedStateMachine):
    """One reserves, one admits, one numbers; between their calls anything may happen."""

    def __init__(self) -> None:
        super().__init__()
        self.execution = ready()
        self.promised: dict[str, int] = {}
        self.answered: list[str] = []
        self.admitted: list[Frame | Unreadable] = []
        self.came: list[str] = []
        self.gone: list[str] = []
        self.lost: list[str] = []
        self.numbers: list[int] = []
        self.open: tuple[ExitStack, Reservation] | None = None
        self.mode = Mode.READY

    @rule(at=st.sampled_from([BEFORE, AFTER, None]))
    def admit(self, at: timedelta | None) -> None:
        item = None
        if at is not None:
            item = part(f"part{len(self.came)}", datetime.now(UTC) + at)
            self.came.append(item.capture.id)
        self.admitted += self.execution.admit(item)

    @precondition(lambda self: self.open is None and self.mode is Mode.READY)
    @rule()
    def begin(self) -> None:
        stack = ExitStack()
        try:
            context = self.execution.reserve(Asked(f"T{len(self.promised)}"), datetime.now(UTC))
            self.open = stack, stack.enter_context(context)
        except OverrunError:
            pass

    @precondition(lambda self: self.open is not None)
    @rule(fails=st.booleans())
    def end(self, *, fails: bool) -> None:
        assert self.open is not None
        stack, mine = self.open
        self.open = None
        if fails:
            with suppress(LostError), stack:
                raise LostError
        else:
            stack.close()
            self.promised[mine.trigger.id] = mine.trigger.seq

    @precondition(lambda self: self.open is None)
    @rule(mode=st.sampled_from([Mode.READY, Mode.HALTED, Mode.CONTINUOUS]), abort=st.booleans())
    def become(self, mode: Mode, *, abort: bool) -> None:
        self.mode = mode
        self.execution.become(mode, abort=abort)

    @precondition(lambda self: self.admitted)
    @rule(count=st.integers(1, 4))
    def number(self, count: int) -> None:
        for item in self.admitted[:count]:
            seq = self.execution.number(item)
            self.numbers.append(seq)
            trigger = item.capture.trigger
            if trigger is None:
                self.gone.append(item.capture.id)
            else:
                assert self.promised[trigger.id] == seq
                self.answered.append(trigger.id)
                if isinstance(item, Frame):
                    assert item.capture.arrived_at >= trigger.at - timedelta(milliseconds=20)
                    self.gone.append(item.capture.id)
        del self.admitted[:count]

    @precondition(lambda self: self.admitted)
    @rule()
    def lose(self) -> None:
        with self.execution.losing() as may:
            loser = next((item for item in self.admitted if not item.capture.trigger), None)
            if may and loser is not None:
                self.admitted = [item for item in self.admitted if item is not loser]
                self.execution.lose()
                self.lost.append(loser.capture.id)

    @invariant()
    def numbers_have_no_gap(self) -> None:
        assert self.numbers == list(range(1, len(self.numbers) + 1))

    @invariant()
    def each_part_and_each_trigger_is_concluded_once(self) -> None:
        assert len(set(self.gone)) == len(self.gone)
        assert len(set(self.answered)) == len(self.answered)
        assert set(self.gone) <= set(self.came)

    @invariant()
    def parts_are_wanted_by_a_trigger_or_in_continuous_execution(self) -> None:
        if self.mode is Mode.CONTINUOUS:
            assert self.execution.wanted()
        elif self.execution.mode is not Mode.SINGLE:
            assert not self.execution.wanted()

    def teardown(self) -> None:
        """Whatever went before, in the end every promise is kept and no part is left over."""
        if self.open is not None:
            self.end(fails=False)
        self.execution.become(Mode.HALTED)
        self.admitted += self.execution.admit(None)
        self.execution.become(Mode.READY)
        self.admitted += self.execution.admit(None)
        if self.admitted:
            self.number(len(self.admitted))
        assert set(self.answered) == set(self.promised)
        assert sorted(self.gone + self.lost) == sorted(self.came)
        self.numbers_have_no_gap()
        assert self.execution.admit(None) == []


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_a_halted_station_lets_in_no_part_that_was_held_beside_a_trigger_until_it_is_reset() -> None:
    execution = ready()
    reserve(execution)
    assert execution.admit(part("old", datetime.now(UTC) + BEFORE)) == []
    execution.become(Mode.HALTED)
    (answer,) = execution.admit(None)
    assert causes([answer]) == [Reason.ABORTED]
    assert execution.admit(None) == []
    execution.become(Mode.READY)
    (old,) = execution.admit(None)
    assert (execution.number(answer), execution.number(old)) == (1, 2)
