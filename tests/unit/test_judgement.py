"""The decision follows the calibration alone, and what is no score is never passed."""

import math
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.calibration import Calibration, Provenance, fit
from daemon.judgement import judge, refuse
from daemon.messages import Decision, Outcome, Reason
from detectors.base import Prediction

MAP = np.zeros((2, 2), np.float32)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    scores = np.linspace(1.0, 2.0, 99)
    return fit(scores, alpha=0.01, provenance=Provenance("f", "d", datetime(2026, 3, 4, tzinfo=UTC)))


def judged(score: float, calibration: Calibration) -> Decision:
    return judge(Prediction(anomaly_score=score, anomaly_map=MAP), calibration)


def test_the_threshold_itself_passes_and_the_next_number_fails(calibration: Calibration) -> None:
    at = judged(calibration.threshold, calibration)
    above = judged(math.nextafter(calibration.threshold, math.inf), calibration)
    assert (at.outcome, at.reason) == (Outcome.PASS, Reason.NONE)
    assert (above.outcome, above.reason) == (Outcome.FAIL, Reason.SCORE_ABOVE_THRESHOLD)


def test_a_part_between_both_thresholds_is_uncertain() -> None:
    provenance = Provenance("f", "d", datetime(2026, 3, 4, tzinfo=UTC))
    banded = fit(np.linspace(1.0, 2.0, 99), alpha=0.1, fail_alpha=0.05, provenance=provenance)
    assert banded.threshold < banded.fail_threshold
    outcomes = [
        (banded.threshold, Outcome.PASS, Reason.NONE),
        (math.nextafter(banded.threshold, math.inf), Outcome.UNCERTAIN, Reason.UNCERTAIN_BAND),
        (banded.fail_threshold, Outcome.UNCERTAIN, Reason.UNCERTAIN_BAND),
        (math.nextafter(banded.fail_threshold, math.inf), Outcome.FAIL, Reason.SCORE_ABOVE_THRESHOLD),
    ]
    for score, outcome, reason in outcomes:
        decision = judged(score, banded)
        assert (decision.outcome, decision.reason) == (outcome, reason)


@given(score=st.floats(allow_nan=False, allow_infinity=False))
def test_every_score_is_decided_as_the_calibration_says(calibration: Calibration, score: float) -> None:
    decision = judged(score, calibration)
    assert (decision.outcome is Outcome.PASS) == (score <= calibration.threshold)
    assert decision.score == score
    assert decision.threshold == calibration.threshold
    assert decision.fail_threshold == calibration.fail_threshold
    assert decision.p_value == calibration.p_value(score)
    assert decision.detail == ""


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error_that_says_so(calibration: Calibration, score: float) -> None:
    decision = judged(score, calibration)
    assert (decision.outcome, decision.reason) == (Outcome.ERROR, Reason.MODEL_ERROR)
    assert str(score) in decision.detail
    assert decision.score is None
    assert decision.p_value is None


def test_a_refused_part_is_an_error_with_its_reason_and_nothing_measured(calibration: Calibration) -> None:
    decision = refuse(Reason.DECODE_FAILED, "cut off", calibration)
    limits = (calibration.threshold, calibration.fail_threshold)
    assert decision == Decision(Outcome.ERROR, Reason.DECODE_FAILED, "cut off", None, None, *limits)


def test_a_score_below_zero_is_kept_but_its_ratio_is_zero_as_minus_one_means_not_measured(
    calibration: Calibration,
) -> None:
    decision = judged(-calibration.threshold, calibration)
    assert decision.outcome is Outcome.PASS
    assert decision.score == -calibration.threshold
    assert decision.ratio == 0.0
