"""Every method chooses the threshold that it promises, and the firmest that the scores carry is taken."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from calibration.threshold import Choice, Method, choose, effective_number

unhurried = settings(deadline=None, max_examples=50)
few = settings(deadline=None, max_examples=15)
methods = pytest.mark.parametrize("method", Method)
order_methods = pytest.mark.parametrize("method", [Method.conformal, Method.tolerance, Method.largest, Method.quantile])
some_scores = st.lists(st.integers(-1000, 1000).map(lambda score: score / 10), min_size=60, max_size=64)
alphas = st.floats(0.05, 0.95)  # that 60 scores carry by every method

Scores = NDArray[np.float64]


def chosen(scores: object, alpha: float, method: Method | None = None) -> Choice:
    return choose(np.sort(np.asarray(scores, dtype=np.float64)), alpha, method=method)


def gumbel(n: int, seed: int = 0) -> Scores:
    return np.sort(np.random.default_rng([n, seed]).gumbel(3, 0.5, n))


@pytest.mark.parametrize(
    ("n", "alpha", "method", "rank"),
    [
        (1, 0.01, Method.largest, 1),
        (14, 0.01, Method.largest, 14),
        (15, 0.01, Method.tail, 15),
        (98, 0.01, Method.tail, 98),
        (99, 0.01, Method.conformal, 99),
        (298, 0.01, Method.conformal, 297),
        (299, 0.01, Method.tolerance, 299),
        (473, 0.01, Method.tolerance, 472),
        (58, 0.05, Method.conformal, 57),
        (59, 0.05, Method.tolerance, 59),
        (1, 0.5, Method.conformal, 1),
        (5, 0.5, Method.tolerance, 5),
    ],
)
def test_the_firmest_method_is_taken_exactly_from_its_first_part_on(
    n: int, alpha: float, method: Method, rank: int
) -> None:
    scores = gumbel(n)
    choice = choose(scores, alpha)
    assert (choice.method, choice.rank, choice.rank_effective, choice.n_effective) == (method, rank, rank, n)
    if method is Method.tail:
        assert choice.threshold >= scores[-1]
    else:
        assert choice.threshold == scores[rank - 1]
    assert choice.threshold == choose(scores, alpha, method=method).threshold


@pytest.mark.parametrize(
    ("n", "why"),
    [
        (10, "n = 10 is below the 99 that carry α = 1 %"),
        (40, "n = 40 is below the 99 that carry α = 1 %"),
        (120, "n = 120 carries α = 1 % on average; 95 % confidence needs 299"),
        (400, "n = 400 is at least the 299 that α = 1 % needs with 95 % confidence"),
    ],
)
def test_the_reason_gives_the_numbers(n: int, why: str) -> None:
    assert choose(gumbel(n), 0.01).why == why


def test_a_method_that_was_asked_for_says_so() -> None:
    assert choose(gumbel(400), 0.01, method=Method.conformal).why == "the method conformal was asked for"


@pytest.mark.parametrize(
    ("method", "n", "needed"), [(Method.tolerance, 298, 299), (Method.conformal, 98, 99), (Method.tail, 14, 15)]
)
def test_a_method_that_needs_more_parts_is_refused_with_their_number(method: Method, n: int, needed: int) -> None:
    with pytest.raises(ValueError, match=f"{n} good parts are too few for the method {method} .* needs {needed};"):
        choose(gumbel(n), 0.01, method=method)
    assert choose(gumbel(needed), 0.01, method=method).method is method


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.1, 95.0, math.nan])
def test_a_confidence_out_of_range_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        choose(gumbel(20), 0.1, confidence=confidence)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, math.nan])
@pytest.mark.parametrize("method", [None, *Method])
def test_an_alpha_out_of_range_is_refused(alpha: float, method: Method | None) -> None:
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        choose(gumbel(20), alpha, method=method)


def test_more_confidence_never_lowers_the_threshold() -> None:
    thresholds = [choose(gumbel(500), 0.02, confidence=confidence).threshold for confidence in (0.5, 0.8, 0.95, 0.99)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < thresholds[-1]


@methods
@few
@given(scores=some_scores, one=alphas, other=alphas)
def test_a_smaller_alpha_never_lowers_the_threshold(
    method: Method, scores: list[float], one: float, other: float
) -> None:
    strict, lax = sorted((one, other))
    assert chosen(scores, strict, method).threshold >= chosen(scores, lax, method).threshold


@pytest.mark.parametrize("method", [Method.tolerance, Method.conformal, Method.largest])
@few
@given(scores=some_scores, alpha=alphas, above=st.floats(0, 1e6))
def test_one_more_score_above_the_threshold_never_lowers_it(
    method: Method, scores: list[float], alpha: float, above: float
) -> None:
    threshold = chosen(scores, alpha, method).threshold
    assert chosen([*scores, threshold + above], alpha, method).threshold >= threshold


@methods
@few
@given(scores=some_scores, alpha=alphas, factor=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_the_threshold_follows_the_unit_and_the_zero_of_the_scores(
    method: Method, scores: list[float], alpha: float, factor: float, shift: float
) -> None:
    threshold = chosen(scores, alpha, method).threshold
    spread = 1e-9 * (max(scores) - min(scores))
    scaled, shifted = (chosen(s, alpha, method).threshold for s in (np.multiply(scores, factor), np.add(scores, shift)))
    assert scaled == pytest.approx(factor * threshold, abs=factor * spread, rel=1e-12)
    assert shifted == pytest.approx(threshold + shift, abs=spread + 1e-9)
    if method in {Method.tolerance, Method.conformal, Method.largest}:
        assert scaled == factor * threshold
        assert shifted == threshold + shift


@methods
@few
@given(scores=some_scores, alpha=alphas)
def test_no_more_scores_lie_above_the_threshold_than_the_rank_allows(
    method: Method, scores: list[float], alpha: float
) -> None:
    choice = chosen(scores, alpha, method)
    assert sum(score > choice.threshold for score in scores) <= len(scores) - choice.rank
    assert choice.threshold >= sorted(scores)[choice.rank - 1]
    if method not in {Method.tail, Method.quantile}:
        assert choice.threshold in scores


@methods
@few
@given(scores=some_scores, alpha=alphas, n_effective=st.integers(59, 64))
def test_fewer_independent_parts_never_give_a_higher_rank_than_their_share_allows(
    method: Method, scores: list[float], alpha: float, n_effective: int
) -> None:
    ordered = np.sort(scores)
    n = min(n_effective, ordered.size)
    choice = choose(ordered, alpha, n_effective=n, method=method)
    assert 1 <= choice.rank_effective <= n == choice.n_effective
    above, allowed = ordered.size - choice.rank, n - choice.rank_effective
    assert above * n <= allowed * ordered.size
    assert choice.threshold >= ordered[choice.rank - 1]
    if method is Method.quantile:
        assert choice.threshold == np.quantile(ordered, 1 - alpha)


def test_groups_leave_the_share_of_scores_above_the_threshold_that_the_effective_parts_allow() -> None:
    scores = np.arange(1.0, 1001)
    choice = choose(scores, 0.05, n_effective=100, method=Method.conformal)
    assert (choice.rank_effective, choice.rank, choice.threshold) == (96, 960, 960.0)


@methods
@pytest.mark.parametrize("n", [60, 61, 500])
def test_equal_scores_give_their_value(method: Method, n: int) -> None:
    assert choose(np.full(n, 0.1), 0.05, method=method).threshold == 0.1


@order_methods
def test_a_million_scores_are_ranked_right(method: Method) -> None:
    scores = np.arange(1.0, 1_000_001)
    choice = choose(scores, 0.001, method=method)
    rank = {Method.conformal: 999_001, Method.largest: 1_000_000, Method.quantile: 999_000}
    if method is Method.tolerance:
        assert binom.sf(choice.rank - 1, 1_000_000, 0.999) <= 0.05 < binom.sf(choice.rank - 2, 1_000_000, 0.999)
    else:
        assert choice.rank == rank[method]
    assert choice.threshold == (pytest.approx(999_000.001) if method is Method.quantile else choice.rank)


def test_the_interpolated_quantile_is_too_low_as_it_says() -> None:
    uniform = np.sort(np.random.default_rng(1).random((200, 60)))
    rates = {
        method: np.mean([1 - choose(scores, 0.05, method=method).threshold for scores in uniform])
        for method in (Method.quantile, Method.conformal, Method.tolerance)
    }
    assert rates[Method.tolerance] < 0.02
    assert rates[Method.conformal] == pytest.approx(3 / 61, abs=0.006)
    assert rates[Method.quantile] > 0.06


@pytest.mark.parametrize(("n", "alpha"), [(60, 0.05), (299, 0.01), (120, 0.1)])
def test_nine_and_a_half_calibrations_in_ten_keep_within_alpha_by_tolerance(n: int, alpha: float) -> None:
    uniform = np.sort(np.random.default_rng(n).random((600, n)))
    kept = sum(1 - choose(scores, alpha, method=Method.tolerance).threshold <= alpha for scores in uniform)
    assert kept >= binom.ppf(1e-4, 600, 0.95)


def kept_by_groups(draw: Callable[[], NDArray[np.float64]], size: int) -> float:
    """The share of calibrations within alpha, by tolerance, where parts come in groups of one size; scores uniform."""
    kept = []
    for _ in range(300):
        scores = draw()
        n = effective_number([str(number // size) for number in range(scores.size)])
        kept.append(1 - choose(np.sort(scores), 0.05, n_effective=n).threshold <= 0.05)
    return float(np.mean(kept))


def test_parts_that_are_alike_in_groups_keep_the_promise_that_is_made_of_groups() -> None:
    random = np.random.default_rng(3)
    assert kept_by_groups(lambda: np.repeat(random.random(80), 5), 5) >= binom.ppf(1e-4, 300, 0.95) / 300


def test_lots_that_lie_in_the_tail_as_a_whole_keep_the_promise_too() -> None:
    random = np.random.default_rng(4)

    def lots() -> NDArray[np.float64]:
        high = np.repeat(random.random(80) < 0.04, 8)
        return np.where(high, 0.96 + 0.04 * random.random(640), 0.96 * random.random(640))

    assert kept_by_groups(lots, 8) >= binom.ppf(1e-4, 300, 0.95) / 300


def test_parts_that_each_stand_alone_count_as_themselves() -> None:
    assert effective_number(["d", "b", "c", "a"]) == 4
    assert effective_number(["a"]) == 1


def test_parts_of_one_group_count_as_one() -> None:
    assert effective_number(["lot"] * 50) == 1


def test_groups_count_once_each_and_fewer_where_their_sizes_differ() -> None:
    assert effective_number([str(number // 8) for number in range(40)]) == 5
    assert effective_number([str(number) for number in np.repeat(np.arange(5), [1, 1, 1, 1, 36])]) == 1


@unhurried
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=40), st.permutations("uvwxyz"))
def test_neither_the_order_of_parts_nor_the_names_of_groups_change_the_effective_number(
    parts: list[str], names: list[str]
) -> None:
    counted = effective_number(parts)
    assert 1 <= counted <= len(set(parts))
    assert effective_number([names["abcdef".index(part)] for part in reversed(parts)]) == counted
