"""What runs: the daemon, the folder that it watches, and a subscriber on the other side."""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Self

from daemon.desk.dataset import labelled_images
from daemon.sources.names import part_id
from demo.child import Child
from demo.subscriber import Subscriber

_SHORTEST_S, _LOAD = 0.2, 0.6  # at most five parts a second, for eyes, and none faster than the machine judges at ease
_START_S, _VERDICT_S = 120.0, 30.0


class PlantError(Exception):
    """The daemon does not do its work; the message ends with the end of its log."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part whose truth is known: `defect` is "good" for none. Its image is called `name` on the line."""

    image: Path
    defect: str
    name: str

    @property
    def id(self) -> str:
        """What the daemon calls it."""
        return part_id(self.name)

    @property
    def good(self) -> bool:
        """Whether it must pass."""
        return self.defect == "good"


def parts_of(folder: Path) -> list[Part]:
    """The test set of a folder in MVTec layout, each part named by its defect and a number.

    Raises:
        DatasetError: the folder has no such layout.
    """
    by_defect = groupby(labelled_images(folder), key=lambda labelled: labelled.defect)
    return [
        Part(labelled.path, defect, f"{defect}-{number:03}{labelled.path.suffix}")
        for defect, group in by_defect
        for number, labelled in enumerate(group)
    ]


class Plant:
    """A daemon at work while in this context; `dropped` holds `time.monotonic()` of each part's arrival, by its id."""

    def __init__(self, command: Sequence[str], folder: Path, log: Path, subscriber: Subscriber) -> None:
        self.dropped: dict[str, float] = {}
        self.daemon = Child(command, log)
        self.subscriber = subscriber
        self._folder = folder
        self._running = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            self._folder.mkdir()
            starting.enter_context(self.subscriber)
            starting.enter_context(self.daemon)
            self._await_online()
            self._running = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def measure(self, parts: Sequence[Part]) -> float:
        """Send parts one by one; give the interval in seconds at which the machine keeps up.

        Raises:
            PlantError: no verdict came.
        """
        for part in parts:
            self._drop(part)
            self.await_verdicts()
        infer_ms = [verdict.infer_ms for verdict in self.subscriber.verdicts]
        if not infer_ms:
            raise self._error("no verdict came")
        return max(_SHORTEST_S, statistics.median(infer_ms) / 1000 / _LOAD)

    def run(self, parts: Sequence[Part], interval_s: float, passed: Callable[[int], None] = lambda _: None) -> None:
        """Send parts at even intervals; `passed` hears how many there have been."""
        due = time.monotonic()
        for number, part in enumerate(parts, start=1):
            time.sleep(max(0.0, due - time.monotonic()))
            self._drop(part)
            passed(number)
            due += interval_s

    def crash(self, parts: Sequence[Part], interval_s: float) -> float:
        """Kill the daemon after a third of the parts, start it again at once; give the seconds until it is online.

        Raises:
            PlantError: it does not come back.
        """
        status = self.subscriber.status
        killed_at = 0.0

        def passed(number: int) -> None:
            nonlocal killed_at
            if number == -(-len(parts) // 3):
                killed_at = time.monotonic()
                self.daemon.kill()
                self.daemon.start()

        self.run(parts, interval_s, passed)
        self._await_online(after=status.boot_id if status else "")
        return time.monotonic() - killed_at

    def await_verdicts(self) -> None:
        """Wait until each part has a verdict, or for half a minute without a new one.

        Raises:
            PlantError: the daemon has ended.
        """
        while (judged := self._judged()) < len(self.dropped):
            if not self._wait(_VERDICT_S, partial(self._has_judged, judged + 1)):
                return

    def _drop(self, part: Part) -> None:
        """Write as a good camera does: under a name of no interest, then all at once under the right one."""
        unfinished = self._folder / f".{part.name}"
        shutil.copyfile(part.image, unfinished)
        self.dropped[part.id] = time.monotonic()
        unfinished.rename(self._folder / part.name)

    def _judged(self) -> int:
        return len({verdict.part_id for verdict in self.subscriber.verdicts})

    def _has_judged(self, parts: int) -> bool:
        return self._judged() >= parts

    def _await_online(self, after: str = "") -> None:
        """Wait for a daemon other than the one with boot id `after`."""

        def online() -> bool:
            status = self.subscriber.status
            return status is not None and status.online and status.boot_id != after

        if not self._wait(_START_S, online):
            raise self._error("it does not come online")

    def _wait(self, seconds: float, done: Callable[[], bool]) -> bool:
        """Wait until `done` while the daemon lives; False if it never was."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.subscriber.wait(0.5, done):
                return True
            if not self.daemon.alive:
                raise self._error("it has ended")
        return False

    def _error(self, what: str) -> PlantError:
        return PlantError(f"the daemon: {what}; {self.daemon.log} ends:\n{self.daemon.last_words()}")
