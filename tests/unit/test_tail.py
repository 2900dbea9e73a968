"""The fitted tail: the right distribution, the right moments, and more caution where scores are few."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import genextreme

from calibration.tail import Tail, cautious_quantile, fit_tail

unhurried = settings(deadline=None, max_examples=50)
few = settings(deadline=None, max_examples=15)
tails = st.builds(Tail, st.floats(-100, 100), st.floats(0.01, 100), st.floats(-0.9, 0.9))
alphas = st.floats(1e-9, 0.999)
Scores = NDArray[np.float64]


def fitted(scores: Scores) -> Tail:
    tail = fit_tail(np.sort(scores), np.size(scores))
    assert tail is not None
    return tail


def textbook(scores: Scores) -> Tail:
    """Follow the published recipe, one term for each score."""
    x, n = np.sort(scores).tolist(), scores.size
    b0 = math.fsum(x) / n
    b1 = math.fsum((j - 1) / (n - 1) * x[j - 1] for j in range(1, n + 1)) / n
    b2 = math.fsum((j - 1) * (j - 2) / ((n - 1) * (n - 2)) * x[j - 1] for j in range(1, n + 1)) / n
    spread, third, weight = 2 * b1 - b0, 6 * b2 - 6 * b1 + b0, n / (n + 50)
    skewness = weight * third / spread + (1 - weight) * 0.1699
    c = 2 / (3 + skewness) - math.log(2) / math.log(3)
    shape = 7.859 * c + 2.9554 * c**2
    gamma = math.gamma(1 + shape)
    scale = spread * shape / ((1 - 2**-shape) * gamma)
    return Tail(b0 - scale * (1 - gamma) / shape, scale, shape)


def assert_same(one: Tail, other: Tail, tolerance: float) -> None:
    for alpha in (0.5, 0.1, 0.01, 0.001):
        assert one.quantile(alpha) == pytest.approx(other.quantile(alpha), abs=tolerance * one.scale)


@unhurried
@given(tails, alphas)
def test_the_quantile_is_that_of_the_generalised_extreme_value_distribution(tail: Tail, alpha: float) -> None:
    assume(abs(tail.shape) > 1e-5)
    expected = genextreme.isf(alpha, tail.shape, tail.location, tail.scale)
    assert tail.quantile(alpha) == pytest.approx(expected, rel=1e-9, abs=1e-9 * (tail.scale + abs(tail.location)))


@unhurried
@given(tails, st.floats(-5, 50))
def test_the_share_exceeded_is_that_of_the_generalised_extreme_value_distribution(tail: Tail, reduced: float) -> None:
    assume(abs(tail.shape) > 1e-5)
    score = tail.location + reduced * tail.scale
    assume(abs(1 - tail.shape * (score - tail.location) / tail.scale) > 1e-6)  # at the very end digits are lost
    expected = genextreme.sf(score, tail.shape, tail.location, tail.scale)
    assert tail.exceeded(score) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("shape", [0.0, 1e-7, -1e-7, 1.1e-6, -1.1e-6])
def test_a_flat_shape_is_that_of_gumbel(shape: float) -> None:
    tail = Tail(3.0, 0.5, shape)
    for alpha in (0.9, 0.1, 1e-3, 1e-6):
        assert tail.quantile(alpha) == pytest.approx(3 - 0.5 * math.log(-math.log1p(-alpha)), rel=1e-4)
        assert tail.exceeded(tail.quantile(alpha)) == pytest.approx(alpha, rel=1e-3)


@unhurried
@given(tails, alphas)
def test_the_quantile_is_exceeded_by_its_share(tail: Tail, alpha: float) -> None:
    assume(abs(tail.location) < 100 * tail.scale)
    score = tail.quantile(alpha)
    assume(tail.shape < 0.3 or alpha > 1e-3)  # nearer the upper end than the digits of a score tell
    assert tail.exceeded(score) == pytest.approx(alpha, rel=1e-3, abs=1e-12)


@unhurried
@given(tails, st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_the_share_exceeded_is_a_share_and_never_rises_with_the_score(tail: Tail, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= tail.exceeded(high) <= tail.exceeded(low) <= 1


def test_nothing_is_beyond_the_ends() -> None:
    bounded, heavy = Tail(0.0, 1.0, 0.5), Tail(0.0, 1.0, -0.5)
    assert (bounded.exceeded(2.0), bounded.exceeded(math.inf), bounded.exceeded(-math.inf)) == (0.0, 0.0, 1.0)
    assert (heavy.exceeded(-2.0), heavy.exceeded(-math.inf), heavy.exceeded(math.inf)) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("shape", [0.3, 0.0, -0.2])
def test_the_parameters_of_a_large_sample_are_found_again(shape: float) -> None:
    scores = genextreme.rvs(shape, 7.0, 2.0, 100_000, random_state=1)
    tail = fitted(scores)
    assert tail.location == pytest.approx(7, abs=0.05)
    assert tail.scale == pytest.approx(2, rel=0.02)
    assert tail.shape == pytest.approx(shape, abs=0.02)


@pytest.mark.parametrize("n", [3, 15, 40, 300])
@pytest.mark.parametrize("draw", ["gumbel", "exponential", "normal", "uniform"])
def test_the_fit_is_the_published_recipe(n: int, draw: str) -> None:
    scores = getattr(np.random.default_rng(n), draw)(size=n) + 5
    assert_same(fitted(scores), textbook(scores), 1e-9)


@unhurried
@given(st.lists(st.tuples(st.integers(-20, 20), st.integers(1, 6)), min_size=2, max_size=20))
def test_ties_have_the_moments_of_the_repeated_scores(pairs: list[tuple[int, int]]) -> None:
    scores = np.repeat([0.1 * score for score, _ in pairs], [count for _, count in pairs])
    assume(scores.size >= 3 and np.ptp(scores) > 0)
    shape = textbook(scores).shape
    assume(abs(shape) > 1e-4)  # where the recipe divides by next to nothing
    assert_same(fitted(scores), textbook(scores), 1e-7)


@pytest.mark.parametrize("n", [15, 40])
def test_the_caution_is_that_of_scores_drawn_again_with_repeats(n: int) -> None:
    random = np.random.RandomState(0)
    scores = np.sort(np.random.default_rng(n).gumbel(10, 1, n))
    drawn = [np.repeat(scores, random.multinomial(n, np.full(n, 1 / n))) for _ in range(200)]
    expected = np.quantile([textbook(draw).quantile(0.01) for draw in drawn], 0.75)
    assert cautious_quantile(scores, 0.01, scores.size) == pytest.approx(expected, rel=1e-9)


def test_few_scores_are_drawn_towards_gumbel_and_many_are_not() -> None:
    heavy = np.sort(genextreme.rvs(-0.4, 0, 1, 2000, random_state=3))
    few = np.quantile(heavy, (np.arange(15) + 0.5) / 15)
    assert abs(fitted(few).shape) < 0.15
    assert fitted(heavy).shape < -0.3


@pytest.mark.parametrize("score", [0.1, -3.0, 0.0, 1e-300, 1e12])
def test_a_point_has_no_tail(score: float) -> None:
    scores = np.full(40, score)
    assert fit_tail(scores, 40) is None
    assert cautious_quantile(scores, 0.01, scores.size) == score


def test_nearly_equal_scores_keep_their_digits() -> None:
    shape = np.sort(np.random.default_rng(2).gumbel(size=40))
    near = 1000 + 1e-9 * shape
    spread = fitted(near).scale
    assert spread == pytest.approx(1e-9 * fitted(shape).scale, rel=1e-3)
    assert near[-1] < cautious_quantile(near, 0.001, near.size) < near[-1] + 1e-7


@few
@given(st.integers(14, 60), st.floats(1e-9, 1e6), st.floats(1e-3, 1e3), st.sampled_from([0.3, 0.01]))
def test_one_score_apart_from_many_equal_ones_gives_a_threshold_near_them(
    n: int, apart: float, score: float, alpha: float
) -> None:
    scores = np.append(np.full(n, score), score + apart)
    assert score <= cautious_quantile(scores, alpha, scores.size) <= score + 20 * apart


@few
@given(st.lists(st.sampled_from([0.1, 0.3, 0.7, 1e-12, 1e12]), min_size=15, max_size=60))
def test_heavy_ties_give_a_finite_threshold_within_reason(scores: list[float]) -> None:
    ordered = np.sort(scores)
    threshold = cautious_quantile(ordered, 0.01, ordered.size)
    assert ordered[0] <= threshold <= ordered[-1] + 20 * np.ptp(ordered)


def test_a_heavy_tail_gives_a_threshold_far_beyond_the_scores() -> None:
    heavy, bounded = (np.sort(genextreme.rvs(shape, 10, 1, 80, random_state=4)) for shape in (-0.4, 0.4))
    assert cautious_quantile(heavy, 0.001, heavy.size) - heavy[-1] > 3
    assert cautious_quantile(bounded, 0.001, bounded.size) - bounded[-1] < 1.5


def test_caution_costs_less_with_more_scores() -> None:
    excess = []
    for n in (60, 240, 1620):
        caution = []
        for seed in range(12):
            scores = np.sort(np.random.default_rng(seed).gumbel(10, 1, n))
            caution.append(cautious_quantile(scores, 0.01, scores.size) - fitted(scores).quantile(0.01))
        excess.append(float(np.mean(caution)))
    assert excess == sorted(excess, reverse=True)
    assert 0 < excess[-1] < 0.6 * excess[0]  # of fewer than that, many draws have so many repeats that they spread less


def test_the_draws_are_the_same_each_time() -> None:
    scores = np.sort(np.random.default_rng(6).gumbel(10, 1, 30))
    assert cautious_quantile(scores, 0.01, scores.size) == cautious_quantile(scores.copy(), 0.01, scores.size)


@pytest.mark.parametrize(("shape", "most"), [(0.0, 0.015), (0.2, 0.01), (-0.2, 0.03)])
def test_the_realised_false_reject_rate_is_about_alpha_for_few_scores(shape: float, most: float) -> None:
    law = genextreme(shape, 10, 1)
    draws = np.sort(law.rvs((40, 30), random_state=7))
    rates = [law.sf(cautious_quantile(scores, 0.01, scores.size)) for scores in draws]
    assert 0.001 < float(np.mean(rates)) < most  # the largest of 30 would be exceeded by 3.2 %


def test_parts_that_count_as_fewer_are_taken_with_more_caution() -> None:
    scores = np.sort(np.random.default_rng(4).gumbel(10, 1, 200))
    assert cautious_quantile(scores, 0.01, 20) > cautious_quantile(scores, 0.01, 200)
