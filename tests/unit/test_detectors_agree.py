"""What every detector must do, whatever it is made of. Add yours to DETECTORS."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from detectors.base import Detector, Image
from detectors.reverse_distillation.detector import ReverseDistillationDetector, preprocess_for
from detectors.reverse_distillation.network import PUBLISHED_SKIPS, ReverseDistillation, Skips
from detectors.teacher import Teacher
from detectors.template import TemplateDetector


def template() -> Detector:
    return TemplateDetector(np.full((32, 48, 3), 90, np.uint8))


def reverse_distillation(backbone: str, skips: Skips) -> Callable[[], Detector]:
    def make() -> Detector:
        torch.manual_seed(0)
        network = ReverseDistillation(Teacher(backbone), skips)
        return ReverseDistillationDetector(network, preprocess_for(backbone, 64), f"{backbone}{skips}", "cpu")

    return make


DETECTORS: dict[str, Callable[[], Detector]] = {
    "template": template,
    "sk_rd4ad": reverse_distillation("efficientnet_lite0", PUBLISHED_SKIPS),
    "rd4ad": reverse_distillation("resnet18", ()),
}


@pytest.fixture(params=sorted(DETECTORS))
def detector(request: pytest.FixtureRequest) -> Detector:
    return DETECTORS[request.param]()


@pytest.fixture
def images() -> list[Image]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((64, 64, 3), (50, 70, 3), (128, 32, 3))]


def test_each_image_has_a_prediction_in_its_place(detector: Detector, images: list[Image]) -> None:
    together = detector.predict(images)
    assert len(together) == 3
    for image, prediction in zip(images, together, strict=True):
        (alone,) = detector.predict([image])
        assert prediction.anomaly_score == pytest.approx(alone.anomaly_score, rel=1e-4)


def test_the_score_is_the_maps_maximum_so_that_one_threshold_serves_both(
    detector: Detector, images: list[Image]
) -> None:
    for prediction in detector.predict(images):
        assert prediction.anomaly_map.ndim == 2
        assert prediction.anomaly_map.dtype == np.float32
        assert prediction.anomaly_score == pytest.approx(float(prediction.anomaly_map.max()))


def test_nothing_gives_nothing(detector: Detector) -> None:
    assert detector.predict([]) == []


def test_the_same_image_has_the_same_score_twice_and_is_not_changed(detector: Detector, images: list[Image]) -> None:
    before = images[0].copy()
    scores = {detector.predict([images[0]])[0].anomaly_score for _ in range(3)}
    assert len(scores) == 1
    assert np.array_equal(images[0], before)


def test_detectors_differ_in_their_fingerprints() -> None:
    assert len({make().fingerprint for make in DETECTORS.values()}) == len(DETECTORS)
