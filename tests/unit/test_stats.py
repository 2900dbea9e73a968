"""Figures of a station add up, whatever happens to its parts and in whatever order."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.messages import Outcome
from daemon.stats import WINDOW, Counters, Drop

START = datetime(2026, 11, 22, 6, 0, tzinfo=UTC)
fates = st.one_of(st.sampled_from(Outcome), st.sampled_from(Drop), st.just("on its way"), st.just("reset"))


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def conclude(counters: Counters, outcome: Outcome, latency_ms: float = 50.0, seconds: float = 0) -> None:
    counters.arrived()
    counters.concluded(outcome, latency_ms, after(seconds))


@given(st.lists(fates, max_size=60))
def test_what_came_is_inspected_dropped_or_pending(course: list[Outcome | Drop | str]) -> None:
    counters = Counters(START)
    outcomes, dropped, pending = dict.fromkeys(Outcome, 0), dict.fromkeys(Drop, 0), 0
    for fate in course:
        if fate == "reset":
            counters.reset(START)
            outcomes, dropped = dict.fromkeys(Outcome, 0), dict.fromkeys(Drop, 0)
            continue
        counters.arrived()
        if isinstance(fate, Outcome):
            counters.concluded(fate, 1.0, START)
            outcomes[fate] += 1
        elif isinstance(fate, Drop):
            counters.dropped(fate)
            dropped[fate] += 1
        else:
            pending += 1
    stats = counters.snapshot(START)
    assert (stats.outcomes, stats.dropped, stats.pending) == (outcomes, dropped, pending)
    assert stats.frames_in == stats.inspected + sum(stats.dropped.values())
    assert stats.inspected == sum(outcomes.values())


@given(st.lists(st.floats(-1e3, 1e7), min_size=1, max_size=50))
def test_extremes_mean_and_percentiles_are_those_of_the_latencies(latencies: list[float]) -> None:
    counters = Counters(START)
    for latency in latencies:
        conclude(counters, Outcome.PASS, latency)
    found = counters.snapshot(START).latencies
    assert found is not None
    assert (found.least, found.greatest) == (min(latencies), max(latencies))
    assert found.mean == pytest.approx(np.mean(latencies), rel=1e-9, abs=1e-6)
    assert [found.p50, found.p95, found.p99] == pytest.approx(np.percentile(latencies, [50, 95, 99]))


def test_percentiles_forget_what_extremes_remember() -> None:
    counters = Counters(START)
    for latency in (9000.0, 1.0):
        conclude(counters, Outcome.PASS, latency)
    for _ in range(WINDOW):
        conclude(counters, Outcome.PASS, 50.0)
    found = counters.snapshot(START).latencies
    assert found is not None
    assert (found.least, found.greatest) == (1.0, 9000.0)
    assert (found.p50, found.p99) == (50.0, 50.0)


def test_before_the_first_verdict_there_is_no_yield_and_no_latency() -> None:
    counters = Counters(START)
    counters.arrived()
    counters.dropped(Drop.MISSED)
    stats = counters.snapshot(after(5))
    assert (stats.yielded, stats.latencies, stats.rate_per_min, stats.frames_in) == (None, None, 0.0, 1)


def test_yield_is_the_share_that_passed_of_all_verdicts() -> None:
    counters = Counters(START)
    for outcome in (Outcome.PASS, Outcome.PASS, Outcome.FAIL, Outcome.UNCERTAIN, Outcome.ERROR):
        conclude(counters, outcome)
    assert counters.snapshot(START).yielded == 0.4


def test_the_rate_is_of_the_last_minute() -> None:
    counters = Counters(START)
    for seconds in (0, 30, 59, 61, 90):
        conclude(counters, Outcome.PASS, seconds=seconds)
    assert counters.snapshot(after(90)).rate_per_min == 3.0
    assert counters.snapshot(after(600)).rate_per_min == 0.0


def test_the_rate_of_a_fast_line_is_that_of_its_newest_parts() -> None:
    counters = Counters(START)
    for number in range(2 * WINDOW):
        conclude(counters, Outcome.PASS, seconds=number / 100)
    assert counters.snapshot(after(20)).rate_per_min == pytest.approx(6000, rel=0.01)


def test_rejects_are_counted_among_the_last_parts_alone() -> None:
    counters = Counters(START)
    for outcome in (Outcome.FAIL, Outcome.PASS, Outcome.UNCERTAIN, Outcome.PASS, Outcome.ERROR):
        conclude(counters, outcome)
    assert [counters.rejected(last) for last in (0, 1, 2, 3, 5, 9)] == [0, 1, 1, 2, 3, 3]


def test_a_reset_starts_anew_and_leaves_what_is_on_its_way() -> None:
    counters = Counters(START)
    conclude(counters, Outcome.FAIL)
    counters.came_too_late()
    counters.arrived()
    assert (counters.snapshot(START).too_late, counters.snapshot(START).since) == (1, START)
    counters.reset(after(60))
    stats = counters.snapshot(after(60))
    assert (stats.since, stats.frames_in, stats.pending, stats.too_late, stats.latencies) == (after(60), 0, 1, 0, None)
    assert counters.rejected(9) == 0


def test_a_part_that_was_never_said_to_come_leaves_no_negative_figure() -> None:
    counters = Counters(START)
    counters.concluded(Outcome.PASS, 1.0, START)
    assert counters.snapshot(START).pending == 0


def test_many_threads_lose_no_part() -> None:
    counters = Counters(START)

    def work(number: int) -> None:
        for _ in range(500):
            conclude(counters, Outcome(number % 4), float(number))
            assert counters.rejected(3) <= 3

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    stats = counters.snapshot(START)
    assert stats.outcomes == dict.fromkeys(Outcome, 1000)
    assert stats.pending == 0
    assert stats.latencies is not None
    assert stats.latencies.mean == 3.5
