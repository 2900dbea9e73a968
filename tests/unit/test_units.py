"""The units are sound and tight, without a systemd that runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSTEMD = ROOT / "systemd"
UNITS = ("inspectd.service", "inspectd@.service")
EXPOSURE = 1.6
"""The most that systemd-analyze may find, of 10."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (apt-get install systemd)"
)


def settings(file: str) -> list[str]:
    """A unit's lines without its comments."""
    return [line for line in (SYSTEMD / file).read_text().splitlines() if line and not line.startswith("#")]


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units beside each other, for a program that exists."""
    for name in (*UNITS, "inspectd.target", "inspectd.slice"):
        text = (SYSTEMD / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/inspectd/.venv/bin/inspectd", sys.executable))
    return tmp_path


@needs_systemd
@pytest.mark.parametrize("unit", ["inspectd.service", "inspectd@line1.service"])
@pytest.mark.parametrize("drop_in", [None, "inspectd-gpu.conf", "inspectd-usb.conf"])
def test_systemd_finds_nothing_wrong(installed: Path, unit: str, drop_in: str | None) -> None:
    if "@" in unit:
        (installed / unit).symlink_to("inspectd@.service")
    if drop_in is not None:
        folder = installed / f"{unit}.d"
        folder.mkdir()
        shutil.copy(SYSTEMD / drop_in, folder)
    done = analyze("verify", "--man=no", installed / unit)
    assert [line for line in done.stderr.splitlines() if "inspectd" in line] == []


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_the_sandbox_stays_tight(unit: str) -> None:
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}", "--no-pager", SYSTEMD / unit)
    assert done.returncode == 0, done.stdout


def test_one_line_and_several_are_run_alike() -> None:
    several = "\n".join(settings("inspectd@.service"))
    names = {"/etc/inspectd/%i.toml": "/etc/inspectd/inspectd.toml", ", line %i": "", "%i": "main"}
    for of_a_line, alone in names.items():
        several = several.replace(of_a_line, alone)
    assert several.splitlines() == settings("inspectd.service")


def test_the_drop_in_for_a_gpu_leaves_the_driver_its_files_in_proc() -> None:
    assert "ProcSubset=all" in settings("inspectd-gpu.conf")
    assert "ProcSubset=pid" not in settings("inspectd-gpu.conf")


def test_an_exit_status_that_a_person_must_see_to_is_the_one_that_is_not_restarted() -> None:
    from daemon.terminal import EXIT_CONFIG

    for unit in UNITS:
        assert f"RestartPreventExitStatus={EXIT_CONFIG}" in settings(unit)


def test_every_file_for_systemd_is_installed_and_explained() -> None:
    installs = re.findall(r"systemd/(\S+)", (ROOT / "Makefile").read_text())
    page = (ROOT / "docs/service.md").read_text()
    for file in SYSTEMD.iterdir():
        assert file.name in installs
        assert file.name in page
