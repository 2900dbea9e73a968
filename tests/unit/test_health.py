"""A station knows whether it sees parts, and says what it has seen."""

import threading
import time

from daemon.contract import STATES
from daemon.health import StationHealth
from daemon.messages import Outcome


def test_a_station_is_preoperational_until_its_source_has_been_tried() -> None:
    health = StationHealth("top", last_seq=41)
    state = health.state(waiting_verdicts=3)
    assert (state.state, state.camera) == ("Preoperational", "offline")
    assert (state.last_seq, state.mqtt_outbox) == (41, 3)
    assert health.summary() == "top: no part yet (source offline)"


def test_an_absent_source_is_an_error_until_it_is_back() -> None:
    health = StationHealth("top", last_seq=0)
    health.source_is(available=False)
    assert (health.state(0).state, health.state(0).camera) == ("Error", "offline")
    health.source_is(available=True)
    assert (health.state(0).state, health.state(0).camera) == ("ContinuousExecution", "online")
    assert health.state(0).state in STATES


def test_verdicts_are_counted_by_outcome_and_the_newest_number_is_told() -> None:
    health = StationHealth("top", last_seq=0)
    health.source_is(available=True)
    for seq, outcome in enumerate((Outcome.PASS, Outcome.FAIL, Outcome.PASS, Outcome.ERROR), 1):
        health.concluded(seq, outcome)
    assert health.state(0).last_seq == 4
    assert health.summary() == "top: 1 ERROR, 2 PASS, 1 FAIL"


def test_the_age_of_the_last_frame_grows_and_starts_again_with_the_next() -> None:
    health = StationHealth("top", last_seq=0)
    threading.Event().wait(0.05)
    before = health.state(0)
    at = time.monotonic()
    health.frame_arrived()
    after = health.state(0)
    assert before.last_frame_age_ms >= 50
    assert after.last_frame_age_ms <= (time.monotonic() - at) * 1000
    assert after.uptime_s >= before.uptime_s >= 0
