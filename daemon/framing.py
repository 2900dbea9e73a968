"""What is done to an image before anything else sees it: shrunk, evenly lit, cut out, turned upright, in this order.

Pure.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from daemon import images
from detectors.base import Image

Shrink = Literal[1, 2, 4, 8]
"""An image is brought to 1/shrink of its size, sides rounded up."""

Crop = tuple[int, int, int, int]
"""x, y, width, height, in pixels of the source image as it is shrunk, from its upper left corner."""

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
        flat_field: an evenly lit white surface as the same camera sees it, shrunk; None for none. Each channel of an
            image is multiplied by mean / flat field, rounded and clipped. It must not be changed afterwards.
        crop: what is kept of the source image; None for all.
        rotate: by how much what is kept is then turned.
        shrink: by how much images are shrunk before all that; whoever decodes files shrinks them by `images.decode`.

    Raises:
        FramingError: a pixel that is kept is dead in the flat field, or the crop is empty or outside it.
    """

    flat_field: Image | None = None
    crop: Crop | None = None
    rotate: Turn = 0
    shrink: Shrink = 1
    _gain: NDArray[np.float32] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.crop is not None and (min(self.crop[:2]) < 0 or min(self.crop[2:]) < 1):
            raise FramingError(f"crop = {list(self.crop)}: give x and y from 0, width and height from 1")
        if self.flat_field is not None:
            object.__setattr__(self, "_gain", _gain(self.flat_field, self._cut(self.flat_field)))

    @property
    def is_plain(self) -> bool:
        """Whether images stay as they are."""
        return self.flat_field is None and self.crop is None and self.rotate == 0 and self.shrink == 1

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes images: 12 hex digits, none where they stay as they are."""
        if self.is_plain:
            return ""
        told = hashlib.sha256(f"{self.crop} {self.rotate}".encode())
        if self.flat_field is not None:
            told.update(f" {self.flat_field.shape}".encode() + self.flat_field.tobytes())
        if self.shrink > 1:  # fingerprints from before images were shrunk stay as they are
            told.update(f" 1/{self.shrink}".encode())
        return told.hexdigest()[:12]

    def apply(self, image: Image) -> Image:
        """Frame an image as the camera took it; it is not changed itself.

        Raises:
            FramingError: as `finish`.
        """
        return self.finish(images.shrunk(image, self.shrink))

    def finish(self, image: Image) -> Image:
        """Frame an image that came shrunk already, by `images.decode` say; it is not changed itself.

        Raises:
            FramingError: its size is not that of the flat field, or the crop does not lie inside it.
        """
        if self.flat_field is not None and image.shape != self.flat_field.shape:
            raise FramingError(
                f"the image is {self._size(image)}, but the flat field {self._size(self.flat_field)}: take the flat "
                "field anew with the camera as it is, or set the camera back"
            )
        kept = self._cut(image)
        if self._gain is not None:
            kept = np.asarray(cv2.multiply(kept, self._gain, dtype=cv2.CV_8U), np.uint8)
        return self._turn(kept)

    def place(self, labels: NDArray[np.integer]) -> NDArray[np.integer]:
        """Cut and turn what belongs to an image pixel by pixel, a mask say, H×W, and leave its values as they are.

        It is not shrunk, so that nothing small vanishes: what it shows is what the framed image shows, `shrink` times
        as large.

        Raises:
            FramingError: the crop does not lie inside.
        """
        below, beside = (-side % self.shrink for side in labels.shape)
        return self._turn(self._cut(np.pad(labels, ((0, below), (0, beside)), mode="edge"), self.shrink))

    def _cut(self, pixels: NDArray[Any], scale: int = 1) -> NDArray[Any]:
        """What is kept of pixels that are `scale` times as many a side as those of the shrunk image."""
        if self.crop is None:
            return pixels
        x, y, width, height = self.crop
        rows, columns = slice(scale * y, scale * (y + height)), slice(scale * x, scale * (x + width))
        if rows.stop > pixels.shape[0] or columns.stop > pixels.shape[1]:
            raise FramingError(
                f"the image is {self._size(pixels, scale)}, but crop = {list(self.crop)} asks for {width}×{height} "
                f"from x {x}, y {y} on: correct the crop, or set the camera back"
            )
        # A copy, so that the rest of the image need not be kept.
        return pixels[rows, columns].copy()

    def _turn(self, pixels: NDArray[Any]) -> NDArray[Any]:
        return pixels if self.rotate == 0 else np.asarray(cv2.rotate(pixels, _CODES[self.rotate]))

    def _size(self, pixels: NDArray[Any], scale: int = 1) -> str:
        rows, columns = pixels.shape[:2]
        shrunk = f" at 1/{self.shrink} of its size" if self.shrink > 1 else ""
        return f"{columns // scale}×{rows // scale} pixels{shrunk}"


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
