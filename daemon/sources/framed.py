"""A source whose images are framed, so that all that follows sees the framed ones only."""

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

from daemon.framing import Framing, FramingError
from daemon.messages import Capture, Frame, Unreadable
from daemon.sources.base import ALWAYS, Demand, Source
from detectors.base import Image


def framed(source: Source, framing: Framing, *, shrunk: bool = False) -> Source:
    """Frame what a source gives; the source itself where images stay as they are.

    `shrunk`: the source decodes files, and shrinks the images by itself meanwhile.
    """
    return source if framing.is_plain else FramedSource(source, framing.finish if shrunk else framing.apply)


class FramedSource:
    """A source and what is done to its images, which may raise FramingError. Satisfies `daemon.sources.base.Source`."""

    def __init__(self, source: Source, frame: Callable[[Image], Image]) -> None:
        self._source = source
        self._frame = frame

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
                image = self._frame(part.image)
            except FramingError as error:
                yield Unreadable(part.capture, str(error))
            else:
                yield replace(part, image=image)
