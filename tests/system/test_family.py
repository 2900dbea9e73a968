"""Every detector of the family from the command line to a verdict, hardly trained; minutes in all."""

import json
from pathlib import Path

import pytest
import torch

from daemon.build import build_detector, load_calibration
from detectors.reverse_distillation.network import ReverseDistillation
from detectors.teacher import Teacher, load_teacher
from tests.system.conftest import Run

pytestmark = pytest.mark.long

SMALL = ["--size", "64", "--steps", "2"]


def usable(model: Path, detector: str) -> None:
    """Whether the daemon can take the model up."""
    assert json.loads((model / "manifest.json").read_text())["detector"] == detector
    loaded = build_detector(model, "cpu")
    assert load_calibration(model, loaded).provenance.model == loaded.fingerprint


@pytest.mark.parametrize("detector", ["sk_rd4ad", "rd4ad", "rdpp", "patchcore"])
def test_each_is_trained_calibrated_and_judges(detector: str, data: Path, inspectd: Run, tmp_path: Path) -> None:
    options = ["--size", "64"] if detector == "patchcore" else SMALL
    done = inspectd("train", "--detector", detector, "--good", data / "train/good", "--out", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    usable(tmp_path, detector)
    done = inspectd("predict", "--model", tmp_path, data / "test/good/000.png")
    assert done.returncode == 0, done.stderr
    assert "000.png" in done.stdout


@pytest.fixture(scope="module")
def few(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good parts to learn from, and five others: EfficientAD sees 256 px only, and takes its time."""
    folder = tmp_path_factory.mktemp("few")
    for place, path in enumerate(sorted((data / "train/good").iterdir())[:7]):
        kind = folder / ("good" if place < 2 else "calibration")
        kind.mkdir(exist_ok=True)
        (kind / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def pdn(few: Path, inspectd: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that has hardly been distilled."""
    out = tmp_path_factory.mktemp("pdn") / "pdn.safetensors"
    command = ["distill-teacher", "--images", few, "--out", out, "--backbone", "efficientnet_lite0"]
    done = inspectd(*command, "--steps", "1", "--batch", "1")
    assert done.returncode == 0, done.stderr
    assert "EfficientAD-S's teacher from 7 pictures" in done.stdout
    assert list(out.parent.iterdir()) == [out]
    done = inspectd(*command)
    assert done.returncode == 1
    assert "exists already" in done.stderr
    done = inspectd("distill-teacher", "--images", few, "--out", out.with_suffix(".pth"))
    assert done.returncode == 2
    assert "must end in .safetensors" in " ".join(done.stderr.split())
    return out


@pytest.mark.timeout(300)  # five commands, and seconds for each image
def test_puad_is_built_on_a_trained_efficientad(few: Path, pdn: Path, inspectd: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "efficientad", tmp_path / "puad"
    train = ["train", "--good", few / "good", "--calibration-good", few / "calibration"]
    done = inspectd(
        *train, "--detector", "efficientad_s", "--pdn", pdn, "--steps", "1", "--penalty", few, "--out", first
    )
    assert done.returncode == 0, done.stderr
    usable(first, "efficientad_s")
    done = inspectd(*train, "--detector", "puad", "--trained", first, "--out", second)
    assert done.returncode == 0, done.stderr
    usable(second, "puad")
    student = [
        json.loads((model / "manifest.json").read_text())["files"]["student.safetensors"] for model in (first, second)
    ]
    assert student[0] == student[1]
    other = ["train", "--good", few / "calibration", "--calibration-good", few / "good"]
    done = inspectd(*other, "--detector", "puad", "--trained", first, "--out", tmp_path / "torn")
    assert done.returncode == 78
    assert "learned from other images" in done.stderr
    done = inspectd(*train, "--detector", "puad", "--trained", first, "--out", first, "--overwrite")
    assert done.returncode == 2
    usable(first, "efficientad_s")


def test_a_checkpoint_of_the_public_code_is_calibrated_on_all_good_parts(
    data: Path, inspectd: Run, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "resnet18.pth"
    teacher = Teacher("resnet18")
    torch.save(teacher.backbone.state_dict(), weights)
    network = ReverseDistillation(load_teacher("resnet18", weights), ())
    torch.save({"bn": network.bn.state_dict(), "decoder": network.decoder.state_dict()}, tmp_path / "foreign.pth")
    model = tmp_path / "model"
    options = ["--backbone", "resnet18", "--weights", weights, "--trained", tmp_path / "foreign.pth", "--size", "64"]
    done = inspectd("train", "--detector", "rd4ad", "--good", data / "train/good", "--out", model, *options)
    assert done.returncode == 0, done.stderr
    usable(model, "rd4ad")
    assert "Good parts     24" in done.stdout
