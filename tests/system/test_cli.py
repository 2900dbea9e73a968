"""The command line as people use it: what it writes, what it says, and with which status it leaves."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image as Pillow

from daemon import images
from daemon.build import build_detector, load_calibration
from detectors.artifact import sealed
from tests.system.conftest import Run, write_part


def test_train_leaves_a_calibrated_model_and_the_split_it_was_made_with(model: Path, data: Path) -> None:
    split = json.loads((model / "split.json").read_text())
    assert len(split["learned"]) == 16
    assert len(split["held_out"]) == 8
    assert sorted({**split["learned"], **split["held_out"]}) == sorted(p.name for p in (data / "train/good").iterdir())
    calibration = json.loads((model / "calibration.json").read_text())
    assert len(calibration["scores"]) == 8
    assert calibration["threshold"] == max(calibration["scores"])
    assert (calibration["method"], calibration["n_effective"]) == ("largest", 8)
    assert calibration["provenance"]["engine"].startswith("torch ")
    assert {len(values) for values in calibration["appearance"]["canaries"].values()} == {8}
    assert {p.name for p in model.iterdir()} == {
        "manifest.json",
        "teacher.safetensors",
        "student.safetensors",
        "split.json",
        "calibration.json",
        "calibration.html",
        "calibration.history",
        "calibration.golden",
    }


def test_evaluate_writes_every_figure(model: Path, data: Path, inspectd: Run, tmp_path: Path) -> None:
    done = inspectd("evaluate", "--model", model, "--data", data, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {
        "image_auroc",
        "pixel_auroc",
        "aupro",
        "threshold",
        "alpha",
        "false_reject_rate",
        "escape_rate",
        "n_good",
        "n_defect",
        "latency_ms_p50",
    } <= figures.keys()
    assert (figures["n_good"], figures["n_defect"]) == (6, 4)
    assert figures["present"] == {"dent": 1, "missing_hole": 1, "scratch": 1, "stain": 1}
    assert "image AUROC" in done.stdout


def test_predict_judges_as_calibrated_and_draws_overlays(
    model: Path, data: Path, inspectd: Run, tmp_path: Path
) -> None:
    parts = [data / "test/good/000.png", data / "test/stain/000.png"]
    done = inspectd("predict", "--model", model, *parts, "--overlays", tmp_path / "look")
    assert done.returncode == 0, done.stderr
    detector = build_detector(model, "cpu")
    calibration = load_calibration(model, detector)
    predictions = detector.predict([images.read(part) for part in parts])
    ratios = [prediction.anomaly_score / calibration.threshold for prediction in predictions]
    said = re.findall(r"│ (PASS|FAIL)\s+│\s+([\d.]+) │", done.stdout)
    assert [float(ratio) for _, ratio in said] == pytest.approx(ratios, abs=2e-3)
    assert [outcome for outcome, _ in said] == ["FAIL" if ratio > 1 else "PASS" for ratio in ratios]
    overlays = sorted((tmp_path / "look").iterdir())
    assert len(overlays) == 2  # of the same stem, neither overwritten
    for path in overlays:
        with Pillow.open(path) as picture:
            assert max(picture.size) >= 512


def test_predict_names_what_it_cannot_read_and_judges_the_rest(
    model: Path, data: Path, inspectd: Run, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.jpg"
    with Pillow.open(data / "test/good/000.png") as good:
        good.save(torn)
    torn.write_bytes(torn.read_bytes()[:-300])
    done = inspectd("predict", "--model", model, torn, data / "test/good/000.png", tmp_path / "nowhere.png")
    assert done.returncode == 1
    assert "ERROR" in done.stdout
    assert "PASS" in done.stdout or "FAIL" in done.stdout


@pytest.mark.parametrize("reason", ["no such folder", "empty folder", "mvtec root", "finished", "backbone", "weights"])
def test_train_refuses_what_cannot_work_and_says_what_to_do(
    reason: str, model: Path, data: Path, inspectd: Run, tmp_path: Path
) -> None:
    good, out, extra = data / "train/good", tmp_path / "model", []
    match reason:
        case "no such folder":
            good, words = tmp_path / "nowhere", "no such folder: .*nowhere"
        case "empty folder":
            good, words = tmp_path, "holds no image"
        case "mvtec root":
            good, words = data, "did you mean .*train/good"
        case "finished":
            out, words = model, "already holds a finished model.*--overwrite"
        case "backbone":
            extra, words = ["--backbone", "vgg"], "no backbone is called 'vgg'; choose one of .*wide_resnet50_2"
        case _:
            extra, words = ["--weights", str(tmp_path / "none.pth")], "no such weights file"
    done = inspectd("train", "--good", good, "--out", out, *extra)
    assert done.returncode in (1, 78)
    assert re.search(words, done.stderr)
    assert "Traceback" not in done.stderr


def test_an_image_that_cannot_be_read_stops_a_training_by_its_name(data: Path, inspectd: Run, tmp_path: Path) -> None:
    shutil.copytree(data / "train/good", tmp_path / "good")
    (tmp_path / "good/torn.png").write_text("hello")
    done = inspectd("train", "--good", tmp_path / "good", "--out", tmp_path / "model", "--size", "64", "--epochs", "1")
    assert done.returncode == 1
    assert "torn.png" in done.stderr


def test_training_interrupted_from_the_keyboard_goes_on_where_it_was(data: Path, inspectd: Run, tmp_path: Path) -> None:
    command = ["train", "--good", data / "train/good", "--size", "64", "--epochs", "3"]
    program = [str(Path(sys.executable).with_name("inspectd")), *map(str, command), "--out", str(tmp_path / "torn")]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 90
        while not (tmp_path / "torn/checkpoint.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert inspectd(*command, "--out", tmp_path / "torn").returncode == 0
    assert inspectd(*command, "--out", tmp_path / "whole").returncode == 0
    torn, whole = (json.loads((tmp_path / n / "manifest.json").read_text())["files"] for n in ("torn", "whole"))
    assert torn == whole


def test_a_training_that_fails_over_a_finished_model_leaves_no_model_with_another_split(
    model: Path, data: Path, inspectd: Run, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(model, mine)
    (tmp_path / "torn.pth").write_text("hello")
    options = ["--detector", "rd4ad", "--trained", tmp_path / "torn.pth", "--size", "64", "--overwrite"]
    assert inspectd("train", "--good", data / "train/good", "--out", mine, *options).returncode == 78
    done = inspectd("calibrate", "--model", mine, "--good", data / "train/good")
    assert done.returncode == 78
    assert "is no model folder" in done.stderr


def test_an_evaluation_says_when_the_model_has_learned_from_test_images(
    model: Path, data: Path, inspectd: Run, tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(data, twin)
    learned = json.loads((model / "split.json").read_text())["learned"]
    shutil.copy(data / "train/good" / min(learned), twin / "test/good/renamed.png")
    done = inspectd("evaluate", "--model", model, "--data", twin)
    assert "1 of 11 test images trained or calibrated this model too" in done.stdout
    assert "this model too" not in inspectd("evaluate", "--model", model, "--data", data).stdout


def test_a_calibration_of_another_model_is_refused(model: Path, data: Path, inspectd: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    done = inspectd(
        "train", "--good", data / "train/good", "--out", other, "--size", "64", "--epochs", "1", "--seed", "7"
    )
    assert done.returncode == 0, done.stderr
    shutil.copy(model / "calibration.json", other / "calibration.json")
    done = inspectd("predict", "--model", other, data / "test/good/000.png")
    assert done.returncode == 78
    assert "made for another model" in done.stderr
    assert "inspectd calibrate" in done.stderr


def test_a_model_of_an_unknown_detector_is_refused(model: Path, data: Path, inspectd: Run, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(model, foreign)
    manifest = foreign / "manifest.json"
    content = json.loads(manifest.read_text().replace('"gsk_rd4ad"', '"crystal_ball"'))
    manifest.write_text(json.dumps(sealed(content)))
    done = inspectd("predict", "--model", foreign, data / "test/good/000.png")
    assert done.returncode == 78
    assert "crystal_ball" in done.stderr


def write_config(folder: Path, model: Path, more: str = "") -> Path:
    config = folder / "inspectd.toml"
    config.write_text(
        f'{more}\n[mqtt]\nhost = "127.0.0.1"\n[[station]]\nname = "cam1"\nmodel = "{model}"\n'
        '[station.source]\ntype = "folder"\npath = "incoming"\n'
    )
    return config


def test_check_approves_a_sound_station_and_names_every_fault_of_another(
    model: Path, inspectd: Run, tmp_path: Path
) -> None:
    config = write_config(tmp_path, model)
    done = inspectd("check", "--config", config)
    assert done.returncode == 78
    assert re.search(r"station cam1: the folder .*incoming cannot be used.*mkdir -p", done.stderr)
    write_part(tmp_path / "incoming/waiting.png", 1)
    done = inspectd("check", "--config", config)
    assert done.returncode == 0, done.stderr
    assert "at most 11 % are rejected, on average over calibrations like this one" in done.stdout
    assert "8 good parts carry no less than α = 11.1 %; 1 % needs 99" in done.stdout
    assert (tmp_path / "incoming/waiting.png").exists()
    assert not (tmp_path / "state").exists()
    config = write_config(tmp_path, tmp_path / "nowhere")
    config.write_text(config.read_text().replace("[mqtt]", '[mqtt]\nusername = "u"\npassword_file = "secret"'))
    done = inspectd("check", "--config", config)
    assert done.returncode == 78
    assert "no model folder" in done.stderr
    assert "secret: mqtt.password_file: cannot be read" in done.stderr


def test_the_doctor_looks_further_than_the_files_and_says_how_to_mend_what_it_finds(
    model: Path, inspectd: Run, tmp_path: Path
) -> None:
    config = write_config(tmp_path, model)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    config.write_text(config.read_text().replace("[[station]]", f"port = {port}\n[[station]]"))
    (tmp_path / "incoming").mkdir()
    done = inspectd("doctor", "--config", config)
    assert done.returncode == 1
    assert f"nothing answers on 127.0.0.1:{port}" in done.stdout
    assert "→ start the broker" in done.stdout
    assert f"{config}: broker: nothing answers" in done.stderr
    assert "golden set" in done.stdout
    assert inspectd("check", "--config", config).returncode == 0
    done = inspectd("doctor", "--config", config, "--json")
    said = json.loads(done.stdout)
    assert said["status"] == done.returncode == 1
    assert [one["subject"] for one in said["findings"] if one["mark"] == "fail"] == ["broker"]
    done = inspectd("doctor", "--config", write_config(tmp_path, tmp_path / "nowhere"))
    assert done.returncode == 78
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("content", "words"),
    [("[mqtt\nhost", "line 1"), ('colour = "red"', "colour: is not an option"), ("", "mqtt: is missing")],
)
def test_a_wrong_configuration_is_named_and_ends_with_78(
    command: str, content: str, words: str, inspectd: Run, tmp_path: Path
) -> None:
    config = tmp_path / "inspectd.toml"
    config.write_text(content)
    done = inspectd(command, "--config", config)
    assert done.returncode == 78
    assert words in done.stderr
    assert str(config) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--goood", "x"], "--good"), (["--skips", "1:1"], "3:2 and 2:1"), (["--size", "100"], "multiple of 32")],
)
def test_wrong_options_end_with_2_and_a_hint(
    options: list[str], words: str, data: Path, inspectd: Run, tmp_path: Path
) -> None:
    done = inspectd("train", "--good", data / "train/good", "--out", tmp_path / "model", *options)
    assert done.returncode == 2
    assert words in done.stderr


def test_parts_that_the_model_learned_never_calibrate_it(data: Path, inspectd: Run, tmp_path: Path) -> None:
    options = ["--size", "64", "--epochs", "1", "--calibration-good", str(data / "train/good")]
    done = inspectd("train", "--good", data / "train/good", "--out", tmp_path / "model", *options)
    assert done.returncode == 1
    assert "calibrate on other good parts" in done.stderr
    assert not (tmp_path / "model/manifest.json").exists()


def test_without_its_split_a_model_is_not_calibrated_again(
    model: Path, data: Path, inspectd: Run, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model/split.json").unlink()
    done = inspectd("calibrate", "--model", tmp_path / "model", "--good", data / "train/good")
    assert done.returncode == 1
    assert "nobody knows which images the model learned from" in done.stderr


@pytest.mark.long
@pytest.mark.skipif("INSPECTD_DATA" not in os.environ, reason="INSPECTD_DATA names no folder of real images")
def test_real_impurities_in_paper_are_told_from_good_paper(inspectd: Run, tmp_path: Path) -> None:
    paper, model = Path(os.environ["INSPECTD_DATA"], "piped/PA_BFT01_TL"), tmp_path / "model"
    done = inspectd("train", "--good", paper / "train/good", "--out", model, "--size", "128", "--epochs", "15")
    assert done.returncode == 0, done.stderr
    done = inspectd("evaluate", "--model", model, "--data", paper, "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["n_good"], figures["n_defect"]) == (12, 48)
    assert figures["image_auroc"] > 0.95
    assert figures["pixel_auroc"] > 0.9
    assert figures["escape_rate"] < 0.2
