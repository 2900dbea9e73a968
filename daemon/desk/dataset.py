"""Folders of images with known answers: what is in their files, and which of them to learn from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.calibration import CONFIDENCE
from calibration.quantile import smallest_sample, smallest_tolerance_sample
from daemon import images
from daemon.desk import lens
from daemon.desk.layouts import Category, DatasetError, Labelled, categories, image_files, read_category
from daemon.framing import PLAIN, Framing, FramingError
from detectors.base import Image

__all__ = [
    "Category",
    "DatasetError",
    "Labelled",
    "categories",
    "digest",
    "digest_of",
    "good_images",
    "identity",
    "labelled_images",
    "pictures",
    "read_category",
    "read_image",
    "read_mask",
    "read_regions",
    "split",
]


def good_images(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name.

    Raises:
        DatasetError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DatasetError(f"no such folder: {folder}")
    found = image_files(folder)
    if not found:
        inner = next((p for p in (folder / "train/good", folder / "train/ok", folder / "good") if p.is_dir()), None)
        hint = f"; did you mean {inner}?" if inner else ""
        raise DatasetError(f"{folder} holds no image ({', '.join(sorted(images.SUFFIXES))}){hint}")
    return found


def labelled_images(folder: Path) -> list[Labelled]:
    """The test set of a folder in any layout that `read_category` knows.

    Raises:
        DatasetError: as `read_category`.
    """
    return read_category(folder).test


def pictures(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders, whatever they show.

    Raises:
        DatasetError: no such folder, or no image in it.
    """
    inner = sorted(path for path in folder.rglob("*") if path.is_dir())
    found = [path for place in [folder, *inner] for path in image_files(place)]
    if not found:
        raise DatasetError(f"{folder} is no folder with images in it")
    return found


def split(paths: Sequence[Path], alpha: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Part good images into those to learn from and those to calibrate on, at random but repeatably.

    A third is held out, and no more than `alpha` needs, with confidence where a third is enough for that: every image
    beyond serves the detector better.

    Raises:
        DatasetError: fewer than three images.
    """
    if len(paths) < 3:  # noqa: PLR2004 -- two to learn from, one to calibrate on
        raise DatasetError(f"{len(paths)} good images are too few to learn from and to calibrate on; give more")
    third, firm = len(paths) // 3, smallest_tolerance_sample(alpha, CONFIDENCE)
    held = firm if third >= firm else min(third, smallest_sample(alpha))
    order = np.random.default_rng(seed).permutation(len(paths))
    chosen = set(order[:held].tolist())
    return [p for i, p in enumerate(paths) if i not in chosen], [p for i, p in enumerate(paths) if i in chosen]


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of files, whatever their names and order."""
    return digest_of([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])


def identity(path: Path) -> str:
    """What tells a picture, framed or not: the digest of its file, or of the file it was framed of."""
    return digest_of([lens.sha256(path)])


def digest_of(digests: Sequence[str]) -> str:
    """SHA-256 over the SHA-256 of files, in rising order."""
    return hashlib.sha256(b"".join(sorted(map(bytes.fromhex, digests)))).hexdigest()


def read_image(path: Path) -> Image:
    """An image that has to be readable, as it is, framed or not.

    Raises:
        DatasetError: it is not, and why.
    """
    try:
        return images.read(path)
    except images.UndecodableError as error:
        raise DatasetError(f"{path}: {error}; repair it or take it out of the folder") from error


def read_mask(mask: Path | None, shape: tuple[int, int], framing: Framing = PLAIN) -> NDArray[np.bool_]:
    """A ground-truth mask at the resolution of an anomaly map; False everywhere without a file.

    Any value but zero is defect, for some data sets write labels; of a folder the files are merged. A pixel counts as
    defective where more than half of what it covers is; of a file whose defect is too small for that the most covered
    pixels stay, so that no defect vanishes. A mask is cut and turned as its image is by `framing`.

    Raises:
        DatasetError: the mask cannot be read.
    """
    merged = np.zeros(shape, bool)
    for file in _files(mask):
        merged |= _fit(_placed(file, framing), shape)
    return merged


def read_regions(
    item: Labelled, shape: tuple[int, int], framing: Framing = PLAIN
) -> list[tuple[NDArray[np.bool_], float]]:
    """The regions of a part, fitted to an anomaly map as by `read_mask`, each with its saturation in pixels of the map.

    Each file of the mask is one region, unless it is all cut away. There is none where the data set defines no
    saturations.

    Raises:
        DatasetError: a mask cannot be read, or the values of its pixels are not one with a saturation.
    """
    if item.saturations is None:
        return []
    regions = []
    for file in _files(item.mask):
        labels, placed = _read_labels(file), _placed(file, framing)
        value, *others = np.unique(labels[labels > 0]).tolist() or [0]
        if others or value not in item.saturations:
            raise DatasetError(
                f"{file} is not one region: its values {[value, *others]} are not one that defects_config.json gives a "
                "saturation; use the files of the data set, or take that table away to do without AU-sPRO"
            )
        mask, saturation = _fit(placed, shape), item.saturations[value]
        whole = np.count_nonzero(mask) if saturation.relative else mask.size / placed.size
        if placed.any():
            regions.append((mask, saturation.threshold * whole))
    return regions


def _files(mask: Path | None) -> list[Path]:
    return [] if mask is None else image_files(mask) if mask.is_dir() else [mask]


def _read_labels(file: Path) -> NDArray[np.integer]:
    # In colour and at full depth: as 8-bit grey, the lowest labels of palettes and of 16-bit masks would round to 0.
    truth = cv2.imread(str(file), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if truth is None:
        raise DatasetError(f"{file} is not a readable image")
    return np.asarray(truth.max(axis=2))


def _placed(file: Path, framing: Framing) -> NDArray[np.integer]:
    try:
        return framing.place(_read_labels(file))
    except FramingError as error:
        raise DatasetError(f"{file}: {error}") from error


def _fit(labels: NDArray[np.integer], shape: tuple[int, int]) -> NDArray[np.bool_]:
    covered = cv2.resize(np.asarray(labels > 0, np.float32), shape[::-1], interpolation=cv2.INTER_AREA)
    return covered > min(0.5, covered.max() * 0.99) if covered.any() else np.zeros(shape, bool)
