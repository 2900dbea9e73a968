"""Features of teacher and student → distances → anomaly map. Pure tensor functions."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn import functional

SIGMA = 4.0


class AnomalyMap(nn.Module):
    """Distances of three levels, upsampled to the input's size, summed and smoothed.

    RD4AD's map: bilinear upsampling with aligned corners, a sum, a Gaussian of σ 4 pixels
    with 33 taps and edge-repeating borders. Upsampling and smoothing are linear and separable, so each level
    becomes M·a·Mᵀ with one matrix M made here in float64; the result equals scipy's to 1e-5.
    """

    def __init__(self, size: int, sides: Sequence[int]) -> None:
        super().__init__()
        for level, side in enumerate(sides, 1):
            self.register_buffer(f"spread{level}", _spread(size, side), persistent=False)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Three distances N×h×w → N×size×size, 0 (alike) … 6 (opposite at every level)."""
        spreads = [self.get_buffer(f"spread{level}") for level in range(1, len(levels) + 1)]
        tall = torch.cat([spread @ distance for spread, distance in zip(spreads, levels, strict=True)], dim=-1)
        return tall @ torch.cat(spreads, dim=1).T  # one product sums the levels


def distances(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> list[Tensor]:
    """Three features N×C×h×w of each → 1 − cos over the channels, N×h×w, 0 (alike) … 2 (opposite)."""
    return [1 - functional.cosine_similarity(e, d, dim=1) for e, d in zip(teacher, student, strict=True)]


def _spread(size: int, side: int) -> Tensor:
    """Make the size×side matrix that upsamples a line of `side` values and smooths it."""
    position = np.linspace(0, side - 1, size)
    below = np.minimum(position.astype(int), side - 2)
    upsample = np.zeros((size, side))
    upsample[np.arange(size), below] = 1 - (position - below)
    upsample[np.arange(size), below + 1] = position - below
    smoothed = gaussian_filter1d(upsample, SIGMA, axis=0, mode="reflect", truncate=4.0)
    return torch.from_numpy(smoothed).float()
