"""Folders of images with known answers: good parts to learn from, and test sets in MVTec layout."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.quantile import smallest_sample
from daemon import images
from detectors.base import Image


class DatasetError(Exception):
    """A folder that does not hold what is asked of it; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One test image: its defect is the name of its folder, "good" for none; the mask is a file or absent."""

    path: Path
    defect: str
    mask: Path | None

    @property
    def good(self) -> bool:
        """Whether the part is one that must pass."""
        return self.defect == "good"


def good_images(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name.

    Raises:
        DatasetError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"no such folder: {folder}")
    found = _images(folder)
    if not found:
        inner = folder / "train" / "good"
        hint = f"; did you mean {inner}?" if inner.is_dir() else ""
        raise DatasetError(f"{folder} holds no image ({', '.join(sorted(images.SUFFIXES))}){hint}")
    return found


def labelled_images(folder: Path) -> list[Labelled]:
    """The test set of a folder in MVTec layout: test/good, test/DEFECT and ground_truth/DEFECT/NAME_mask.png.

    Raises:
        DatasetError: no such layout, or a defect whose masks are there for some images only.
    """
    if not (folder / "test").is_dir():
        raise DatasetError(
            f"{folder} is not in MVTec layout: it has no folder test/ with good/ and one folder per defect"
        )
    found = []
    for kind in sorted(p for p in (folder / "test").iterdir() if p.is_dir()):
        truth = folder / "ground_truth" / kind.name
        for path in _images(kind):
            mask = truth / f"{path.stem}_mask.png"
            if truth.is_dir() and not mask.is_file():
                raise DatasetError(f"{path} has no mask {mask}, though its neighbours have; add it")
            found.append(Labelled(path, kind.name, mask if mask.is_file() else None))
    if not any(item.good for item in found) or all(item.good for item in found):
        raise DatasetError(f"{folder}/test needs images in good/ and in at least one folder of a defect")
    return found


def split(paths: Sequence[Path], alpha: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Part good images into those to learn from and those to calibrate on, at random but repeatably.

    A third is held out, and no more than `alpha` needs: every image beyond that serves the detector better.

    Raises:
        DatasetError: fewer than three images.
    """
    if len(paths) < 3:  # noqa: PLR2004 -- two to learn from, one to calibrate on
        raise DatasetError(f"{len(paths)} good images are too few to learn from and to calibrate on; give more")
    held = min(len(paths) // 3, smallest_sample(alpha))
    order = np.random.default_rng(seed).permutation(len(paths))
    chosen = set(order[:held].tolist())
    return [p for i, p in enumerate(paths) if i not in chosen], [p for i, p in enumerate(paths) if i in chosen]


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, whatever their names and order."""
    each = sorted(hashlib.sha256(path.read_bytes()).digest() for path in paths)
    return hashlib.sha256(b"".join(each)).hexdigest()


def read_image(path: Path) -> Image:
    """An image that has to be readable.

    Raises:
        DatasetError: it is not, and why.
    """
    try:
        return images.read(path)
    except images.UndecodableError as error:
        raise DatasetError(f"{path}: {error}; repair it or take it out of the folder") from error


def read_mask(mask: Path | None, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A ground-truth mask at the resolution of an anomaly map; False everywhere without a file.

    A pixel counts as defective where more than half of what it covers is; of a defect too small for that the most
    covered pixels stay, so that no defect vanishes.

    Raises:
        DatasetError: the mask cannot be read.
    """
    if mask is None:
        return np.zeros(shape, bool)
    truth = cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE)
    if truth is None:
        raise DatasetError(f"{mask} is not a readable image")
    covered = cv2.resize((truth > 0).astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA)
    return covered > min(0.5, covered.max() * 0.99) if covered.any() else np.zeros(shape, bool)


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in images.SUFFIXES and not p.name.startswith("."))
