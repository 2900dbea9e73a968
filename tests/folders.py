"""A watched folder and what arrives in it, for tests: a source that runs in a thread, or as a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image as Pillow

from daemon.messages import Frame, Unreadable
from daemon.sources.base import ALWAYS, Demand, Source, SourceUnavailableError
from daemon.sources.folder.source import FolderSource
from detectors.base import Image

DEADLINE_S = 20.0
QUIET_S = 0.15
NEVER_MS = 60_000
NOBODY = 65534


def source(
    folder: Path,
    *,
    concluded: Callable[[str], bool] = lambda _: False,
    settle_ms: int = 20,
    give_up_s: float = DEADLINE_S,
    rescan_s: float = 0.1,
    **options: Any,
) -> FolderSource:
    """A source that hurries."""
    return FolderSource(
        "s1", folder, concluded=concluded, settle_ms=settle_ms, give_up_s=give_up_s, rescan_s=rescan_s, **options
    )


class Arrivals:
    """Runs a source's `frames` in a thread of its own, as the daemon does, and leaves nothing behind."""

    def __init__(self, taken_from: Source, demand: Demand = ALWAYS) -> None:
        self._source = taken_from
        self._demand = demand
        self._before = set(threading.enumerate())
        self._stop = threading.Event()
        self._parts = Queue[Frame | Unreadable]()
        self._error: SourceUnavailableError | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            for part in self._source.frames(self._stop, self._demand):
                if part is not None:
                    self._parts.put(part)
        except SourceUnavailableError as error:
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not set(threading.enumerate()) - self._before

    def watching(self) -> bool:
        """Wait until watchdog's three threads run beside ours."""
        return eventually(lambda: len(set(threading.enumerate()) - self._before) == 4)

    def next(self) -> Frame | Unreadable:
        return self._parts.get(timeout=DEADLINE_S)

    def frame(self) -> Frame:
        part = self.next()
        assert isinstance(part, Frame), part
        return part

    def unreadable(self) -> Unreadable:
        part = self.next()
        assert isinstance(part, Unreadable), part
        return part

    def nothing(self) -> bool:
        try:
            self._parts.get(timeout=QUIET_S)
        except Empty:
            return True
        return False

    def taken(self) -> list[Frame | Unreadable]:
        """What came and was not asked for yet."""
        return [self._parts.get() for _ in range(self._parts.qsize())]

    def failure(self) -> str:
        self._thread.join(DEADLINE_S)
        assert self._error is not None
        return str(self._error)


def pixels(shade: int) -> Image:
    image = np.random.default_rng(shade).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image[:, 0] = shade
    return image


def file_of(image: Image, kind: str = "PNG") -> bytes:
    file = BytesIO()
    Pillow.fromarray(image).save(file, kind)
    return file.getvalue()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def names_under(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


class Reader:
    """A source with its record as a process of its own (`tests.folder_reader`), which can be stopped and killed."""

    def __init__(self, folder: Path, state: Path, *options: str, prefix: Sequence[str] = ()) -> None:
        state.mkdir(exist_ok=True)
        self._told = state / "told.jsonl"
        self._state = state
        command = [*prefix, sys.executable, "-m", "tests.folder_reader", str(folder), str(state), *options]
        with self._told.open("ab") as told, (state / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=told, stderr=log, cwd=Path(__file__).parents[1])

    def __enter__(self) -> Self:
        assert eventually(self._begun), self.log()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def _begun(self) -> bool:
        return (self._state / f"begun.{self._process.pid}").exists() or self._process.poll() is not None

    @property
    def pid(self) -> int:
        """Whom to send signals."""
        return self._process.pid

    def told(self) -> list[dict[str, Any]]:
        """Each part it was handed over, by all processes with this state."""
        return [json.loads(line) for line in self._told.read_text().splitlines() if line.endswith("}")]

    def has_told(self, count: int) -> bool:
        """Whether it has said so many parts, and none more."""
        return len(self.told()) == count

    def log(self) -> str:
        """What it said."""
        return (self._state / "log.txt").read_text()

    def wait(self, seconds: float = DEADLINE_S) -> int:
        """Wait until it ends by itself; its exit status, negative if a signal ended it."""
        return self._process.wait(seconds)

    def kill(self) -> None:
        """As the kernel would."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(DEADLINE_S)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be nobody, if root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
