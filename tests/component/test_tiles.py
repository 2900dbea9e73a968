"""A defect of a few pixels on a large part: lost when the image is squeezed, found when it is cut into tiles."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.main import get_command

from daemon.cli import app


def write_plate(path: Path, seed: int, *, spot: bool = False) -> None:
    """A plate with soft shading and a sensor's noise; a spot is 4×4 pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:256, :384].astype(np.float32)
    plate = 120 + 40 * np.sin(y / 30 + rng.uniform(0, 6)) + 20 * np.cos(x / 50) + rng.normal(0, 3, x.shape)
    if spot:
        top, left = rng.integers(30, 220), rng.integers(30, 350)
        plate[top : top + 4, left : left + 4] -= 90
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), plate.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def plates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plates to learn from and to test; each spotted one has a twin without."""
    root = tmp_path_factory.mktemp("plates")
    for seed in range(12):
        write_plate(root / f"train/good/{seed:02d}.png", seed)
    for seed in range(100, 104):
        write_plate(root / f"test/good/{seed}.png", seed)
        write_plate(root / f"test/spot/{seed}.png", seed, spot=True)
    return root


def inspectd(*arguments: str | Path) -> None:
    get_command(app).main([str(argument) for argument in arguments], standalone_mode=False)


def told_apart(plates: Path, model: Path, *options: str) -> float:
    """The image AUROC of a PatchCore of 64 px that was trained with these options."""
    small = ["--detector", "patchcore", "--size", "64", "--alpha", "0.25", "--device", "cpu"]
    inspectd("train", "--good", plates / "train/good", "--out", model, *small, *options)
    inspectd("evaluate", "--model", model, "--data", plates, "--json", model / "figures.json", "--device", "cpu")
    auroc: float = json.loads((model / "figures.json").read_text())["image_auroc"]
    return auroc


def test_tiles_find_a_small_defect_that_a_squeezed_image_loses(
    plates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, tiles = tmp_path / "whole", tmp_path / "tiles"
    assert told_apart(plates, whole) < 0.8
    assert told_apart(plates, tiles, "--tile", "96", "--tile-overlap", "0") == 1
    settings = [json.loads((model / "manifest.json").read_text())["settings"] for model in (whole, tiles)]
    assert [known.get("tiling") for known in settings] == [None, {"side": 96, "overlap": 0}]
    capsys.readouterr()
    inspectd("predict", "--model", tiles, plates / "test/spot/100.png", "--overlays", tmp_path, "--device", "cpu")
    assert "FAIL" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "100.jpg")) is not None
