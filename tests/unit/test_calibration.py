"""A calibration decides as its threshold says, knows what it promises, and says so."""

import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.calibration import (
    LEAST_P,
    Appearance,
    Calibration,
    CalibrationError,
    Provenance,
    describe,
    expectation,
    fit,
    promise,
    shortage,
)
from calibration.threshold import Method

NOON = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)
PROVENANCE = Provenance("model-a", "d" * 64, NOON)
unhurried = settings(deadline=None, max_examples=50)
few = settings(deadline=None, max_examples=15)
methods = pytest.mark.parametrize("method", Method)
some_scores = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=120)
enough_scores = st.lists(st.integers(1, 1000).map(lambda score: score / 8), min_size=60, max_size=64)
alphas = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.25, 0.3])


def fitted(
    scores: object,
    alpha: float = 0.01,
    method: Method | None = None,
    *,
    groups: Sequence[str] = (),
    fail_alpha: float | None = None,
    confidence: float = 0.95,
) -> Calibration:
    return fit(
        scores,  # type: ignore[arg-type] # some tests give what is no list of scores
        alpha=alpha,
        provenance=PROVENANCE,
        confidence=confidence,
        method=method,
        groups=groups,
        fail_alpha=fail_alpha,
    )


def gumbel(n: int) -> list[float]:
    scores: list[float] = np.random.default_rng(n).gumbel(3, 0.5, n).tolist()
    return scores


def bursts(groups: int, size: int) -> tuple[list[float], list[str]]:
    """Give each of some parts several images that look nearly alike."""
    near = np.random.default_rng(groups).gumbel(0, 1e-6, groups * size)
    return (np.repeat(gumbel(groups), size) + near).tolist(), [f"part{i // size}" for i in range(groups * size)]


@methods
@few
@given(enough_scores, st.one_of(st.floats(allow_nan=False), st.integers(0, 59)))
def test_a_part_passes_exactly_up_to_the_threshold(method: Method, scores: list[float], drawn: float) -> None:
    calibration = fitted(scores, 0.05, method)
    score = scores[drawn] if isinstance(drawn, int) else drawn
    assert calibration.passes(score) == (score <= calibration.threshold)


@methods
def test_the_threshold_itself_passes_and_the_next_number_does_not(method: Method) -> None:
    calibration = fitted(gumbel(350), method=method)
    assert calibration.passes(calibration.threshold)
    assert not calibration.passes(math.nextafter(calibration.threshold, math.inf))


@methods
def test_nan_never_passes_and_has_no_p_value(method: Method) -> None:
    calibration = fitted(gumbel(350), method=method)
    assert not calibration.passes(math.nan)
    assert math.isnan(calibration.p_value(math.nan))


@unhurried
@given(some_scores, alphas, st.floats(0, 1100))
def test_the_p_value_counts_the_scores_at_least_as_high_up_to_the_largest(
    scores: list[float], alpha: float, drawn: float
) -> None:
    score = min(drawn, max(scores))
    expected = (1 + sum(other >= score for other in scores)) / (len(scores) + 1)
    assert fitted(scores, alpha).p_value(score) == expected


@few
@given(some_scores, st.lists(st.floats(allow_nan=False), min_size=2, max_size=10))
def test_the_p_value_never_rises_with_the_score(scores: list[float], others: list[float]) -> None:
    calibration = fitted(scores)
    top = max(scores)
    drawn = sorted([*others, *scores[:5], top, math.nextafter(top, math.inf), top * 1.01, top * 3, math.inf])
    values = [calibration.p_value(score) for score in drawn]
    assert values == sorted(values, reverse=True)
    assert all(LEAST_P <= value <= 1 for value in values)


@pytest.mark.parametrize("n", [15, 60, 400])
def test_the_p_value_goes_on_from_the_count_along_the_tail(n: int) -> None:
    calibration = fitted(gumbel(n))
    top = calibration.scores[-1]
    assert calibration.tail is not None
    assert calibration.p_value(top) == 2 / (n + 1)
    assert calibration.p_value(math.nextafter(top, math.inf)) == pytest.approx(1 / (n + 1), rel=1e-9)
    beyond = calibration.p_value(top + 1)
    assert beyond * calibration.tail.exceeded(top) * (n + 1) == pytest.approx(calibration.tail.exceeded(top + 1))
    assert LEAST_P < beyond < 1 / (n + 1)
    assert calibration.p_value(math.inf) == calibration.p_value(1e300) == LEAST_P


@pytest.mark.parametrize("scores", [[2.0] * 200, gumbel(14)])
def test_without_a_tail_no_p_value_is_below_that_of_the_count(scores: list[float]) -> None:
    calibration = fitted(scores)
    assert calibration.tail is None
    assert calibration.p_value(max(scores)) > 1 / (len(scores) + 1)
    assert calibration.p_value(math.inf) == calibration.p_value(max(scores) + 1e-9) == 1 / (len(scores) + 1)


def test_the_p_value_of_groups_counts_independent_parts() -> None:
    scores, groups = bursts(40, 10)
    calibration = fitted(scores, groups=groups)
    assert (calibration.good_parts, calibration.n_effective) == (400, 40)
    assert calibration.p_value(-math.inf) == 1
    assert calibration.p_value(calibration.scores[200]) == pytest.approx((1 + 200 / 400 * 40) / 41)
    assert calibration.p_value(math.nextafter(calibration.scores[-1], math.inf)) == pytest.approx(1 / 41, rel=1e-4)


@unhurried
@given(some_scores, alphas, st.floats(0, 1100), st.integers(0, 119))
def test_a_part_is_rejected_exactly_where_its_p_value_is_within_alpha(
    scores: list[float], alpha: float, drawn: float, place: int
) -> None:
    method = Method.conformal if len(scores) >= 1 / alpha - 1 else Method.largest
    calibration = fitted(scores, alpha, method)
    for score in (drawn, scores[place % len(scores)]):
        assert calibration.passes(score) == (calibration.p_value(score) > calibration.alpha_carried + 1e-12)


def test_the_scores_are_kept_in_ascending_order_whatever_they_came_in() -> None:
    calibration = fitted(np.array([3, 1, 2], dtype=np.float32), 0.25)
    assert calibration.scores == (1.0, 2.0, 3.0)
    assert all(type(score) is float for score in calibration.scores)


def test_each_score_keeps_its_group() -> None:
    calibration = fitted([3.0, 1.0, 2.0, 1.0], 0.25, groups=["b", "c", "a", "a"])
    assert calibration.scores == (1.0, 1.0, 2.0, 3.0)
    assert calibration.groups == (0, 2, 0, 1)


@methods
@few
@given(enough_scores, st.randoms(use_true_random=False))
def test_the_order_of_the_parts_does_not_change_the_calibration(
    method: Method, scores: list[float], random: Random
) -> None:
    parts = [(score, f"part{place % 40}") for place, score in enumerate(scores)]

    def calibrated() -> list[Calibration]:
        values, groups = zip(*parts, strict=True)
        return [fitted(values, 0.25, method), fitted(values, 0.25, method, groups=groups)]

    before = calibrated()
    random.shuffle(parts)
    assert calibrated() == before


@methods
def test_neither_the_order_of_grouped_parts_nor_the_names_of_their_groups_matter(method: Method) -> None:
    scores, groups = bursts(80, 4)
    calibration = fitted(scores, 0.05, method, groups=groups)
    order = np.random.default_rng(1).permutation(320)
    shuffled = fitted([scores[i] for i in order], 0.05, method, groups=[groups[i] for i in order])
    assert shuffled == calibration
    renamed = fitted(scores, 0.05, method, groups=[f"{hash(group) % 10**6}-{group}" for group in groups])
    same = replace(renamed, id=calibration.id, groups=calibration.groups)
    assert same == calibration
    assert calibration.n_effective == 80


def test_groups_cost_the_method_that_the_scores_alone_would_carry() -> None:
    scores, groups = bursts(60, 10)
    blind, counted = fitted(scores), fitted(scores, groups=groups)
    assert (blind.method, blind.n_effective) == (Method.tolerance, 600)
    assert (counted.method, counted.n_effective) == (Method.tail, 60)
    assert counted.threshold > blind.threshold


def test_groups_that_do_not_match_the_scores_are_refused() -> None:
    with pytest.raises(CalibrationError, match="2 groups for 3 scores"):
        fitted([1.0, 2.0, 3.0], groups=["a", "b"])


def test_the_id_is_stable_and_changes_with_everything_that_goes_in() -> None:
    scores = gumbel(350)

    def named(scores: list[float] = scores, alpha: float = 0.01, **others: object) -> str:
        provenance = {key: others.pop(key) for key in list(others) if hasattr(PROVENANCE, key)}
        made = replace(PROVENANCE, **provenance)  # type: ignore[arg-type] # each is of its field's type
        return fit(scores, alpha=alpha, provenance=made, **others).id  # type: ignore[arg-type]

    assert re.fullmatch("[0-9a-f]{12}", named())
    assert named() == named()
    others = [
        named(scores=[*scores[1:], scores[0] + 1e-9]),
        named(alpha=0.02),
        named(confidence=0.9),
        named(method=Method.tolerance),  # the firmest, but asked for
        named(fail_alpha=0.005),
        named(groups=[str(number) for number in range(350)]),
        named(appearance=Appearance({"brightness": (0.5,) * 350}, "cGljdHVyZQ==")),
        named(appearance=Appearance({"brightness": (0.25,) * 350}, "cGljdHVyZQ==")),
        named(model="model-b"),
        named(data_sha256="e"),
        named(engine="cuda"),
        named(regions="r"),
        named(made_by="Ann"),
        named(made_at=NOON + timedelta(microseconds=1)),
    ]
    assert len({named(), *others}) == len(others) + 1


def test_the_time_is_kept_in_utc() -> None:
    local = replace(PROVENANCE, made_at=NOON.astimezone(timezone(timedelta(hours=9))))
    calibration = fit([1.0], alpha=0.5, provenance=local)
    assert calibration.provenance.made_at.isoformat() == "2026-03-04T12:00:00+00:00"
    assert calibration == fit([1.0], alpha=0.5, provenance=PROVENANCE)


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(CalibrationError, match="time zone"):
        fit([1.0], alpha=0.5, provenance=replace(PROVENANCE, made_at=NOON.replace(tzinfo=None)))


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([], "at least one number"),
        ([[1.0, 2.0]], "at least one number"),
        (3.0, "at least one number"),
        ([1.0, math.nan], "score 2 of 2 is nan"),
        ([1.0, -math.inf, 2.0], "score 2 of 3 is -inf"),
        ([math.inf], "score 1 of 1 is inf"),
        ([0.0] * 200, "above zero"),
        ([-2.0, -1.0], "above zero"),
    ],
)
@pytest.mark.parametrize("method", [None, Method.largest, Method.quantile])
def test_scores_that_give_no_usable_threshold_are_refused(scores: object, reason: str, method: Method | None) -> None:
    with pytest.raises(CalibrationError, match=reason):
        fitted(scores, method=method)


def test_a_share_out_of_range_is_a_calibration_error() -> None:
    with pytest.raises(CalibrationError, match="alpha must lie between 0 and 1"):
        fitted([1.0], 1.0)
    with pytest.raises(CalibrationError, match="confidence must lie between 0 and 1"):
        fitted([1.0], 0.5, confidence=95)
    with pytest.raises(CalibrationError, match="98 good parts are too few for the method conformal at α = 1 %"):
        fitted(gumbel(98), method=Method.conformal)


def test_a_single_part_is_its_own_threshold() -> None:
    calibration = fitted([2.5])
    assert (calibration.threshold, calibration.method, calibration.tail) == (2.5, Method.largest, None)
    assert calibration.alpha_carried == 0.5
    assert fitted([2.5], 0.5).method is Method.conformal


@methods
def test_equal_scores_are_their_own_threshold_and_have_no_tail(method: Method) -> None:
    calibration = fitted([0.1] * 300, method=method)
    assert (calibration.threshold, calibration.tail) == (0.1, None)
    assert calibration.passes(0.1)
    assert (calibration.p_value(0.1), calibration.p_value(0.2)) == (1.0, 1 / 301)
    assert re.search(r"0\.1 +300 #+  <-- threshold$", describe(calibration), re.MULTILINE)


@pytest.mark.parametrize(
    ("n", "fail_alpha", "method"),
    [(120, 0.005, Method.tail), (700, 0.005, Method.tolerance), (350, 0.005, Method.tail), (350, 0.001, Method.tail)],
)
def test_parts_between_both_thresholds_are_uncertain(n: int, fail_alpha: float, method: Method) -> None:
    calibration = fitted(gumbel(n), fail_alpha=fail_alpha)
    assert calibration.fail_method is method
    assert calibration.fail_threshold > calibration.threshold == fitted(gumbel(n)).threshold
    kind = "an estimate: " if method is Method.tail else ""
    assert f"{calibration.fail_threshold:.6g} ({kind}α = {100 * fail_alpha:g} %, {method})" in describe(calibration)


@few
@given(some_scores, alphas, st.floats(0.01, 0.99))
def test_the_threshold_of_failure_is_never_below_the_other(scores: list[float], alpha: float, share: float) -> None:
    calibration = fitted(scores, alpha, fail_alpha=alpha * share)
    assert calibration.fail_threshold >= calibration.threshold


def test_a_method_that_promises_less_does_not_lower_the_threshold_of_failure() -> None:
    calibration = fitted(gumbel(299), fail_alpha=0.0099)
    lower = fitted(gumbel(299), 0.0099).threshold
    assert lower < calibration.threshold <= calibration.fail_threshold


@methods
def test_without_a_band_both_thresholds_are_one(method: Method) -> None:
    calibration = fitted(gumbel(350), method=method)
    assert calibration.fail_threshold == calibration.threshold
    assert calibration.fail_method is None
    assert "Uncertain" not in describe(calibration)


@pytest.mark.parametrize("fail_alpha", [0.01, 0.02, math.nan])
def test_a_band_that_is_not_beyond_the_threshold_is_refused(fail_alpha: float) -> None:
    with pytest.raises(CalibrationError, match=r"the share that fails, \S+, must be below α, 0\.01"):
        fitted(gumbel(350), fail_alpha=fail_alpha)


def test_a_band_that_the_method_asked_for_cannot_carry_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"too few for the method tolerance at α = 0\.1 %, which needs 2995"):
        fitted(gumbel(350), method=Method.tolerance, fail_alpha=0.001)
    with pytest.raises(CalibrationError, match="alpha must lie between 0 and 1"):
        fitted(gumbel(350), fail_alpha=0.0)


def test_what_is_expected_follows_from_the_rank() -> None:
    calibration = fitted(gumbel(300), method=Method.conformal)
    assert (calibration.good_parts, calibration.rank, calibration.carries) == (300, 298, True)
    assert calibration.expected_false_rejects == 3 / 301
    low, high = calibration.false_reject_interval
    assert (round(1000 * low), round(1000 * high)) == (3, 21)


@unhurried
@given(some_scores, alphas)
def test_the_expected_false_rejects_keep_within_what_is_carried(scores: list[float], alpha: float) -> None:
    calibration = fitted(scores, alpha)
    assert calibration.expected_false_rejects <= calibration.alpha_carried + 1e-15
    assert not calibration.carries or calibration.alpha_carried == alpha
    assert calibration.carries == (calibration.method in {Method.tolerance, Method.conformal})


@pytest.mark.parametrize("method", [Method.tail, Method.quantile])
def test_a_threshold_above_its_ranks_score_has_no_lower_bound_of_false_rejects(method: Method) -> None:
    calibration = fitted(gumbel(300), method=method)
    assert calibration.false_reject_interval[0] == 0
    assert "expect at most" in expectation(calibration)


def test_a_calibration_is_not_printed_with_all_its_scores() -> None:
    assert "scores" in {field.name for field in fields(Calibration)}
    assert "scores" not in repr(fitted(gumbel(300)))


@pytest.mark.parametrize(
    ("n", "method", "said"),
    [
        (300, None, "at most 1 % are rejected, with 95 % confidence"),
        (120, None, "at most 1 % are rejected, on average over calibrations like this one"),
        (
            31,
            None,
            "about 1 % are rejected if the fitted tail is right, and at most 3.1 % on average over",
        ),
        (
            9,
            None,
            "at most 10 % are rejected, on average over calibrations like this one; nothing is promised of 1 %",
        ),
        (
            120,
            Method.largest,
            "at most 0.83 % are rejected, on average over calibrations like this one; nothing is promised of 1 %",
        ),
        (
            120,
            Method.quantile,
            "at most 2.5 % are rejected, on average over calibrations like this one; nothing is promised of 1 %",
        ),
    ],
)
def test_the_promise_says_how_much_and_how_firmly(n: int, method: Method | None, said: str) -> None:
    calibration = fitted(gumbel(n), method=method)
    assert promise(calibration).startswith(f"of good parts like these {said}")
    assert said in describe(calibration)


def test_shares_are_promised_to_the_digits_they_were_asked_in() -> None:
    said = describe(fitted(gumbel(900), 0.0125, confidence=0.999))
    assert "1.25 % asked, 1.25 % carried" in said
    assert "at most 1.25 % are rejected, with 99.9 % confidence" in said


@pytest.mark.parametrize(
    ("n", "method", "missing"),
    [
        (300, None, ""),
        (120, None, ""),
        (31, None, "31 good parts carry no less than α = 3.12 %; 1 % needs 99"),
        (9, None, "9 good parts carry no less than α = 10 %; 1 % needs 99"),
        (120, Method.tail, "the method tail promises nothing of α = 1 %; leave the method open"),
        (120, Method.quantile, "the method quantile promises nothing of α = 1 %; leave the method open"),
    ],
)
def test_what_is_missing_is_said(n: int, method: Method | None, missing: str) -> None:
    assert shortage(fitted(gumbel(n), method=method)) == missing


def test_what_is_missing_is_counted_in_independent_parts() -> None:
    scores, groups = bursts(40, 10)
    calibration = fitted(scores, groups=groups)
    missing = "400 good parts count as 40, and carry no less than α = 2.44 %; 1 % needs 99"
    assert shortage(calibration) == missing
    text = describe(calibration)
    assert "Good parts     400 in 40 groups, which count as 40" in text
    assert f"{missing}: add 59 and calibrate again" in text


def test_the_description_states_the_promise_and_how_sure_it_is() -> None:
    text = describe(fitted(gumbel(300), method=Method.conformal))
    assert "of 1000 good parts expect 10 rejected (90 % of such calibrations: 3 to 21)" in text
    assert "1 % asked, 1 % carried" in text
    assert "score 298 of 300" in text
    assert "above score" not in text
    assert "With 299 good parts the promise would hold with 95 % confidence." in text
    assert "NO PROMISE" not in text


def test_the_description_says_where_the_scores_come_from() -> None:
    full = Provenance("model-a", "d" * 64, NOON, engine="onnx fp16", regions="mask-1", made_by="Ann")
    text = describe(fit(gumbel(300), alpha=0.01, provenance=full))
    assert re.search(r"^Calibration +[0-9a-f]{12}, 2026-03-04 12:00 UTC, Ann$", text, re.MULTILINE)
    assert re.search(r"^Model +model-a, onnx fp16$", text, re.MULTILINE)
    assert re.search(r"^Regions +mask-1$", text, re.MULTILINE)
    assert re.search(r"^Images +sha256 d{64}$", text, re.MULTILINE)
    bare = describe(fitted(gumbel(300)))
    assert re.search(r"12:00 UTC$", bare, re.MULTILINE)
    assert re.search(r"^Model +model-a$", bare, re.MULTILINE)
    assert "Regions" not in bare


def test_the_description_is_loud_where_the_good_parts_are_too_few() -> None:
    calibration = fitted(gumbel(31))
    assert calibration.threshold > max(calibration.scores)
    text = describe(calibration)
    assert "!!! NO PROMISE OF α = 1 % !!!" in text
    assert "31 good parts carry no less than α = 3.12 %; 1 % needs 99: add 68" in text
    assert "above score 31 of 31" in text
    (marked,) = [line for line in text.splitlines() if "<-- threshold" in line]
    assert marked.split() == [f"{calibration.threshold:.6g}", "0", "<--", "threshold"]


def test_a_rare_false_reject_is_told_of_more_than_a_thousand_parts() -> None:
    text = describe(fitted(gumbel(9999), 0.0001))
    assert "of 10000 good parts expect 1 rejected" in text


@unhurried
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=150), st.sampled_from([None, Method.quantile]))
def test_the_histogram_counts_every_part_and_marks_the_threshold_once(
    scores: list[float], method: Method | None
) -> None:
    calibration = fitted(scores, method=method)
    drawn = describe(calibration).split("Scores of the good parts", 1)[1]
    rows = re.findall(r"^ *(\S+) +(\d+)(?: #+)? *(  <-- threshold)?$", drawn, re.MULTILINE)
    assert sum(int(count) for _, count, _ in rows) == len(scores)
    marked = [(float(start), int(count)) for start, count, mark in rows if mark]
    assert len(marked) == 1
    start, count = marked[0]
    assert start <= calibration.threshold * (1 + 1e-5)
    if calibration.threshold > max(scores):
        assert count == 0
        assert start == pytest.approx(calibration.threshold, rel=1e-5)
    elif method is None:
        assert count > 0
