"""A station says when parts or pictures are no longer as they were at calibration, and moves no threshold."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
from structlog.testing import capture_logs

from calibration.calibration import Calibration, Provenance, fit
from daemon.canaries import appearance, glance
from daemon.challenge import Challenge, ChallengeSet
from daemon.contract import WATCHES
from daemon.judgement import judge, refuse
from daemon.messages import Decision, Outcome, Reason
from daemon.quality import StationQuality
from detectors.base import Image, Prediction

SET = ChallengeSet("box 3", frozenset({"good"}), frozenset({"bad"}), timedelta(hours=8), timedelta(minutes=30))
MAP = np.zeros((2, 2), np.float32)
PART = np.zeros((64, 96), np.float32)
PART[16:48, 24:72] = 60 + cv2.GaussianBlur(np.random.default_rng(0).normal(0, 80, (32, 48)), (0, 0), 1.5)


def picture(rng: np.random.Generator, *, light: float = 1.0, blur: float = 0.0, across: float = 0.0) -> Image:
    """The same part again, in nearly the same light and place."""
    place = np.array([[1, 0, across + rng.normal(0, 0.3)], [0, 1, rng.normal(0, 0.3)]], np.float32)
    seen = np.asarray(cv2.warpAffine(PART, place, (96, 64)) + 80 + rng.normal(0, 2, PART.shape))
    if blur:
        seen = np.asarray(cv2.GaussianBlur(seen, (0, 0), blur))
    grey = np.clip(light * rng.normal(1, 0.01) * seen, 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, np.newaxis], 3, axis=2)


def calibrate(*, pictures: bool) -> Calibration:
    rng = np.random.default_rng(1)
    looks = appearance([glance(picture(rng)) for _ in range(100)]) if pictures else None
    made = Provenance("f", "d", datetime.now(UTC))
    return fit(rng.normal(10, 1, 100), alpha=0.05, provenance=made, appearance=looks)


SEEN = calibrate(pictures=True)
BLIND = calibrate(pictures=False)


def decide(score: float) -> Decision:
    return judge(Prediction(score, MAP), SEEN)


def stream(quality: StationQuality, parts: int, seed: int, *, score: float = 10.0, **change: float) -> None:
    """Let parts through that pass, each with a picture and a score of its own."""
    rng = np.random.default_rng(seed)
    for _ in range(parts):
        while (value := rng.normal(score, 1)) > SEEN.threshold:
            pass
        quality.observe(picture(rng, **change), decide(value))


def alarms(quality: StationQuality) -> set[str]:
    return {name for name, reading in quality.report().watches.items() if reading.alarm}


def test_a_stream_like_the_calibration_alarms_nothing() -> None:
    quality = StationQuality("top", SEEN)
    with capture_logs() as logs:
        stream(quality, 200, seed=3)
    report = quality.report()
    assert (report.drift, alarms(quality)) == ("ok", set())
    assert set(report.watches) == set(WATCHES)
    assert {reading.parts for reading in report.watches.values()} == {200}
    assert logs == []


@pytest.mark.parametrize(
    ("change", "cause", "alarm"),
    [
        ({"light": 0.9}, "light", ("brightness", "down")),
        ({"blur": 1.2}, "focus", ("sharpness", "down")),
        ({"across": 6.0}, "position", ("shift", "up")),
        ({"score": 11.5}, "product", ("score", "up")),
    ],
)
def test_what_drifts_is_named_by_its_cause(change: dict[str, float], cause: str, alarm: tuple[str, str]) -> None:
    quality = StationQuality("top", SEEN)
    stream(quality, 60, seed=3, **change)
    name, direction = alarm
    assert quality.report().drift == cause
    assert quality.report().watches[name].alarm
    assert quality.report().watches[name].direction == direction


def test_scores_that_drift_with_the_light_are_laid_to_the_light() -> None:
    quality = StationQuality("top", SEEN)
    stream(quality, 60, seed=3, light=0.9, score=11.5)
    assert alarms(quality) >= {"score", "brightness"}
    assert quality.report().drift == "light"


def test_a_drift_is_logged_when_it_begins_and_when_it_ends() -> None:
    quality = StationQuality("top", SEEN)
    with capture_logs() as logs:
        stream(quality, 25, seed=3, light=0.9)
        assert quality.report().drift == "light"
        stream(quality, 100, seed=4)
    assert quality.report().drift == "ok"
    assert [(entry["log_level"], entry.get("drift")) for entry in logs] == [("warning", "light"), ("info", None)]
    assert logs[0]["alarming"]["brightness"] == "down"
    assert "no threshold was moved" in logs[0]["event"]


def test_without_the_looks_of_good_parts_only_the_scores_are_watched() -> None:
    quality = StationQuality("top", BLIND)
    assert set(quality.report().watches) == {"score"}
    stream(quality, 60, seed=3, light=0.5)
    assert quality.report().drift == "ok"
    stream(quality, 60, seed=4, score=11.5)
    assert quality.report().drift == "product"


def test_bad_parts_move_the_watches_of_pictures_but_not_that_of_scores() -> None:
    quality = StationQuality("top", SEEN)
    rng = np.random.default_rng(3)
    for _ in range(60):
        stream(quality, 1, seed=int(rng.integers(2**32)))
        quality.observe(picture(rng), decide(99.0))
    watches = quality.report().watches
    assert (watches["score"].parts, watches["brightness"].parts) == (60, 120)
    assert quality.report().drift == "ok"


def test_no_drift_changes_a_decision() -> None:
    quality = StationQuality("top", SEEN)
    stream(quality, 60, seed=3, light=0.9, score=11.5)
    for score in (10.0, 99.0):
        assert quality.confirm("part", decide(score)) == decide(score)
    assert not quality.holds


def challenged(folder: Path, *, holds_station: bool) -> StationQuality:
    return StationQuality("top", SEEN, Challenge(SET, "top", folder, holds_station=holds_station))


def test_a_failing_challenge_part_keeps_its_decision_and_holds_all_others_until_the_set_passes(tmp_path: Path) -> None:
    quality = challenged(tmp_path, holds_station=True)
    assert quality.confirm("part", decide(10.0)) == decide(10.0)
    assert quality.confirm("bad", decide(10.0)) == decide(10.0)
    quality.conclude("bad", decide(10.0))
    assert quality.holds
    held = quality.confirm("part", decide(10.0))
    assert (held.outcome, held.reason) == (Outcome.ERROR, Reason.CHALLENGE_FAILED)
    assert (held.score, held.p_value) == (None, None)
    assert "bad (bad) passed" in held.detail
    assert 'send all 2 parts of "box 3"' in held.detail
    assert quality.confirm("good", decide(10.0)) == decide(10.0)
    quality.conclude("good", decide(10.0))
    assert quality.holds
    assert quality.confirm("bad", decide(99.0)) == decide(99.0)
    quality.conclude("bad", decide(99.0))
    assert not quality.holds
    assert quality.confirm("part", decide(10.0)) == decide(10.0)


def test_what_could_not_be_judged_keeps_its_reason_while_the_station_is_held(tmp_path: Path) -> None:
    quality = challenged(tmp_path, holds_station=True)
    quality.conclude("bad", decide(10.0))
    assert quality.holds
    damaged = refuse(Reason.DECODE_FAILED, "cut off", SEEN)
    assert quality.confirm("part", damaged) == damaged


def test_a_failed_challenge_test_that_does_not_hold_only_tells(tmp_path: Path) -> None:
    quality = challenged(tmp_path, holds_station=False)
    quality.conclude("bad", decide(10.0))
    assert not quality.holds
    assert quality.confirm("part", decide(10.0)) == decide(10.0)
    test = quality.report().challenge
    assert test is not None
    assert test.status == "failed"


def test_without_a_challenge_test_no_part_is_one_of_it() -> None:
    quality = StationQuality("top", SEEN)
    assert not quality.is_challenge("good")
    assert quality.report().challenge is None
