"""A source whose images are framed, so that all that follows sees the framed ones only."""

import threading
from collections.abc import Generator, Iterator
from dataclasses import replace

from daemon.framing import Framing, FramingError
from daemon.messages import Capture, Frame, Unreadable
from daemon.sources.base import ALWAYS, Demand, Source


def framed(source: Source, framing: Framing) -> Source:
    """Frame what a source gives; the source itself where images stay as they are."""
    return source if framing.is_plain else FramedSource(source, framing)


class FramedSource:
    """A source and what is done to its images. Satisfies `daemon.sources.base.Source`."""

    def __init__(self, source: Source, framing: Framing) -> None:
        self._source = source
        self._framing = framing

    def frames(self, stop: threading.Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:
        """Yield the parts of the source, framed; one that cannot be framed is `Unreadable`.

        Raises:
            SourceUnavailableError: as the source does.
        """
        return self._framed(self._source.frames(stop, demand))

    def settle(self, capture: Capture, failure: str | None) -> bool:
        """Let the source let go of a part."""
        return self._source.settle(capture, failure)

    def _framed(self, parts: Iterator[Frame | Unreadable | None]) -> Generator[Frame | Unreadable | None]:
        for part in parts:
            if not isinstance(part, Frame):
                yield part
                continue
            try:
                image = self._framing.apply(part.image)
            except FramingError as error:
                yield Unreadable(part.capture, str(error))
            else:
                yield replace(part, image=image)
