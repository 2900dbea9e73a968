"""What a comparison runs, what it does not run again, and how it sums up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from daemon.desk import comparison
from daemon.desk.comparison import Entry, Result, Row, Run
from daemon.desk.dataset import Category, DatasetError, Labelled

KNOWN = ("rd4ad", "sk_rd4ad")


def make_run(out: Path, *options: str, seed: int = 0) -> Run:
    entry = Entry("rd4ad", "rd4ad", options)
    return Run("flange", Path("/data/flange"), "0a1b", Path("/data/flange/train/good"), None, entry, seed, "cpu", out)


def make_row(label: str, *values: float | None) -> Row:
    results = (
        Result(seed, None if v is None else {"auroc": v}, "no" if v is None else "") for seed, v in enumerate(values)
    )
    return Row(Entry(label, "rd4ad", ()), tuple(results))


def images(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        cv2.imwrite(str(folder / name), np.zeros((4, 4, 3), np.uint8))
    return [folder / name for name in sorted(names)]


def test_labels_tell_two_of_one_detector_apart_and_a_label_wins_over_all() -> None:
    settings = ["r50:--backbone=resnet50_msra", "all:--size=128", "r50:--size=64"]
    assert comparison.entries("rd4ad, r50=rd4ad", settings, KNOWN) == [
        Entry("rd4ad", "rd4ad", ("--size=128",)),
        Entry("r50", "rd4ad", ("--size=128", "--backbone=resnet50_msra", "--size=64")),
    ]


@pytest.mark.parametrize(
    ("detectors", "settings", "words"),
    [
        ("patchcore", [], "no detector is called 'patchcore'; choose of rd4ad, sk_rd4ad"),
        ("rd4ad,rd4ad", [], "rd4ad2=rd4ad"),
        ("../x=rd4ad", [], "is no label"),
        ("all=rd4ad", [], "is no label"),
        ("", [], "no detector is listed"),
        ("rd4ad", ["rd4ad:size=3"], "is no setting"),
        ("rd4ad", ["rdpp:--size=64"], "LABEL one of all, rd4ad"),
    ],
)
def test_a_list_that_cannot_be_right_is_refused_with_what_would_be(
    detectors: str, settings: list[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words.replace("..", r"\.\.")):
        comparison.entries(detectors, settings, KNOWN)


def test_every_entry_runs_with_every_seed_on_a_folder_of_good_parts_alone(tmp_path: Path) -> None:
    good = images(tmp_path / "flange/train/good", "0.png", "1.png")
    category = Category("flange", "mvtec_ad", good, [], [])
    runs = comparison.plan(
        category, tmp_path / "flange", comparison.entries("rd4ad,sk_rd4ad", [], KNOWN), 2, "cpu", tmp_path
    )
    assert [run.name for run in runs] == [
        "flange/rd4ad/seed0",
        "flange/sk_rd4ad/seed0",
        "flange/rd4ad/seed1",
        "flange/sk_rd4ad/seed1",
    ]
    assert {run.good for run in runs} == {(tmp_path / "flange/train/good").resolve()}
    assert "--calibration-good" not in runs[0].train
    assert not (tmp_path / "links").exists()


def test_good_parts_among_others_are_linked_and_held_parts_calibrate(tmp_path: Path) -> None:
    pool = images(tmp_path / "data/good", "0.png", "1.png", "2.png")
    held = images(tmp_path / "data/validation", "9.png")
    category = Category("nut", "plain", pool[:2], held, [Labelled(pool[2], "good", None)])
    listed = [Entry("rd4ad", "rd4ad", ())]
    comparison.plan(category, tmp_path / "data", listed, 1, "cpu", tmp_path / "out")
    (run,) = comparison.plan(category, tmp_path / "data", listed, 1, "cpu", tmp_path / "out")  # over the first's links
    assert sorted(path.resolve() for path in run.good.iterdir()) == pool[:2]
    assert run.train[run.train.index("--calibration-good") + 1] == str(tmp_path / "data/validation")


def test_a_category_without_good_parts_is_refused_before_anything_runs(tmp_path: Path) -> None:
    images(tmp_path / "flange/test/good", "0.png")
    images(tmp_path / "flange/test/dent", "0.png")
    with pytest.raises(DatasetError, match="no good parts to learn from"):
        comparison.read(tmp_path)


def test_a_run_is_finished_only_with_its_own_options_and_a_whole_record(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--size=64")
    assert comparison.finished(run) is None
    run.record.parent.mkdir(parents=True)
    run.record.write_text(json.dumps({"image_auroc": 0.9}))  # evaluated, then interrupted
    assert comparison.finished(run) is None
    run.record.write_text(json.dumps({"image_auroc": 0.9, "run": {"identity": run.identity}}))
    result = comparison.finished(run)
    assert result is not None
    assert result.figures is not None
    assert result.figures["image_auroc"] == 0.9
    assert comparison.finished(make_run(tmp_path, "--size=128")) is None
    assert comparison.finished(replace(run, data=Path("/data/other"))) is None
    run.record.write_text(run.record.read_text()[:-9])
    assert comparison.finished(run) is None


@pytest.mark.parametrize(
    ("values", "mean", "sd", "n"), [([0.5], 0.5, None, 1), ([1.0, 2.0, 3.0], 2, 1, 3), ([None, 0.5], 0.5, None, 1)]
)
def test_of_one_seed_there_is_no_deviation(values: list[float | None], mean: float, sd: float | None, n: int) -> None:
    found = comparison.spread(values)
    assert found is not None
    assert (found.mean, found.sd, found.n) == (mean, sd, n)
    assert comparison.spread([None]) is None


def test_a_lead_is_clear_only_beyond_both_deviations_together() -> None:
    steady, near, far = (
        make_row("steady", 0.79, 0.80, 0.81),
        make_row("near", 0.80, 0.81, 0.82),
        make_row("far", 0.9, 0.92),
    )
    assert comparison.clearly_best([steady, near], "auroc", "high") is None
    assert comparison.clearly_best([steady, near, far], "auroc", "high") is far
    assert comparison.clearly_best([far, steady], "auroc", "low") is steady
    assert comparison.clearly_best([far], "auroc", "high") is None
    assert comparison.clearly_best([far, make_row("once", 0.1)], "auroc", "high") is None


def test_failures_of_several_seeds_are_told_once() -> None:
    row = make_row("torn", None, 0.5, None)
    assert row.errors == ["seed 0, 2: no"]
    assert len(row.done) == 1


def part(name: str, defect: str, score: float) -> dict[str, Any]:
    return {"path": name, "defect": defect, "score": score, "rejected": score > 1}


def test_the_parts_judged_worst_are_shown_first() -> None:
    parts = [part(f"g{i}", "good", i / 10) for i in range(12)] + [part(f"b{i}", "dent", i / 5) for i in range(12)]
    chosen = [str(p["path"]) for p in comparison.telling(parts)]
    assert chosen == ["b0", "b1", "b2", "g11", "g10", "b11", "b10", "g0"]
    few = [part("g", "good", 0.1), part("b", "dent", 2.0)]
    assert [p["path"] for p in comparison.telling(few)] == ["b", "g"]
