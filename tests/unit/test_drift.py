"""Drift: exact p-values, honest alarms, and the way back."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, kstest

from calibration.drift import (
    BULK_FALSE_ALARM,
    BULK_WINDOW,
    CUSUM_LIMIT,
    CUSUM_RUN_LENGTH,
    CUSUM_SLACK,
    EPOCH,
    FALSE_ALARM,
    MARTINGALE_FALSE_ALARM,
    Ranks,
    Reading,
    Watch,
)


def watched(watch: Watch, values: NDArray[np.float64]) -> Reading:
    for value in values:
        watch.update(float(value))
    return watch.reading


def delay(watch: Watch, values: NDArray[np.float64]) -> float:
    """How many values until an alarm."""
    for number, value in enumerate(values, 1):
        watch.update(float(value))
        if watch.reading.alarm:
            return number
    return math.inf


@pytest.mark.parametrize("kind", ["few", "tied", "heavy"])
def test_p_values_of_exchangeable_values_are_uniform_and_independent(kind: str) -> None:
    rng = np.random.default_rng(7)
    values = {
        "few": rng.normal(size=3_005),
        "tied": rng.integers(0, 3, 3_005).astype(float),
        "heavy": rng.standard_cauchy(3_005),
    }[kind]
    ranks = Ranks(values[:5], seed=1)
    p = []
    for value in values[5:]:
        p.append(ranks.p_value(float(value)))
        ranks.learn(float(value))
    assert kstest(p, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(p[1:], p[:-1])[0, 1]) < 4 / math.sqrt(len(p))


def test_p_values_against_few_good_parts_that_never_change_are_not_uniform() -> None:
    rng = np.random.default_rng(7)
    ranks = Ranks(rng.normal(size=5), seed=1)
    assert kstest([ranks.p_value(float(value)) for value in rng.normal(size=3_000)], "uniform").pvalue < 0.001


def test_the_first_p_value_is_uniform_over_references_however_few() -> None:
    rng = np.random.default_rng(3)
    p = [Ranks(values[:1], seed).p_value(values[1]) for seed, values in enumerate(rng.normal(size=(2_000, 2)))]
    assert kstest(p, "uniform").pvalue > 0.001


def test_a_high_value_has_a_small_p_value_and_never_zero_or_one() -> None:
    ranks = Ranks(range(99), seed=0)
    assert 0 < ranks.p_value(1e9) <= 0.01
    assert 0.99 <= ranks.p_value(-1e9) < 1
    assert 0.48 < ranks.p_value(49.5) < 0.52


def test_the_stated_rates_follow_from_the_limits() -> None:
    b = CUSUM_LIMIT + 1.166
    one_side = (math.exp(2 * CUSUM_SLACK * b) - 2 * CUSUM_SLACK * b - 1) / (2 * CUSUM_SLACK**2)
    assert one_side / 2 == pytest.approx(CUSUM_RUN_LENGTH, rel=0.1)
    least = next(k for k in range(BULK_WINDOW) if 2 * binom.cdf(k, BULK_WINDOW, 0.5) > BULK_FALSE_ALARM)
    exact = 2 * binom.cdf(least - 1, BULK_WINDOW, 0.5)
    assert BULK_FALSE_ALARM / 2 < exact <= BULK_FALSE_ALARM
    assert pytest.approx(0.013) == FALSE_ALARM


@pytest.mark.parametrize("n", [1, 20, 99])
def test_exchangeable_streams_hardly_ever_alarm(n: int) -> None:
    rng = np.random.default_rng(n)
    streams = 6
    hits = sum(delay(Watch(rng.gumbel(size=n), seed), rng.gumbel(size=5_000)) < math.inf for seed in range(streams))
    allowed = int(binom.ppf(0.999, streams, FALSE_ALARM))
    assert hits <= allowed


@pytest.mark.parametrize(("shift", "direction"), [(1.0, "up"), (-1.0, "down")])
def test_a_jump_of_a_standard_deviation_alarms_within_120_parts(shift: float, direction: str) -> None:
    rng = np.random.default_rng(11)
    for seed in range(5):
        watch = Watch(rng.normal(size=200), seed)
        assert not watched(watch, rng.normal(size=500)).alarm
        assert delay(watch, rng.normal(shift, size=400)) <= 120
        assert watch.reading.direction == direction


def test_a_small_drift_that_lasts_is_found_by_the_martingale() -> None:
    rng = np.random.default_rng(12)
    watch = Watch(rng.normal(size=99), 0)
    assert not watched(watch, rng.normal(size=4_000)).alarm
    for value in rng.normal(0.4, size=2_000):
        watch.update(value)
        if watch.reading.martingale == "alarm":
            break
    assert watch.reading.martingale == "alarm"
    assert watch.reading.direction == "up"


def test_the_bulk_is_blind_to_a_few_bad_parts_but_not_to_half_a_deviation() -> None:
    rng = np.random.default_rng(14)
    values = rng.normal(size=BULK_WINDOW)
    values[::25] = 50
    reading = watched(Watch(rng.normal(size=2_000), 0), values)
    assert reading.bulk == "ok"
    reading = watched(Watch(rng.normal(size=2_000), 0), rng.normal(0.5, size=BULK_WINDOW))
    assert reading.bulk == "alarm"
    assert reading.bulk_share < 0.42


def test_the_alarm_ends_when_the_light_comes_back() -> None:
    rng = np.random.default_rng(15)
    watch = Watch(rng.normal(100, 5, size=99), 0)
    watched(watch, rng.normal(100, 5, size=300))
    assert watched(watch, rng.normal(80, 5, size=500)).cusum == "alarm"
    reading = watched(watch, rng.normal(100, 5, size=60))
    assert (reading.cusum, reading.direction) == ("ok", "down")
    reading = watched(watch, rng.normal(100, 5, size=2_500))
    assert (reading.alarm, reading.direction) == (False, "")


def test_a_large_drift_does_not_become_usual_however_long_it_lasts() -> None:
    rng = np.random.default_rng(16)
    watch = Watch(rng.normal(size=99), 0)
    watched(watch, rng.normal(size=300))
    assert watched(watch, rng.normal(4, size=EPOCH)).cusum == "alarm"


def test_after_an_epoch_everything_starts_from_the_calibration() -> None:
    rng = np.random.default_rng(17)
    watch = Watch(rng.normal(size=50), 0)
    reading = watched(watch, rng.normal(size=EPOCH))
    assert not math.isnan(reading.bulk_share)
    reading = watched(watch, rng.normal(size=1))
    assert reading.parts == EPOCH + 1
    assert math.isnan(reading.bulk_share)
    assert reading.log_martingale == pytest.approx(0, abs=1e-4)


def test_the_gambler_neither_gains_nor_loses_on_average() -> None:
    rng = np.random.default_rng(18)
    wealth = [
        math.exp(watched(Watch(rng.normal(size=20), seed), rng.normal(size=100)).log_martingale) for seed in range(200)
    ]
    assert np.mean(wealth) == pytest.approx(1, abs=5 * float(np.std(wealth)) / math.sqrt(len(wealth)))
    assert MARTINGALE_FALSE_ALARM * max(wealth) < 1


def test_a_constant_stream_like_its_constant_reference_raises_nothing() -> None:
    watch = Watch([1.0] * 20, 0)
    assert not watched(watch, np.ones(3_000)).alarm


def test_a_constant_stream_unlike_its_constant_reference_alarms() -> None:
    assert delay(Watch([1.0] * 50, 0), np.full(100, 1.1)) < 100


def test_values_that_are_not_finite_are_passed_over() -> None:
    rng = np.random.default_rng(19)
    values = rng.normal(size=50)
    plain, torn = Watch(range(9), 0), Watch(range(9), 0)
    for value in values:
        plain.update(value)
        for odd in (math.nan, math.inf, value, -math.inf):
            torn.update(odd)
    assert torn.reading.parts == 50
    assert repr(torn.reading) == repr(plain.reading)


@pytest.mark.parametrize("reference", [[], [1.0, math.nan], [math.inf]])
def test_a_reference_without_values_or_with_none_finite_is_refused(reference: list[float]) -> None:
    with pytest.raises(ValueError, match="calibrate again"):
        Watch(reference, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=80, unique=True),
    st.integers(1, 40),
    st.integers(0, 2**32),
    st.floats(0.1, 3),
)
def test_only_the_order_of_values_matters(values: list[float], n: int, seed: int, scale: float) -> None:
    warped = [math.exp(scale * value) for value in values]
    n = min(n, len(values) - 1)
    assume(len(set(warped)) == len(values))
    plain = watched(Watch(values[:n], seed), np.array(values[n:]))
    assert repr(watched(Watch(reversed(warped[:n]), seed), np.array(warped[n:]))) == repr(plain)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=300), st.integers(1, 5))
def test_whatever_comes_the_reading_stays_finite(values: list[float], n: int) -> None:
    reading = watched(Watch([0.0] * n, 0), np.array(values))
    assert 0 <= reading.cusum_up <= 1.25 * CUSUM_LIMIT
    assert 0 <= reading.cusum_down <= 1.25 * CUSUM_LIMIT
    assert math.isfinite(reading.log_martingale)
    assert reading.alarm == bool(reading.direction)
