"""What a station knows of itself: the content of its `state` message and of the service's status line."""

import time
from collections import Counter
from threading import Lock

import structlog

from daemon.contract import StationState
from daemon.messages import Outcome
from daemon.quality import StationQuality

log = structlog.get_logger()


class StationHealth:
    """Counters and conditions of one station. Any thread may report; any may ask."""

    def __init__(self, station: str, last_seq: int, quality: StationQuality) -> None:
        self.station = station
        self.quality = quality
        self._started = self._last_frame = time.monotonic()
        self._camera: bool | None = None
        self._record = True
        self._late = 0
        self._outcomes: Counter[Outcome] = Counter()
        self._last_seq = last_seq
        self._lock = Lock()

    def source_is(self, *, available: bool) -> None:
        """The camera or folder can, or cannot, be read."""
        self._camera = available

    def record_is(self, *, writable: bool) -> None:
        """Verdicts can, or cannot, be made durable."""
        self._record = writable

    def came_too_late(self) -> None:
        """A part was judged so long after it came that the gate was not told."""
        self._late += 1
        if self._late == 1 or self._late % 100 == 0:
            log.warning("the gate is not told of parts that came long ago", station=self.station, so_far=self._late)

    def frame_arrived(self) -> None:
        """A part was seen."""
        self._last_frame = time.monotonic()

    def concluded(self, seq: int, outcome: Outcome) -> None:
        """A part got its verdict."""
        with self._lock:
            self._outcomes[outcome] += 1
            self._last_seq = seq

    def state(self, waiting_verdicts: int) -> StationState:
        """The station's condition now."""
        now = time.monotonic()
        state = {None: "Preoperational", False: "Error", True: "ContinuousExecution"}[self._camera]
        if not self._record or self.quality.holds:
            state = "Error"
        quality = self.quality.report()
        return StationState(
            state=state,
            camera="online" if self._camera else "offline",
            drift=quality.drift,
            challenge=quality.challenge.status if quality.challenge else "off",
            last_frame_age_ms=int((now - self._last_frame) * 1000),
            mqtt_outbox=waiting_verdicts,
            last_seq=self._last_seq,
            uptime_s=int(now - self._started),
        )

    def summary(self) -> str:
        """One line for `systemctl status`."""
        with self._lock:
            counted = ", ".join(f"{self._outcomes[o]} {o.name}" for o in Outcome if self._outcomes[o]) or "no part yet"
        troubles = [
            *([] if self._camera else ["source offline"]),
            *([] if self._record else ["record cannot be written"]),
            *([f"{self._late} too late for the gate"] if self._late else []),
            *([f"{drift} drifts"] if (drift := self.quality.report().drift) not in {"ok", "off"} else []),
            *(["challenge test failed: others are rejected"] if self.quality.holds else []),
        ]
        return f"{self.station}: {counted}" + (f" ({', '.join(troubles)})" if troubles else "")
