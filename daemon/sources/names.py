"""Names of files: which may be parts, what the parts are called, and where there is room for them."""

import os
import re
from pathlib import Path

from daemon.images import SUFFIXES

PART_ID_CHARACTERS = 64
NAME_BYTES = 200
"""What is kept of a longer file name: with what is put around it, it stays under the 255 of file systems."""


def is_candidate(name: str) -> bool:
    """Whether a file of this name may be a part: an image, and not one that its writer will still rename."""
    stem, suffix = os.path.splitext(name.lower())  # noqa: PTH122 -- asked of each file at each look, and much faster
    return suffix in SUFFIXES and not name.startswith(".") and not stem.endswith("_tmp")


def is_foreign(name: str) -> bool:
    """Whether a file is of a kind that will never be taken, and is not just one on its way."""
    suffix = os.path.splitext(name.lower())[1]  # noqa: PTH122 -- as above
    return suffix not in {*SUFFIXES, ".tmp", ".part", ".filepart"} and not name.startswith(".") and name[-1] != "~"


def part_id(name: str) -> str:
    """The part's id from its file's name: the last 64 letters, digits, dots, dashes and underscores of the stem.

    Other characters become underscores. Cameras put what differs, a serial number, last.
    """
    return clean(Path(name).stem)


def clean(said: str) -> str:
    """What a part's id may consist of: letters, digits, dots, dashes and underscores, and of these the last 64."""
    return re.sub(r"[^\w.-]", "_", said)[-PART_ID_CHARACTERS:]


def natural(name: str) -> list[str | int]:
    """What to sort names by so that img2 comes before img10."""
    return [int(run) if place % 2 else run.casefold() for place, run in enumerate(re.split("([0-9]+)", name))]


def shortened(name: str) -> str:
    """The name, or, of one too long to be put something around it, its beginning and its suffix."""
    stem, suffix = os.fsencode(Path(name).stem), os.fsencode(Path(name).suffix)
    return os.fsdecode(stem[: NAME_BYTES - len(suffix)] + suffix)


def free_path(folder: Path, name: str) -> Path:
    """Where to put a file without overwriting one: under its name or that with -1, -2, … before the suffix.

    A camera may use one name for all parts of a day, so the number is found by doubling and halving.
    """
    stem, suffix = Path(name).stem, Path(name).suffix

    def numbered(number: int) -> Path:
        return folder / (f"{stem}-{number}{suffix}" if number else name)

    taken, free = -1, 0
    while numbered(free).exists():
        taken, free = free, 2 * free + 1
    while free - taken > 1:
        middle = (taken + free) // 2
        taken, free = (middle, free) if numbered(middle).exists() else (taken, middle)
    return numbered(free)
