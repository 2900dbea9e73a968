"""The smallest detector keeps the protocol honest."""

import numpy as np

from detectors.base import Detector
from detectors.template import TemplateDetector


def test_it_scores_the_place_and_the_size_of_a_difference() -> None:
    template = np.full((40, 60, 3), 100, np.uint8)
    detector: Detector = TemplateDetector(template)
    spoiled = template.copy()
    spoiled[10:20, 30:40] = 180
    same, different = detector.predict([template, spoiled])
    assert same.anomaly_score == 0
    assert 40 < different.anomaly_score <= 80
    hottest = different.anomaly_map.argmax()
    assert 10 <= hottest // 60 < 20
    assert 30 <= hottest % 60 < 40
    assert detector.predict([]) == []
    assert detector.fingerprint != TemplateDetector(spoiled).fingerprint
