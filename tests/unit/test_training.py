"""Training: repeatable, interruptible, and saved so that nothing wrong can be loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from detectors import artifact
from detectors.base import ArtifactError, Image
from detectors.engines.start import reference
from detectors.reverse_distillation import detector as rd
from detectors.reverse_distillation.network import ReverseDistillation
from detectors.reverse_distillation.training import Recipe, default_steps, train
from detectors.teacher import load_teacher, preprocess_for
from detectors.training import CHECKPOINT, Progress, steps_per_epoch

SIZE = 64


def images(count: int) -> list[Image]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (80, 70, 3), dtype=np.uint8) for _ in range(count)]


def learn(
    folder: Path, recipe: Recipe, report: Callable[[Progress], None] = lambda _: None, count: int = 5
) -> ReverseDistillation:
    return train(
        images(count),
        load_teacher("efficientnet_lite0"),
        preprocess_for("efficientnet_lite0", SIZE),
        recipe,
        folder=folder,
        identity={"data": "noise"},
        device="cpu",
        report=report,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved, hardly trained model."""
    folder = tmp_path_factory.mktemp("model")
    network = learn(folder, Recipe(steps=1))
    rd.save(folder, "sk_rd4ad", network, preprocess_for("efficientnet_lite0", SIZE), {"seed": 0})
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """The model in a folder that a test may spoil."""
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    first = learn(tmp_path / "a", Recipe(steps=2, batch=3)).learned()
    second = learn(tmp_path / "b", Recipe(steps=2, batch=3)).learned()
    other = learn(tmp_path / "c", Recipe(steps=2, batch=3, seed=1)).learned()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    recipe = Recipe(steps=6, batch=3)
    whole = learn(tmp_path / "whole", recipe).learned()

    def interrupt(progress: Progress) -> None:
        if progress.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "torn", recipe, interrupt)
    seen: list[int] = []
    resumed = learn(tmp_path / "torn", recipe, lambda p: seen.append(p.step)).learned()
    assert seen == [2, 3, 4, 5, 6]  # a checkpoint follows the first step, and then every half minute
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_checkpoint_of_another_training_is_not_continued(tmp_path: Path) -> None:
    learn(tmp_path, Recipe(steps=1))
    with pytest.raises(ArtifactError, match=r"another training.*recipe.*remove it"):
        learn(tmp_path, Recipe(steps=2, seed=1))


def test_a_torn_checkpoint_is_refused(tmp_path: Path) -> None:
    learn(tmp_path, Recipe(steps=1))
    checkpoint = tmp_path / CHECKPOINT
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        learn(tmp_path, Recipe(steps=1))


def test_one_image_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="at least 2 good parts, there are 1"):
        learn(tmp_path, Recipe(steps=1), count=1)


def test_no_batch_is_ever_a_lone_image() -> None:
    for count in range(2, 200):
        sizes = [len(b) for b in np.array_split(np.arange(count), steps_per_epoch(count, 16))]
        assert min(sizes) >= 2
        assert max(sizes) <= 16


@pytest.mark.parametrize(("images", "epochs"), [(2, 60), (16, 60), (21, 30), (32, 30), (80, 12), (221, 12), (9999, 12)])
def test_the_default_length_is_twelve_epochs_but_at_least_sixty_steps(images: int, epochs: int) -> None:
    assert default_steps(images, 16) == epochs * steps_per_epoch(images, 16)


def test_a_saved_model_predicts_what_it_predicted_before(model: Path) -> None:
    manifest = artifact.read_manifest(model)
    detector = rd.load(model, manifest, reference)
    assert manifest.detector == "sk_rd4ad"
    batch = images(3)
    together = detector.predict(batch)
    again = rd.load(model, manifest, reference).predict(batch)
    for one, other, image in zip(together, again, batch, strict=True):
        assert one.anomaly_map.shape == (SIZE, SIZE)
        assert one.anomaly_score == one.anomaly_map.max() == other.anomaly_score
        (alone,) = detector.predict([image])
        assert alone.anomaly_score == pytest.approx(one.anomaly_score, rel=1e-4)
    assert detector.predict([]) == []


def test_a_model_without_skips_is_an_rd4ad_model(tmp_path: Path) -> None:
    network = learn(tmp_path, Recipe(steps=1, skips=()))
    manifest = rd.save(tmp_path, "rd4ad", network, preprocess_for("efficientnet_lite0", SIZE), {})
    assert manifest.detector == "rd4ad"
    assert rd.load(tmp_path, manifest, reference).predict(images(1))


def test_nothing_in_a_model_folder_is_a_pickle(model: Path) -> None:
    names = {path.name for path in model.iterdir()}
    assert names == {"manifest.json", "teacher.safetensors", "student.safetensors", CHECKPOINT}


def test_the_fingerprint_follows_weights_and_settings_and_nothing_else(copy: Path) -> None:
    before = artifact.read_manifest(copy)
    content = json.loads((copy / "manifest.json").read_text())
    content["training"]["seed"] = 77
    (copy / "manifest.json").write_text(json.dumps(artifact.sealed(content)))
    assert artifact.read_manifest(copy).fingerprint == before.fingerprint
    content["settings"]["size"] = 96
    (copy / "manifest.json").write_text(json.dumps(artifact.sealed(content)))
    assert artifact.read_manifest(copy).fingerprint != before.fingerprint


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        rd.load(folder, artifact.read_manifest(folder), reference)
    return str(caught.value)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    path = copy / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refused(copy)


def test_an_edited_file_is_refused(copy: Path) -> None:
    path = copy / "student.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "changed since training" in refused(copy)


def test_a_missing_file_is_refused(copy: Path) -> None:
    (copy / "teacher.safetensors").unlink()
    assert "is missing" in refused(copy)


def test_a_manifest_that_does_not_fit_its_weights_is_refused(copy: Path) -> None:
    for setting, value in (("backbone", "resnet18"), ("size", 250), ("skips", [[1, 1]])):
        content = json.loads((copy / "manifest.json").read_text())
        content["settings"][setting] = value
        (copy / "manifest.json").write_text(json.dumps(artifact.sealed(content)))
        assert "train it again" in refused(copy)


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"size": 64', '"size": 96'))
    with pytest.raises(ArtifactError, match="edited since training"):
        artifact.read_manifest(copy)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no model folder"),
        ("{", "cannot be read"),
        ('{"schema": "inspectd.model/9"}', "not of the form"),
        ('{"schema": "inspectd.model/1", "detector": "sk_rd4ad"}', "has been edited since training"),
        ("[]", "not of the form"),
    ],
)
def test_a_folder_without_a_sound_manifest_is_no_model(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=reason):
        artifact.read_manifest(tmp_path)


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path) -> None:
    learn(tmp_path, Recipe(steps=1))
    with pytest.raises(ArtifactError, match="run the same `inspectd train` again"):
        artifact.read_manifest(tmp_path)
