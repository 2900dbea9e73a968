"""The decision. Pure: a prediction and a calibration in, a decision out."""

import math

from calibration.calibration import Calibration
from daemon.messages import Decision, Outcome, Reason
from detectors.base import Prediction


def judge(prediction: Prediction, calibration: Calibration) -> Decision:
    """PASS up to and including the threshold; above it FAIL, or UNCERTAIN within a calibrated band; NaN is an ERROR."""
    score = prediction.anomaly_score
    if not math.isfinite(score):
        return refuse(Reason.MODEL_ERROR, f"the detector gave {score} instead of a score", calibration)
    if calibration.passes(score):
        outcome, reason = Outcome.PASS, Reason.NONE
    elif score <= calibration.fail_threshold:
        outcome, reason = Outcome.UNCERTAIN, Reason.UNCERTAIN_BAND
    else:
        outcome, reason = Outcome.FAIL, Reason.SCORE_ABOVE_THRESHOLD
    return Decision(
        outcome=outcome,
        reason=reason,
        detail="",
        score=score,
        p_value=calibration.p_value(score),
        threshold=calibration.threshold,
        fail_threshold=calibration.fail_threshold,
    )


def refuse(reason: Reason, detail: str, calibration: Calibration) -> Decision:
    """ERROR: the part was seen and could not be judged, so the line must not pass it."""
    return Decision(Outcome.ERROR, reason, detail, None, None, calibration.threshold, calibration.fail_threshold)


def explain(decision: Decision) -> str:
    """What stands under a picture: the figures of a measured part, or why there are none."""
    if decision.ratio is None or decision.p_value is None:
        return decision.detail
    p = f"{decision.p_value:.3f}" if decision.p_value >= 0.001 else f"10^{math.log10(decision.p_value):.1f}"  # noqa: PLR2004
    return f"score {decision.ratio:.2f} × threshold · p {p}"
