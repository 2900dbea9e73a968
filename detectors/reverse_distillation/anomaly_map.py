"""Features of teacher and student → anomaly map. Pure tensor functions."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn import functional

SIGMA = 4.0


class AnomalyMap(nn.Module):
    """Cosine distances of three levels, upsampled to the input's size, summed and smoothed.

    RD4AD's map: 1 − cos over the channels, bilinear upsampling with aligned corners, a sum, a Gaussian of σ 4 pixels
    with 33 taps and edge-repeating borders. Upsampling and smoothing are linear and separable, so each level
    becomes M·a·Mᵀ with one matrix M made here in float64; the result equals scipy's to 1e-5.
    """

    def __init__(self, size: int, sides: Sequence[int]) -> None:
        super().__init__()
        for level, side in enumerate(sides, 1):
            self.register_buffer(f"spread{level}", _spread(size, side), persistent=False)

    def forward(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        """Three features N×C×h×w of each → N×size×size, 0 (alike) … 6 (opposite at every level)."""
        maps = []
        for level, (e, d) in enumerate(zip(teacher, student, strict=True), 1):
            spread = self.get_buffer(f"spread{level}")
            distance = 1 - functional.cosine_similarity(e, d, dim=1)
            maps.append(spread @ distance @ spread.T)
        return torch.stack(maps).sum(dim=0)


def anomaly_score(maps: Tensor) -> Tensor:
    """N×H×W → N: the largest value of each map."""
    return maps.amax(dim=(1, 2))


def _spread(size: int, side: int) -> Tensor:
    """Make the size×side matrix that upsamples a line of `side` values and smooths it."""
    position = np.linspace(0, side - 1, size)
    below = np.minimum(position.astype(int), side - 2)
    upsample = np.zeros((size, side))
    upsample[np.arange(size), below] = 1 - (position - below)
    upsample[np.arange(size), below + 1] = position - below
    smoothed = gaussian_filter1d(upsample, SIGMA, axis=0, mode="reflect", truncate=4.0)
    return torch.from_numpy(smoothed).float()
