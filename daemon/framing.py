"""What is done to an image before anything else sees it: evenly lit, cut out, turned upright, in this order. Pure."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.base import Image

Crop = tuple[int, int, int, int]
"""x, y, width, height, in pixels of the source image, from its upper left corner."""

Turn = Literal[0, 90, 180, 270]
"""Degrees, clockwise."""

FRAMING = "inspectd-framing"
"""What a framed image says of its framing: the keyword of a PNG's text, or what a JPEG's comment begins with."""

DEAD = 0.05
"""A pixel of the flat field below this share of its channel's mean shows nothing that could be made brighter."""

_CODES: dict[int, int] = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}


class FramingError(ValueError):
    """A framing that cannot be used, or not on this image. The message says why and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Framing:
    """What is done to each image of a station. May be applied from several threads at once.

    Args:
        flat_field: an evenly lit white surface as the same camera sees it; None for none. Each channel of an image is
            multiplied by mean / flat field, rounded and clipped. It must not be changed afterwards.
        crop: what is kept of the source image; None for all.
        rotate: by how much what is kept is then turned.

    Raises:
        FramingError: a pixel that is kept is dead in the flat field, or the crop is empty or outside it.
    """

    flat_field: Image | None = None
    crop: Crop | None = None
    rotate: Turn = 0
    _gain: NDArray[np.float32] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.crop is not None and (min(self.crop[:2]) < 0 or min(self.crop[2:]) < 1):
            raise FramingError(f"crop = {list(self.crop)}: give x and y from 0, width and height from 1")
        if self.flat_field is not None:
            object.__setattr__(self, "_gain", _gain(self.flat_field, self._cut(self.flat_field)))

    @property
    def is_plain(self) -> bool:
        """Whether images stay as they are."""
        return self.flat_field is None and self.crop is None and self.rotate == 0

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes images: 12 hex digits, none where they stay as they are."""
        if self.is_plain:
            return ""
        told = hashlib.sha256(f"{self.crop} {self.rotate}".encode())
        if self.flat_field is not None:
            told.update(f" {self.flat_field.shape}".encode() + self.flat_field.tobytes())
        return told.hexdigest()[:12]

    def apply(self, image: Image) -> Image:
        """Frame an image; it is not changed itself.

        Raises:
            FramingError: its size is not that of the flat field, or the crop does not lie inside it.
        """
        if self.flat_field is not None and image.shape != self.flat_field.shape:
            raise FramingError(
                f"the image is {_size(image)} pixels, but the flat field {_size(self.flat_field)}: take the flat field "
                "anew with the camera as it is, or set the camera back"
            )
        kept = self._cut(image)
        if self._gain is not None:
            kept = np.asarray(cv2.multiply(kept, self._gain, dtype=cv2.CV_8U), np.uint8)
        return self._turn(kept)

    def place(self, labels: NDArray[np.integer]) -> NDArray[np.integer]:
        """Cut and turn what belongs to an image pixel by pixel, a mask say, H×W, and leave its values as they are.

        Raises:
            FramingError: the crop does not lie inside.
        """
        return self._turn(self._cut(labels))

    def _cut(self, pixels: NDArray[Any]) -> NDArray[Any]:
        if self.crop is None:
            return pixels
        x, y, width, height = self.crop
        rows, columns = pixels.shape[:2]
        if x + width > columns or y + height > rows:
            raise FramingError(
                f"the image is {columns}×{rows} pixels, but crop = {list(self.crop)} asks for {width}×{height} from "
                f"x {x}, y {y} on: correct the crop, or set the camera back"
            )
        # A copy, so that the rest of the image need not be kept.
        return pixels[y : y + height, x : x + width].copy()

    def _turn(self, pixels: NDArray[Any]) -> NDArray[Any]:
        return pixels if self.rotate == 0 else np.asarray(cv2.rotate(pixels, _CODES[self.rotate]))


PLAIN = Framing()
"""Images stay as they are."""


def _gain(flat: Image, kept: Image) -> NDArray[np.float32]:
    """What each pixel and channel that is kept is multiplied by; the mean is of the whole flat field."""
    mean = flat.mean(axis=(0, 1))
    # Where all is black the mean is 0, and nothing would be below it.
    dead = int((kept < np.maximum(DEAD * mean, 1)).any(axis=2).sum())
    if dead:
        raise FramingError(
            f"{dead} px are darker than {DEAD:.0%} of the mean, so that nothing could be made of them: take the "
            "image anew of a white surface, evenly lit, without the lens cap, or crop those pixels away"
        )
    return np.asarray(mean / kept, np.float32)


def _size(image: Image) -> str:
    return f"{image.shape[1]}×{image.shape[0]}"
