"""Calibration as a quality engineer does it: propose, compare, accept, go back; with rules, groups and what-if."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import typer
from typer.main import get_command

from calibration import golden, store
from calibration.calibration import CalibrationError
from calibration.threshold import Method
from config.load import ConfigError
from daemon import images
from daemon.build import build_detector, load_calibration
from daemon.cli import app
from daemon.desk.dataset import DatasetError

Say = Callable[..., str]


@pytest.fixture
def mine(model: Path, tmp_path: Path) -> Path:
    """A calibrated model to change."""
    shutil.copytree(model, tmp_path / "mine")
    return tmp_path / "mine"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command of `inspectd` in this process; gives what it says on standard output, on one line."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        get_command(app).main([str(argument) for argument in arguments], standalone_mode=False)
        return " ".join(capsys.readouterr().out.split())

    return run


def test_a_first_calibration_is_in_force_at_once_with_its_card(mine: Path, data: Path, say: Say) -> None:
    (mine / "calibration.json").unlink()
    said = say("calibrate", "--model", mine, "--good", data / "test/good", "--by", "Q. E.")
    made = store.read(mine / "calibration.json")
    assert f"In force: {made.id}" in said
    assert "NO PROMISE OF α = 1 %" in said
    assert "6 good parts carry no less than α = 14.3 %; 1 % needs 99" in said
    assert made.provenance.made_by == "Q. E."
    assert made.id in (mine / "calibration.html").read_text()


def test_what_the_model_has_learned_is_left_out(mine: Path, data: Path, say: Say) -> None:
    said = say("calibrate", "--model", mine, "--good", data / "train/good", "--alpha", "0.2")
    assert "16 of 24 images trained this model and are left out" in said
    assert store.read(store.proposal(mine / "calibration.json")).good_parts == 8


def test_another_calibration_waits_until_it_is_accepted_and_can_be_taken_back(
    mine: Path, data: Path, say: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    path = mine / "calibration.json"
    first = store.read(path)
    said = say("calibrate", "--model", mine, "--good", data / "test/good", "--alpha", "0.2")
    proposed = store.read(store.proposal(path))
    assert store.read(path) == first
    assert f"{first.id} stays in force until: inspectd calibrations accept {proposed.id} --model {mine}" in said
    assert f"in force {first.id} {first.threshold:.5g} 0 of 8 = 0.0%" in said
    assert f"proposed {proposed.id} {proposed.threshold:.5g}" in said
    listed = say("calibrations", "list", "--model", mine)
    assert f"in force {first.id}" in listed
    assert f"proposed {proposed.id}" in listed

    page = (mine / "calibration.html").read_bytes()
    with pytest.raises(CalibrationError, match=f"the proposal is {proposed.id}, not {first.id}"):
        say("calibrations", "accept", first.id, "--model", mine)
    assert "In force" not in capsys.readouterr().out
    assert (mine / "calibration.html").read_bytes() == page
    assert f"In force: {proposed.id}" in say("calibrations", "accept", proposed.id, "--model", mine)
    assert store.read(path) == proposed
    assert proposed.id in (mine / "calibration.html").read_text()
    assert not list(mine.glob("*proposed*"))
    with pytest.raises(CalibrationError, match="there is no proposal"):
        say("calibrations", "accept", proposed.id, "--model", mine)

    assert f"In force: {first.id}" in say("calibrations", "roll-back", "--model", mine)
    assert store.read(path) == first
    assert f"earlier {proposed.id}" in say("calibrations", "list", "--model", mine)
    assert f"In force: {proposed.id}" in say("calibrations", "roll-back", "--model", mine, "--id", proposed.id)
    with pytest.raises(CalibrationError, match="known: "):
        say("calibrations", "roll-back", "--model", mine, "--id", "000000000000")


def test_a_calibration_keeps_its_golden_set_through_proposal_acceptance_and_roll_back(
    mine: Path, data: Path, say: Say
) -> None:
    path = mine / "calibration.json"
    first = store.read(path)
    assert golden.load(path, first) is not None  # `inspectd train` made it
    say("calibrate", "--model", mine, "--good", data / "test/good", "--alpha", "0.3")
    replaced = store.read(store.proposal(path))
    said = say("calibrate", "--model", mine, "--good", data / "test/good", "--alpha", "0.2")
    proposed = store.read(store.proposal(path))
    assert f"Golden set: 5 images, 0.1 MB, in {golden.place(path, proposed.id)}" in said
    assert {file.stem for file in golden.place(path, first.id).parent.iterdir()} == {first.id, proposed.id}
    assert replaced.id != proposed.id

    assert "golden set" not in say("calibrations", "accept", proposed.id, "--model", mine)
    kept = golden.load(path, store.read(path))
    assert kept is not None
    assert kept.scores == tuple(proposed.scores[place] for place in (0, 1, 2, 4, 5))
    detector = build_detector(mine, "cpu")
    assert kept.verify([one.anomaly_score for one in detector.predict(kept.images)]) < 1e-3
    with pytest.raises(CalibrationError, match=r"golden image \d of 5 scored"):
        kept.verify([one.anomaly_score for one in detector.predict([image[::-1] for image in kept.images])])

    file = golden.place(path, first.id)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(CalibrationError, match="the golden set is torn"):
        say("calibrations", "roll-back", "--model", mine)
    assert store.read(path) == proposed
    file.unlink()
    assert "It has no golden set" in say("calibrations", "roll-back", "--model", mine)
    file.write_bytes(whole)
    say("calibrations", "roll-back", "--model", mine, "--id", proposed.id)
    assert "golden set" not in say("calibrations", "roll-back", "--model", mine, "--id", first.id)
    assert golden.load(path, first) is not None


def test_a_golden_set_is_made_of_added_parts_alone(mine: Path, data: Path, say: Say) -> None:
    path = mine / "calibration.json"
    before = store.read(path)
    say("calibrate", "--model", mine, "--good", data / "test/good", "--add")
    both = store.read(store.proposal(path))
    kept = golden.load(path, both)
    assert kept is not None
    assert set(kept.scores) <= set(both.scores) - set(before.scores)


def test_a_proposal_for_another_model_is_not_accepted(mine: Path, data: Path, say: Say) -> None:
    say("calibrate", "--model", mine, "--good", data / "test/good")
    manifest = json.loads((mine / "manifest.json").read_text())
    say("train", "--detector", "patchcore", "--good", data / "train/good", "--out", mine, "--size", "64", "--overwrite")
    assert json.loads((mine / "manifest.json").read_text()) != manifest
    in_force = store.read(mine / "calibration.json")
    proposed = store.read(store.proposal(mine / "calibration.json"))
    with pytest.raises(CalibrationError, match="made for another model"):
        say("calibrations", "accept", proposed.id, "--model", mine)
    with pytest.raises(CalibrationError, match="made for another model"):
        say("calibrations", "roll-back", "--model", mine)
    assert store.read(mine / "calibration.json") == in_force


def test_added_parts_join_those_in_force(mine: Path, data: Path, say: Say) -> None:
    before = store.read(mine / "calibration.json")
    say("calibrate", "--model", mine, "--good", data / "test/good", "--add", "--alpha", "0.1")
    both = store.read(store.proposal(mine / "calibration.json"))
    assert both.good_parts == 14
    assert set(before.scores) < set(both.scores)
    assert both.method is Method.conformal
    assert both.provenance.data_sha256 != before.provenance.data_sha256
    assert both.appearance is not None
    assert {len(values) for values in both.appearance.canaries.values()} == {14}
    say("calibrations", "accept", both.id, "--model", mine)
    with pytest.raises(DatasetError, match="every image is in the calibration in force already"):
        say("calibrate", "--model", mine, "--good", data / "test/good", "--add")


def test_copies_of_an_image_are_no_further_parts(mine: Path, data: Path, tmp_path: Path, say: Say) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(data / "test/good", twice)
    for path in sorted(twice.iterdir()):
        shutil.copy(path, path.with_stem(f"{path.stem}-copy"))
    said = say("calibrate", "--model", mine, "--good", twice)
    assert "6 of 12 images are copies of others and are left out" in said
    assert store.read(store.proposal(mine / "calibration.json")).good_parts == 6


def test_a_calibration_that_was_edited_is_not_replaced_in_silence(mine: Path, data: Path, say: Say) -> None:
    path = mine / "calibration.json"
    path.write_text(path.read_text().replace('"alpha": 0.01', '"alpha": 0.05'))
    with pytest.raises(CalibrationError, match="edited"):
        say("calibrate", "--model", mine, "--good", data / "test/good")
    with pytest.raises(CalibrationError, match="edited"):
        say("calibrations", "list", "--model", mine)


def test_parts_of_one_lot_count_as_fewer(mine: Path, tmp_path: Path, data: Path, say: Say) -> None:
    lots = tmp_path / "lots"
    lots.mkdir()
    for number in range(6):
        image = images.read(data / f"test/good/{number:03}.png").copy()
        for copy in range(3):  # the same part again, but for a pixel
            image[0, 0] = copy
            cv2.imwrite(str(lots / f"lot{number}_{copy}.png"), image)
    say("calibrate", "--model", mine, "--good", lots, "--group", r"^(lot\d+)_", "--alpha", "0.2")
    grouped = store.read(store.proposal(mine / "calibration.json"))
    assert grouped.good_parts == 18
    assert grouped.n_effective == 6
    with pytest.raises(DatasetError, match="has no group"):
        say("calibrate", "--model", mine, "--good", lots, "--group", "batch")
    with pytest.raises(typer.BadParameter, match="no regular expression"):
        say("calibrate", "--model", mine, "--good", lots, "--group", "(")


def test_what_if_shows_thresholds_and_escapes_and_writes_nothing(mine: Path, data: Path, say: Say) -> None:
    before = {path: path.read_bytes() for path in mine.iterdir() if path.is_file()}
    said = say("calibrate", "--model", mine, "--what-if", "--defects", data / "test/missing_hole")
    assert "10 %" in said
    assert "0.1 %" in said
    assert "of 1 " in said
    assert {path: path.read_bytes() for path in mine.iterdir() if path.is_file()} == before
    said = say("calibrate", "--model", mine, "--what-if", "--alpha", "0.3", "--method", "conformal")
    assert "30 %" in said
    assert "none conformal" in said
    with pytest.raises(typer.BadParameter, match="bad parts never move a threshold"):
        say("calibrate", "--model", mine, "--good", data / "test/good", "--defects", data / "test/missing_hole")


def test_an_uncertain_band_splits_the_rejects(mine: Path, data: Path, say: Say) -> None:
    options = ["--good", data / "train/good", "--alpha", "0.3", "--fail-alpha", "0.15"]
    say("calibrate", "--model", mine, *options)
    say("calibrations", "accept", store.read(store.proposal(mine / "calibration.json")).id, "--model", mine)
    made = store.read(mine / "calibration.json")
    assert made.threshold < made.fail_threshold == made.scores[-1]
    said = say("predict", "--model", mine, *(data / "train/good").glob("*.png"))
    assert "UNCERTAIN" in said


def station(folder: Path, model: Path, regions: str) -> Path:
    config = folder / "inspectd.toml"
    config.write_text(
        f'[mqtt]\nhost = "127.0.0.1"\n[[station]]\nname = "cam1"\nmodel = "{model}"\ncalibration = "cam1.json"\n'
        f'[station.source]\ntype = "folder"\npath = "incoming"\n[station.regions]\n{regions}\n'
    )
    return config


def test_a_station_is_calibrated_under_its_own_rules_and_no_others(
    mine: Path, data: Path, tmp_path: Path, say: Say
) -> None:
    (tmp_path / "incoming").mkdir()
    config = station(tmp_path, mine, "smallest_area_px = 60")
    with pytest.raises(ConfigError, match="there is no calibration"):
        say("check", "--config", config)
    say("calibrate", "--config", config, "--good", data / "test/good", "--alpha", "0.2")
    ruled = store.read(tmp_path / "cam1.json")
    detector = build_detector(mine, "cpu")
    plain = load_calibration(mine, detector)
    assert ruled.provenance.regions
    assert plain.provenance.regions == ""
    assert "at most 20 % are rejected" in say("check", "--config", config)
    said = say("predict", "--config", config, data / "test/missing_hole/000.png")
    assert "FAIL" in said or "PASS" in said

    station(tmp_path, mine, "smallest_area_px = 61")
    with pytest.raises(ConfigError, match="other masks or region rules"):
        say("check", "--config", config)
    with pytest.raises(CalibrationError, match="other masks or region rules"):
        say("predict", "--config", config, data / "test/missing_hole/000.png")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "either --model, or --config"),
        (["--station", "cam1"], "either --model, or --config"),
        (["--model", "MINE"], "--good is missing"),
        (["--model", "MINE", "--good", "GOOD", "--fail-alpha", "0.5"], "must be below α"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], says: str, mine: Path, data: Path, say: Say) -> None:
    given = [option.replace("MINE", str(mine)).replace("GOOD", str(data / "test/good")) for option in options]
    with pytest.raises((typer.BadParameter, CalibrationError), match=says):
        say("calibrate", *given)
