"""`inspectd compare` as people use it: once, and again with one more detector."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image as Pillow

from tests.system.conftest import Run


@pytest.mark.long
def test_detectors_are_compared_once_and_only_what_is_new_runs_again(data: Path, inspectd: Run, tmp_path: Path) -> None:
    out = tmp_path / "report"
    options = ["--data", data, "--out", out, "--seeds", "1", "--device", "cpu", "--set", "all:--size=64"]
    options += ["--set", "all:--epochs=1"]
    done = inspectd("compare", *options, "--detectors", "rd4ad,sk_rd4ad")
    assert done.returncode == 0, done.stderr
    assert re.search(r"image AUROC.*\n(.*\n)+.*rd4ad.*\d\.\d{3}.*\n.*sk_rd4ad.*\d\.\d{3}", done.stdout)
    models = sorted(out.glob("models/*/*/seed0/manifest.json"))
    assert [path.parent.parent.name for path in models] == ["rd4ad", "sk_rd4ad"]
    record = json.loads((out / "runs" / data.name / "rd4ad/seed0.json").read_text())
    assert record["train_seconds"] > 0
    assert record["run"]["identity"]["options"] == ["--size=64", "--epochs=1"]
    assert record["run"]["commands"][0].startswith("inspectd train --detector rd4ad --good")
    assert (record["run"]["learned"], len(record["run"]["calibration_scores"])) == (16, 8)
    assert record["run"]["machine"]["device"] == "cpu"

    page = (out / f"{data.name}.html").read_text()
    links = [unquote(link) for link in re.findall(r'(?:src|href)="([^"]+)"', page)]
    assert all((out / link).is_file() for link in links)
    pictures = [link for link in links if link.endswith(".jpg")]
    assert (
        len(pictures) == 2 * 2 * 7
    )  # detectors, truth beside map, and of four bad parts one is among the best and the worst
    with Pillow.open(out / pictures[0]) as truth, Pillow.open(out / pictures[1]) as seen:
        assert truth.height == seen.height
    assert f"### {data.name}" in (out / "results.md").read_text().replace("\\", "")

    before = {path: path.stat().st_mtime_ns for path in (*models, *out.rglob("*.jpg"))}
    options += ["--set", "torn:--backbone=vgg"]
    done = inspectd("compare", *options, "--detectors", "rd4ad,sk_rd4ad,torn=rd4ad")
    assert done.returncode == 1
    assert "2 of 3 runs were finished before" in done.stdout
    assert re.search(r"torn/seed0 failed: train: no backbone is called 'vgg'.*torn/seed0.log", done.stderr)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "failed, seed 0: train: no backbone is called" in (out / "index.html").read_text()
    assert 'class="failed"' in (out / f"{data.name}.html").read_text()
