"""The program that reads one video with OpenCV, apart from the daemon: see `source`.

OpenCV may wait for ever, and its decoders read what anybody sends; only a process can be ended whatever it does. It is
started as a file, `python -P -u reader.py SOCKET PAGE`, and needs nothing of the daemon. Over the socket comes an
`Order` as JSON, answered by `Opened`; then each byte asks for a frame, answered by `Arrived` once its pixels are in the
page, memory that both processes have. The program ends with its daemon, whose death closes the socket.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass

import cv2
from cv2.typing import MatLike

BUFFERED = 4
"""Frames that wait to be asked for; of a live video the newest."""

UNREAD = 100
"""So many frames of a file may be damaged in a row, for OpenCV does not tell damage from the end."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to read: a number is a V4L2 device, and of that alone are the last four, which are its own where not given.

    `skip` is how many frames at the beginning are not wanted. A live video is never held up: frames nobody asks for
    give way to newer ones.
    """

    place: str | int
    live: bool
    skip: int = 0
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    fourcc: str | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """What the video is like, or, if it could not be opened, the last word of the libraries on that."""

    failed: bool
    reason: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    fourcc: str = ""


@dataclass(frozen=True, slots=True)
class Arrived:
    """One frame; the first has the number 1, and no more will come after 0.

    It came at `at_ns`, nanoseconds since 1970, and `seen_at`, `time.monotonic()` seconds. Since the last answer
    `dropped` older frames gave way, and `incomplete` ones could not be decoded.
    """

    number: int
    at_ns: int = 0
    seen_at: float = 0.0
    width: int = 0
    height: int = 0
    dropped: int = 0
    incomplete: int = 0


class _Shelf:
    """Frames between the thread that reads them and the one that is asked for them."""

    def __init__(self, line: socket.socket, page: int) -> None:
        self._line = line
        self._page = page
        self._changed = threading.Condition()
        self._frames = deque[tuple[int, int, float, MatLike]]()
        self._asked = False
        self._ended = False
        self._dropped = 0
        self._incomplete = 0

    def put(self, number: int, image: MatLike, *, live: bool) -> None:
        arrived = number, time.time_ns(), time.monotonic(), image
        with self._changed:
            if not live:
                self._changed.wait_for(lambda: len(self._frames) < BUFFERED)
            elif len(self._frames) == BUFFERED:
                self._frames.popleft()
                self._dropped += 1
            self._frames.append(arrived)
            self._answer()

    def miss(self, frames: int) -> None:
        with self._changed:
            self._incomplete += frames

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._answer()

    def ask(self) -> None:
        with self._changed:
            self._asked = True
            self._answer()

    def _answer(self) -> None:
        if not self._asked or not (self._frames or self._ended):
            return
        arrived = Arrived(0)
        if self._frames:
            number, at_ns, seen_at, image = self._frames.popleft()
            height, width = image.shape[:2]
            os.pwrite(self._page, cv2.cvtColor(image, cv2.COLOR_BGR2RGB).data, 0)
            arrived = Arrived(number, at_ns, seen_at, width, height, self._dropped, self._incomplete)
            self._dropped = self._incomplete = 0
        self._asked = False
        self._changed.notify_all()
        self._line.send(json.dumps(asdict(arrived)).encode())


def _serve(line: socket.socket, shelf: _Shelf) -> None:
    while line.recv(1):
        shelf.ask()
    os._exit(0)  # the daemon is gone, and the other thread may be waiting for ever


def _open(order: Order) -> cv2.VideoCapture:
    if not isinstance(order.place, int):
        # One thread decodes a live video: several are each a frame behind.
        return cv2.VideoCapture(order.place, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1] if order.live else [])
    capture = cv2.VideoCapture(order.place, cv2.CAP_V4L2)
    if order.fourcc is not None:  # first: it decides which sizes there are
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*order.fourcc))
    for option, value in (
        (cv2.CAP_PROP_FRAME_WIDTH, order.width),
        (cv2.CAP_PROP_FRAME_HEIGHT, order.height),
        (cv2.CAP_PROP_FPS, order.fps),
    ):
        if value is not None:
            capture.set(option, value)
    return capture


def _last_word(said: int) -> str:
    """Why FFmpeg could not open it, out of what it wrote; without addresses, which may tell a password."""
    words = os.pread(said, 65536, 0).decode(errors="replace").strip().rpartition("\n")[2].rpartition(": ")[2]
    return "" if "/" in words or "@" in words else words


def _read(line: socket.socket, page: int) -> None:
    order = Order(**json.loads(line.recv(65536)))
    shelf = _Shelf(line, page)
    server = threading.Thread(target=_serve, args=(line, shelf), daemon=True)
    server.start()
    said = os.memfd_create("said")
    for output in (1, 2):  # where the libraries write; Python has a copy of its own
        os.dup2(said, output)
    capture = _open(order)
    if not capture.isOpened():
        line.send(json.dumps(asdict(Opened(failed=True, reason=_last_word(said)))).encode())
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # for weeks they would tell of every damaged block
        os.dup2(nowhere, output)
    os.close(said)
    opened = Opened(
        failed=False,
        width=round(capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
        height=round(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
        fps=capture.get(cv2.CAP_PROP_FPS),
        fourcc=round(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("latin-1"),
    )
    line.send(json.dumps(asdict(opened)).encode())
    number = unread = 0
    while unread <= (0 if order.live else UNREAD):
        number += 1
        if not capture.grab():
            unread += 1
            continue
        if number > order.skip:
            whole, image = capture.retrieve()
            shelf.miss(unread if whole else unread + 1)
            if whole:
                shelf.put(number, image, live=order.live)
        unread = 0
    shelf.end()
    server.join()


def main() -> None:
    """Read one video for the daemon that has started this program."""
    for stopping in (signal.SIGINT, signal.SIGTERM):  # those meant for the daemon, which knows what to do
        signal.signal(stopping, signal.SIG_IGN)
    sys.stderr = os.fdopen(os.dup(2), "w")
    cv2.setNumThreads(1)
    line, page = (int(handle) for handle in sys.argv[1:])
    _read(socket.socket(fileno=line), page)


if __name__ == "__main__":
    main()
