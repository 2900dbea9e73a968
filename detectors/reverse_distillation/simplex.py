"""RD++'s defects that never were: patches of simplex noise on good parts. Pure functions."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from opensimplex import OpenSimplex
from torch import Tensor

REFERENCE = 256
"""The image side for which sizes are given in pixels; other sides are scaled."""


def simplex_patches(images: Tensor, rng: np.random.Generator) -> Tensor:
    """RD++'s pseudo-anomalies: one rectangle of simplex noise an image (CVPR 2023, its code).

    `images` are N×3×S×S, 0…1, before normalisation; the result is not clipped. `rng` draws sizes (10 to 31 pixels of
    256 a side) and places. As in the published code all patches show the same texture, cut to their size.
    """
    result = images.clone()
    side = images.shape[-1]
    lowest, highest = (round(length * side / REFERENCE) for length in (10, 31))
    for image in result:
        height, width = rng.integers(lowest, highest, 2, endpoint=True)
        top, left = rng.integers(1, side - height), rng.integers(1, side - width)
        noise = simplex_field(side)[:, :height, :width]
        image[:, top : top + height, left : left + width] += 0.2 * torch.from_numpy(noise.copy()).to(image)
    return result


@cache
def simplex_field(side: int) -> NDArray[np.float32]:
    """The texture for images of `side` pixels, −2.4…2.4, as large as the largest patch.

    Fractal OpenSimplex noise of 6 octaves, persistence 0.6, the first with a wavelength of 32 pixels of 256. The
    channel is the third coordinate, so that neighbouring channels are neighbouring slices.
    """
    scale = side / REFERENCE
    place = np.arange(round(31 * scale)) / scale
    noise = OpenSimplex(seed=0).noise3array
    octaves = (32 / 2**octave for octave in range(6))
    field = sum(0.6**i * noise(place / w, place / w, np.arange(3) / w) for i, w in enumerate(octaves))
    return np.asarray(field, np.float32)
