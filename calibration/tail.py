"""The tail of good scores beyond the largest that was seen: a generalised extreme-value distribution, shrunk.

An image's score is the largest of many pixels, for which this family is the natural one. It is fitted by L-moments
(Hosking, Journal of the Royal Statistical Society B 52, 1990; Hosking, Wallis and Wood, Technometrics 27, 1985), and
the skewness, which few scores tell badly, is drawn towards that of the Gumbel distribution. An estimate: it rests on
the family being right, where order statistics rest on nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

_GUMBEL_SKEWNESS = 0.1699
_PRIOR = 50
"""How many scores the Gumbel distribution's skewness weighs."""
_EULER = 0.5772156649015329
_FLAT = 1e-6
"""Shapes smaller than this are Gumbel's, where the general formula divides by zero."""
_DRAWS = 200
_CAUTION = 0.75


@dataclass(frozen=True, slots=True)
class Tail:
    """Location and scale in the units of the scores; `shape` above 0 has an upper end, below 0 a heavy tail."""

    location: float
    scale: float
    shape: float

    def quantile(self, alpha: float) -> float:
        """Return the score that a share `alpha` of good parts exceeds, 0 < alpha < 1."""
        doubled = -math.log1p(-alpha)
        if abs(self.shape) < _FLAT:
            return self.location - self.scale * math.log(doubled)
        return self.location + self.scale / self.shape * (1 - math.pow(doubled, self.shape))

    def exceeded(self, score: float) -> float:
        """Return the share of good parts above a score, 0…1."""
        reduced = (score - self.location) / self.scale
        if abs(self.shape) >= _FLAT:
            inside = 1 - self.shape * reduced
            if inside <= 0:  # beyond the upper end, or below the lower one
                return 0.0 if self.shape > 0 else 1.0
            reduced = -math.log(inside) / self.shape
        return -math.expm1(-math.exp(min(-reduced, 700)))


def fit_tail(scores: Scores, n_effective: int) -> Tail | None:
    """Fit ascending scores, at least three; None where all are equal, since a point has no tail.

    `n_effective` is as how many independent ones they count: so much their skewness is trusted.
    """
    return _from_moments(*_moments(scores, np.ones(scores.size)), n_effective)


def cautious_quantile(scores: Scores, alpha: float, n_effective: int) -> float:
    """Return the 75 % bootstrap quantile of the fitted tail's quantile: fewer scores, more caution.

    The draws are seeded, so that equal scores give an equal threshold.

    Args:
        scores: Ascending, at least three.
        alpha: The share of good parts that may exceed the result.
        n_effective: As how many independent scores they count, at least three; so many make a draw.
    """
    if scores[0] == scores[-1]:
        return float(scores[-1])
    random = np.random.RandomState(0)  # its stream is frozen, and a stored threshold is computed again
    even = np.full(scores.size, 1 / scores.size)
    drawn = []
    for _ in range(_DRAWS):
        tail = _from_moments(*_moments(scores, random.multinomial(n_effective, even)), n_effective)
        drawn.append(float(scores[-1]) if tail is None else tail.quantile(alpha))
    return float(np.quantile(drawn, _CAUTION))


def _moments(scores: Scores, counts: NDArray[np.generic]) -> tuple[float, float, float]:
    """Return the first three unbiased L-moments of ascending scores, each of which is there `counts` times."""
    weight = counts.astype(np.float64)
    n = weight.sum()
    before = np.cumsum(weight) - weight
    # Of c equal scores with b before them, the ranks are b … b + c - 1: sums of j and j(j - 1) over those.
    first = weight * (before + (weight - 1) / 2)
    second = weight * (before * (before - 1) + before * (weight - 1) + (weight - 1) * (weight - 2) / 3)
    # Differences to the largest that is there keep their digits where the scores are nearly equal, and are 0 where they
    # are equal.
    centre = float(scores[np.flatnonzero(weight)[-1]])
    relative = scores - centre
    b0 = float(weight @ relative / n)
    b1 = float(first @ relative / (n * (n - 1)))
    b2 = float(second @ relative / (n * (n - 1) * (n - 2)))
    return b0 + centre, 2 * b1 - b0, 6 * b2 - 6 * b1 + b0


def _from_moments(mean: float, spread: float, third: float, n: int) -> Tail | None:
    if spread <= 0:
        return None
    trust = n / (n + _PRIOR)
    skewness = trust * third / spread + (1 - trust) * _GUMBEL_SKEWNESS
    c = 2 / (3 + skewness) - math.log(2) / math.log(3)
    shape = 7.859 * c + 2.9554 * c * c
    if abs(shape) < _FLAT:
        scale = spread / math.log(2)
        return Tail(mean - _EULER * scale, scale, 0.0)
    gamma = math.gamma(1 + shape)
    scale = spread * shape / ((1 - 2**-shape) * gamma)
    return Tail(mean - scale * (1 - gamma) / shape, scale, shape)
