"""Parts that are frames of a video: a USB camera, a network camera, a video file, or numbered still images.

    frames ─ask→ reader.py (a process of its own) ─ask→ OpenCV
           ←page, memory of both──┘

OpenCV takes nine seconds to notice that a network camera has fallen silent, and may wait for ever. So the reader is
watched from here, and killed once it is late; nothing of it stays behind, whatever the libraries in it hang in.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import structlog
from ulid import ULID

from daemon import images
from daemon.messages import Capture, Clock, Frame, Unreadable
from daemon.sources.base import ALWAYS, TICK_S, Demand, SourceUnavailableError
from daemon.sources.names import clean
from daemon.sources.video import reader
from daemon.sources.video.reader import Arrived, Opened, Order
from daemon.stats import Drop
from detectors.base import Image

OPEN_S = 5.0
"""How long a video may take to be opened."""

FIRST_S = 10.0
"""How long it may take from then to the first frame: until a network camera sends a key frame, say."""

END_S = 2.0
"""How long to wait for a killed reader."""

_NUMBER = re.compile(r"%(?:0(\d+))?d")

log = structlog.get_logger()


class VideoSource:
    """One video. Satisfies `daemon.sources.base.Source`.

    A live video runs by itself: frames that come while no part is wanted are nobody's, and of those that are not taken
    in time the oldest give way and are counted. Of a file and of still images each frame is a part, in order, and waits
    until it is wanted; when all were handed over, no more come. They begin anew when the daemon does, with new ids.

    Damaged pictures: of a video, the decoder fills what it can of a frame from its neighbours, so that it is smeared,
    and leaves out what it cannot, which is counted where OpenCV tells; a still image is handed over as `Unreadable`.

    Args:
        station: the name its captures carry.
        place: a V4L2 device by its path or number, a URL (rtsp, http, …), a video file, or still images by a pattern
            for their numbers (`part_%04d.png`).
        lost: is told of frames that came while wanted and were not handed over, by the cause and how many; in the
            thread that runs `frames`.
        live: whether the video runs by itself; None: devices and URLs do.
        width: of the device's pictures, in pixels; None leaves it to the device, here and below.
        height: the same.
        fps: the device's frames a second.
        fourcc: the device's pixel format, four letters such as MJPG.
        stall_s: how long a live video may give no frame before it counts as away. More than between two frames.
        transport: how RTSP brings its packets; "udp" loses some, "tcp" may be late.

    Raises:
        ValueError: options that do not fit the place, in words for an operator.
    """

    def __init__(
        self,
        station: str,
        place: str,
        *,
        lost: Callable[[Drop, int], None],
        live: bool | None = None,
        width: int | None = None,
        height: int | None = None,
        fps: float | None = None,
        fourcc: str | None = None,
        stall_s: float = 1.0,
        transport: Literal["tcp", "udp"] = "tcp",
    ) -> None:
        is_url = "://" in place
        self._is_device = place.isdecimal() or place.startswith("/dev/")
        self._pattern = None if is_url or Path(place).exists() else _NUMBER.search(Path(place).name)
        if not self._is_device and (width, height, fps, fourcc) != (None, None, None, None):
            raise ValueError(f"width, height, fps and fourcc are for V4L2 devices, and {shown(place)} is none")
        if fourcc is not None and len(fourcc) != len("MJPG"):
            raise ValueError(f"fourcc is four letters such as MJPG, not {fourcc!r}")
        if self._pattern and live:
            raise ValueError(f"still images are never live: leave out live for {shown(place)}")
        self._station = station
        self._place = f"/dev/video{place}" if place.isdecimal() else place
        self._shown = shown(self._place)
        self._is_url = is_url
        self._live = is_url or self._is_device if live is None else live
        self._order = Order(place, self._live, 0, width, height, fps, fourcc)
        self._lost = lost
        self._stall_s = stall_s
        self._transport = transport
        self._last_id = ULID.from_int(0)
        self._taken = -1  # the number of the last frame handed over; of a live video it is of no use
        self._ended = False

    def frames(self, stop: threading.Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:
        """Yield frames as they come, or, of material, as they are wanted. Waits up to `OPEN_S` for it to be opened.

        Raises:
            SourceUnavailableError: the video is not there or cannot be opened, at once; later, it is late or over.
        """
        parts = self._parts(stop, demand)
        next(parts, None)  # as far as being open
        return parts

    def settle(self, capture: Capture, failure: str | None) -> bool:  # noqa: ARG002 -- the protocol's signature
        """Nothing is kept of a video's parts."""
        return True

    def _parts(self, stop: threading.Event, demand: Demand) -> Iterator[Frame | Unreadable | None]:
        if not self._ended:
            yield from self._stills(stop, demand) if self._pattern else self._moving(stop, demand)
            if stop.is_set():
                return
            self._ended = True
            log.info("all frames were handed over", station=self._station, place=self._shown)
        while not stop.wait(TICK_S):
            yield None

    def _stills(self, stop: threading.Event, demand: Demand) -> Iterator[Frame | Unreadable | None]:
        paths = _numbered(Path(self._place))
        if not paths:
            raise SourceUnavailableError(
                f"there are no images {self._shown}; put them there, or correct the source's `place`"
            )
        yield None
        for number, path in sorted(paths.items()):
            if number <= self._taken:
                continue
            while not demand.wanted(TICK_S):
                yield None
                if stop.is_set():
                    return
            if stop.is_set():
                return
            try:
                decoded: Image | str = images.read(path)
            except images.UndecodableError as error:
                decoded = str(error)
            except OSError as error:
                decoded = f"the file cannot be read: {error.strerror}"
            self._taken = number
            capture = self._capture(clean(path.stem), number, time.time_ns(), time.monotonic(), str(path))
            yield Unreadable(capture, decoded) if isinstance(decoded, str) else Frame(capture, decoded)

    def _moving(self, stop: threading.Event, demand: Demand) -> Iterator[Frame | None]:
        with _Reader(self._prepared(), self._transport, self._shown) as reading:
            if not self._opened(reading, stop):
                return
            yield None
            unwanted_at = 0.0
            for arrived in self._arriving(reading, stop, demand):
                if self._live and not demand.wanted():
                    unwanted_at = time.monotonic()
                if arrived is None or arrived.seen_at < unwanted_at:
                    yield None
                    continue
                frame = self._frame(arrived, reading.image(arrived))
                since = demand.since
                if self._live and since is not None and frame.capture.arrived_at < since:
                    yield None  # seen before the trigger, so not its part
                    continue
                self._count(arrived)
                yield frame

    def _arriving(self, reading: "_Reader", stop: threading.Event, demand: Demand) -> Iterator[Arrived | None]:
        patience_s = max(FIRST_S, self._stall_s)
        while not stop.is_set():
            if not self._live and not demand.wanted(TICK_S):
                yield None
                continue
            reading.ask()
            late_at = time.monotonic() + patience_s
            while (arrived := reading.arrived(TICK_S)) is None:
                if stop.is_set():
                    return
                if self._live and time.monotonic() > late_at:
                    raise SourceUnavailableError(f"{self._shown} gave no frame for {patience_s:g} s; {self._cure()}")
                yield None
            if not arrived.number:
                if self._live:
                    raise SourceUnavailableError(f"{self._shown} has ended; {self._cure()}")
                return
            patience_s = self._stall_s
            yield arrived

    def _prepared(self) -> Order:
        """What to tell the reader.

        Raises:
            SourceUnavailableError: what is to be read is not there, or may not be read.
        """
        order = replace(self._order, skip=0 if self._live else max(0, self._taken))
        if self._is_url:
            return order
        path = Path(self._place)
        if not path.exists():
            cure = "see to its cable and power" if self._is_device else "put it there"
            raise SourceUnavailableError(f"there is no {path}; {cure}, or correct the source's `place`")
        if not os.access(path, os.R_OK | os.W_OK if self._is_device else os.R_OK):
            cure = "add the daemon's user to the group video" if self._is_device else f"chmod a+r {path}"
            raise SourceUnavailableError(f"{path} may not be used; {cure}")
        if not self._is_device:
            return replace(order, place=str(path.absolute()))
        number = re.fullmatch(r"/dev/video(\d+)", str(path.resolve()))
        if not number:
            raise SourceUnavailableError(
                f"{path} is no V4L2 device; correct the source's `place` (v4l2-ctl --list-devices)"
            )
        return replace(order, place=int(number[1]))

    def _opened(self, reading: "_Reader", stop: threading.Event) -> bool:
        """Wait until the video is open; False if asked to stop meanwhile."""
        late_at = time.monotonic() + OPEN_S
        while (opened := reading.opened(TICK_S)) is None:
            if stop.is_set():
                return False
            if time.monotonic() > late_at:
                raise SourceUnavailableError(f"{self._shown} did not open within {OPEN_S:g} s; {self._cure()}")
        if opened.failed:
            reason = f" ({opened.reason})" if opened.reason else ""
            raise SourceUnavailableError(f"{self._shown} cannot be opened{reason}; {self._cure()}")
        for option in ("width", "height", "fps", "fourcc"):
            asked, got = getattr(self._order, option), getattr(opened, option)
            if asked not in {None, got}:
                log.warning("the camera took another value", station=self._station, option=option, asked=asked, got=got)
        return True

    def _cure(self) -> str:
        if self._is_device:
            return "see to its cable, and that no other program uses it and it takes pictures"
        if self._is_url:
            return "see to the camera and the network, and to the name and password in the source's `place`"
        return "see that it is a whole video file"

    def _count(self, arrived: Arrived) -> None:
        for cause, number in ((Drop.QUEUE, arrived.dropped), (Drop.INCOMPLETE, arrived.incomplete)):
            if number:
                self._lost(cause, number)

    def _frame(self, arrived: Arrived, image: Image) -> Frame:
        if self._live:
            return Frame(self._capture("", arrived.number, arrived.at_ns, arrived.seen_at, self._shown), image)
        self._taken = arrived.number
        part_id = clean(f"{Path(self._shown).stem}-{arrived.number:06}")
        return Frame(self._capture(part_id, arrived.number, time.time_ns(), time.monotonic(), self._shown), image)

    def _capture(self, part_id: str, number: int, at_ns: int, seen_at: float, origin: str) -> Capture:
        self._last_id = max(ULID(), ULID.from_int(int(self._last_id) + 1))  # in order, even if the clock is set back
        at = datetime.fromtimestamp(at_ns / 1e9, UTC)
        return Capture(
            id=str(self._last_id),
            station=self._station,
            part_id=part_id,
            captured_at=at,
            arrived_at=at,
            seen_at=seen_at,
            origin=origin,
            clock=Clock.HOST_ARRIVAL,
            frame_id=number,
        )


def shown(place: str) -> str:
    """A place as it may be shown: a URL without name and password, nor the query, where cameras take them too."""
    if "://" not in place:
        return place
    scheme, _, rest = place.partition("://")
    head, _, query = rest.partition("?")
    if "@" in query and "/" not in head:  # a password with a question mark, perhaps
        return f"{scheme}://…"
    return f"{scheme}://{head.rpartition('@')[2]}"


def _numbered(pattern: Path) -> dict[int, Path]:
    """The files a pattern such as `part_%04d.png` means, by their numbers."""
    start, width, end = _NUMBER.split(pattern.name, maxsplit=1)
    name = re.compile(f"{re.escape(start)}(\\d+){re.escape(end)}")
    matching = ((name.fullmatch(path.name), path) for path in pattern.parent.glob("*"))
    numbers = ((int(found[1]), path) for found, path in matching if found)
    return {number: path for number, path in numbers if path.name == f"{start}{number:0{width or 1}}{end}"}


class _Reader:
    """The process that reads one video, as long as this context lasts."""

    def __init__(self, order: Order, transport: str, place: str) -> None:
        self._place = place
        self._line, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._page = os.memfd_create("frame")
        self._line.send(json.dumps(asdict(order)).encode())  # not as arguments, which everybody on the machine can see
        options = f"rtsp_transport;{transport}"
        if order.live:  # not first, as parts of now, what came while it was opened
            options += "|fflags;nobuffer"
        try:
            self._process = subprocess.Popen(
                # Unbuffered, C's own output too, or FFmpeg's last word would come too late.
                [sys.executable, "-P", "-u", reader.__file__, str(far_end.fileno()), str(self._page)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(far_end.fileno(), self._page),
                env={
                    **os.environ,
                    "OPENCV_LOG_LEVEL": "OFF",
                    "OPENCV_FFMPEG_LOGLEVEL": "16",  # errors
                    "OPENCV_FFMPEG_CAPTURE_OPTIONS": options,
                },
            )
        except OSError as error:
            self._line.close()
            os.close(self._page)
            raise SourceUnavailableError(
                f"the program that reads {place} cannot be started: {error}; see to memory and the number of processes"
            ) from error
        finally:
            far_end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()
        os.close(self._page)
        self._process.kill()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            log.warning("a reader hangs in a driver and ends when that lets go", place=self._place)

    def opened(self, wait_s: float) -> Opened | None:
        """Its first answer, or None while there is none."""
        said = self._hear(wait_s)
        return None if said is None else Opened(**said)

    def ask(self) -> None:
        """Let it answer with the next frame."""
        try:
            self._line.send(b"?")
        except OSError:
            raise self._gone() from None

    def arrived(self, wait_s: float) -> Arrived | None:
        """Its answer, or None while there is none."""
        said = self._hear(wait_s)
        return None if said is None else Arrived(**said)

    def image(self, arrived: Arrived) -> Image:
        """The pixels of a frame, before the next is asked for."""
        image = np.empty((arrived.height, arrived.width, 3), np.uint8)
        os.preadv(self._page, [image.data], 0)
        return image

    def _hear(self, wait_s: float) -> dict[str, Any] | None:
        self._line.settimeout(wait_s)
        try:
            said = self._line.recv(65536)
        except TimeoutError:
            return None
        except OSError:
            raise self._gone() from None
        if not said:
            raise self._gone()
        heard: dict[str, Any] = json.loads(said)
        return heard

    def _gone(self) -> SourceUnavailableError:
        return SourceUnavailableError(
            f"the program that reads {self._place} has ended unexpectedly; it is started anew"
        )
