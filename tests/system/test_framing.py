"""A station that frames its images, from the first image to the check: nothing is framed twice, or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow
from typer.main import get_command

from calibration import store
from calibration.calibration import CalibrationError
from config.load import ConfigError
from daemon import images
from daemon.cli import app
from daemon.desk import lens
from daemon.desk.dataset import DatasetError
from daemon.framing import Framing
from tests.system.conftest import SIDE, Run, write_part

Say = Callable[..., str]

CROP = 8, 6, 84, 80


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Path:
    """Where the configuration, its flat field, its calibration and a folder for parts lie."""
    (tmp_path / "incoming").mkdir()
    shade = np.linspace(120, 240, SIDE).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "flat.png"), np.tile(shade[:, None], (1, SIDE)))
    configure(tmp_path, model)
    return tmp_path


def configure(place: Path, model: Path, rotate: int = 90, more: str = 'calibration = "cam1.json"') -> Path:
    config = place / "inspectd.toml"
    config.write_text(
        f'[mqtt]\nhost = "127.0.0.1"\n[[station]]\nname = "cam1"\nmodel = "{model}"\n{more}\n'
        '[station.source]\ntype = "folder"\npath = "incoming"\n'
        f'[station.framing]\nflat_field = "flat.png"\ncrop = {list(CROP)}\nrotate = {rotate}\n'
    )
    return config


def framing_of(place: Path) -> Framing:
    return Framing(images.read(place / "flat.png"), CROP, 90)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command of `inspectd` in this process; gives what it says, or why it refuses, on one line."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        refusal = ""
        try:
            get_command(app).main([str(argument) for argument in arguments], standalone_mode=False)
        except (ConfigError, CalibrationError, DatasetError) as error:
            refusal = f"refused: {error}"
        return " ".join((capsys.readouterr().out + refusal).split())

    return run


def test_the_installed_program_calibrates_a_station_as_it_frames_and_refuses_another_framing(
    place: Path, model: Path, data: Path, inspectd: Run
) -> None:
    config = place / "inspectd.toml"
    done = inspectd("calibrate", "--config", config, "--good", data / "test/good", "--alpha", "0.2")
    assert done.returncode == 0, done.stderr
    done = inspectd("check", "--config", config)
    assert done.returncode == 0, done.stderr
    assert "at most 20 % are rejected" in done.stdout
    configure(place, model, rotate=270)
    for command in ("check", "run"):
        done = inspectd(command, "--config", config)
        assert done.returncode == 78
        assert "made of images framed otherwise" in done.stderr
        assert "run `inspectd calibrate --config FILE --station NAME`" in done.stderr


def test_framed_copies_are_the_same_pictures_with_the_same_scores_and_never_framed_twice(
    place: Path, model: Path, data: Path, say: Say
) -> None:
    config, good, framed = place / "inspectd.toml", data / "test/good", place / "framed"
    calibrated = say("calibrate", "--config", config, "--good", good, "--alpha", "0.2")
    assert f"learned from images framed otherwise (not at all, now {framing_of(place).fingerprint})" in calibrated
    made = store.read(place / "cam1.json")
    assert made.provenance.framing == framing_of(place).fingerprint
    assert "│ PASS" in say("predict", "--config", config, good / "000.png")
    assert "6 images framed as station cam1 does" in say("sources", "frame", "--config", config, good, framed)
    say("calibrate", "--config", config, "--good", framed, "--alpha", "0.2")
    again = store.read(store.proposal(place / "cam1.json"))
    assert (again.scores, again.images) == (made.scores, made.images)
    copies = "every image is in the calibration in force already"
    assert copies in say("calibrate", "--config", config, "--good", framed, "--add")
    assert "has been framed before" in say("sources", "frame", "--config", config, framed, place / "twice")

    configure(place, model, rotate=270)
    assert "was framed otherwise than now" in say("calibrate", "--config", config, "--good", framed)
    otherwise = "made of images framed otherwise"
    assert otherwise in say("calibrate", "--config", config, "--good", data / "train/good", "--add")
    assert otherwise in say("evaluate", "--config", config, "--data", data)


def test_what_trained_on_framed_images_can_be_used_at_once_and_only_for_such(place: Path, data: Path, say: Say) -> None:
    mine, framed, config = place / "mine", place / "framed", place / "inspectd.toml"
    say("sources", "frame", "--config", config, data / "train/good", framed)
    assert len(list(framed.iterdir())) == 24
    assert images.read(framed / "003.png").shape == (CROP[2], CROP[3], 3)
    say("train", "--detector", "patchcore", "--good", framed, "--out", mine, "--size", "64")
    configure(place, mine, more="")
    assert "model" in say("check", "--config", config)
    calibrated = say("calibrate", "--config", config, "--good", data / "train/good", "--alpha", "0.2")
    assert "16 of 24 images trained this model and are left out" in calibrated
    assert "learned from images framed otherwise" not in calibrated
    assert "give --config FILE --station NAME instead of --model" in say(
        "predict", "--model", mine, data / "test/good/000.png"
    )
    assert "PASS" in say("predict", "--model", mine, framed / "003.png")
    shutil.copy(data / "train/good/003.png", framed / "raw.png")
    assert "give images that are all framed alike, or none of them" in say(
        "train", "--detector", "patchcore", "--good", framed, "--out", place / "other"
    )


def test_an_evaluation_frames_images_and_masks_alike(place: Path, data: Path, say: Say) -> None:
    config = place / "inspectd.toml"
    say("calibrate", "--config", config, "--good", data / "train/good", "--alpha", "0.2")
    say("evaluate", "--config", config, "--data", data, "--json", place / "raw.json")

    # The same, framed beforehand: by the station, and the masks by hand.
    framing = framing_of(place)
    assert "is a mask; give the folders of images alone" in say(
        "sources", "frame", "--config", config, data, place / "all"
    )
    say("sources", "frame", "--config", config, data / "test", place / "all/test")
    for mask in (data / "ground_truth").rglob("*.png"):
        to = place / "all" / mask.relative_to(data)
        to.parent.mkdir(parents=True)
        Pillow.fromarray(framing.place(np.asarray(Pillow.open(mask)))).save(to)
    say("sources", "frame", "--config", config, data / "train", place / "all/train")
    say("evaluate", "--config", config, "--data", place / "all", "--json", place / "framed.json")
    raw, framed = (json.loads((place / f"{name}.json").read_text()) for name in ("raw", "framed"))
    for figure in ("image_auroc", "pixel_auroc", "aupro", "threshold", "n_masked"):
        assert raw[figure] == framed[figure]
    assert raw["n_masked"] > 0


def test_what_is_grabbed_is_framed_and_says_so(place: Path, say: Say) -> None:
    for number in range(3):
        write_part(place / f"part_{number}.png", number)
    config = place / "inspectd.toml"
    text = config.read_text().replace('type = "folder"\npath = "incoming"', 'type = "video"\nplace = "part_%d.png"')
    config.write_text(text.replace("part_%d", str(place / "part_%d")))
    say("sources", "grab", "--config", config, "--out", place / "grabbed", "--count", "3")
    framing = framing_of(place)
    grabbed = sorted((place / "grabbed").iterdir())
    assert [lens.fingerprint(path) for path in grabbed] == [framing.fingerprint] * 3
    for number, path in enumerate(grabbed):
        assert np.array_equal(images.read(path), framing.apply(images.read(place / f"part_{number}.png")))


def test_a_flat_field_or_a_crop_that_cannot_be_used_is_told_before_the_start(place: Path, data: Path, say: Say) -> None:
    config = place / "inspectd.toml"
    flat = images.read(place / "flat.png")
    flat[40, 40:44] = 0
    Pillow.fromarray(flat).save(place / "flat.png")
    assert f"{place / 'flat.png'}: 4 px are darker than 5% of the mean" in say("check", "--config", config)
    (place / "flat.png").unlink()
    refusal = say("calibrate", "--config", config, "--good", data / "test/good")
    assert f"{place / 'flat.png'}: cannot be read (No such file or directory)" in refusal
