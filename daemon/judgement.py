"""The decision. Pure: a prediction and a calibration in, a decision out."""

import math

from calibration.calibration import Calibration
from daemon.messages import Decision, Outcome, Reason
from detectors.base import Prediction


def judge(prediction: Prediction, calibration: Calibration) -> Decision:
    """PASS up to and including the threshold, FAIL above it; a score that is no number is an ERROR."""
    score = prediction.anomaly_score
    if not math.isfinite(score):
        return refuse(Reason.MODEL_ERROR, f"the detector gave {score} instead of a score", calibration)
    passed = calibration.passes(score)
    return Decision(
        outcome=Outcome.PASS if passed else Outcome.FAIL,
        reason=Reason.NONE if passed else Reason.SCORE_ABOVE_THRESHOLD,
        detail="",
        score=score,
        p_value=calibration.p_value(score),
        threshold=calibration.threshold,
    )


def refuse(reason: Reason, detail: str, calibration: Calibration) -> Decision:
    """ERROR: the part was seen and could not be judged, so the line must not pass it."""
    return Decision(Outcome.ERROR, reason, detail, None, None, calibration.threshold)


def explain(decision: Decision) -> str:
    """What stands under a picture: the figures of a measured part, or why there are none."""
    if decision.ratio is None or decision.p_value is None:
        return decision.detail
    return f"score {decision.ratio:.2f} × threshold · p {decision.p_value:.3f}"
