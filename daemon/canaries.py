"""Image → four numbers that tell light, focus and position from the product.

When the scores drift, something changed: the parts, or how they are seen. These numbers know nothing of defects and
move with the picture alone. Each is watched like the scores; the alarms together name a cause.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.calibration import Appearance
from calibration.drift import Reading
from detectors.base import Image

Reference = NDArray[np.uint8]
"""S×S grey, the mean of the calibration's images, each stretched to that square."""

CAUSES = {"brightness": "light", "sharpness": "focus", "contrast": "light", "shift": "position"}
"""What an alarm of each number means, the first alarm counts. Blur lowers contrast, but never brightness."""

_SIDE = 512
_THUMBNAIL = 128
_WINDOW = cv2.createHanningWindow((_THUMBNAIL, _THUMBNAIL), cv2.CV_32F)
_SMOOTH = np.exp(-2 * np.pi**2 * (np.fft.fftfreq(_THUMBNAIL)[:, np.newaxis] ** 2 + np.fft.rfftfreq(_THUMBNAIL) ** 2))
"""The spectrum of a Gaussian of one pixel: fine detail differs from part to part and would drown the peak."""

_FLAT = 1.0
_TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Canaries:
    """The numbers of one image, reduced to grey of at most 512 px a side: finer blur no detector here sees.

    `brightness` is its mean and `contrast` its standard deviation, in grey values 0…255. `sharpness` is the
    root-mean-square slope over the standard deviation, per pixel of the reduced image: a stronger or weaker light
    leaves it as it is. `shift` is how far the image lies from the reference, in pixels of the source, without a
    sign; NaN without a reference. In a flat image sharpness and shift are 0.
    """

    brightness: float
    contrast: float
    sharpness: float
    shift: float


@dataclass(frozen=True, slots=True)
class Glance:
    """What is kept of one image: its numbers without the shift, its thumbnail, and its width and height."""

    canaries: Canaries
    thumbnail: NDArray[np.float32]
    size: tuple[int, int]


def glance(image: Image) -> Glance:
    """Take what `appearance` needs of one image."""
    grey = _grey(image)
    mean, deviation = (float(value.item()) for value in cv2.meanStdDev(grey))
    seen = Canaries(
        brightness=mean,
        contrast=deviation,
        sharpness=_slope(grey) / deviation if deviation > _FLAT else 0.0,
        shift=math.nan,
    )
    return Glance(seen, _thumbnail(grey), (image.shape[1], image.shape[0]))


def measure(image: Image, reference: Reference | None) -> Canaries:
    """Measure one image. A shift of half the image or more is not told from a smaller one the other way."""
    seen = glance(image)
    return seen.canaries if reference is None else _placed(seen, reference)


def appearance(glances: Sequence[Glance], known: Appearance | None = None) -> Appearance | None:
    """Put together how good parts look, after those that are known; None for fewer than two, which cannot be compared.

    Each is compared with the mean of the others: it would lie closer to a mean that it is part of itself than a new
    image does, and every stream would seem to drift. Where there is a known mean, that stays the reference.
    """
    if known is not None:
        mean = reference_of(known)
        seen = [_placed(one, mean) for one in glances]
    elif len(glances) > 1:
        total = np.sum([one.thumbnail for one in glances], axis=0, dtype=np.float64)
        others = (np.rint((total - one.thumbnail) / (len(glances) - 1)).astype(np.uint8) for one in glances)
        seen = [_placed(one, reference) for one, reference in zip(glances, others, strict=True)]
        mean = np.rint(total / len(glances)).astype(np.uint8)
    else:
        return None
    before = known.canaries if known else {}
    canaries = {
        field.name: (*before.get(field.name, ()), *(getattr(one, field.name) for one in seen))
        for field in fields(Canaries)
    }
    return Appearance(canaries, base64.b64encode(mean.tobytes()).decode())


def reference_of(looks: Appearance) -> Reference:
    """Read the thumbnail of an appearance."""
    return np.frombuffer(base64.b64decode(looks.thumbnail), np.uint8).reshape(_THUMBNAIL, _THUMBNAIL)


def cause(readings: Mapping[str, Reading]) -> str:
    """Name what drifted, from the watches by name: "light", "focus", "position", "product", or "" if nothing did.

    What comes earlier in that order may move what comes later, the scores last of all: the product is named only when
    none of the picture's own numbers alarms.
    """
    alarming = {name for name, reading in readings.items() if reading.alarm}
    for name, origin in CAUSES.items():
        if name in alarming:
            return origin
    return "product" if alarming else ""


def _grey(image: Image) -> NDArray[np.uint8]:
    """Reduce by a whole factor, which OpenCV does fifty times faster than by any other; at most 512 px a side."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    factor = math.ceil(max(grey.shape) / _SIDE)
    height, width = (max(length // factor, 1) for length in grey.shape)
    cut = grey[: height * factor, : width * factor]
    return np.asarray(cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _slope(grey: NDArray[np.uint8]) -> float:
    """Root mean square of the gradient, in grey values per pixel."""
    across, down = (cv2.norm(cv2.Sobel(grey, cv2.CV_16S, *axis)) / 8 for axis in ((1, 0), (0, 1)))
    return math.hypot(across, down) / math.sqrt(grey.size)


def _thumbnail(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    small = cv2.resize(grey, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def _placed(seen: Glance, there: Reference) -> Canaries:
    return replace(seen.canaries, shift=_shift(seen.thumbnail, there, *seen.size))


def _shift(thumbnail: NDArray[np.float32], reference: Reference, width: int, height: int) -> float:
    """Correlate phases (Kuglin and Hines, 1975), under a window, for edges of pictures do not meet.

    Each is taken less its mean, which would correlate with itself at 0.
    """
    here, there = thumbnail - thumbnail.mean(), reference - reference.mean()
    if min(here.std(), there.std()) < _FLAT:
        return 0.0
    cross = np.fft.rfft2(here * _WINDOW) * np.conj(np.fft.rfft2(there * _WINDOW))
    correlation = np.fft.irfft2(cross / np.maximum(np.abs(cross), _TINY) * _SMOOTH, s=here.shape)
    row, column = np.unravel_index(int(correlation.argmax()), here.shape)
    down = _peak(correlation[:, column], int(row)) * height / _THUMBNAIL
    across = _peak(correlation[row], int(column)) * width / _THUMBNAIL
    return math.hypot(across, down)


def _peak(circle: NDArray[np.float64], place: int) -> float:
    """Where a parabola through the highest value and its neighbours has its top, counted from 0 both ways round."""
    before, top, after = circle[place - 1], circle[place], circle[(place + 1) % circle.size]
    bend = before - 2 * top + after
    offset = 0.5 * (before - after) / bend if bend < 0 else 0.0
    return float((place + circle.size // 2) % circle.size - circle.size // 2 + offset)
