"""A calibration survives its file, and a file that cannot be trusted is refused with its reason."""

import json
import math
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.calibration import Calibration, CalibrationError, fit
from calibration.store import load, save


def made(n: int = 120, *, fingerprint: str = "model-a") -> Calibration:
    return fit(
        np.random.default_rng(n).gumbel(3, 0.5, n),
        alpha=0.01,
        detector_fingerprint=fingerprint,
        data_sha256="d" * 64,
        made_at=datetime(2026, 3, 4, 12, 0, 0, 123456, tzinfo=UTC),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "calibration.json"


@pytest.mark.parametrize("n", [1, 31, 99, 1000])
def test_what_is_saved_is_loaded_again_to_the_last_bit(path: Path, n: int) -> None:
    calibration = made(n)
    save(calibration, path)
    assert load(path, "model-a") == calibration


def test_saving_leaves_nothing_but_the_file(path: Path) -> None:
    save(made(), path)
    save(made(200), path)
    assert list(path.parent.iterdir()) == [path]
    assert load(path, "model-a") == made(200)


def test_a_failed_save_leaves_no_temporary_file_behind(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OSError, match=r"calibration\.json"):
        save(made(), path)
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_meets_a_whole_file_while_another_is_saved(path: Path) -> None:
    one, other = made(99), made(600)
    save(one, path)
    stop = threading.Event()

    def keep_saving() -> None:
        while not stop.is_set():
            save(other, path)
            save(one, path)

    writer = threading.Thread(target=keep_saving)
    writer.start()
    try:
        met = {load(path, "model-a").id for _ in range(60)}
    finally:
        stop.set()
        writer.join()
    assert met <= {one.id, other.id}


def test_a_missing_file_says_what_to_run(path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration; run `inspectd calibrate`"):
        load(path, "model-a")


def test_a_folder_in_its_place_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(CalibrationError, match="cannot be read"):
        load(path, "model-a")


def test_a_file_torn_at_any_byte_is_refused(path: Path) -> None:
    save(made(5), path)
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CalibrationError, match="torn"):
            load(path, "model-a")


@pytest.mark.parametrize("noise", [b"\x00" * 512, b"\xff\xfe\x00", b"{}}"])
def test_a_file_of_noise_is_refused(path: Path, noise: bytes) -> None:
    path.write_bytes(noise)
    with pytest.raises(CalibrationError, match="torn or not JSON"):
        load(path, "model-a")


@pytest.mark.parametrize("document", ["[]", "3", "{}", '{"schema": "inspectd.calibration/2"}'])
def test_an_unknown_version_is_refused(path: Path, document: str) -> None:
    path.write_text(document)
    with pytest.raises(CalibrationError, match=r"is unknown, 'inspectd\.calibration/1' is read here"):
        load(path, "model-a")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", "000000000000"),
        ("threshold", 1000.0),
        ("alpha", 0.02),
        ("alpha", "0.01"),
        ("alpha", True),
        ("alpha_carried", 0.001),
        ("scores", [1.0, 2.0]),
        ("scores", []),
        ("scores", {"a": 1}),
        ("scores", ["one"]),
        ("scores", [10**400]),
        ("scores", [math.nan]),
        ("detector_fingerprint", "model-b"),
        ("data_sha256", "e" * 64),
        ("made_at", "2027-03-04T12:00:00+00:00"),
        ("made_at", "2026-03-04T12:00:00"),
        ("made_at", "today"),
        ("made_at", 5),
        ("method", "guess"),
        ("note", "an unknown key"),
    ],
)
def test_an_edited_file_is_refused(path: Path, key: str, value: object) -> None:
    save(made(), path)
    document: dict[str, Any] = json.loads(path.read_text())
    document[key] = value
    path.write_text(json.dumps(document))
    for fingerprint in ("model-a", "model-b"):
        with pytest.raises(CalibrationError, match="edited"):
            load(path, fingerprint)


def test_one_score_changed_is_noticed(path: Path) -> None:
    save(made(), path)
    document = json.loads(path.read_text())
    document["scores"][0] = math.nextafter(document["scores"][0], 0)
    path.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match="edited: id not as calibrated"):
        load(path, "model-a")


def test_scores_out_of_order_are_noticed(path: Path) -> None:
    save(made(), path)
    document = json.loads(path.read_text())
    document["scores"].reverse()
    path.write_text(json.dumps(document))
    with pytest.raises(CalibrationError, match="edited: scores not as calibrated"):
        load(path, "model-a")


def test_a_missing_key_is_named(path: Path) -> None:
    save(made(), path)
    document = json.loads(path.read_text())
    for key in document.keys() - {"schema"}:
        path.write_text(json.dumps({name: value for name, value in document.items() if name != key}))
        with pytest.raises(CalibrationError, match=f"edited.*{key}"):
            load(path, "model-a")


def test_a_calibration_of_another_model_is_refused_with_both_names(path: Path) -> None:
    save(made(fingerprint="model-b"), path)
    with pytest.raises(
        CalibrationError, match="made for another model: model-b, not model-a; run `inspectd calibrate`"
    ):
        load(path, "model-a")
