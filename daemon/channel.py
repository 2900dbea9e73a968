"""A bounded, closable hand-over between threads. Closing is how work ends: what was put is still taken."""

from collections import deque
from collections.abc import Iterator
from enum import Enum, auto
from threading import Condition
from typing import Generic, TypeVar

T = TypeVar("T")


class Overflow(Enum):
    """What a full channel does: hold the giver up, or let go of the oldest and count it."""

    WAIT = auto()
    DROP_OLDEST = auto()


class ClosedError(Exception):
    """Nothing can be put into this channel any more."""


class Channel(Generic[T]):
    """Any number of threads may put, one may take."""

    def __init__(self, capacity: int, overflow: Overflow) -> None:
        self._capacity = capacity
        self._overflow = overflow
        self._waiting: deque[T] = deque()
        self._changed = Condition()
        self._closed = False
        self.dropped = 0

    def put(self, item: T) -> None:
        """Hand over one thing.

        Raises:
            ClosedError: the channel is closed, also while waiting for room.
        """
        with self._changed:
            if self._overflow is Overflow.WAIT:
                self._changed.wait_for(lambda: self._closed or len(self._waiting) < self._capacity)
            if self._closed:
                raise ClosedError
            if len(self._waiting) >= self._capacity:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(item)
            self._changed.notify_all()

    def batches(self, limit: int) -> Iterator[list[T]]:
        """Take what is there, 1 to `limit` things at a time, waiting only for the first; ends after `close`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                batch = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
                self._changed.notify_all()
            if not batch:
                return
            yield batch

    def close(self) -> None:
        """Refuse everything from now on; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
