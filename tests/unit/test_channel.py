"""A channel hands over in order, holds up or lets go when it is full, and ends by being closed."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import chain
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daemon.channel import Channel, ClosedError, Lanes, Overflow

DEADLINE_S = 20.0
CAPACITY = 3

T = TypeVar("T")


def start(work: Callable[..., T], *given: Any) -> Future[T]:
    """Do something in a thread that a failing test may leave waiting."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work(*given))
        except ClosedError as refusal:
            done.set_exception(refusal)

    threading.Thread(target=run, daemon=True).start()
    return done


def test_what_was_put_comes_out_in_order_in_batches_up_to_the_limit() -> None:
    channel = Channel[int](10, Overflow.WAIT)
    for number in range(5):
        channel.put(number)
    channel.close()
    assert list(channel.batches(2)) == [[0, 1], [2, 3], [4]]


def test_a_taker_whose_patience_is_over_gets_an_empty_batch_and_later_what_was_put() -> None:
    lanes = Lanes[int](["a"], 10)
    patience = [0.01, 0.0, None]
    batches = lanes.batches(2, lambda: patience.pop(0) if patience else None)
    assert next(batches) == next(batches) == []
    lanes.put("a", 1)
    assert next(batches) == [1]
    lanes.close()
    assert list(batches) == []


def test_a_full_channel_holds_the_giver_up_until_something_is_taken() -> None:
    channel = Channel[int](2, Overflow.WAIT)
    channel.put(1)
    channel.put(2)
    giver = start(channel.put, 3)
    with pytest.raises(TimeoutError):
        giver.result(0.1)
    batches = channel.batches(1)
    assert next(batches) == [1]
    giver.result(DEADLINE_S)
    channel.close()
    assert list(batches) == [[2], [3]]
    assert channel.dropped == 0


def test_a_full_channel_that_may_drop_lets_go_of_the_oldest_and_counts() -> None:
    channel = Channel[int](2, Overflow.DROP_OLDEST)
    for number in range(5):
        channel.put(number)
    channel.close()
    assert list(channel.batches(9)) == [[3, 4]]
    assert channel.dropped == 3


def test_a_waiting_taker_wakes_when_something_is_put() -> None:
    channel = Channel[int](2, Overflow.WAIT)
    taker = start(lambda: next(channel.batches(2)))
    with pytest.raises(TimeoutError):
        taker.result(0.1)
    channel.put(7)
    assert taker.result(DEADLINE_S) == [7]


def test_closing_wakes_a_waiting_taker_who_then_ends() -> None:
    channel = Channel[int](2, Overflow.WAIT)
    taker = start(lambda: list(channel.batches(2)))
    with pytest.raises(TimeoutError):
        taker.result(0.1)
    channel.close()
    assert taker.result(DEADLINE_S) == []


def test_closing_wakes_a_held_up_giver_who_is_refused_while_what_was_put_is_still_taken() -> None:
    channel = Channel[int](1, Overflow.WAIT)
    channel.put(1)
    giver = start(channel.put, 2)
    with pytest.raises(TimeoutError):
        giver.result(0.1)
    channel.close()
    with pytest.raises(ClosedError):
        giver.result(DEADLINE_S)
    assert list(channel.batches(2)) == [[1]]


@pytest.mark.parametrize("overflow", Overflow)
def test_a_closed_channel_takes_nothing_and_may_be_closed_again(overflow: Overflow) -> None:
    channel = Channel[int](1, overflow)
    channel.close()
    channel.close()
    with pytest.raises(ClosedError):
        channel.put(1)
    assert list(channel.batches(1)) == []


def test_many_givers_lose_nothing_and_each_keeps_its_order() -> None:
    channel = Channel[tuple[int, int]](4, Overflow.WAIT)
    together = threading.Barrier(8)

    def give(giver: int) -> None:
        together.wait(DEADLINE_S)
        for number in range(200):
            channel.put((giver, number))

    taker = start(lambda: list(channel.batches(3)))
    for done in [start(give, giver) for giver in range(8)]:
        done.result(DEADLINE_S)
    channel.close()
    taken = list(chain.from_iterable(taker.result(DEADLINE_S)))
    for giver in range(8):
        assert [number for who, number in taken if who == giver] == list(range(200))
    assert len(taken) == 1600


def test_many_givers_who_may_drop_account_for_everything() -> None:
    channel = Channel[int](4, Overflow.DROP_OLDEST)

    def give() -> None:
        for number in range(500):
            channel.put(number)

    taker = start(lambda: list(channel.batches(3)))
    for done in [start(give) for _ in range(4)]:
        done.result(DEADLINE_S)
    channel.close()
    assert sum(map(len, taker.result(DEADLINE_S))) + channel.dropped == 2000


class ChannelAgainstAList(RuleBasedStateMachine):
    """One thread puts, takes and closes at will; a deque says what should come out."""

    overflow = Overflow.DROP_OLDEST

    def __init__(self) -> None:
        super().__init__()
        self.channel = Channel[int](CAPACITY, self.overflow)
        self.expected: deque[int] = deque()
        self.dropped = 0
        self.closed = False

    @property
    def room(self) -> bool:
        return len(self.expected) < CAPACITY

    @precondition(lambda self: self.closed or self.room or self.overflow is Overflow.DROP_OLDEST)
    @rule(item=st.integers())
    def put(self, item: int) -> None:
        if self.closed:
            with pytest.raises(ClosedError):
                self.channel.put(item)
            return
        self.channel.put(item)
        if not self.room:
            self.expected.popleft()
            self.dropped += 1
        self.expected.append(item)

    @precondition(lambda self: self.closed or self.expected)
    @rule(limit=st.integers(1, CAPACITY + 1))
    def take(self, limit: int) -> None:
        taken = [self.expected.popleft() for _ in range(min(limit, len(self.expected)))]
        assert next(self.channel.batches(limit), []) == taken

    @rule()
    def close(self) -> None:
        self.channel.close()
        self.closed = True

    @invariant()
    def drops_are_counted(self) -> None:
        assert self.channel.dropped == self.dropped


class WaitingChannelAgainstAList(ChannelAgainstAList):
    """The same with a channel that would hold the giver up, which this never lets happen."""

    overflow = Overflow.WAIT


TestChannelAgainstAList = ChannelAgainstAList.TestCase
TestWaitingChannelAgainstAList = WaitingChannelAgainstAList.TestCase
TestChannelAgainstAList.settings = settings(deadline=None, max_examples=60, stateful_step_count=20)
TestWaitingChannelAgainstAList.settings = TestChannelAgainstAList.settings
