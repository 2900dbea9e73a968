"""What a station knows of itself: the content of its `state` message, its figures, its alarms, and its status line."""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from threading import Lock

import structlog

from calibration.calibration import shortage
from daemon.alarms import AlarmId, Alarms, Change
from daemon.contract import StationState
from daemon.execution import UNACKNOWLEDGED, Execution
from daemon.messages import Outcome, Reason, Verdict
from daemon.quality import StationQuality
from daemon.recipes import Recipes
from daemon.stats import Counters, Drop

OUTBOX_HIGH = 1_000
"""Verdicts that wait for the broker before that is an alarm."""
REJECTS_HIGH, OF_LAST = 25, 50
"""So many rejects of so many parts are an alarm."""

log = structlog.get_logger()


class StationHealth:
    """Figures, conditions and alarms of one station. Any thread may report; any may ask; one updates the alarms."""

    def __init__(
        self,
        station: str,
        last_seq: int,
        recipes: Recipes,
        execution: Execution,
        counters: Counters,
        archive_trouble: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._archive_trouble = archive_trouble
        self.station = station
        self._recipes = recipes
        self._execution = execution
        self.counters = counters
        self.alarms = Alarms()
        self._started = self._last_frame = time.monotonic()
        self._camera: bool | None = None
        self._record = True
        self._late = 0
        self._failure: str | None = None
        self._overrun: str | None = None
        self._last_seq = last_seq
        self.newest: Verdict | None = None
        self._lock = Lock()

    @property
    def quality(self) -> StationQuality:
        """Of what is prepared now."""
        return self._recipes.current.quality

    def source_is(self, *, available: bool) -> None:
        """The camera or folder can, or cannot, be read."""
        self._camera = available

    def record_is(self, *, writable: bool) -> None:
        """Verdicts can, or cannot, be made durable."""
        self._record = writable

    def came_too_late(self) -> None:
        """A part was judged so long after it came that the gate was not told."""
        self.counters.came_too_late()
        self._late += 1
        if self._late == 1 or self._late % 100 == 0:
            log.warning("the gate is not told of parts that came long ago", station=self.station, so_far=self._late)

    def dropped(self, cause: Drop) -> None:
        """A part that was seen, or heard of, gets no verdict."""
        self.counters.dropped(cause)

    def lost(self, cause: Drop, count: int = 1) -> None:
        """Parts that never came, which somebody knows of, get no verdict."""
        self.counters.lost(cause, count)

    def trigger_lost(self) -> None:
        """A trigger gets neither a part nor a verdict."""
        self.counters.trigger_lost()

    def frame_arrived(self, *, seen: bool, challenge: bool = False) -> None:
        """A part was seen, or only heard of. Those of the challenge test are in no figure."""
        if seen:
            self._last_frame = time.monotonic()
        if not challenge:
            self.counters.arrived()

    def concluded(self, verdict: Verdict) -> None:
        """A part got its verdict, which is on disk, and so is counted already."""
        decision = verdict.decision
        with self._lock:
            self._last_seq = verdict.seq
            self.newest = verdict
            self._failure = decision.detail if decision.reason is Reason.MODEL_ERROR else None
            self._overrun = decision.detail if decision.reason is Reason.TRIGGER_WHILE_BUSY else None

    def update(self, waiting_verdicts: int, audit_trouble: str | None = None) -> list[Change]:
        """See what is wrong now, and which alarms that raises or clears. To be called every second or so."""
        conditions = {**self._conditions(waiting_verdicts), AlarmId.AUDIT_BLOCKED: audit_trouble}
        return self.alarms.update(conditions, time.monotonic(), datetime.now(UTC))

    def state(self, waiting_verdicts: int) -> StationState:
        """The station's condition now."""
        now = time.monotonic()
        state = {None: "Preoperational", False: "Error", True: self._execution.mode.value}[self._camera]
        if not self._record or self.quality.holds:
            state = "Error"
        quality, unacknowledged = self.quality.report(), self._execution.unacknowledged
        return StationState(
            state=state,
            camera="online" if self._camera else "offline",
            drift=quality.drift,
            challenge=quality.challenge.status if quality.challenge else "off",
            last_frame_age_ms=int((now - self._last_frame) * 1000),
            mqtt_outbox=waiting_verdicts,
            last_seq=self._last_seq,
            uptime_s=int(now - self._started),
            unacknowledged=unacknowledged,
            overrun=unacknowledged >= UNACKNOWLEDGED,
        )

    def summary(self) -> str:
        """One line for `systemctl status`."""
        outcomes = self.counters.snapshot(datetime.now(UTC)).outcomes
        counted = ", ".join(f"{outcomes[o]} {o.name}" for o in Outcome if outcomes[o]) or "no part yet"
        quality = self.quality.report()
        test = quality.challenge.status if quality.challenge else "ok"
        troubles = [
            *([] if self._camera else ["source offline"]),
            *([] if self._record else ["record cannot be written"]),
            *([f"{self._late} too late for the gate"] if self._late else []),
            *([] if quality.drift in {"ok", "off"} else [f"{quality.drift} drifts"]),
            *([] if test == "ok" else [f"challenge test {test}"]),
            *(["others are rejected"] if self.quality.holds else []),
        ]
        return f"{self.station}: {counted}" + (f" ({', '.join(troubles)})" if troubles else "")

    def _conditions(self, waiting_verdicts: int) -> Mapping[AlarmId, str | None]:
        """What is wrong now, in words; None where nothing is."""
        quality = self.quality.report()
        test = quality.challenge
        rejects = self.counters.rejected(OF_LAST)
        return {
            AlarmId.CAMERA_OFFLINE: "" if self._camera is False else None,
            AlarmId.RECORD_BLOCKED: None if self._record else "",
            AlarmId.INFERENCE_FAILED: self._failure,
            AlarmId.CHALLENGE_FAILED: test.detail if test and test.status == "failed" else None,
            AlarmId.CHALLENGE_DUE: test.detail if test and test.status == "due" else None,
            AlarmId.TRIGGER_OVERRUN: self._overrun,
            AlarmId.DISK_LOW: self._archive_trouble(),
            AlarmId.OUTBOX_HIGH: f"{waiting_verdicts} wait" if waiting_verdicts > OUTBOX_HIGH else None,
            AlarmId.REJECT_RATE_HIGH: f"{rejects} of the last {OF_LAST}" if rejects >= REJECTS_HIGH else None,
            AlarmId.DRIFT: None if quality.drift in {"ok", "off"} else quality.drift,
            AlarmId.NOT_CALIBRATED: shortage(quality.calibration) or None,
        }
