"""What every source gives, and what it is told in return."""

import threading
from collections.abc import Iterator
from typing import Protocol

from daemon.messages import Capture, Frame, Unreadable


class Source(Protocol):
    """Hands over parts. `frames` runs in one thread at a time; `settle` may be called from another meanwhile."""

    def frames(self, stop: threading.Event) -> Iterator[Frame | Unreadable]:
        """Yield each part once, blocking until there is one; return soon after `stop` is set.

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
