"""Changes of colour with which the networks are trained."""

import numpy as np
import torch
from torch import Tensor


def grey(pixels: Tensor) -> Tensor:
    """N×3×H×W uint8 → the same without colour."""
    return _luma(pixels.float()).round().byte().expand_as(pixels)


def jitter(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """N×3×H×W, 0…1 → the same with brightness, contrast or saturation changed by a factor of 0.8 to 1.2."""
    luma = _luma(pixels)
    away_from = (torch.zeros_like(luma), luma.mean((1, 2, 3), keepdim=True), luma)[rng.integers(3)]
    return (away_from + rng.uniform(0.8, 1.2) * (pixels - away_from)).clamp(0, 1)


def _luma(pixels: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device)  # ITU-R BT.601
    return (pixels * weights[:, None, None]).sum(1, keepdim=True)
