"""Images as files give them → the tensor a teacher expects. The one resize of training, calibration and running."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from detectors.base import Image


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Resize to `size`×`size` (aspect not kept), scale to 0…1, normalise by channel.

    The resize is bilinear with antialiasing on 8-bit values. RD4AD was published with Pillow's, to which this is equal
    within 2 of 255 on pure noise, mostly exactly; a resize without antialiasing gives visibly other scores.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        """Refuse what the strides of the networks cannot halve five times."""
        if self.size < 64 or self.size % 32:  # noqa: PLR2004
            raise ValueError(f"the network's size must be a multiple of 32 from 64 on, not {self.size}")

    def resize(self, images: Iterable[Image]) -> Tensor:
        """N images H×W×3 of any sizes → N×3×size×size uint8."""
        resized = [self._resize(image) for image in images]
        return torch.cat(resized) if resized else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)

    def normalise(self, pixels: Tensor) -> Tensor:
        """N×3×size×size uint8 → normalised float32, on the same device."""
        return self.standardise(pixels.float() / 255)

    def standardise(self, shares: Tensor) -> Tensor:
        """N×3×size×size, 0…1, perhaps with something painted in → normalised, on the same device."""
        # Filled, not copied from the CPU, which a CUDA graph could not capture.
        mean, std = (torch.stack([shares.new_full((1, 1), v) for v in values]) for values in (self.mean, self.std))
        return (shares - mean) / std

    def _resize(self, image: Image) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]  # channels-last in memory
        return functional.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
