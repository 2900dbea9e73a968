"""What a station has counted, in this shift and since it first ran: parts by outcome, parts that got none, triggers.

Every part that comes arrives once, and is then concluded or dropped; one that was only heard of, such as a trigger
without a frame, arrives and is dropped. So nothing is lost between the figures.

What is concluded is counted here when its verdict is on disk, and saved in one commit with it (`outbox`).
"""

import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from enum import StrEnum
from itertools import islice
from threading import Lock
from typing import Any

import numpy as np

from daemon.messages import Outcome, Reason, Verdict

WINDOW = 1000
"""The newest verdicts, whose latencies the percentiles are of."""

_MINUTE, _DAY = timedelta(minutes=1), timedelta(days=1)
_TOO_LATE, _TRIGGERS, _TRIGGER_ERRORS = "too_late", "triggers", "trigger_errors"
"""Names of what is counted, beside those of outcomes and causes."""
_UNTAKEN = {Reason.ACQUISITION_TIMEOUT, Reason.TRIGGER_WHILE_BUSY, Reason.ABORTED}
"""Why a trigger has a verdict without a part."""


class Drop(StrEnum):
    """Why a part that came has no verdict."""

    QUEUE = "queue"
    INCOMPLETE = "incomplete"
    MISSED = "missed"
    DUPLICATE = "duplicate"


class Window(StrEnum):
    """Since when is counted: since the shift began, or since the station first ran."""

    SHIFT = "shift"
    TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Part:
    """A verdict as it counts, at a time in UTC: whether somebody asked for it, and then got a part."""

    outcome: Outcome
    latency_ms: float
    at: datetime
    triggered: bool = False
    answered: bool = False


def counted(verdict: Verdict) -> Part | None:
    """As what a verdict counts; None, as nothing, where it is the challenge test's."""
    if verdict.challenge:
        return None
    decision, triggered = verdict.decision, verdict.capture.trigger is not None
    answered = triggered and decision.reason not in _UNTAKEN
    return Part(decision.outcome, verdict.latency.total, verdict.decided_at, triggered, answered)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Milliseconds from capture to decision: extremes and mean of all parts."""

    least: float
    greatest: float
    mean: float


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The same of the newest 1,000 parts: half, 95 % and 99 % took no longer."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Stats:
    """The figures of one station in one window at one moment.

    Attributes:
        since: when counting began, UTC.
        outcomes: parts by their outcome; all outcomes are there.
        dropped: parts without a verdict by the cause; all causes are there.
        answered: triggers whose part has its verdict.
        trigger_errors: triggers that got no part; most have a verdict ERROR all the same, which is in `outcomes`.
        pending: parts on their way to a verdict, in no other figure.
        too_late: parts of which the reject gate was not told, for they came too long ago; in `outcomes` too.
        rate_per_min: verdicts in the last minute; where the newest 1,000 took less, at what rate those came.
        latencies: None before the first verdict.
        percentiles: None before the first verdict of this run.
    """

    since: datetime
    outcomes: Mapping[Outcome, int]
    dropped: Mapping[Drop, int]
    answered: int = 0
    trigger_errors: int = 0
    pending: int = 0
    too_late: int = 0
    rate_per_min: float = 0.0
    latencies: Latencies | None = None
    percentiles: Percentiles | None = None

    @property
    def inspected(self) -> int:
        """Parts with a verdict, whatever it is."""
        return sum(self.outcomes.values())

    @property
    def frames_in(self) -> int:
        """Parts that came and whose fate is known: always those inspected and those dropped."""
        return self.inspected + sum(self.dropped.values())

    @property
    def triggers(self) -> int:
        """Triggers whose fate is known: always those answered and those that got no part."""
        return self.answered + self.trigger_errors

    @property
    def yielded(self) -> float | None:
        """The share that passed of all that were inspected; None where none was."""
        return self.outcomes[Outcome.PASS] / self.inspected if self.inspected else None


@dataclass(frozen=True, slots=True)
class Tally:
    """What one window has counted since a time in UTC, behind the verdict numbered `after`."""

    since: datetime
    after: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    sum_ms: float = 0.0
    least_ms: float = math.inf
    greatest_ms: float = -math.inf

    def counting(self, what: str, number: int = 1) -> "Tally":
        """The same with some more of something."""
        return replace(self, counts=self.counts + Counter({what: number}))

    def concluding(self, parts: Sequence[Part]) -> "Tally":
        """The same when these parts have their verdicts, too."""
        more = Counter(part.outcome.name for part in parts)
        more[_TRIGGERS] = sum(part.triggered for part in parts)
        more[_TRIGGER_ERRORS] = sum(part.triggered and not part.answered for part in parts)
        taken = [part.latency_ms for part in parts]
        return replace(
            self,
            counts=self.counts + more,
            sum_ms=self.sum_ms + sum(taken),
            least_ms=min([self.least_ms, *taken]),
            greatest_ms=max([self.greatest_ms, *taken]),
        )

    def stats(self, newest: Sequence[Part] = (), pending: int = 0, now: datetime | None = None) -> Stats:
        """The figures, with what is known of the newest parts at a time in UTC."""
        counts = self.counts
        outcomes = {outcome: counts[outcome.name] for outcome in Outcome}
        inspected = sum(outcomes.values())
        percentiles = None
        if newest:
            percentiles = Percentiles(*np.percentile([part.latency_ms for part in newest], [50, 95, 99]).tolist())
        return Stats(
            since=self.since,
            outcomes=outcomes,
            dropped={cause: counts[cause.value] for cause in Drop},
            answered=counts[_TRIGGERS] - counts[_TRIGGER_ERRORS],
            trigger_errors=counts[_TRIGGER_ERRORS],
            pending=pending,
            too_late=counts[_TOO_LATE],
            rate_per_min=0.0 if now is None else _rate_per_min(newest, now),
            latencies=Latencies(self.least_ms, self.greatest_ms, self.sum_ms / inspected) if inspected else None,
            percentiles=percentiles,
        )

    def pack(self) -> dict[str, Any]:
        """As it is saved."""
        taken = (self.sum_ms, self.least_ms, self.greatest_ms) if math.isfinite(self.least_ms) else None
        return {"since": self.since.isoformat(), "after": self.after, "counts": self.counts, "ms": taken}


def _unpack(content: Mapping[str, Any]) -> Tally:
    since = datetime.fromisoformat(content["since"]).astimezone(UTC)
    return Tally(since, content["after"], Counter(content["counts"]), *(content["ms"] or ()))


@dataclass(frozen=True, slots=True)
class Figures:
    """What a station has counted in both windows."""

    shift: Tally
    total: Tally

    def concluding(self, parts: Sequence[Part]) -> "Figures":
        """The same when these parts have their verdicts, too."""
        return Figures(self.shift.concluding(parts), self.total.concluding(parts))

    def counting(self, what: str, number: int = 1) -> "Figures":
        """The same with some more of something."""
        return Figures(self.shift.counting(what, number), self.total.counting(what, number))

    def pack(self) -> str:
        """As they are saved."""
        return json.dumps({Window.SHIFT: self.shift.pack(), Window.TOTAL: self.total.pack()}, separators=(",", ":"))


def begun(at: datetime, after: int = 0) -> Figures:
    """Those of a station that counts from now on, a time in UTC, behind the verdict numbered `after`."""
    return Figures(Tally(at, after), Tally(at, after))


def unpack(content: str) -> Figures:
    """The figures that were packed."""
    windows = json.loads(content)
    return Figures(_unpack(windows[Window.SHIFT]), _unpack(windows[Window.TOTAL]))


@dataclass(frozen=True, slots=True)
class Shift:
    """A shift that is over, until a time in UTC; the numbers of its first and last verdict are 0 where it has none."""

    stats: Stats
    until: datetime
    first_seq: int
    last_seq: int


class Counters:
    """The running figures of one station. Any thread may report or ask; nothing here waits for the disk.

    Args:
        figures: what was counted before this run.
    """

    def __init__(self, figures: Figures) -> None:
        self._lock = Lock()
        self._pending = 0
        self._figures = figures
        self._newest: dict[Window, deque[Part]] = {window: deque(maxlen=WINDOW) for window in Window}

    @property
    def figures(self) -> Figures:
        """What is counted now in both windows."""
        return self._figures

    def arrived(self) -> None:
        """A part came."""
        with self._lock:
            self._pending += 1

    def concluded(self, parts: Sequence[Part]) -> None:
        """Parts got their verdicts, and these are on disk."""
        with self._lock:
            self._pending = max(0, self._pending - len(parts))  # nobody tells of a group's parts that they came
            self._figures = self._figures.concluding(parts)
            for newest in self._newest.values():
                newest.extend(parts)

    def dropped(self, cause: Drop) -> None:
        """A part that came will get no verdict."""
        with self._lock:
            self._pending -= 1
            self._figures = self._figures.counting(cause.value)

    def lost(self, cause: Drop, count: int = 1) -> None:
        """Parts that never came will get no verdict."""
        with self._lock:
            self._figures = self._figures.counting(cause.value, count)

    def came_too_late(self) -> None:
        """The reject gate was not told of a part, for it came too long ago; it is concluded all the same."""
        with self._lock:
            self._figures = self._figures.counting(_TOO_LATE)

    def trigger_lost(self) -> None:
        """A trigger will get neither a part nor a verdict."""
        with self._lock:
            lost = self._figures.counting(_TRIGGERS).counting(_TRIGGER_ERRORS)
            self._figures = lost.counting(Drop.MISSED.value)

    def rejected(self, last: int) -> int:
        """How many of the last parts of this run, at most 1,000, did not pass; whatever shift it is."""
        with self._lock:
            newest = list(islice(reversed(self._newest[Window.TOTAL]), last))
        return sum(part.outcome is not Outcome.PASS for part in newest)

    def snapshot(self, now: datetime, window: Window = Window.SHIFT) -> Stats:
        """The figures of one window now, at a time in UTC."""
        with self._lock:
            tally = self._figures.shift if window is Window.SHIFT else self._figures.total
            newest, pending = list(self._newest[window]), max(0, self._pending)
        return tally.stats(newest, pending, now)

    def begin(self, shift: Tally, closed: Tally) -> None:
        """Count a new shift behind one that was closed; what was counted since it was, is the new one's."""
        with self._lock:
            present = self._figures.shift
            shift = replace(shift, counts=present.counts - closed.counts)
            self._figures = Figures(shift, self._figures.total)
            self._newest[Window.SHIFT].clear()


def is_over(since: datetime, shifts: Iterable[time], now: datetime, zone: tzinfo | None = None) -> bool:
    """Whether a shift that began at `since` is over `now`, both UTC, where a new one begins at these times each day.

    The times are those of the zone, None the machine's. Each comes once on every day: one that the clock skips in
    spring counts an hour later, and of two in autumn the first. After the clock was set back a day or more, a shift
    that seems to begin in the future is over too.
    """
    today = now.astimezone(zone).date()
    days = (today - _DAY, today, today + _DAY)
    begun = [at for day in days for each in shifts if (at := _instant(day, each, zone)) <= now]
    return bool(begun) and not max(begun) <= since < now + _DAY


def _instant(day: date, at: time, zone: tzinfo | None) -> datetime:
    return datetime.combine(day, at, zone).astimezone(UTC)


def _rate_per_min(newest: Sequence[Part], now: datetime) -> float:
    lately = sum(now - part.at < _MINUTE for part in newest)
    if lately < WINDOW:
        return float(lately)
    taken = now - min(part.at for part in newest)
    return WINDOW * (_MINUTE / max(taken, timedelta(milliseconds=1)))
