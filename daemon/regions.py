"""Where on the image a defect may be, and how large it must be: a part of the score, never a second decision.

A score above the threshold stays the only rule of rejection. Scoring under a rule gives the level up to which the map
still meets the rule, so that `score > threshold` says exactly that what lies above the threshold meets it. A
calibration made with the same rule keeps its promise; `Rule.fingerprint` tells with which one it was made.

Sizes and places are in pixels of the image, whatever the resolution of the map. All but `load_mask` is pure, and may
be called from several threads at once.
"""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from daemon import images
from daemon.images import UndecodableError
from detectors.base import AnomalyMap, Detector, Image, Prediction

Mask = NDArray[np.bool_]
"""H×W; True is inspected, unless something else is said."""

_WHITE = 128  # and above, of 255
_FEWEST = 512  # values among which the score is looked for first


class MaskError(ValueError):
    """A mask that cannot be used, or not on this image. The message says which, why and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """What it takes to reject a part; without arguments, the plain rule: anything above the threshold, anywhere.

    A region is connected across corners too. One several times as large as `smallest_area_px` counts as several.

    Args:
        smallest_area_px: smaller regions do not count; 0 lets every one count.
        count: how many regions it takes; more than one only with a smallest area.
        kept: what is inspected, as large as the image; None for everything. It must not be changed afterwards.

    Raises:
        ValueError: no part could ever be rejected, or the arguments do not go together.
    """

    smallest_area_px: float = 0
    count: int = 1
    kept: Mask | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.smallest_area_px) and self.smallest_area_px >= 0):
            raise ValueError(f"a smallest area of {self.smallest_area_px} px: give 0 or more")
        if self.count < 1:
            raise ValueError(f"a count of {self.count} would reject every part: give 1 or more")
        if self.count > 1 and self.smallest_area_px == 0:
            raise ValueError(f"{self.count} regions cannot be counted without a smallest area: give one above 0")
        if self.kept is None:
            return
        if self.kept.ndim != 2 or self.kept.dtype != np.bool_:  # noqa: PLR2004 -- H×W
            raise ValueError(f"a mask of {self.kept.dtype} with {self.kept.ndim} axes: give booleans, H×W")
        if not self.kept.any():
            raise ValueError("the mask leaves nothing to inspect: keep at least one pixel")
        _check_room(self.kept, self.kept.size, self)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes scores: 12 hex digits, none for the plain rule."""
        if self.is_plain:
            return ""
        told = hashlib.sha256(f"{float(self.smallest_area_px)!r} {self.count}".encode())
        if self.kept is not None:
            told.update(f" {self.kept.shape}".encode() + np.packbits(self.kept).tobytes())
        return told.hexdigest()[:12]

    @property
    def is_plain(self) -> bool:
        """Whether the detector's own score stands as it is."""
        return self.smallest_area_px == 0 and self.kept is None


PLAIN = Rule()
"""Anything above the threshold, anywhere."""


class RegionDetector:
    """A detector that scores under a rule. Satisfies `detectors.base.Detector`."""

    def __init__(self, detector: Detector, rule: Rule) -> None:
        self._detector = detector
        self._rule = rule
        self.fingerprint = detector.fingerprint
        self.engine = detector.engine

    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        """Give one prediction per image, as `apply` makes it.

        Raises:
            DeviceLostError: the GPU does not answer any more.
            ValueError: an image has another size than the mask.
        """
        predictions = self._detector.predict(images)
        return [
            apply(prediction, image.shape, self._rule) for prediction, image in zip(predictions, images, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Region:
    """A place above the threshold, in pixels of the image from its upper left corner.

    `peak` and `mean` of the map are in units of the threshold, so above 1. The box is rounded outwards.
    """

    x: int
    y: int
    width: int
    height: int
    area_px: float
    peak: float
    mean: float


def apply(prediction: Prediction, image_shape: tuple[int, ...], rule: Rule) -> Prediction:
    """Score a map under a rule.

    The score is sup{t : {map > t} meets the rule}, so that `score > t` says exactly that {map > t} does. It exists
    because a set that meets the rule still does when it grows: ⌊a + b⌋ ≥ ⌊a⌋ + ⌊b⌋ where two regions become one.
    It is a value of the map, never above its maximum; NaN where the inspected map is not finite.

    Args:
        prediction: as the detector gave it.
        image_shape: height and width of the image; what follows them is not looked at.
        rule: the plain one gives the prediction back as it is.

    Returns:
        The score, and the map with a value outside the mask that is neither above the map inside nor above zero, so
        above no threshold.

    Raises:
        ValueError: the mask is not as large as the image, or the rule cannot be met on an image of this size.
    """
    if rule.is_plain:
        return prediction
    anomaly_map = prediction.anomaly_map
    inside = _inside(rule, image_shape[:2], anomaly_map.shape)
    values = anomaly_map[inside]
    filled = np.where(inside, anomaly_map, min(values.min(), np.float32(0)))
    if not np.isfinite(values).all():
        return Prediction(math.nan, filled)
    if rule.smallest_area_px == 0:
        return Prediction(float(values.max()), filled)
    image_px = math.prod(image_shape[:2])
    return Prediction(_highest_met(filled, values, image_px, rule), filled)


def _highest_met(filled: AnomalyMap, values: NDArray[np.float32], image_px: int, rule: Rule) -> float:
    """The lowest of the values above which the rule is not met any more, by bisection.

    It is looked for among the highest, and among more of them as long as the rule is met nowhere there: that is most
    often enough, and sorting all values takes longer than an engine.
    """
    count = min(values.size, _FEWEST)
    while True:
        levels = np.unique(np.partition(values, -count)[-count:])
        if count == values.size or _meets(filled > levels[0], image_px, rule):
            break
        count = min(values.size, 8 * count)
    # Nothing lies above the highest level, so that there is always one at which the rule is met no more.
    return float(levels[bisect_left(levels, x=True, key=lambda level: not _meets(filled > level, image_px, rule))])


def regions(anomaly_map: AnomalyMap, threshold: float, image_shape: tuple[int, ...], rule: Rule) -> list[Region]:
    """Find what lies above the threshold where the rule inspects and is at least as large as it asks.

    Args:
        anomaly_map: as the detector gave it, or as `apply` did.
        threshold: positive, in the map's units.
        image_shape: height and width of the image; what follows them is not looked at.
        rule: its count is not looked at.

    Returns:
        All of them, the highest peak first.

    Raises:
        ValueError: the mask is not as large as the image, or the rule cannot be met on an image of this size.
    """
    height, width = image_shape[:2]
    rows, columns = anomaly_map.shape
    # In double precision, as the verdict was.
    above = (anomaly_map > np.float64(threshold)) & _inside(rule, (height, width), anomaly_map.shape)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above.view(np.uint8), connectivity=8)
    values, owners = anomaly_map[above] / np.float64(threshold), labels[above].astype(np.int32, copy=False)
    sums, peaks = np.bincount(owners, values, count), np.zeros(count)
    np.maximum.at(peaks, owners, values)
    found = []
    for label, (left, top, across, down, cells) in enumerate(stats[1:].tolist(), start=1):
        if cells * float(height * width) < rule.smallest_area_px * anomaly_map.size:
            continue
        x, y = left * width // columns, top * height // rows
        region = Region(
            x=x,
            y=y,
            width=math.ceil((left + across) * width / columns) - x,
            height=math.ceil((top + down) * height / rows) - y,
            area_px=cells * height * width / anomaly_map.size,
            peak=float(peaks[label]),
            mean=float(sums[label]) / cells,
        )
        found.append(region)
    return sorted(found, key=lambda region: (-region.peak, region.y, region.x))


def shown(prediction: Prediction) -> AnomalyMap:
    """Give the map for a picture: up to its score, so that what is too small to count is not above the threshold."""
    return np.minimum(prediction.anomaly_map, np.float32(prediction.anomaly_score))


def load_mask(roi: Path | None, ignore: Path | None) -> Mask | None:
    """Read what is inspected from images of the camera's size, painted over in black and white.

    Args:
        roi: white where parts are inspected; None for everywhere.
        ignore: white where they are not; None for nowhere. White is above 127 of 255 in every channel.

    Returns:
        True where parts are inspected; None without files.

    Raises:
        MaskError: a file cannot be read, the two differ in size, or nothing is left to inspect.
    """
    kept = None if roi is None else _read_white(roi)
    if kept is not None and not kept.any():
        raise MaskError(f"{roi}: has no white, so nothing would be inspected. Paint white (255) what is inspected.")
    if ignore is None:
        return kept
    ignored = _read_white(ignore)
    if kept is None:
        kept = np.ones_like(ignored)
    if kept.shape != ignored.shape:
        raise MaskError(
            f"{ignore}: is {_size(ignored.shape)} pixels, but {roi} is {_size(kept.shape)}."
            " Draw both on an image of the same camera."
        )
    kept &= ~ignored
    if not kept.any():
        raise MaskError(f"{ignore}: is white everywhere that is inspected, so nothing is left. Paint less of it white.")
    return kept


def _read_white(file: Path) -> Mask:
    try:
        image = images.read(file)
    except UndecodableError as error:
        raise MaskError(f"{file}: cannot be read as a mask: {error}. Save it again as a PNG.") from None
    except OSError as error:
        raise MaskError(
            f"{file}: the mask cannot be read ({error.strerror}). Put it there, readable by the daemon's user."
        ) from None
    return np.asarray((image >= _WHITE).all(axis=2))


def _meets(found: Mask, image_px: int, rule: Rule) -> bool:
    """Say whether regions at any resolution, found in an image of so many pixels, are large and many enough."""
    *_, stats, _ = cv2.connectedComponentsWithStats(found.view(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA] * float(image_px)
    if rule.smallest_area_px == 0:
        return len(areas) > 0
    return bool((areas // (rule.smallest_area_px * found.size)).sum() >= rule.count)


def _check_room(inside: Mask, image_px: int, rule: Rule) -> None:
    if not _meets(inside, image_px, rule):
        room = inside.mean() * image_px
        raise MaskError(
            f"{rule.count} × {rule.smallest_area_px:g} px do not fit into the {room:.0f} px inspected,"
            " so that no part could be rejected: make smallest_area_px or count smaller"
        )


@lru_cache(maxsize=64)
def _inside(rule: Rule, image_shape: tuple[int, int], map_shape: tuple[int, int]) -> Mask:
    """Bring the mask to the map: a pixel of the map is inspected if more than half of what it covers is kept."""
    height, width = image_shape
    inside = np.ones(map_shape, bool)
    if rule.kept is not None:
        if rule.kept.shape != image_shape:
            raise MaskError(
                f"the mask is {_size(rule.kept.shape)} pixels, but the image {_size(image_shape)}: draw the mask anew"
                " on an image of this size, or set the camera back"
            )
        # Between the corners of a pixel its integral is bilinear, so that this is exact; in whole numbers, for a tie to
        # fall the same way everywhere. The unit is one pixel by the size of the map.
        total = np.asarray(cv2.integral(rule.kept.view(np.uint8)), np.int64)
        rows = _interpolate(total, map_shape[0])
        covered = np.diff(np.diff(_interpolate(rows.T, map_shape[1]).T, axis=0), axis=1)
        inside = 2 * covered > height * width
        if not inside.any():
            raise MaskError(
                "what the mask keeps is too thin for the map, whose pixels are"
                f" {width / map_shape[1]:.1f}×{height / map_shape[0]:.1f} of the image's: keep more"
            )
    _check_room(inside, height * width, rule)
    inside.flags.writeable = False
    return inside


def _interpolate(total: NDArray[np.int64], cells: int) -> NDArray[np.int64]:
    """Take `cells` + 1 equidistant rows from first to last, between rows where need be, times `cells`."""
    last = len(total) - 1
    row, rest = np.divmod(np.arange(cells + 1) * last, cells)
    rest = rest[:, np.newaxis]
    below = np.minimum(row + 1, last)
    return np.asarray(total[row] * (cells - rest) + total[below] * rest, np.int64)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[0]}"
