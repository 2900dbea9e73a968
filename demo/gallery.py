"""Parts, their anomaly maps and their verdicts on one picture."""

from collections.abc import Sequence
from pathlib import Path

from calibration.calibration import Calibration
from daemon import images, judgement, overlay
from demo.plant import Part
from detectors.base import Detector, Image

_SIDE = 256
_COLUMNS = 6


def contact_sheet(parts: Sequence[Part], model: Path, title: str) -> Image:
    """Judge parts with a model, as the daemon has, and show them side by side.

    Raises:
        ArtifactError, CalibrationError: the model cannot be used.
        UndecodableError, OSError: an image cannot be read.
    """
    from daemon.build import build_detector, load_calibration

    detector = build_detector(model)
    calibration = load_calibration(model, detector)
    return overlay.contact_sheet([_picture(part, detector, calibration) for part in parts], _COLUMNS, title)


def _picture(part: Part, detector: Detector, calibration: Calibration) -> Image:
    image = images.read(part.image)
    (prediction,) = detector.predict([image])
    decision = judgement.judge(prediction, calibration)
    ratio, p_value = prediction.anomaly_score / decision.threshold, calibration.p_value(prediction.anomaly_score)
    caption = overlay.Caption(decision.outcome, part.id, f"score {ratio:.2f} × threshold · p {p_value:.3f}")
    return overlay.render(image, prediction.anomaly_map, decision.threshold, caption, _SIDE)
