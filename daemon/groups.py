"""What a group of stations, which see one part from several sides, knows of itself."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import structlog

from daemon.alarms import AlarmId, Alarms, Change
from daemon.contract import StationState
from daemon.fusion import Fate, Key
from daemon.health import OF_LAST, OUTBOX_HIGH, REJECTS_HIGH, StationHealth
from daemon.messages import Outcome, Reason, Verdict
from daemon.stats import Counters

_UNREADIEST_FIRST = ("Error", "Preoperational", "Halted", "SingleExecution", "Ready", "ContinuousExecution")

log = structlog.get_logger()


class GroupHealth:
    """Figures, condition and alarms of one group; as ready as the least ready of its views. Any thread may call."""

    def __init__(self, group: str, last_seq: int, views: Sequence[StationHealth], counters: Counters) -> None:
        self.group = group
        self.views = views
        self.counters = counters
        self.alarms = Alarms()
        self.newest: Verdict | None = None
        self._started = time.monotonic()
        self._last_seq = last_seq
        self._late = self._unnamed = 0
        self._trouble: str | None = None

    def view_came(self, view: Verdict, fate: Fate, by: Key) -> None:
        """A view was judged; it may have come too late, or may be nobody's."""
        station, part = view.capture.station, view.capture.part_id
        if fate is Fate.LATE:
            self._late += 1
            log.warning(
                "a view came after its part was given up",
                group=self.group,
                station=station,
                part=part,
                id=view.capture.id,
                so_far=self._late,
            )
        elif fate is Fate.UNNAMED:
            self._unnamed += 1
            self._trouble = f"parts at {station} have no {by}"
            if self._unnamed == 1 or self._unnamed % 100 == 0:
                log.warning(
                    "a view without an id is no part's",
                    group=self.group,
                    station=station,
                    part=part,
                    id=view.capture.id,
                    missing=by.value,
                )

    def came_too_late(self) -> None:
        """The gate was not told of a part, for it came too long ago."""
        self.counters.came_too_late()

    def concluded(self, verdict: Verdict) -> None:
        """A part got its verdict, which is on disk, and so is counted already."""
        decision = verdict.decision
        self._last_seq = verdict.seq
        self.newest = verdict
        self._trouble = decision.detail if decision.reason is Reason.VIEW_MISSING else None

    def update(self, waiting_verdicts: int, audit_trouble: str | None = None) -> list[Change]:
        """See what is wrong now, and which alarms that raises or clears. To be called every second or so."""
        rejects = self.counters.rejected(OF_LAST)
        conditions = {
            AlarmId.VIEW_MISSING: self._trouble,
            AlarmId.AUDIT_BLOCKED: audit_trouble,
            AlarmId.OUTBOX_HIGH: f"{waiting_verdicts} wait" if waiting_verdicts > OUTBOX_HIGH else None,
            AlarmId.REJECT_RATE_HIGH: f"{rejects} of the last {OF_LAST}" if rejects >= REJECTS_HIGH else None,
        }
        return self.alarms.update(conditions, time.monotonic(), datetime.now(UTC))

    def state(self, waiting_verdicts: int) -> StationState:
        """The condition now: of each thing the worst that a view says."""
        states = [view.state(0) for view in self.views]
        return StationState(
            state=min((state.state for state in states), key=_UNREADIEST_FIRST.index),
            camera="online" if all(state.camera == "online" for state in states) else "offline",
            drift=_worst([state.drift for state in states], ["off", "ok"]),
            challenge=_worst([state.challenge for state in states], ["off", "ok", "due"]),
            last_frame_age_ms=min(state.last_frame_age_ms for state in states),
            mqtt_outbox=waiting_verdicts,
            last_seq=self._last_seq,
            uptime_s=int(time.monotonic() - self._started),
            unacknowledged=sum(state.unacknowledged for state in states),
            overrun=any(state.overrun for state in states),
        )

    def summary(self) -> str:
        """One line for `systemctl status`."""
        outcomes = self.counters.snapshot(datetime.now(UTC)).outcomes
        counted = ", ".join(f"{outcomes[o]} {o.name}" for o in Outcome if outcomes[o]) or "no part yet"
        troubles = [
            *([f"late views: {self._late}"] if self._late else []),
            *([f"views without an id: {self._unnamed}"] if self._unnamed else []),
        ]
        return f"{self.group}: {counted}" + (f" ({', '.join(troubles)})" if troubles else "")


def _worst(words: Sequence[str], best_first: Sequence[str]) -> str:
    """The worst of some words; those that are not among the ranked ones are worse than these."""
    return max(words, key=lambda word: best_first.index(word) if word in best_first else len(best_first))
