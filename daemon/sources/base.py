"""What every source gives, and what it is told in return."""

import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Protocol

from daemon.messages import Capture, Frame, Unreadable

TICK_S = 0.1
"""A source lets nobody wait longer than about this without a word."""


class Demand(Protocol):
    """Whether the line wants parts now. Any thread may ask."""

    def wanted(self, wait_s: float = 0.0) -> bool:
        """True while parts are to be judged; waits up to `wait_s` seconds for that."""

    @property
    def since(self) -> datetime | None:
        """Only what came since then, in UTC, is wanted; None if whatever came is, or nothing."""


class _Always:
    def wanted(self, wait_s: float = 0.0) -> bool:  # noqa: ARG002 -- the protocol's signature
        return True

    @property
    def since(self) -> None:
        return None


ALWAYS: Demand = _Always()
"""Every part is wanted."""


class Source(Protocol):
    """Hands over parts. `frames` runs in one thread at a time; `settle` may be called from another meanwhile."""

    def frames(self, stop: threading.Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:
        """Yield each part once, as long as parts are wanted, and None whenever there was none for about `TICK_S`.

        What comes while it is not wanted stays where it is (a folder), or is nobody's (a camera that runs by itself).
        A camera that exposes on command does so when a part is wanted. Returns soon after `stop` is set.

        May be called again after it has ended: it goes on with what has not been handed over yet, and, in a new
        process, first hands over again, with the same id, what was never settled.

        Raises:
            SourceUnavailableError: there is nothing to take parts from, at once or while waiting. Call again later.
        """

    def settle(self, capture: Capture, failure: str | None) -> bool:
        """Let go of a part: its verdict is safe on disk. `failure` is why it was unreadable, None if it was not.

        False if that is not possible now, so that the record must go on remembering the part.
        """


class SourceUnavailableError(Exception):
    """The folder or camera is away. The message says which, and what to do about it."""
