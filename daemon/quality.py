"""Is a station still what its calibration was made for? Drift of scores and pictures, and the challenge test.

Alarms only: nothing here moves a threshold.
"""

from datetime import UTC, datetime
from threading import Lock

import structlog

from calibration.calibration import Calibration
from calibration.drift import Watch
from daemon import canaries
from daemon.challenge import Challenge
from daemon.contract import Quality
from daemon.judgement import refuse
from daemon.messages import Decision, Outcome, Reason
from detectors.base import Image

SCORE = "score"

log = structlog.get_logger()


class StationQuality:
    """The watches and the challenge test of one station. Any thread may call.

    Scores are watched of parts that pass: among good parts those are exchangeable with the calibration's scores up to
    the threshold, however many bad parts come between. Pictures are watched of all parts.
    """

    def __init__(self, station: str, calibration: Calibration, challenge: Challenge | None = None) -> None:
        self._station = station
        self._calibration = calibration
        self._challenge = challenge
        self._lock = Lock()
        self._drift = "off"
        self._watches: dict[str, Watch] = {}
        looks = calibration.appearance
        self._reference = None if looks is None else canaries.reference_of(looks)
        if passing := [score for score in calibration.scores if calibration.passes(score)]:
            self._watches[SCORE] = Watch(passing, seed=0)
        for number, (name, values) in enumerate(looks.canaries.items() if looks else (), start=1):
            self._watches[name] = Watch(values, seed=number)
        if self._watches:
            self._drift = "ok"

    def is_challenge(self, part_id: str) -> bool:
        """Whether a part is one of the challenge test's."""
        return self._challenge is not None and self._challenge.recognises(part_id)

    def confirm(self, part_id: str, decision: Decision) -> Decision:
        """Take note of a challenge part's decision; refuse all other parts while a failed test holds the station.

        What could not be judged keeps its own reason: it is rejected already, and a damaged file must be known as one.
        """
        if self._challenge is None:
            return decision
        now = datetime.now(UTC)
        if self.is_challenge(part_id):
            self._challenge.conclude(part_id, decision.outcome, now)
        elif decision.outcome is not Outcome.ERROR and self._challenge.holding(now):
            detail = f"the challenge test failed: {self._challenge.status(now).detail}"
            return refuse(Reason.CHALLENGE_FAILED, detail, self._calibration)
        return decision

    def observe(self, image: Image, decision: Decision) -> None:
        """Watch one measured part that is none of the challenge test's; a change is logged."""
        seen = None if self._reference is None else canaries.measure(image, self._reference)
        with self._lock:
            for name, watch in self._watches.items():
                if name != SCORE:
                    watch.update(getattr(seen, name))
                elif decision.outcome is Outcome.PASS and decision.score is not None:
                    watch.update(decision.score)
            readings = {name: watch.reading for name, watch in self._watches.items()}
            before, self._drift = self._drift, canaries.cause(readings) or ("ok" if readings else "off")
            drift = self._drift
        if drift == before:
            return
        alarming = {name: reading.direction for name, reading in readings.items() if reading.alarm}
        if alarming:
            log.warning(
                "parts or pictures are not as they were at calibration; no threshold was moved",
                station=self._station,
                drift=drift,
                **alarming,
            )
        else:
            log.info("parts and pictures are as at calibration again", station=self._station)

    def report(self) -> Quality:
        """How it stands now."""
        with self._lock:
            readings = {name: watch.reading for name, watch in self._watches.items()}
            drift = self._drift
        test = None if self._challenge is None else self._challenge.status(datetime.now(UTC))
        return Quality(self._calibration, drift, readings, test)

    @property
    def holds(self) -> bool:
        """Whether a failed challenge test takes the station out of Ready."""
        return self._challenge is not None and self._challenge.holding(datetime.now(UTC))
