"""A calibration decides as its threshold says, knows what it promises, and says so."""

import math
import re
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.calibration import Calibration, CalibrationError, describe, fit

NOON = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)
unhurried = settings(deadline=None)
some_scores = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=120)
alphas = st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.25, 0.3])


def fitted(scores: object, alpha: float = 0.01) -> Calibration:
    return fit(
        scores,  # type: ignore[arg-type]
        alpha=alpha,
        detector_fingerprint="model-a",
        data_sha256="d" * 64,
        made_at=NOON,
    )


def gumbel(n: int) -> list[float]:
    scores: list[float] = np.random.default_rng(n).gumbel(3, 0.5, n).tolist()
    return scores


@unhurried
@given(some_scores, alphas, st.one_of(st.floats(allow_nan=False), st.integers(0, 119)))
def test_a_part_passes_exactly_up_to_the_threshold(scores: list[float], alpha: float, drawn: float) -> None:
    calibration = fitted(scores, alpha)
    score = scores[drawn % len(scores)] if isinstance(drawn, int) else drawn
    assert calibration.passes(score) == (score <= calibration.threshold)


def test_the_threshold_itself_passes_and_the_next_number_does_not() -> None:
    calibration = fitted(gumbel(150))
    assert calibration.passes(calibration.threshold)
    assert not calibration.passes(math.nextafter(calibration.threshold, math.inf))


def test_nan_never_passes_and_has_no_p_value() -> None:
    calibration = fitted(gumbel(150))
    assert not calibration.passes(math.nan)
    assert math.isnan(calibration.p_value(math.nan))


@unhurried
@given(some_scores, alphas, st.floats(0, 1100))
def test_the_p_value_counts_the_scores_at_least_as_high(scores: list[float], alpha: float, score: float) -> None:
    expected = (1 + sum(other >= score for other in scores)) / (len(scores) + 1)
    assert fitted(scores, alpha).p_value(score) == expected


@unhurried
@given(some_scores, alphas, st.floats(0, 1100), st.integers(0, 119))
def test_a_part_is_rejected_exactly_where_its_p_value_is_within_alpha(
    scores: list[float], alpha: float, drawn: float, place: int
) -> None:
    calibration = fitted(scores, alpha)
    for score in (drawn, scores[place % len(scores)]):
        assert calibration.passes(score) == (calibration.p_value(score) > calibration.alpha_carried + 1e-12)


def test_the_scores_are_kept_in_ascending_order_whatever_they_came_in() -> None:
    calibration = fitted(np.array([3, 1, 2], dtype=np.float32), alpha=0.25)
    assert calibration.scores == (1.0, 2.0, 3.0)
    assert all(type(score) is float for score in calibration.scores)


@unhurried
@given(some_scores, st.randoms(use_true_random=False))
def test_the_order_of_the_parts_does_not_change_the_calibration(scores: list[float], random: object) -> None:
    shuffled = list(scores)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fitted(shuffled) == fitted(scores)


def test_the_id_is_stable_and_changes_with_everything_that_goes_in() -> None:
    scores = gumbel(120)

    def named(
        scores: list[float] = scores,
        alpha: float = 0.01,
        fingerprint: str = "model-a",
        data: str = "d",
        made_at: datetime = NOON,
    ) -> str:
        return fit(scores, alpha=alpha, detector_fingerprint=fingerprint, data_sha256=data, made_at=made_at).id

    assert re.fullmatch("[0-9a-f]{12}", named())
    assert named() == named()
    others = [
        named(scores=[*scores[1:], scores[0] + 1e-9]),
        named(alpha=0.02),
        named(fingerprint="model-b"),
        named(data="e"),
        named(made_at=NOON + timedelta(microseconds=1)),
    ]
    assert len({named(), *others}) == 6


def test_the_time_is_kept_in_utc() -> None:
    local = NOON.astimezone(timezone(timedelta(hours=9)))
    calibration = fit([1.0], alpha=0.5, detector_fingerprint="m", data_sha256="d", made_at=local)
    assert calibration.made_at.isoformat() == "2026-03-04T12:00:00+00:00"


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(CalibrationError, match="time zone"):
        fit(
            [1.0],
            alpha=0.5,
            detector_fingerprint="m",
            data_sha256="d",
            made_at=NOON.replace(tzinfo=None),
        )


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([], "at least one number"),
        ([1.0, math.nan], "score 2 of 2 is nan"),
        ([math.inf], "score 1 of 1 is inf"),
        ([0.0] * 200, "above zero"),
        ([-2.0, -1.0], "above zero"),
    ],
)
def test_scores_that_give_no_usable_threshold_are_refused(scores: list[float], reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason):
        fitted(scores)


def test_an_alpha_out_of_range_is_a_calibration_error() -> None:
    with pytest.raises(CalibrationError, match="alpha must lie between 0 and 1"):
        fitted([1.0], alpha=1.0)


def test_what_is_expected_follows_from_the_rank() -> None:
    calibration = fitted(gumbel(300))
    assert (calibration.good_parts, calibration.rank, calibration.carries) == (300, 298, True)
    assert calibration.expected_false_rejects == 3 / 301
    low, high = calibration.false_reject_interval
    assert (round(1000 * low), round(1000 * high)) == (3, 21)


@unhurried
@given(some_scores, alphas)
def test_the_expected_false_rejects_keep_within_what_is_carried(scores: list[float], alpha: float) -> None:
    calibration = fitted(scores, alpha)
    assert calibration.expected_false_rejects <= calibration.alpha_carried + 1e-15
    assert calibration.carries == (calibration.alpha_carried == alpha)


def test_a_calibration_is_not_printed_with_all_its_scores() -> None:
    assert "scores" in {field.name for field in fields(Calibration)}
    assert "scores" not in repr(fitted(gumbel(300)))


def test_the_description_states_the_promise_and_how_sure_it_is() -> None:
    text = describe(fitted(gumbel(300)))
    assert "of 1000 good parts expect 10 rejected (90 % of such calibrations: 3 to 21)" in text
    assert "1 % asked, 1 % carried" in text
    assert "score 298 of 300" in text
    assert "TOO FEW" not in text


def test_the_description_is_loud_where_the_good_parts_are_too_few() -> None:
    calibration = fitted(gumbel(31))
    assert calibration.threshold == max(calibration.scores)
    text = describe(calibration)
    assert "!!! TOO FEW GOOD PARTS !!!" in text
    assert "31 good parts carry no less than α = 3.1 %; 1 % needs 99: add 68" in text


def test_a_rare_false_reject_is_told_of_more_than_a_thousand_parts() -> None:
    text = describe(fitted(gumbel(9999), alpha=0.0001))
    assert "of 10000 good parts expect 1 rejected" in text


@unhurried
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=150))
def test_the_histogram_counts_every_part_and_marks_the_threshold_once(scores: list[float]) -> None:
    calibration = fitted(scores)
    text = describe(calibration)
    rows = re.findall(r"^ *(\S+) +(\d+)(?: #+)?(  <-- threshold)?$", text, re.MULTILINE)
    assert sum(int(count) for _, count, _ in rows) == len(scores)
    marked = [(float(start), int(count)) for start, count, mark in rows if mark]
    assert len(marked) == 1
    start, count = marked[0]
    assert start <= calibration.threshold * (1 + 1e-5)
    assert count > 0
