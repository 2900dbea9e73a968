"""Figures of a station add up, whatever happens to its parts and in whatever order."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.messages import Outcome, Reason
from daemon.stats import WINDOW, Counters, Drop, Part, Tally, Window, begun, counted, is_over, unpack
from tests.payloads import PASSED, TRIGGERED

ROOT = Path(__file__).parents[2]
BERLIN = ZoneInfo("Europe/Berlin")
START = datetime(2026, 11, 22, 6, 0, tzinfo=UTC)
triggers = st.sampled_from(["answered", "untaken", "overrun"])
fates = st.one_of(st.sampled_from(Outcome), st.sampled_from(Drop), triggers, st.just("on its way"), st.just("reset"))


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def fresh() -> Counters:
    return Counters(begun(START))


def conclude(counters: Counters, outcome: Outcome, latency_ms: float = 50.0, seconds: float = 0) -> None:
    counters.arrived()
    counters.concluded([Part(outcome, latency_ms, after(seconds))])


def reset(counters: Counters, at: datetime = START) -> None:
    counters.begin(Tally(at), counters.figures.shift)


@given(st.lists(fates, max_size=60))
def test_what_came_is_inspected_dropped_or_pending_and_all_shifts_are_the_total(
    course: list[Outcome | Drop | str],
) -> None:
    counters, closed, pending, asked = fresh(), [], 0, 0
    for fate in course:
        if fate == "reset":
            closed.append(counters.figures.shift.stats())
            reset(counters)
        elif fate == "overrun":
            counters.trigger_lost()
            asked += 1
        elif isinstance(fate, Drop):
            counters.arrived()
            counters.dropped(fate)
        else:
            counters.arrived()
            pending += fate == "on its way"
            if fate in {"answered", "untaken"}:
                counters.concluded([Part(Outcome.ERROR, 1.0, START, triggered=True, answered=fate == "answered")])
                asked += 1
            elif isinstance(fate, Outcome):
                counters.concluded([Part(fate, 1.0, START)])
    total = counters.snapshot(START, Window.TOTAL)
    shifts = [*closed, counters.snapshot(START)]
    for stats in (*shifts, total):
        assert stats.frames_in == stats.inspected + sum(stats.dropped.values())
        assert stats.triggers == stats.answered + stats.trigger_errors
    assert total.pending == pending
    assert total.outcomes == {one: sum(stats.outcomes[one] for stats in shifts) for one in Outcome}
    assert total.dropped == {one: sum(stats.dropped[one] for stats in shifts) for one in Drop}
    assert total.triggers == sum(stats.triggers for stats in shifts) == asked
    assert (total.inspected, total.dropped[Drop.QUEUE]) == (
        sum(isinstance(fate, Outcome) or fate in {"answered", "untaken"} for fate in course),
        course.count(Drop.QUEUE),
    )
    assert unpack(counters.figures.pack()) == counters.figures


@given(st.lists(st.floats(-1e3, 1e7), min_size=1, max_size=50))
def test_extremes_mean_and_percentiles_are_those_of_the_latencies(latencies: list[float]) -> None:
    counters = fresh()
    for latency in latencies:
        conclude(counters, Outcome.PASS, latency)
    found = counters.snapshot(START).latencies
    assert found is not None
    assert (found.least, found.greatest) == (min(latencies), max(latencies))
    assert found.mean == pytest.approx(np.mean(latencies), rel=1e-9, abs=1e-6)
    of = counters.snapshot(START).percentiles
    assert of is not None
    assert [of.p50, of.p95, of.p99] == pytest.approx(np.percentile(latencies, [50, 95, 99]))


def test_percentiles_forget_what_extremes_remember() -> None:
    counters = fresh()
    for latency in (9000.0, 1.0):
        conclude(counters, Outcome.PASS, latency)
    for _ in range(WINDOW):
        conclude(counters, Outcome.PASS, 50.0)
    found = counters.snapshot(START).latencies
    assert found is not None
    assert (found.least, found.greatest) == (1.0, 9000.0)
    of = counters.snapshot(START).percentiles
    assert of is not None
    assert (of.p50, of.p99) == (50.0, 50.0)


def test_before_the_first_verdict_there_is_no_yield_and_no_latency() -> None:
    counters = fresh()
    counters.arrived()
    counters.dropped(Drop.MISSED)
    stats = counters.snapshot(after(5))
    assert (stats.yielded, stats.latencies, stats.rate_per_min, stats.frames_in) == (None, None, 0.0, 1)


def test_yield_is_the_share_that_passed_of_all_verdicts() -> None:
    counters = fresh()
    for outcome in (Outcome.PASS, Outcome.PASS, Outcome.FAIL, Outcome.UNCERTAIN, Outcome.ERROR):
        conclude(counters, outcome)
    assert counters.snapshot(START).yielded == 0.4


def test_the_rate_is_of_the_last_minute() -> None:
    counters = fresh()
    for seconds in (0, 30, 59, 61, 90):
        conclude(counters, Outcome.PASS, seconds=seconds)
    assert counters.snapshot(after(90)).rate_per_min == 3.0
    assert counters.snapshot(after(600)).rate_per_min == 0.0


def test_the_rate_of_a_fast_line_is_that_of_its_newest_parts() -> None:
    counters = fresh()
    for number in range(2 * WINDOW):
        conclude(counters, Outcome.PASS, seconds=number / 100)
    assert counters.snapshot(after(20)).rate_per_min == pytest.approx(6000, rel=0.01)


def test_rejects_are_counted_among_the_last_parts_alone() -> None:
    counters = fresh()
    for outcome in (Outcome.FAIL, Outcome.PASS, Outcome.UNCERTAIN, Outcome.PASS, Outcome.ERROR):
        conclude(counters, outcome)
    assert [counters.rejected(last) for last in (0, 1, 2, 3, 5, 9)] == [0, 1, 1, 2, 3, 3]


def test_a_reset_starts_anew_and_leaves_what_is_on_its_way() -> None:
    counters = fresh()
    conclude(counters, Outcome.FAIL)
    counters.came_too_late()
    counters.arrived()
    assert (counters.snapshot(START).too_late, counters.snapshot(START).since) == (1, START)
    reset(counters, after(60))
    stats, total = counters.snapshot(after(60)), counters.snapshot(after(60), Window.TOTAL)
    assert (stats.since, stats.frames_in, stats.pending, stats.too_late, stats.latencies) == (after(60), 0, 1, 0, None)
    assert stats.percentiles is None
    assert (total.since, total.frames_in, total.pending, total.too_late) == (START, 1, 1, 1)
    assert counters.rejected(9) == 1  # what may be wrong with the line is so in the new shift too


def test_what_is_lost_while_a_shift_is_closed_is_the_new_ones() -> None:
    counters = fresh()
    counters.lost(Drop.MISSED, 3)
    closed = counters.figures.shift
    counters.lost(Drop.MISSED, 2)
    counters.begin(Tally(after(60)), closed)
    assert counters.snapshot(after(60)).dropped[Drop.MISSED] == 2
    assert counters.snapshot(after(60), Window.TOTAL).dropped[Drop.MISSED] == 5


def test_what_was_counted_before_a_restart_goes_on_but_for_the_percentiles() -> None:
    counters = fresh()
    for latency in (20.0, 40.0):
        conclude(counters, Outcome.PASS, latency)
    again = Counters(unpack(counters.figures.pack()))
    assert again.snapshot(START).latencies == counters.snapshot(START).latencies
    assert again.snapshot(START).percentiles is None
    conclude(again, Outcome.FAIL, 90.0)
    stats = again.snapshot(START)
    assert (stats.inspected, stats.yielded) == (3, 2 / 3)
    assert stats.latencies is not None
    assert (stats.latencies.greatest, stats.latencies.mean) == (90.0, 50.0)


def test_a_verdict_counts_as_its_trigger_fared_and_that_of_the_challenge_test_not_at_all() -> None:
    assert counted(replace(PASSED, challenge=True)) is None
    plain, asked = counted(PASSED), counted(TRIGGERED)
    assert plain is not None
    assert asked is not None
    assert (plain.triggered, plain.answered, asked.triggered, asked.answered) == (False, False, True, True)
    for reason in Reason:
        refused = counted(replace(TRIGGERED, decision=replace(TRIGGERED.decision, reason=reason)))
        assert refused is not None
        without_a_part = reason in {Reason.ACQUISITION_TIMEOUT, Reason.TRIGGER_WHILE_BUSY, Reason.ABORTED}
        assert (refused.triggered, refused.answered) == (True, not without_a_part)


def test_a_part_that_was_never_said_to_come_leaves_no_negative_figure() -> None:
    counters = fresh()
    counters.concluded([Part(Outcome.PASS, 1.0, START)])
    assert counters.snapshot(START).pending == 0
    counters.arrived()
    assert counters.snapshot(START).pending == 1


def test_many_threads_lose_no_part() -> None:
    counters = fresh()

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


# When shifts change


SHIFTS = (time(22), time(6), time(14))


def local(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).astimezone(UTC)


def over(since: str, now: str, shifts: tuple[time, ...] = SHIFTS) -> bool:
    return is_over(local(since), shifts, local(now), BERLIN)


def test_a_shift_is_over_at_the_next_of_its_times_and_not_before() -> None:
    assert not over("2026-11-22T06:00", "2026-11-22T13:59:59.999")
    assert over("2026-11-22T06:00", "2026-11-22T14:00")
    assert over("2026-11-22T13:59:59", "2026-11-22T14:00")
    assert not over("2026-11-22T22:00:00.4", "2026-11-23T05:59")
    assert over("2026-11-22T22:00", "2026-11-23T06:00")
    assert over("2026-10-01T07:00", "2026-11-22T07:00")  # the daemon was away
    assert not over("2026-11-22T06:00", "2026-12-22T06:00", ())


def test_each_time_comes_once_on_the_days_on_which_clocks_are_changed() -> None:
    night = (time(2, 30),)
    assert not is_over(local("2026-03-29T00:00"), night, local("2026-03-29T00:00") + timedelta(minutes=149), BERLIN)
    assert over("2026-03-29T00:00", "2026-03-29T03:30", night)  # half past two is left out
    first = local("2026-10-25T02:30")
    assert is_over(first - timedelta(hours=3), night, first, BERLIN)
    assert not is_over(first, night, first + timedelta(hours=1), BERLIN)  # half past two once more
    for day in ("2026-03-29", "2026-10-25"):
        begun_at = local(f"{day}T00:00")
        since, changes = begun_at, 0
        for minute in range(1, 26 * 60):
            now = begun_at + timedelta(minutes=minute)
            if is_over(since, SHIFTS, now, BERLIN):
                since, changes = now, changes + 1
                assert now.astimezone(BERLIN).strftime("%H:%M") in {"06:00", "14:00", "22:00"}
        assert changes == 3


def test_a_clock_that_was_set_back_a_little_changes_no_shift_twice_and_one_far_in_the_future_is_given_up() -> None:
    assert not over("2026-11-22T06:00:00.5", "2026-11-22T06:00:00.1")
    assert not over("2026-11-22T06:00:00.5", "2026-11-22T05:59:58")
    assert over("2036-11-22T06:00", "2026-11-22T07:00")


def test_without_a_zone_the_times_are_those_of_the_machine() -> None:
    script = (
        "from datetime import UTC, datetime, time\n"
        "from daemon.stats import is_over\n"
        "since = datetime(2026, 7, 1, 0, 0, tzinfo=UTC)\n"
        "print([is_over(since, [time(6)], since.replace(hour=h)) for h in (3, 4)])\n"
    )
    environ = os.environ | {"TZ": "Europe/Berlin"}
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    ).stdout
    assert said == "[False, True]\n"
