"""The four packages have short names; nothing else may answer to them."""

import importlib
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("calibration", "config", "daemon", "detectors")


@pytest.mark.parametrize("name", NAMES)
def test_the_package_is_ours_and_only_ours(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / name
    assert set(packages_distributions().get(name, ["inspectd"])) <= {"inspectd"}


def test_the_daemon_runs_without_what_only_training_needs() -> None:
    program = "import sys, daemon.service; sys.exit(any(name.endswith('.training') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
