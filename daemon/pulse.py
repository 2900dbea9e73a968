"""Signs of life: whether the thread of a stage moves, or hangs in a driver, a library or a lock."""

import time
from collections.abc import Callable

Beat = Callable[[], None]
"""Called by a stage whenever it has moved, or has waited in vain for about a second."""

BEAT_S = 1.0
"""Seconds that a stage waits without a sign of life."""


def unwatched() -> None:
    """The sign of life of a stage that nobody looks after."""


class Pulse:
    """When one thread last moved. One thread beats, any may look.

    Args:
        limit_s: seconds without a beat after which the thread hangs: more than its longest piece of work.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._last = time.monotonic()

    def beat(self) -> None:
        """Note that the thread moves."""
        self._last = time.monotonic()

    @property
    def hangs(self) -> bool:
        """Whether the last beat is too long ago."""
        return time.monotonic() - self._last > self._limit_s
