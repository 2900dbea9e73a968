"""Distilling EfficientAD's teacher: it learns, can be interrupted, and leaves a file that can be read."""

from pathlib import Path
from shutil import copy

import numpy as np
import pytest
import torch
from safetensors import safe_open

from detectors.base import ArtifactError, Image
from detectors.efficientad.distillation import DistillationRecipe, Targets, distil
from detectors.efficientad.teacher import load_pdn
from detectors.preprocess import Preprocess
from detectors.teacher import IMAGENET_MEAN, IMAGENET_STD, Teacher, load_teacher
from detectors.training import CHECKPOINT, Progress

BACKBONE = "efficientnet_lite0"
RECIPE = DistillationRecipe(steps=2, batch=2)


def images(count: int) -> list[Image]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (8, 9, 3), dtype=np.uint8).repeat(30, 0).repeat(30, 1) for _ in range(count)]


def test_a_distillation_learns_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.safetensors", tmp_path / "torn.safetensors"
    losses: list[float] = []

    def report(progress: Progress) -> None:
        losses.append(progress.loss)
        if progress.step == RECIPE.steps:  # its checkpoint is still the one before
            folder = tmp_path / "torn.safetensors.training"
            folder.mkdir()
            copy(tmp_path / "whole.safetensors.training" / CHECKPOINT, folder)

    pdn = distil(images(2), load_teacher(BACKBONE), RECIPE, out=whole, device="cpu", report=report)
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(value, pdn.state_dict()[key]) for key, value in load_pdn(whole).state_dict().items())
    with safe_open(whole, "pt") as file:
        about = file.metadata()
    assert about.items() >= {"size": "s", "backbone": BACKBONE, "steps": "2", "seed": "0", "images": "2"}.items()
    seen: list[int] = []
    distil(
        images(2),
        load_teacher(BACKBONE),
        RECIPE,
        out=torn,
        device="cpu",
        report=lambda p: seen.append(p.step),
        keep_bytes=0,
    )
    assert seen == [2]
    again = load_pdn(torn).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in load_pdn(whole).state_dict().items())


@pytest.mark.parametrize("backbone", [BACKBONE, "resnet18"])
def test_targets_have_384_channels_whatever_the_backbone(backbone: str) -> None:
    torch.manual_seed(0)
    targets = Targets(images(2), Teacher(backbone), "cpu", 1 << 30)
    coloured = targets.of(0, without_colour=False)
    assert coloured.shape == (384, 64, 64)
    assert not torch.equal(coloured, targets.of(0, without_colour=True))
    mean, std = targets.statistics(np.random.default_rng(0))
    both = torch.stack([targets.of(n, without_colour=False) for n in range(2)]).double()
    torch.testing.assert_close(mean.double(), both.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std.double(), both.std((0, 2, 3), correction=0), rtol=1e-2, atol=1e-4)


def test_resnet18s_second_and_third_levels_stand_in_the_target_as_they_are() -> None:
    torch.manual_seed(0)
    backbone = Teacher("resnet18")
    targets = Targets(images(1), backbone, "cpu", 0)
    large = Preprocess(512, IMAGENET_MEAN, IMAGENET_STD)
    _, level2, _ = backbone(large.normalise(large.resize(images(1))))
    torch.testing.assert_close(targets.of(0, without_colour=False)[:128].float(), level2[0], rtol=2e-3, atol=2e-3)


def test_one_image_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="at least 2"):
        distil(
            images(1),
            load_teacher(BACKBONE),
            RECIPE,
            out=tmp_path / "t.safetensors",
            device="cpu",
            report=lambda _: None,
        )
