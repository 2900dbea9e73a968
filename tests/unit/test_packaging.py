"""The four packages have short names; nothing else may answer to them."""

import importlib
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from daemon import schemas

ROOT = Path(__file__).parents[2]
NAMES = ("calibration", "config", "daemon", "detectors")


@pytest.mark.parametrize("name", NAMES)
def test_the_package_is_ours_and_only_ours(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / name
    assert set(packages_distributions().get(name, ["inspectd"])) <= {"inspectd"}


def test_every_schema_lies_in_a_package_that_is_installed_and_is_not_ignored() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build == {"targets": {"wheel": {"packages": ["daemon", "detectors", "calibration", "config"]}}}
    files = sorted((ROOT / "daemon/schemas").glob("*.json"))
    assert [file.stem for file in files] == schemas.names()
    # The build leaves out what git ignores, and git, asked about a file it does not ignore, answers 1.
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, check=False, capture_output=True)
    assert ignored.stdout == b""


def test_the_daemon_runs_without_what_only_training_needs() -> None:
    program = "import sys, daemon.service; sys.exit(any(name.endswith('.training') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
