"""What every detector must do, whatever it is made of. Add yours to DETECTORS."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from detectors import patchcore as patchcore_detector
from detectors.base import Detector, Image
from detectors.efficientad import detector as efficientad_detector
from detectors.efficientad.comparison import EfficientADComparison
from detectors.efficientad.network import PDN, EfficientAD
from detectors.efficientad.puad import fit_puad
from detectors.engines.pytorch import Eager
from detectors.patchcore import Description, coreset, describe
from detectors.reverse_distillation import detector as reverse_distillation_detector
from detectors.reverse_distillation.comparison import ReverseDistillationComparison
from detectors.reverse_distillation.network import ReverseDistillation
from detectors.reverse_distillation.training import RECIPES
from detectors.teacher import Teacher, preprocess_for
from detectors.template import TemplateDetector


def template() -> Detector:
    return TemplateDetector(np.full((32, 48, 3), 90, np.uint8))


def reverse_distillation(name: str, backbone: str) -> Callable[[], Detector]:
    def make() -> Detector:
        torch.manual_seed(0)
        recipe = RECIPES[name]
        network = ReverseDistillation(Teacher(backbone), recipe.skips, gate=recipe.gate, projected=recipe.projected)
        preprocess = preprocess_for(backbone, 64)
        engine = Eager(ReverseDistillationComparison(network, preprocess))
        return reverse_distillation_detector.run_by(engine, preprocess, f"{name} {backbone}")

    return make


def efficientad() -> EfficientAD:
    torch.manual_seed(0)
    network = EfficientAD(PDN("s"))
    network.std.fill_(1)
    network.quantiles.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    return network


def puad() -> Detector:
    rng = np.random.default_rng(0)
    good = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(7)]
    network = efficientad()
    head = fit_puad(network, good[:2], good[2:])
    return efficientad_detector.run_by(Eager(EfficientADComparison(network, head.feature)), head, "puad")


def patchcore() -> Detector:
    torch.manual_seed(0)
    teacher, preprocess = Teacher("efficientnet_lite0"), preprocess_for("efficientnet_lite0", 64)
    good = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    bank = coreset([describe(good, teacher, preprocess)], 6, 0, lambda *_: None)
    return patchcore_detector.run_by(Eager(Description(teacher, preprocess)), bank, preprocess, "patchcore")


DETECTORS: dict[str, Callable[[], Detector]] = {
    "template": template,
    "gsk_rd4ad": reverse_distillation("gsk_rd4ad", "efficientnet_lite0"),
    "sk_rd4ad": reverse_distillation("sk_rd4ad", "efficientnet_lite0"),
    "rd4ad": reverse_distillation("rd4ad", "resnet18"),
    "rdpp": reverse_distillation("rdpp", "resnet18"),
    "efficientad_s": lambda: efficientad_detector.run_by(
        Eager(EfficientADComparison(efficientad(), None)), None, "efficientad_s"
    ),
    "puad": puad,
    "patchcore": patchcore,
}


@cache
def made(name: str) -> Detector:
    return DETECTORS[name]()


@pytest.fixture(params=sorted(DETECTORS), scope="module")
def detector(request: pytest.FixtureRequest) -> Detector:
    return made(request.param)


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
    scores = {detector.predict([images[0]])[0].anomaly_score for _ in range(2)}
    assert len(scores) == 1
    assert np.array_equal(images[0], before)


def test_detectors_differ_in_their_fingerprints() -> None:
    assert len({made(name).fingerprint for name in DETECTORS}) == len(DETECTORS)
