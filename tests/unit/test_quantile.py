"""The finite-sample order statistics: their ranks, their edges, and what they promise."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from calibration.quantile import (
    conformal_rank,
    false_reject_interval,
    smallest_sample,
    smallest_tolerance_sample,
    tolerance_rank,
)

alphas = st.floats(0.002, 0.998)
confidences = st.floats(0.5, 0.999)
unhurried = settings(deadline=None, max_examples=50)


@pytest.mark.parametrize(
    ("n", "alpha", "rank"),
    [
        (99, 0.01, 99),
        (98, 0.01, None),
        (199, 0.01, 198),
        (200, 0.01, 199),
        (19, 0.05, 19),
        (9, 0.1, 9),
        (999, 0.001, 999),
        (998, 0.001, None),
        (1_000_000, 0.01, 990_001),
        (999_999, 0.000001, 999_999),
        (999_998, 0.000001, None),
        (1, 0.5, 1),
        (1, 0.49, None),
    ],
)
def test_the_rank_is_that_of_exact_arithmetic(n: int, alpha: float, rank: int | None) -> None:
    assert conformal_rank(n, alpha) == rank


@pytest.mark.parametrize(
    ("alpha", "n"), [(0.05, 19), (0.02, 49), (0.01, 99), (0.005, 199), (0.001, 999), (0.3, 3), (0.5, 1)]
)
def test_the_smallest_sample_is_that_of_the_published_table(alpha: float, n: int) -> None:
    assert smallest_sample(alpha) == n


@unhurried
@given(alphas)
def test_the_smallest_sample_carries_alpha_and_one_part_less_does_not(alpha: float) -> None:
    n = smallest_sample(alpha)
    assert conformal_rank(n, alpha) is not None
    assert n == 1 or conformal_rank(n - 1, alpha) is None


@unhurried
@given(st.integers(1, 10**6), alphas)
def test_the_rank_is_the_smallest_that_keeps_the_false_reject_rate_within_alpha(n: int, alpha: float) -> None:
    rank = conformal_rank(n, alpha)
    exact = Fraction(str(alpha))
    if rank is None:
        assert Fraction(1, n + 1) > exact
    else:
        assert Fraction(n + 1 - rank, n + 1) <= exact < Fraction(n + 2 - rank, n + 1)


@pytest.mark.parametrize(
    ("alpha", "sizes"),
    [
        (0.05, (59, 93, 124, 181)),
        (0.02, (149, 236, 313, 456)),
        (0.01, (299, 473, 628, 913)),
        (0.005, (598, 947, 1258, 1829)),
        (0.001, (2995, 4742, 6294, 9151)),
    ],
)
def test_the_tolerance_ranks_are_those_of_the_published_table(alpha: float, sizes: tuple[int, ...]) -> None:
    for above, n in zip((0, 1, 2, 4), sizes, strict=True):
        assert tolerance_rank(n, alpha, 0.95) == n - above
        fewer = tolerance_rank(n - 1, alpha, 0.95)
        assert fewer == (n - above if above else None)
    assert smallest_tolerance_sample(alpha, 0.95) == sizes[0]


@pytest.mark.parametrize(
    ("alpha", "confidence", "n"),
    [
        (0.05, 0.9, 45),
        (0.02, 0.9, 114),
        (0.01, 0.9, 230),
        (0.005, 0.9, 460),
        (0.001, 0.9, 2302),
        (0.05, 0.99, 90),
        (0.02, 0.99, 228),
        (0.01, 0.99, 459),
        (0.005, 0.99, 919),
        (0.001, 0.99, 4603),
    ],
)
def test_the_smallest_tolerance_sample_is_that_of_the_published_table(alpha: float, confidence: float, n: int) -> None:
    assert smallest_tolerance_sample(alpha, confidence) == n
    assert tolerance_rank(n, alpha, confidence) == n
    assert tolerance_rank(n - 1, alpha, confidence) is None


@unhurried
@given(st.integers(1, 10**5), alphas, confidences)
def test_the_tolerance_rank_is_the_lowest_that_the_binomial_law_allows(n: int, alpha: float, confidence: float) -> None:
    # More than alpha lie above the k-th smallest exactly if k or more of n scores lie below the (1 - alpha)-quantile.
    rank = tolerance_rank(n, alpha, confidence)
    if rank is None:
        assert binom.sf(n - 1, n, 1 - alpha) > (1 - confidence) * (1 - 1e-9)
    else:
        assert binom.sf(rank - 1, n, 1 - alpha) <= (1 - confidence) * (1 + 1e-9)
        assert binom.sf(rank - 2, n, 1 - alpha) > (1 - confidence) * (1 - 1e-9)


@unhurried
@given(st.integers(1, 10**5), alphas, alphas, confidences, confidences)
def test_the_tolerance_rank_never_falls_as_alpha_shrinks_or_the_confidence_grows(
    n: int, one: float, other: float, sure: float, surer: float
) -> None:
    (strict, lax), (low, high) = sorted((one, other)), sorted((sure, surer))
    bound = n + 1  # None stands for a rank beyond the scores
    assert (tolerance_rank(n, strict, low) or bound) >= (tolerance_rank(n, lax, low) or bound)
    assert (tolerance_rank(n, lax, high) or bound) >= (tolerance_rank(n, lax, low) or bound)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        conformal_rank(1, alpha)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        tolerance_rank(1, alpha, 0.95)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        smallest_sample(alpha)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        smallest_tolerance_sample(alpha, 0.95)


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.01), (60, 0.05), (250, 0.02), (137, 0.033)])
def test_the_realised_false_reject_rate_averages_alpha_at_most(n: int, alpha: float) -> None:
    rank = conformal_rank(n, alpha)
    assert rank is not None
    # Scores are uniform on 0 to 1, so the true false-reject rate of a threshold is what lies above it.
    rates = 1 - np.sort(np.random.default_rng(n).random((3000, n)))[:, rank - 1]
    noise = 3 * rates.std() / math.sqrt(rates.size)
    assert alpha - 1 / (n + 1) - noise <= rates.mean() <= alpha + noise


@pytest.mark.parametrize(
    ("n", "alpha", "confidence"), [(299, 0.01, 0.95), (400, 0.02, 0.9), (59, 0.05, 0.95), (250, 0.1, 0.8)]
)
def test_the_realised_false_reject_rate_keeps_within_alpha_with_the_confidence(
    n: int, alpha: float, confidence: float
) -> None:
    rank = tolerance_rank(n, alpha, confidence)
    assert rank is not None
    rates = 1 - np.sort(np.random.default_rng(n).random((2000, n)))[:, rank - 1]
    kept = int((rates <= alpha).sum())
    assert kept >= binom.ppf(1e-4, rates.size, confidence)


def test_the_false_reject_interval_holds_the_rate_of_nine_calibrations_in_ten() -> None:
    rank = conformal_rank(200, 0.05)
    assert rank is not None
    rates = 1 - np.sort(np.random.default_rng(5).random((3000, 200)))[:, rank - 1]
    low, high = false_reject_interval(200, rank)
    assert np.mean(rates < low) == pytest.approx(0.05, abs=0.015)
    assert np.mean(rates > high) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("n", [1, 59, 299, 1_000_000])
def test_the_interval_of_a_maximum_is_the_closed_form(n: int) -> None:
    low, high = false_reject_interval(n, n)
    assert low == pytest.approx(1 - 0.95 ** (1 / n), rel=1e-9)
    assert high == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-9)


@pytest.mark.parametrize("rank", [0, 11])
def test_a_rank_outside_the_scores_has_no_interval(rank: int) -> None:
    with pytest.raises(ValueError, match="not within 1 to 10"):
        false_reject_interval(10, rank)
