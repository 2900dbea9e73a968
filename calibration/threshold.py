"""Which score is the threshold, by which method, and what that method can promise. Pure."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from calibration.quantile import (
    conformal_rank,
    smallest_sample,
    smallest_tolerance_sample,
    tolerance_rank,
)
from calibration.tail import cautious_quantile

FEWEST_FOR_TAIL = 15
"""Scores below which a fitted tail says nothing."""


class Method(StrEnum):
    """The ways to a threshold, from the firmest promise to none."""

    tolerance = "tolerance"
    conformal = "conformal"
    tail = "tail"
    largest = "largest"
    quantile = "quantile"


@dataclass(frozen=True, slots=True)
class Choice:
    """A threshold and its grounds.

    `rank` counts the ascending scores from 1: the threshold is that one or, by `tail` and `quantile`, not below it; of
    `n_effective` independent parts it is as good as number `rank_effective`. `why` is a sentence.
    """

    threshold: float
    method: Method
    rank: int
    n_effective: int
    rank_effective: int
    why: str


def choose(
    scores: NDArray[np.float64],
    alpha: float,
    *,
    confidence: float = 0.95,
    n_effective: int | None = None,
    method: Method | None = None,
) -> Choice:
    """Choose the threshold that at most a share `alpha` of good parts exceeds, by the firmest method there is.

    That is `tolerance` (at most alpha, with this confidence), else `conformal` (at most alpha on average over
    calibrations), else, from 15 parts on, `tail` (about alpha, if the fitted tail is right), else `largest`. The
    methods promise different things, so the threshold may step down where a smaller alpha changes the method.

    Args:
        scores: Ascending and finite, one for each good part.
        alpha: The share of good parts that may be rejected, between 0 and 1, both excluded.
        confidence: Of `tolerance`, between 0 and 1.
        n_effective: As how many independent parts the scores count, 1 to n; None: as many as there are.
        method: This one instead of the firmest. `quantile` interpolates, as is widely done, and is always too low.

    Raises:
        ValueError: `alpha` or `confidence` is out of range, or the scores are too few for the method.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    n = scores.size if n_effective is None else n_effective
    ranks = {Method.tolerance: tolerance_rank(n, alpha, confidence), Method.conformal: conformal_rank(n, alpha)}
    chosen = method or _firmest(n, ranks)
    rank = ranks.get(chosen, ranks[Method.conformal] or n)
    if rank is None or (chosen is Method.tail and n < FEWEST_FOR_TAIL):
        raise ValueError(
            f"{n} good parts are too few for the method {chosen} at α = {100 * alpha:g} %, which needs "
            f"{_need(chosen, alpha, confidence)}; give more, or leave the choice of the method open"
        )
    if chosen is Method.largest:
        rank = n
    # Of n effective parts so many may lie above; the same share of the scores, rounded down, may.
    place = scores.size - (n - rank) * scores.size // n
    if chosen is Method.quantile:
        place = math.floor((scores.size - 1) * (1 - alpha)) + 1
        rank = max(1, n - math.ceil((scores.size - place) * n / scores.size))
    threshold = float(scores[place - 1])
    if chosen is Method.tail:
        threshold = max(threshold, cautious_quantile(scores, alpha, n))
    if chosen is Method.quantile:
        threshold = float(np.quantile(scores, 1 - alpha))
    return Choice(threshold, chosen, place, n, rank, _why(chosen, n, alpha, confidence, asked=method is not None))


def effective_number(groups: Sequence[str]) -> int:
    """Return as how many independent parts those in groups (one part, lot or burst each) count, 1 to n.

    n² / Σm², m the sizes of the groups: as many as there are groups, fewer where their sizes differ (Kish, Survey
    Sampling, 1965, for parts of a group that are all alike). How alike they are is not asked: what matters is whether
    one lot lies in the tail, and few lots do not tell that.
    """
    sizes = list(Counter(groups).values())
    return sum(sizes) ** 2 // sum(size * size for size in sizes)


def _firmest(n: int, ranks: dict[Method, int | None]) -> Method:
    for method, rank in ranks.items():
        if rank is not None:
            return method
    return Method.tail if n >= FEWEST_FOR_TAIL else Method.largest


def _need(method: Method, alpha: float, confidence: float) -> int:
    if method is Method.tolerance:
        return smallest_tolerance_sample(alpha, confidence)
    return smallest_sample(alpha) if method is Method.conformal else FEWEST_FOR_TAIL


def _why(method: Method, n: int, alpha: float, confidence: float, *, asked: bool) -> str:
    """Say in a sentence why this method, for the person who signs."""
    if asked:
        return f"the method {method} was asked for"
    tolerance, conformal = smallest_tolerance_sample(alpha, confidence), smallest_sample(alpha)
    share = f"α = {100 * alpha:g} %"
    match method:
        case Method.tolerance:
            return f"n = {n} is at least the {tolerance} that {share} needs with {100 * confidence:g} % confidence"
        case Method.conformal:
            return f"n = {n} carries {share} on average; {100 * confidence:g} % confidence needs {tolerance}"
        case _:
            return f"n = {n} is below the {conformal} that carry {share}"
