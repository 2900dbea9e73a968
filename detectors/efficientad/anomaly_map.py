"""What the networks say → anomaly maps (section 3.4 of the paper)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from detectors.efficientad.network import FEATURES, PIXELS

STRIDE, CENTRE = 4, 16
"""Cell (i, j) sees 33×33 pixels around pixel (16 + 4i, 16 + 4j)."""


def differences(taught: Tensor, student: Tensor, autoencoder: Tensor) -> Tensor:
    """Outputs of `EfficientAD` → N×2×56×56, mean squared differences over channels.

    First of student and teacher, then of student and autoencoder.
    """
    local = (taught - student[:, :FEATURES]).square().mean(1)
    whole = (autoencoder - student[:, FEATURES:]).square().mean(1)
    return torch.stack([local, whole], 1)


def quantiles(found: Tensor) -> Tensor:
    """Differences N×2×56×56 on held-out good parts → 2×2: the 0.9- and 0.995-quantile over all cells, for each map.

    Where both are equal, as on pictures without any texture, the second is put slightly above the first.
    """
    cells = found.transpose(0, 1).flatten(1).cpu().numpy()
    low, high = np.quantile(cells, (0.9, 0.995), axis=1)
    return torch.from_numpy(np.stack([low, np.maximum(high, low * (1 + 1e-6) + 1e-12)], 1)).float()


def combine(found: Tensor, measured: Tensor) -> Tensor:
    """Differences N×2×56×56 → N×56×56: the mean of both, each scaled so that q_a becomes 0 and q_b becomes 0.1.

    `measured` are the `quantiles`. Negative values are normal.
    """
    low, high = measured[:, 0, None, None], measured[:, 1, None, None]
    return (0.1 * (found - low) / (high - low)).mean(1)


def align(cells: Tensor) -> Tensor:
    """N×56×56 → N×256×256, linear between the cells, each at the pixel in the middle of what it sees.

    The 16 pixels of the border that are no cell's middle repeat the nearest cell. The public implementations stretch
    the grid over the picture, which misplaces anomalies by up to 15 pixels, or pad it first, which leaves 1.5 and
    lowers every maximum. Here the map passes through the cells' values: its maximum is the grid's.
    """
    reach = STRIDE * (cells.shape[-1] - 1) + 1
    inner = functional.interpolate(cells[:, None], (reach, reach), mode="bilinear", align_corners=True)
    after = PIXELS - CENTRE - reach
    return functional.pad(inner, (CENTRE, after, CENTRE, after), mode="replicate")[:, 0]
