"""Distance to one good image: the smallest detector, the example to copy, and a fast one for tests."""

import hashlib
from collections.abc import Sequence

import cv2
import numpy as np

from detectors.base import Image, Prediction


class TemplateDetector:
    """Scores how far an image is from `template`, in grey levels, after smoothing. For parts that never move."""

    def __init__(self, template: Image) -> None:
        self._template = cv2.GaussianBlur(template, (0, 0), 2).astype(np.float32)
        self.engine = "opencv cpu float32"
        self.fingerprint = hashlib.sha256(repr(template.shape).encode() + template.tobytes()).hexdigest()

    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        """Compare each image, resized to the template."""
        predictions = []
        height, width = self._template.shape[:2]
        for image in images:
            fitted = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            distance = np.abs(cv2.GaussianBlur(fitted, (0, 0), 2).astype(np.float32) - self._template).max(axis=2)
            predictions.append(Prediction(float(distance.max()), distance))
        return predictions
