"""The parent's end of a contender: starts its process, has it measure itself, and knows when it is dead."""

import json
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

CONTENDER = Path(__file__).with_name("contender.py")
PATIENCE_S = 600.0
"""For one answer; a large network beside a busy program takes seconds a frame, and a compiler a minute."""
GOODBYE_S = 10.0
LAST_WORDS = 300

What = Literal["memory", "file", "decode"]
"""From an image in memory to its prediction, from a file to that, or from a file to the image."""


class FallenError(Exception):
    """A contender has ended, or does not answer; the message says why, and where to read more."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a contender says of itself.

    `ready_s` is from the start of its process until it had run once, `load_s` the part of that after imports.
    """

    ready_s: float
    load_s: float
    rss_mb: float
    engine: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one contender took, call by call; a call judges `batch` images. `cpu_s` is of all its threads together."""

    ms: tuple[float, ...]
    batch: int
    cpu_s: float
    peak_mb: float


class Rival:
    """One contender's process. As a context it is ended when the context is left."""

    def __init__(
        self, name: str, order: Mapping[str, Any], log: Path, python: Path | None = None, patience_s: float = PATIENCE_S
    ) -> None:
        """Start the process; `start` waits for it.

        Args:
            name: what tables call it.
            order: what it shall be, for `contender`.
            log: a file for what it prints.
            python: the interpreter to run it by; this one by default.
            patience_s: how long it may take for an answer.
        """
        self.name = name
        self.log = log
        self._patience_s = patience_s
        self._began = time.monotonic()
        command = [str(python or sys.executable), str(CONTENDER), json.dumps(dict(order))]
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out)
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._pipes[0].close()
        try:
            self._process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipes[1].close()

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def start(self, images: Sequence[Path]) -> Start:
        """Wait until it is ready, and give it the images to judge.

        Raises:
            FallenError: it did not start.
        """
        said = self._hear()
        ready_s = time.monotonic() - self._began
        self._ask({"images": [str(path.resolve()) for path in images]})
        return Start(ready_s, said["load_s"], said["rss_mb"], said["engine"], said["versions"])

    def finish(self) -> None:
        """Wait until it is ready, and be content with that.

        Raises:
            FallenError: it never was.
        """
        self._hear()

    def measure(self, what: What, calls: int, batch: int = 1) -> Turn:
        """Let it judge so many batches of images, one after the other.

        Raises:
            FallenError: it has ended, or does not answer.
        """
        said = self._ask({"measure": calls, "batch": batch, "what": what})
        return Turn(tuple(said["ms"]), batch, said["cpu_s"], said["peak_mb"])

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._pipes[0].write(json.dumps(request).encode() + b"\n")
            self._pipes[0].flush()
        except OSError:
            raise self._fallen() from None
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        deadline = time.monotonic() + self._patience_s
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._pipes[1]], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                self._process.kill()
                self._process.wait()
                raise FallenError(f"no answer for {self._patience_s:.0f} s; see {self.log}")
            more = self._pipes[1].read1(65536)
            if not more:
                raise self._fallen()
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def _fallen(self) -> FallenError:
        status = self._process.wait(self._patience_s)
        why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        printed = self.log.read_text(encoding="utf-8", errors="replace").strip()
        words = printed.splitlines()[-1][:LAST_WORDS] if printed else "it printed nothing"
        return FallenError(f"{why}: {words}")

    @property
    def _pipes(self) -> tuple[Any, Any]:
        return self._process.stdin, self._process.stdout
