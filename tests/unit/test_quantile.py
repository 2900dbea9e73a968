"""The finite-sample order statistic: its rank, its edges, and what it promises."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.quantile import conformal_rank, false_reject_interval, smallest_sample, upper_quantile

some_scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=150)
alphas = st.floats(0.002, 0.998)
unhurried = settings(deadline=None)


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


def test_enough_scores_give_the_ranked_score_and_carry_what_was_asked() -> None:
    quantile = upper_quantile([float(score) for score in range(199, 0, -1)], 0.01)
    assert (quantile.threshold, quantile.rank) == (198.0, 198)
    assert (quantile.alpha_carried, quantile.carries) == (0.01, True)


def test_too_few_scores_give_their_maximum_and_say_what_it_carries() -> None:
    quantile = upper_quantile([1.0, 3.0, 2.0], 0.01)
    assert (quantile.threshold, quantile.rank) == (3.0, 3)
    assert (quantile.alpha_carried, quantile.carries) == (0.25, False)


def test_a_million_scores_are_ranked_right() -> None:
    scores = np.random.default_rng(1).permutation(1_000_000).astype(np.float64) + 1
    quantile = upper_quantile(scores, 0.001)
    assert quantile.threshold == quantile.rank == 999_001


def test_ties_are_fine() -> None:
    assert upper_quantile([2.0] * 99, 0.01).threshold == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_finite_number_is_refused_with_its_place(bad: float) -> None:
    with pytest.raises(ValueError, match="score 2 of 3"):
        upper_quantile([1.0, bad, 2.0], 0.1)


@pytest.mark.parametrize("scores", [[], [[1.0, 2.0]], 3.0])
def test_anything_but_a_list_of_scores_is_refused(scores: object) -> None:
    with pytest.raises(ValueError, match="list of at least one number"):
        upper_quantile(scores, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        upper_quantile([1.0], alpha)
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        smallest_sample(alpha)


@unhurried
@given(some_scores, alphas, st.randoms(use_true_random=False))
def test_the_order_of_the_scores_does_not_matter(scores: list[float], alpha: float, random: object) -> None:
    shuffled = list(scores)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert upper_quantile(shuffled, alpha) == upper_quantile(scores, alpha)


@unhurried
@given(some_scores, alphas, st.floats(0, 1e6))
def test_one_more_score_above_the_threshold_never_lowers_it(scores: list[float], alpha: float, above: float) -> None:
    threshold = upper_quantile(scores, alpha).threshold
    assert upper_quantile([*scores, threshold + above], alpha).threshold >= threshold


@unhurried
@given(some_scores, alphas, alphas)
def test_a_smaller_alpha_never_lowers_the_threshold(scores: list[float], one: float, other: float) -> None:
    strict, lax = sorted((one, other))
    assert upper_quantile(scores, strict).threshold >= upper_quantile(scores, lax).threshold


@unhurried
@given(some_scores, alphas)
def test_no_more_scores_lie_above_the_threshold_than_their_rank_allows(scores: list[float], alpha: float) -> None:
    quantile = upper_quantile(scores, alpha)
    assert quantile.threshold in scores
    assert sum(score > quantile.threshold for score in scores) <= len(scores) - quantile.rank


@pytest.mark.parametrize(("n", "alpha"), [(99, 0.01), (60, 0.05), (250, 0.02), (137, 0.033)])
def test_the_realised_false_reject_rate_averages_alpha_at_most(n: int, alpha: float) -> None:
    random = np.random.default_rng(n)
    # Scores are uniform on 0 to 1, so the true false-reject rate of a threshold is what lies above it.
    rates = np.array([1 - upper_quantile(random.random(n), alpha).threshold for _ in range(3000)])
    noise = 3 * rates.std() / math.sqrt(rates.size)
    assert alpha - 1 / (n + 1) - noise <= rates.mean() <= alpha + noise


def test_the_false_reject_interval_holds_the_rate_of_nine_calibrations_in_ten() -> None:
    random = np.random.default_rng(5)
    rates = np.array([1 - upper_quantile(random.random(200), 0.05).threshold for _ in range(3000)])
    low, high = false_reject_interval(200, upper_quantile(random.random(200), 0.05).rank)
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
