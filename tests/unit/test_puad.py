"""PUAD: a distance that cannot break, and a score that is EfficientAD's and the distance's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import LedoitWolf
from torch import Tensor

from detectors import artifact
from detectors.base import ArtifactError, Image
from detectors.efficientad.comparison import EfficientADComparison
from detectors.efficientad.detector import PUAD, load, run_by, save
from detectors.efficientad.mahalanobis import Mahalanobis
from detectors.efficientad.network import PDN, EfficientAD
from detectors.efficientad.puad import Puad, fit_puad
from detectors.engines.pytorch import Eager
from detectors.engines.start import reference


def images(count: int, seed: int = 0) -> list[Image]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (8, 9, 3), dtype=np.uint8).repeat(30, 0).repeat(30, 1) for _ in range(count)]


def features(count: int, width: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)
    return torch.from_numpy(mixed).float()


@pytest.mark.parametrize("count", [12, 500])
def test_the_distance_is_that_of_the_pseudo_inverse(count: int) -> None:
    known, asked = features(count, 40), features(7, 40, seed=1)
    shrunk = LedoitWolf().fit(known.double().numpy())
    assert 0 <= shrunk.shrinkage_ <= 1
    off = asked.double().numpy() - shrunk.location_
    expected = np.sqrt(np.einsum("nd,de,ne->n", off, np.linalg.pinv(shrunk.covariance_), off))
    assert Mahalanobis.fit(known).distance(asked).numpy() == pytest.approx(expected, rel=1e-4)


def test_the_squared_distance_of_much_known_data_is_its_width_on_average() -> None:
    known = features(5000, 20)
    assert float(Mahalanobis.fit(known).distance(known).square().mean()) == pytest.approx(20, rel=0.05)


@given(st.integers(1, 9))
def test_the_distance_does_not_depend_on_the_batch(size: int) -> None:
    head, asked = Mahalanobis.fit(features(30, 10)), features(9, 10, seed=1)
    apart = torch.cat([head.distance(part) for part in torch.split(asked, size)])
    torch.testing.assert_close(apart, head.distance(asked))


def test_channels_that_never_vary_do_no_harm() -> None:
    for count in (5, 2000):
        known = features(count, 10)
        known[:, 3] = 2.5
        assert Mahalanobis.fit(known).distance(known).isfinite().all()
    assert Mahalanobis.fit(torch.ones(4, 10)).distance(torch.ones(2, 10)).tolist() == [0, 0]


def puad(weight: float) -> Puad:
    scales = torch.tensor([[0.3, 0.1], [19.0, 2.0]], dtype=torch.float64)
    return Puad(Mahalanobis.fit(features(50, 384)), scales, weight=weight)


def test_the_score_is_the_sum_of_both_in_standard_deviations_and_the_maps_maximum() -> None:
    maps, student = torch.rand(4, 256, 256), features(4, 768, seed=1)[:, :, None, None].expand(4, 768, 2, 2)
    head = puad(weight=0.5)
    far = head.distance.distance(student[:, :384].mean((2, 3)))
    expected = (maps.amax((1, 2)) - 0.3) / 0.1 + 0.5 * (far - 19) / 2
    found = head.lift(maps, student[:, :384].mean((2, 3))).amax((1, 2))
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_weight_of_nothing_leaves_efficientads_ranking() -> None:
    maps, student = torch.rand(30, 8, 8), features(30, 768, seed=1)[:, :, None, None]
    before = maps.amax((1, 2)).argsort()
    assert torch.equal(puad(weight=0).lift(maps, student[:, :384].mean((2, 3))).amax((1, 2)).argsort(), before)
    assert not torch.equal(puad(weight=1).lift(maps, student[:, :384].mean((2, 3))).amax((1, 2)).argsort(), before)


@pytest.fixture(scope="module")
def network() -> EfficientAD:
    torch.manual_seed(0)
    return EfficientAD(PDN("s")).eval()


@pytest.fixture(scope="module")
def head(network: EfficientAD) -> Puad:
    return fit_puad(network, images(2), images(5, seed=1))


def test_both_parts_have_mean_0_and_std_1_on_held_out_good_parts_and_survive_saving(
    network: EfficientAD, head: Puad, tmp_path: Path
) -> None:
    held = images(5, seed=1)
    both, picturable = (
        run_by(Eager(EfficientADComparison(network, puad.feature)), puad, "").predict(held)
        for puad in (head, replace(head, weight=0))
    )
    scores = np.array([[p.anomaly_score for p in predictions] for predictions in (both, picturable)])
    for part in (scores[1], scores[0] - scores[1]):
        assert (part.mean(), part.std()) == pytest.approx((0, 1), abs=1e-2)
    assert save(tmp_path, network, {}, head).detector == "puad"
    loaded = load(tmp_path, artifact.read_manifest(tmp_path), reference)
    for one, other in zip(both[:2], loaded.predict(held[:2]), strict=True):
        assert np.array_equal(one.anomaly_map, other.anomaly_map)
        assert other.anomaly_score == other.anomaly_map.max()


def test_held_out_images_that_are_all_alike_have_the_std_of_those_learned_from(network: EfficientAD) -> None:
    alone = fit_puad(network, images(2), images(1, seed=1) * 5, feature="teacher")
    assert (alone.scales[:, 1] > 0).all()
    assert alone.scales[0, 1] != 1
    assert alone.scales.isfinite().all()


def test_too_few_good_parts_are_refused(network: EfficientAD) -> None:
    with pytest.raises(ArtifactError, match="at least 2 good parts and 5 held out, there are 2 and 1"):
        fit_puad(network, images(2), images(1))


def test_good_parts_that_are_held_out_give_a_threshold_above_zero(network: EfficientAD, head: Puad) -> None:
    detector = run_by(Eager(EfficientADComparison(network, head.feature)), head, "")
    scores = [prediction.anomaly_score for prediction in detector.predict(images(5, seed=1))]
    assert max(scores) > 0.1


def test_a_puad_file_that_does_not_fit_is_refused(network: EfficientAD, head: Puad, tmp_path: Path) -> None:
    small = Puad(Mahalanobis.fit(features(20, 10)), head.scales)
    with pytest.raises(ArtifactError, match=r"puad\.safetensors holds tensors of other shapes; train it again"):
        load(tmp_path, save(tmp_path, network, {}, small), reference)
    save(tmp_path, network, {}, head)
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["settings"]["feature"] = "autoencoder"
    (tmp_path / "manifest.json").write_text(json.dumps(artifact.sealed(content)))
    with pytest.raises(ArtifactError, match="its feature is 'autoencoder'"):
        load(tmp_path, artifact.read_manifest(tmp_path), reference)
    (tmp_path / PUAD).write_bytes((tmp_path / PUAD).read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="truncated"):
        load(tmp_path, artifact.read_manifest(tmp_path), reference)
