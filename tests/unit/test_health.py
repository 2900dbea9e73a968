"""A station knows whether it sees parts, and says what it has seen."""

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from calibration.calibration import Provenance, fit
from daemon.challenge import Challenge, ChallengeSet
from daemon.contract import STATES
from daemon.execution import Execution, Mode
from daemon.health import StationHealth
from daemon.judgement import judge
from daemon.messages import Capture, Decision, Latency, Outcome, Reason, Verdict
from daemon.quality import StationQuality
from daemon.recipes import Recipe, Recipes
from daemon.stats import Counters, begun, counted
from detectors.base import Prediction
from detectors.template import TemplateDetector
from tests.payloads import IDENTITY

CALIBRATION = fit(
    [1 + number / 200 for number in range(200)], alpha=0.05, provenance=Provenance("f", "d", datetime.now(UTC))
)
IMAGE = np.zeros((8, 8, 3), np.uint8)
SET = ChallengeSet("box 3", frozenset({"good"}), frozenset({"bad"}), timedelta(hours=8), timedelta(minutes=30))


def healthy(challenge: Challenge | None = None, last_seq: int = 0, mode: Mode = Mode.CONTINUOUS) -> StationHealth:
    quality = StationQuality("top", CALIBRATION, challenge)
    recipe = Recipe(IDENTITY, TemplateDetector(IMAGE), CALIBRATION, quality)
    recipes = Recipes({recipe.name: lambda: recipe})
    counters = Counters(begun(datetime.now(UTC), last_seq))
    return StationHealth("top", last_seq, recipes, Execution("top", mode, last_seq), counters)


def see(health: StationHealth, score: float, part_id: str = "part") -> None:
    """Let a part of some score through."""
    decision = judge(Prediction(score, np.zeros((2, 2), np.float32)), CALIBRATION)
    health.quality.conclude(part_id, decision)
    health.quality.observe(IMAGE, decision)


def test_a_station_is_preoperational_until_its_source_has_been_tried() -> None:
    health = healthy(last_seq=41)
    state = health.state(waiting_verdicts=3)
    assert (state.state, state.camera) == ("Preoperational", "offline")
    assert (state.last_seq, state.mqtt_outbox) == (41, 3)
    assert health.summary() == "top: no part yet (source offline)"


def test_an_absent_source_is_an_error_until_it_is_back() -> None:
    health = healthy()
    health.source_is(available=False)
    assert (health.state(0).state, health.state(0).camera) == ("Error", "offline")
    health.source_is(available=True)
    assert (health.state(0).state, health.state(0).camera) == ("ContinuousExecution", "online")
    assert health.state(0).state in STATES


def concluded(
    seq: int, outcome: Outcome, reason: Reason = Reason.NONE, detail: str = "", *, challenge: bool = False
) -> Verdict:
    """A verdict of which only the outcome matters."""
    now = datetime.now(UTC)
    capture = Capture(str(seq), "top", "part", now, now, 0.0, "part.png")
    decision = Decision(outcome, reason, detail, None, None, 1.0, 1.0)
    return Verdict(seq, capture, decision, now, Latency(0.0, 0.0, 1.0), challenge=challenge)


def test_a_failing_detector_is_an_alarm_until_it_judges_again() -> None:
    health = healthy()
    health.source_is(available=True)
    health.concluded(concluded(1, Outcome.ERROR, Reason.MODEL_ERROR, "out of memory"))
    raised = [change for change in health.update(0) if change.active]
    assert [(change.alarm.id, change.alarm.detail) for change in raised] == [("INFERENCE_FAILED", "out of memory")]
    health.concluded(concluded(2, Outcome.PASS))
    assert "INFERENCE_FAILED" not in {alarm.id for alarm in health.alarms.active()} or health.update(0) == []


def test_parts_of_the_challenge_test_are_in_no_figure() -> None:
    health = healthy()
    verdict = concluded(1, Outcome.FAIL, challenge=True)
    health.concluded(verdict)
    assert counted(verdict) is None
    assert health.state(0).last_seq == 1


def test_verdicts_are_counted_by_outcome_and_the_newest_number_is_told() -> None:
    health = healthy()
    health.source_is(available=True)
    for seq, outcome in enumerate((Outcome.PASS, Outcome.FAIL, Outcome.PASS, Outcome.ERROR), 1):
        verdict = concluded(seq, outcome)
        health.concluded(verdict)
        if part := counted(verdict):
            health.counters.concluded([part])
    assert health.state(0).last_seq == 4
    assert health.summary() == "top: 1 ERROR, 2 PASS, 1 FAIL"


def test_the_age_of_the_last_frame_grows_and_starts_again_with_the_next() -> None:
    health = healthy()
    threading.Event().wait(0.05)
    before = health.state(0)
    at = time.monotonic()
    health.frame_arrived(seen=True)
    after = health.state(0)
    assert before.last_frame_age_ms >= 50
    assert after.last_frame_age_ms <= (time.monotonic() - at) * 1000
    assert after.uptime_s >= before.uptime_s >= 0


def test_a_drift_is_told_but_the_station_stays_ready() -> None:
    health = healthy()
    health.source_is(available=True)
    assert health.state(0).drift == "ok"
    for _ in range(60):
        see(health, CALIBRATION.threshold)
    assert (health.state(0).drift, health.state(0).state) == ("product", "ContinuousExecution")
    assert health.summary() == "top: no part yet (product drifts)"


def test_a_failed_challenge_test_is_an_error_only_where_it_holds_the_station(tmp_path: Path) -> None:
    assert healthy().state(0).challenge == "off"
    for holds, state in ((True, "Error"), (False, "ContinuousExecution")):
        health = healthy(Challenge(SET, f"top-{holds}", tmp_path, holds_station=holds))
        health.source_is(available=True)
        assert (health.state(0).challenge, health.state(0).state) == ("due", "ContinuousExecution")
        see(health, 99.0, "good")
        assert (health.state(0).challenge, health.state(0).state) == ("failed", state)
        assert "challenge test failed" in health.summary()
        assert ("others are rejected" in health.summary()) is holds
        see(health, 1.0, "good")
        see(health, 99.0, "bad")
        assert (health.state(0).challenge, health.state(0).state) == ("ok", "ContinuousExecution")
