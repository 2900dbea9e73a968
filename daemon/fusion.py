"""Several views of one part, one verdict: the worst of them. Pure: verdicts and clocks in, verdicts out.

A part is what its views have in common, a trigger id or a part id. Its verdict is given once, when the last view is in
or the deadline has passed. Among views of one station, of a part that was sent again say, the worst counts too: an id
that two parts bear by mistake must not let the bad one pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum, StrEnum, auto

from ulid import ULID

from daemon.messages import Capture, Decision, Latency, Outcome, Reason, Verdict, View

WAITING = 256
"""Parts that may wait for views; of more the oldest is given up."""
LATE = 10
"""A view that comes so many times the deadline after its part was given up belongs to another part of the same id."""

_WORST_FIRST = (Outcome.ERROR, Outcome.FAIL, Outcome.UNCERTAIN, Outcome.PASS)


class Key(StrEnum):
    """What the views of one part have in common."""

    TRIGGER_ID = "trigger_id"
    PART_ID = "part_id"

    def of(self, capture: Capture) -> str:
        """What it is in a capture; "" where that says nothing."""
        if self is Key.PART_ID:
            return capture.part_id
        return capture.trigger.trigger_id if capture.trigger else ""


class Fate(Enum):
    """What became of a view: it counts, it came after its part was given up, or nobody knows whose it is."""

    JOINED = auto()
    LATE = auto()
    UNNAMED = auto()


@dataclass(frozen=True, slots=True)
class Fused:
    """The verdict of a part, and the worst of its views, which it goes by."""

    verdict: Verdict
    worst: Verdict


@dataclass(slots=True)
class _Part:
    """A part that waits: the worst view of each station so far, and when the first came, by the monotonic clock."""

    since: float
    views: dict[str, Verdict] = field(default_factory=dict)


@dataclass(slots=True)
class _GivenUp:
    """A part whose verdict was given without some of its views, and when."""

    at: float
    missing: set[str]


class Fusion:
    """The parts of one group that wait for views, and the numbering of their verdicts. One thread.

    Moments are `now`, seconds of the monotonic clock, and `at`, the same in UTC.

    Args:
        name: of the group.
        views: names of its stations.
        by: what the views of one part have in common.
        within_s: seconds from the arrival of a part's first view in which all must have their verdicts.
        last_seq: number of the last verdict on disk.
    """

    def __init__(self, name: str, views: Sequence[str], by: Key, within_s: float, last_seq: int = 0) -> None:
        self.views = tuple(views)
        self.by = by
        self.within_s = within_s
        self._name = name
        self._seq = last_seq
        self._waiting: dict[str, _Part] = {}
        self._given_up: dict[str, _GivenUp] = {}

    @property
    def waiting(self) -> int:
        """Parts that wait for views."""
        return len(self._waiting)

    def join(self, view: Verdict, now: float, at: datetime) -> tuple[Fate, list[Fused]]:
        """Take in the verdict of one view; learn what became of it, and which parts have their verdicts by now."""
        fused = self.expire(now, at)
        key, station = self.by.of(view.capture), view.capture.station
        if not key:
            return Fate.UNNAMED, fused
        if self._is_owed(key, station, now):
            return Fate.LATE, fused
        self._given_up.pop(key, None)  # a view that was in comes again: the part is sent once more
        part = self._waiting.setdefault(key, _Part(view.capture.seen_at))
        part.since = min(part.since, view.capture.seen_at)
        part.views[station] = min(part.views.get(station, view), view, key=_severity)
        if len(part.views) == len(self.views):
            del self._waiting[key]
            return Fate.JOINED, [*fused, self._fuse(part, None, now, at)]
        fused += self.expire(now, at)
        while len(self._waiting) > WAITING:
            oldest = min(self._waiting, key=lambda waiting: self._waiting[waiting].since)
            fused.append(self._give_up(oldest, f"while more than {WAITING} parts waited", now, at))
        return Fate.JOINED, fused

    def expire(self, now: float, at: datetime) -> list[Fused]:
        """Give up the parts whose deadline has passed."""
        due = [key for key, part in self._waiting.items() if part.since + self.within_s <= now]
        return [self._give_up(key, f"within {self.within_s:g} s", now, at) for key in due]

    def end(self, now: float, at: datetime) -> list[Fused]:
        """Give up all parts that wait."""
        return [self._give_up(key, "before the daemon ended", now, at, Reason.ABORTED) for key in list(self._waiting)]

    def patience_s(self, now: float) -> float | None:
        """Seconds to the next deadline; None where no part waits."""
        return max(0.0, min(p.since for p in self._waiting.values()) + self.within_s - now) if self._waiting else None

    def _is_owed(self, key: str, station: str, now: float) -> bool:
        """Whether a part was given up for want of this view; it is owed once."""
        for old in [old for old, part in self._given_up.items() if now - part.at > LATE * self.within_s]:
            del self._given_up[old]
        missing = self._given_up[key].missing if key in self._given_up else set()
        owed = station in missing
        missing.discard(station)
        return owed

    def _give_up(self, key: str, when: str, now: float, at: datetime, reason: Reason = Reason.VIEW_MISSING) -> Fused:
        part = self._waiting.pop(key)
        missing = [view for view in self.views if view not in part.views]
        self._given_up.pop(key, None)
        self._given_up[key] = _GivenUp(now, set(missing))
        if len(self._given_up) > WAITING:
            del self._given_up[next(iter(self._given_up))]
        return self._fuse(part, (reason, f"no verdict of {', '.join(missing)} {when}"), now, at)

    def _fuse(self, part: _Part, refusal: tuple[Reason, str] | None, now: float, at: datetime) -> Fused:
        self._seq += 1
        views = [part.views[name] for name in self.views if name in part.views]
        worst = min(views, key=_severity)
        verdict = Verdict(
            self._seq,
            self._capture([view.capture for view in views], worst.capture, refused=refusal is not None, at=at),
            _decide(worst, refusal),
            at,
            Latency(
                queue=(now - part.since) * 1000,
                infer=sum(view.latency.infer for view in views),
                total=(at - min(view.capture.captured_at for view in views)).total_seconds() * 1000,
            ),
            challenge=any(view.challenge for view in views),
            views=tuple(_seen(view) for view in views),
        )
        return Fused(verdict, worst)

    def _capture(self, captures: Sequence[Capture], worst: Capture, *, refused: bool, at: datetime) -> Capture:
        """What is said of the part: what its views say in their order.

        It counts as arrived, to the reject gate, when the last view has or, without that, at the deadline.
        """
        first = min(captures, key=lambda capture: capture.captured_at)
        arrivals = [capture.arrived_at for capture in captures]
        return replace(
            worst,
            id=str(ULID.from_datetime(at)),
            station=self._name,
            part_id=_first(capture.part_id for capture in captures),
            captured_at=first.captured_at,
            clock=first.clock,
            arrived_at=min(arrivals) + timedelta(seconds=self.within_s) if refused else max(arrivals),
            origin="",
            frame_id=0,
            batch_id=_first(capture.batch_id for capture in captures),
            meta={},
            trigger=next((capture.trigger for capture in captures if capture.trigger), None),
            reply=None,
        )


def _severity(view: Verdict) -> tuple[int, float, int]:
    """The least is the worst; of equals the first counts."""
    return _WORST_FIRST.index(view.decision.outcome), -(view.decision.ratio or 0.0), view.seq


def _decide(worst: Verdict, refusal: tuple[Reason, str] | None) -> Decision:
    decision = worst.decision
    if refusal is None:
        return replace(decision, detail=f"{worst.capture.station}: {decision.detail}" if decision.detail else "")
    reason, detail = refusal
    return Decision(Outcome.ERROR, reason, detail, None, None, decision.threshold, decision.fail_threshold)


def _seen(view: Verdict) -> View:
    return View(view.capture.station, view.capture.id, view.seq, view.decision.outcome, view.decision.ratio)


def _first(texts: Iterable[str]) -> str:
    return next(filter(None, texts), "")
