"""Order statistics that bound false rejects whatever the distribution of scores: how many, which, and how sure.

Split conformal prediction: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (2005); Angelopoulos and
Bates, arXiv 2107.07511, section 1. Tolerance bounds: Wilks, Annals of Mathematical Statistics 12 (1941).
"""

import math
from fractions import Fraction

from scipy.special import betaincinv  # scipy.stats has it too, and takes a second to import


def conformal_rank(n: int, alpha: float) -> int | None:
    """Return k = ⌈(n + 1)(1 - alpha)⌉, or None where `n` scores are too few for `alpha`.

    A further score exceeds the k-th smallest with probability `alpha` at most, on average over samples.
    """
    rank = math.ceil((n + 1) * (1 - _exact(alpha)))
    return rank if rank <= n else None


def tolerance_rank(n: int, alpha: float, confidence: float) -> int | None:
    """Return the lowest rank that at most `alpha` of all parts exceed with this confidence; None for too few scores.

    The share above the k-th smallest follows Beta(n + 1 - k, k); its `confidence` quantile must not exceed `alpha`.
    """
    _exact(alpha)
    low, high = 0, n + 1  # of ranks, the lower is not enough, the upper would be
    while high - low > 1:
        rank = (low + high) // 2
        low, high = (low, rank) if betaincinv(n + 1 - rank, rank, confidence) <= alpha else (rank, high)
    return high if high <= n else None


def smallest_sample(alpha: float) -> int:
    """Return how many scores `alpha` needs at least on average: ⌈1 / alpha⌉ - 1."""
    return math.ceil(1 / _exact(alpha)) - 1


def smallest_tolerance_sample(alpha: float, confidence: float) -> int:
    """Return how many scores `alpha` needs at least with this confidence: (1 - alpha)ⁿ ≤ 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-float(_exact(alpha))))


def false_reject_interval(n: int, rank: int, confidence: float = 0.9) -> tuple[float, float]:
    """Bound the false-reject rate of one sample: over samples it follows Beta(n + 1 - rank, rank).

    That law is exact for a continuous distribution of scores; ties only lower the rate. The interval is
    central: the rates below and above it are equally likely.
    """
    if not 1 <= rank <= n:
        raise ValueError(f"rank {rank} is not within 1 to {n}")
    tail = (1 - confidence) / 2
    low, high = betaincinv(n + 1 - rank, rank, [tail, 1 - tail])
    return float(low), float(high)


def _exact(alpha: float) -> Fraction:
    """Take `alpha` as it was written: 0.01 is 1/100, so that 99 parts carry it, whatever binary floats say."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha}")
    return Fraction(str(alpha))
