"""The installed program, and a small model that it trained itself."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest

from demo.parts import KINDS, render

Run = Callable[..., subprocess.CompletedProcess[str]]

SIDE = 96


def write_part(path: Path, seed: int, kind: str = "good") -> None:
    """Render a part into a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    part.write_bytes(cv2.imencode(".png", render(seed, kind, SIDE).image[..., ::-1])[1].tobytes())
    part.rename(path)


@pytest.fixture(scope="session")
def inspectd() -> Run:
    """Run the installed command; its output is text, and two minutes are too long."""
    program = Path(sys.executable).with_name("inspectd")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered parts in MVTec layout: 24 to learn from, 6 good and 4 defective to test."""
    root = tmp_path_factory.mktemp("data")
    for i in range(24):
        write_part(root / f"train/good/{i:03d}.png", i)
    for i in range(6):
        write_part(root / f"test/good/{i:03d}.png", 100 + i)
    for i, kind in enumerate(KINDS):
        write_part(root / f"test/{kind}/000.png", 200 + i, kind)
        mask = root / f"ground_truth/{kind}/000_mask.png"
        mask.parent.mkdir(parents=True)
        cv2.imwrite(str(mask), render(200 + i, kind, SIDE).mask.astype("uint8") * 255)
    return root


@pytest.fixture(scope="session")
def model(inspectd: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `inspectd train` leaves it: small and hardly trained, but whole and calibrated."""
    folder = tmp_path_factory.mktemp("models") / "flange"
    done = inspectd("train", "--good", data / "train/good", "--out", folder, "--size", "64", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    return folder
