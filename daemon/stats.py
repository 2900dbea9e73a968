"""What a station has counted since it started: parts by outcome, parts that got none, and how long they took.

Every part that comes arrives once, and is then concluded or dropped; one that was only heard of, such as a trigger
without a frame, arrives and is dropped. So nothing is lost between the figures.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice
from threading import Lock

import numpy as np

from daemon.messages import Outcome

WINDOW = 1000
"""The newest verdicts, whose latencies the percentiles are of."""

_MINUTE = timedelta(minutes=1)


class Drop(StrEnum):
    """Why a part that came has no verdict."""

    QUEUE = "queue"
    INCOMPLETE = "incomplete"
    MISSED = "missed"
    DUPLICATE = "duplicate"


@dataclass(frozen=True, slots=True)
class Latencies:
    """Milliseconds from capture to decision: extremes and mean of all parts, percentiles of the newest 1,000."""

    least: float
    greatest: float
    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of one station at one moment.

    Attributes:
        since: when counting began, UTC.
        outcomes: parts by their outcome; all outcomes are there.
        dropped: parts without a verdict by the cause; all causes are there.
        pending: parts on their way to a verdict, in no other figure.
        too_late: parts of which the reject gate was not told, for they came too long ago; in `outcomes` too.
        rate_per_min: verdicts in the last minute; where the newest 1,000 took less, at what rate those came.
        latencies: None before the first verdict.
    """

    since: datetime
    outcomes: Mapping[Outcome, int]
    dropped: Mapping[Drop, int]
    pending: int
    too_late: int
    rate_per_min: float
    latencies: Latencies | None

    @property
    def inspected(self) -> int:
        """Parts with a verdict, whatever it is."""
        return sum(self.outcomes.values())

    @property
    def frames_in(self) -> int:
        """Parts that came and whose fate is known: always those inspected and those dropped."""
        return self.inspected + sum(self.dropped.values())

    @property
    def yielded(self) -> float | None:
        """The share that passed of all that were inspected; None where none was."""
        return self.outcomes[Outcome.PASS] / self.inspected if self.inspected else None


@dataclass(frozen=True, slots=True)
class _Conclusion:
    outcome: Outcome
    latency_ms: float
    at: datetime


@dataclass(slots=True)
class _Tally:
    """What a reset begins anew."""

    since: datetime
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    dropped: Counter[Drop] = field(default_factory=Counter)
    too_late: int = 0
    newest: deque[_Conclusion] = field(default_factory=lambda: deque(maxlen=WINDOW))
    sum_ms: float = 0.0
    least_ms: float = math.inf
    greatest_ms: float = -math.inf


class Counters:
    """The running figures of one station. Any thread may report or ask; reporting a part takes constant time."""

    def __init__(self, now: datetime) -> None:
        self._lock = Lock()
        self._pending = 0
        self._tally = _Tally(now)

    def arrived(self) -> None:
        """A part came."""
        with self._lock:
            self._pending += 1

    def concluded(self, outcome: Outcome, latency_ms: float, at: datetime) -> None:
        """A part that came got its verdict, at a time in UTC."""
        with self._lock:
            tally = self._tally
            self._pending -= 1
            tally.outcomes[outcome] += 1
            tally.newest.append(_Conclusion(outcome, latency_ms, at))
            tally.sum_ms += latency_ms
            tally.least_ms = min(tally.least_ms, latency_ms)
            tally.greatest_ms = max(tally.greatest_ms, latency_ms)

    def dropped(self, cause: Drop) -> None:
        """A part that came will get no verdict."""
        with self._lock:
            self._pending -= 1
            self._tally.dropped[cause] += 1

    def came_too_late(self) -> None:
        """The reject gate was not told of a part, for it came too long ago; it is concluded all the same."""
        with self._lock:
            self._tally.too_late += 1

    def rejected(self, last: int) -> int:
        """How many of the last parts, at most 1,000, did not pass."""
        with self._lock:
            newest = list(islice(reversed(self._tally.newest), last))
        return sum(part.outcome is not Outcome.PASS for part in newest)

    def snapshot(self, now: datetime) -> Stats:
        """The figures now, at a time in UTC."""
        with self._lock:
            tally = self._tally
            newest = list(tally.newest)
            outcomes = {outcome: tally.outcomes[outcome] for outcome in Outcome}
            dropped = {cause: tally.dropped[cause] for cause in Drop}
            pending, too_late = max(0, self._pending), tally.too_late
            least, greatest, total = tally.least_ms, tally.greatest_ms, tally.sum_ms
        latencies = None
        if newest:
            p50, p95, p99 = np.percentile([part.latency_ms for part in newest], [50, 95, 99]).tolist()
            latencies = Latencies(least, greatest, total / sum(outcomes.values()), p50, p95, p99)
        return Stats(tally.since, outcomes, dropped, pending, too_late, _rate_per_min(newest, now), latencies)

    def reset(self, now: datetime) -> None:
        """Count anew from now, a time in UTC; what is on its way stays so."""
        with self._lock:
            self._tally = _Tally(now)


def _rate_per_min(newest: list[_Conclusion], now: datetime) -> float:
    lately = sum(now - part.at < _MINUTE for part in newest)
    if lately < WINDOW:
        return float(lately)
    taken = now - min(part.at for part in newest)
    return WINDOW * (_MINUTE / max(taken, timedelta(milliseconds=1)))
