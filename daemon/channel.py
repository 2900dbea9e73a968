"""Bounded, closable hand-overs between threads. Closing is how work ends: what was put is still taken."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum, auto
from threading import Condition
from typing import Generic, TypeVar

from daemon.pulse import BEAT_S, Beat, unwatched

T = TypeVar("T")


class Overflow(Enum):
    """What a full lane does: hold the giver up, let go of the oldest, or take what is light all the same."""

    WAIT = auto()
    DROP_OLDEST = auto()
    EXCEED = auto()


_EXCESS = 250
"""So many times its capacity a lane takes of what is light."""


class ClosedError(Exception):
    """Nothing can be put here any more."""


class Lanes(Generic[T]):
    """Several lanes to one taker, who takes from each in turn: a full lane delays no other. Any thread may put.

    Args:
        names: of the lanes.
        capacity: what each of them holds.
        keeps: of what a full lane never lets go.
    """

    def __init__(self, names: Iterable[str], capacity: int, keeps: Callable[[T], bool] = lambda _: False) -> None:
        self._capacity = capacity
        self._keeps = keeps
        self._lanes: dict[str, deque[T]] = {name: deque() for name in names}
        self._turns = deque(self._lanes)
        self._changed = Condition()
        self._closed = False

    def put(self, name: str, item: T, overflow: Overflow = Overflow.WAIT, beat: Beat = unwatched) -> T | None:
        """Hand over one thing; give back what was let go of for it.

        Raises:
            ClosedError: the lanes are closed, also while waiting for room.
        """
        lane, dropped = self._lanes[name], None
        with self._changed:
            loser = None
            if overflow is Overflow.DROP_OLDEST and len(lane) >= self._capacity:
                loser = next((place for place, waiting in enumerate(lane) if not self._keeps(waiting)), None)
            capacity = _EXCESS * self._capacity if overflow is Overflow.EXCEED else self._capacity
            if loser is None:
                self._wait(lambda: self._closed or len(lane) < capacity, None, beat)
            if self._closed:
                raise ClosedError
            if loser is not None:
                dropped = lane[loser]
                del lane[loser]
            lane.append(item)
            self._changed.notify_all()
        return dropped

    def full(self, name: str) -> bool:
        """Whether a lane holds as much as it may."""
        return len(self._lanes[name]) >= self._capacity

    def batches(
        self, limit: int, patience_s: Callable[[], float | None] = lambda: None, beat: Beat = unwatched
    ) -> Iterator[list[T]]:
        """Take what is there, 1 to `limit` things at a time, waiting only for the first; ends after `close`.

        Where the taker has patience for so many seconds only, an empty batch says that they are over.
        """
        while True:
            with self._changed:
                self._wait(lambda: self._closed or any(self._lanes.values()), patience_s(), beat)
                batch: list[T] = []
                while len(batch) < limit and any(self._lanes.values()):
                    lane = self._lanes[self._turns[0]]
                    self._turns.rotate(-1)
                    if lane:
                        batch.append(lane.popleft())
                self._changed.notify_all()
                ended = self._closed and not batch
            if ended:
                return
            yield batch

    def close(self) -> None:
        """Refuse everything from now on; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, over: Callable[[], bool], patience_s: float | None, beat: Beat) -> None:
        """Wait until it is over, or for so many seconds, with signs of life."""
        until = None if patience_s is None else time.monotonic() + patience_s
        while True:
            beat()
            left = BEAT_S if until is None else min(BEAT_S, until - time.monotonic())
            if self._changed.wait_for(over, left) or (until is not None and time.monotonic() >= until):
                return


class Channel(Generic[T]):
    """One lane. `dropped` counts what it has let go of."""

    def __init__(self, capacity: int, overflow: Overflow) -> None:
        self._lanes: Lanes[T] = Lanes([""], capacity)
        self._overflow = overflow
        self.dropped = 0

    def put(self, item: T, beat: Beat = unwatched) -> None:
        """Hand over one thing. One thread at a time, where it may let go of others.

        Raises:
            ClosedError: the channel is closed, also while waiting for room.
        """
        if self._lanes.put("", item, self._overflow, beat) is not None:
            self.dropped += 1

    def batches(self, limit: int, beat: Beat = unwatched) -> Iterator[list[T]]:
        """Take what is there, 1 to `limit` things at a time, waiting only for the first; ends after `close`."""
        return self._lanes.batches(limit, beat=beat)

    def close(self) -> None:
        """Refuse everything from now on; idempotent."""
        self._lanes.close()
