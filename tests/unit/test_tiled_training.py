"""What is trained on tiles: its length, its memory, its checkpoint, and what its model says."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from daemon.desk.training import Order, prepare, write_split
from detectors import artifact
from detectors.base import ArtifactError, DetectorName
from detectors.efficientad import detector as efficientad
from detectors.efficientad.network import PDN, EfficientAD
from detectors.patchcore import bank_size
from detectors.tiling import Tiling
from detectors.training import CHECKPOINT, Progress

TILING = Tiling(64, 16)
RD = Order(DetectorName.rd4ad, size=64, seed=0, device="cpu", tiling=TILING)


@pytest.fixture
def good(tmp_path: Path) -> list[Path]:
    """Three images, of 2 × 3 tiles, of the same lying, and of one."""
    rng = np.random.default_rng(0)
    paths = []
    for place, shape in enumerate([(100, 150, 3), (150, 100, 3), (64, 40, 3)]):
        paths.append(tmp_path / f"good/{place}.png")
        paths[0].parent.mkdir(exist_ok=True)
        cv2.imwrite(str(paths[-1]), rng.integers(0, 256, shape, dtype=np.uint8))
    return paths


def quiet(_: Progress) -> None:
    pass


def test_epochs_and_the_memory_follow_the_number_of_tiles(good: list[Path]) -> None:
    assert prepare(replace(RD, epochs=3, tiling=None), good).steps == 3
    assert prepare(replace(RD, epochs=3, tiling=Tiling(64, 0)), good * 3).steps == 3 * 3  # 39 tiles in batches of 16
    assert prepare(replace(RD, tiling=Tiling(64, 0)), good * 10).steps == 12 * 9  # 130 tiles, twelve epochs
    patchcore = replace(RD, detector=DetectorName.patchcore)
    assert prepare(patchcore, good).steps == bank_size(13, 64)
    assert prepare(replace(patchcore, tiling=None), good).steps == bank_size(3, 64)


def test_a_trained_model_says_how_images_are_cut_and_one_of_whole_images_does_not(
    good: list[Path], tmp_path: Path
) -> None:
    for detector in (DetectorName.rd4ad, DetectorName.patchcore):
        for name, tiling, settings in (("tiled", TILING, {"side": 64, "overlap": 16}), ("whole", None, None)):
            folder = tmp_path / detector / name
            prepare(replace(RD, detector=detector, steps=1, tiling=tiling), good).run(folder, [], quiet)
            assert artifact.read_manifest(folder).settings.get("tiling") == settings


def test_a_checkpoint_is_not_continued_with_other_tiles(good: list[Path], tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(replace(RD, steps=3), good).run(tmp_path, [], interrupt)
    assert (tmp_path / CHECKPOINT).exists()
    for other in (None, Tiling(64, 0)):
        with pytest.raises(ArtifactError, match=r"another training \(different: tiling\)"):
            prepare(replace(RD, steps=3, tiling=other), good).run(tmp_path, [], quiet)
    prepare(replace(RD, steps=3), good).run(tmp_path, [], quiet)


def test_a_puad_takes_an_efficientad_of_the_same_tiles_alone(good: list[Path], tmp_path: Path) -> None:
    efficientad.save(tmp_path, EfficientAD(PDN("s")), {}, None, TILING)
    write_split(tmp_path, good, [], 0)
    order = Order(DetectorName.puad, size=256, seed=0, device="cpu", trained=tmp_path)
    for other in (None, Tiling(64, 0)):
        with pytest.raises(ArtifactError, match="learned from other tiles"):
            prepare(replace(order, tiling=other), good)
    assert prepare(replace(order, tiling=TILING), good).steps == 0
