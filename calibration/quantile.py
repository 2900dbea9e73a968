"""The order statistic that bounds false rejects for any distribution of scores: split conformal prediction.

Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (2005); Angelopoulos and Bates,
arXiv 2107.07511, section 1.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import beta


@dataclass(frozen=True, slots=True)
class Quantile:
    """A threshold and the share of good parts that it may reject.

    `threshold` is the `rank`-th smallest score, counted from 1. `carries` says whether the scores were enough
    for the alpha that was asked; if not, the threshold is the largest score and `alpha_carried` is 1 / (n + 1).
    """

    threshold: float
    rank: int
    alpha_carried: float
    carries: bool


def upper_quantile(scores: ArrayLike, alpha: float) -> Quantile:
    """Choose the threshold that a new good part exceeds with probability `alpha` at most.

    Args:
        scores: One finite number per good part, in any order; none of these parts may have trained the model.
        alpha: The share of good parts that may be rejected, between 0 and 1, both excluded.

    Raises:
        ValueError: There is no score, one is not finite, or `alpha` is out of range.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"scores must be a list of at least one number, not an array of shape {values.shape}")
    if not np.isfinite(values).all():
        position = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"score {position + 1} of {values.size} is {values[position]}, not a finite number")
    rank = conformal_rank(values.size, alpha)
    chosen = values.size if rank is None else rank
    return Quantile(
        threshold=float(np.partition(values, chosen - 1)[chosen - 1]),
        rank=chosen,
        alpha_carried=1 / (values.size + 1) if rank is None else alpha,
        carries=rank is not None,
    )


def conformal_rank(n: int, alpha: float) -> int | None:
    """Return k = ⌈(n + 1)(1 - alpha)⌉, or None where `n` scores are too few for `alpha`."""
    rank = math.ceil((n + 1) * (1 - _exact(alpha)))
    return rank if rank <= n else None


def smallest_sample(alpha: float) -> int:
    """Return how many scores `alpha` needs at least: ⌈1 / alpha⌉ - 1."""
    return math.ceil(1 / _exact(alpha)) - 1


def false_reject_interval(n: int, rank: int, confidence: float = 0.9) -> tuple[float, float]:
    """Bound the false-reject rate of one calibration: over calibrations it follows Beta(n + 1 - rank, rank).

    That law is exact for a continuous distribution of scores; ties only lower the rate. The interval is
    central: the rates below and above it are equally likely.
    """
    if not 1 <= rank <= n:
        raise ValueError(f"rank {rank} is not within 1 to {n}")
    tail = (1 - confidence) / 2
    low, high = beta.ppf([tail, 1 - tail], n + 1 - rank, rank)
    return float(low), float(high)


def _exact(alpha: float) -> Fraction:
    """Take `alpha` as it was written: 0.01 is 1/100, so that 99 parts carry it, whatever binary floats say."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha}")
    return Fraction(str(alpha))
