"""What is counted of verdicts, as the page says it."""

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from config.load import load
from config.schema import Settings
from daemon.messages import Capture, Decision, Latency, Outcome, Reason, Verdict
from daemon.metrics import LATENCIES_S, SCORES, Metrics

AT = datetime(2026, 11, 22, 7, 58, 3, tzinfo=UTC)
CAPTURE = Capture("0" * 26, "cam1", "part1", AT, AT, 0.0, "")
CONFIGURATION = """
[mqtt]
host = "127.0.0.1"
[metrics]
[[station]]
name = "cam1"
model = "m"
source = { type = "folder", path = "in1" }
[[station]]
name = "cam2"
source = { type = "folder", path = "in2" }
[[station.recipe]]
name = "bracket-A"
model = "a"
[[station.recipe]]
name = "bracket-B"
model = "b"
[[group]]
name = "part"
views = ["cam1", "cam2"]
"""


def verdict(ratio: float | None, outcome: Outcome = Outcome.PASS, **others: object) -> Verdict:
    """A part of so many times the threshold, which is 50, within 1, 20 and 90 ms."""
    score = None if ratio is None else 50 * ratio
    decision = Decision(outcome, Reason.NONE, "", score, None, 50.0, 50.0)
    whole = Verdict(1, CAPTURE, decision, AT, Latency(queue=1.0, infer=20.0, total=90.0))
    return replace(whole, **others)  # type: ignore[arg-type] # as they are called


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    file = tmp_path_factory.mktemp("line") / "inspectd.toml"
    file.write_text(CONFIGURATION)
    return load(Path(file), {})


def figure(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_every_outcome_of_every_station_group_and_recipe_is_there_before_its_first_part(settings: Settings) -> None:
    metrics = Metrics(settings)
    for station, recipes in {
        "cam1": ["default"],
        "cam2": ["bracket-A", "bracket-B"],
        "part": ["default", "bracket-A", "bracket-B"],
    }.items():
        for recipe in recipes:
            for outcome in Outcome:
                assert (
                    figure(metrics, "inspectd_inspections_total", station=station, recipe=recipe, outcome=outcome.name)
                    == 0
                )


def test_a_verdict_is_counted_by_its_outcome_and_its_times_by_their_stage(settings: Settings) -> None:
    metrics = Metrics(settings)
    metrics.observe(verdict(1.4, Outcome.FAIL), "default", AT + timedelta(milliseconds=7))
    assert figure(metrics, "inspectd_inspections_total", station="cam1", recipe="default", outcome="FAIL") == 1
    assert figure(metrics, "inspectd_inspections_total", station="cam1", recipe="default", outcome="PASS") == 0
    for stage, seconds in {"queue": 0.001, "infer": 0.020, "total": 0.090, "record": 0.007}.items():
        assert figure(metrics, "inspectd_latency_seconds_sum", station="cam1", stage=stage) == pytest.approx(seconds)
        assert figure(metrics, "inspectd_latency_seconds_count", station="cam1", stage=stage) == 1
    assert figure(metrics, "inspectd_score_sum", station="cam1", recipe="default") == pytest.approx(1.4)


def test_what_could_not_be_measured_has_no_score_and_no_time_in_the_detector(settings: Settings) -> None:
    metrics = Metrics(settings)
    metrics.observe(verdict(None, Outcome.ERROR), "default", AT)
    assert figure(metrics, "inspectd_inspections_total", station="cam1", recipe="default", outcome="ERROR") == 1
    assert figure(metrics, "inspectd_score_count", station="cam1", recipe="default") == 0
    stages = ("total", "record", "queue", "infer")
    counts = [figure(metrics, "inspectd_latency_seconds_count", station="cam1", stage=stage) for stage in stages]
    assert counts == [1, 1, 0, 0]


def test_a_part_of_the_challenge_test_is_in_no_figure(settings: Settings) -> None:
    metrics = Metrics(settings)
    metrics.observe(verdict(1.4, Outcome.FAIL, challenge=True), "default", AT)
    assert figure(metrics, "inspectd_inspections_total", station="cam1", recipe="default", outcome="FAIL") == 0
    assert figure(metrics, "inspectd_latency_seconds_count", station="cam1", stage="total") == 0


def test_a_camera_whose_clock_runs_ahead_lets_no_sum_fall(settings: Settings) -> None:
    metrics = Metrics(settings)
    metrics.observe(verdict(0.5, latency=Latency(1.0, 20.0, -3000.0)), "default", AT - timedelta(seconds=1))
    for stage in ("total", "record"):
        assert figure(metrics, "inspectd_latency_seconds_sum", station="cam1", stage=stage) == 0
        assert figure(metrics, "inspectd_latency_seconds_bucket", station="cam1", stage=stage, le="0.001") == 1


@hypothesis(max_examples=25)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=20))
def test_parts_that_pass_are_those_up_to_the_bucket_of_one(settings: Settings, ratios: list[float]) -> None:
    metrics = Metrics(settings)
    for ratio in ratios:
        metrics.observe(verdict(ratio), "default", AT)
    passed = figure(metrics, "inspectd_score_bucket", station="cam1", recipe="default", le="1.0")
    assert passed == sum(verdict(ratio).decision.ratio <= 1.0 for ratio in ratios)  # type: ignore[operator] # a number
    assert 1.0 in SCORES
    assert list(LATENCIES_S) == sorted(LATENCIES_S)


def test_threads_lose_no_verdict_of_each_other(settings: Settings) -> None:
    metrics = Metrics(settings)

    def judge() -> None:
        for _ in range(500):
            metrics.observe(verdict(0.5), "default", AT)

    threads = [threading.Thread(target=judge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert figure(metrics, "inspectd_inspections_total", station="cam1", recipe="default", outcome="PASS") == 2000
    assert figure(metrics, "inspectd_score_sum", station="cam1", recipe="default") == pytest.approx(1000)


def test_a_recipe_that_the_configuration_did_not_have_is_counted_too(settings: Settings) -> None:
    metrics = Metrics(settings)
    for _ in range(2):
        metrics.observe(verdict(0.5), "bracket-C", AT)
    assert figure(metrics, "inspectd_inspections_total", station="cam1", recipe="bracket-C", outcome="PASS") == 2
