"""The line: parts with known answers, put one after the other into the folder that the daemon watches."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from daemon.dataset import labelled_images
from daemon.sources.names import part_id


@dataclass(frozen=True, slots=True)
class Part:
    """A part whose truth is known: `defect` is "good" for none; its `image` is named `name` on the line."""

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


class Line:
    """A camera that writes as a good one does: under a name of no interest first, then all at once under the right one.

    `dropped` holds `time.monotonic()` of that moment by part id.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dropped: dict[str, float] = {}
        folder.mkdir()

    def drop(self, part: Part) -> None:
        """Put a part into the folder."""
        unfinished = self.folder / f".{part.name}"
        shutil.copyfile(part.image, unfinished)
        self.dropped[part.id] = time.monotonic()
        unfinished.rename(self.folder / part.name)

    def run(self, parts: Sequence[Part], interval_s: float, passed: Callable[[int], None] = lambda _: None) -> None:
        """Drop parts at even intervals; `passed` hears how many there have been."""
        due = time.monotonic()
        for number, part in enumerate(parts, start=1):
            time.sleep(max(0.0, due - time.monotonic()))
            self.drop(part)
            passed(number)
            due += interval_s

    def inspected(self, part: Part) -> Path:
        """Where the daemon has put the image of a part with a verdict.

        Raises:
            FileNotFoundError: it has none.
        """
        for path in self.folder.glob(f"done/*/{part.name}"):
            return path
        raise FileNotFoundError(f"{part.name} is not in {self.folder}/done")
