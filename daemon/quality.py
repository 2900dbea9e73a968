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
        # Given the threshold, the scores below it are as those of good parts below it; its own score is not.
        if below := [score for score in calibration.scores if score < calibration.threshold]:
            self._watches[SCORE] = Watch(below, seed=0)
        for number, (name, values) in enumerate(looks.canaries.items() if looks else (), start=1):
            self._watches[name] = Watch(values, seed=number)
        if self._watches:
            self._drift = "ok"

    @property
    def calibration(self) -> Calibration:
        """What it is compared with."""
        return self._calibration

    @property
    def challenge(self) -> Challenge | None:
        """The challenge test, if there is one."""
        return self._challenge

    def is_challenge(self, part_id: str) -> bool:
        """Whether a part is one of the challenge test's."""
        return self._challenge is not None and self._challenge.recognises(part_id)

    def confirm(self, part_id: str, decision: Decision) -> Decision:
        """Refuse all parts but those of the challenge test while a failed one holds the station.

        What could not be judged keeps its own reason: it is rejected already, and a damaged file must be known as one.
        """
        if self._challenge is None or self.is_challenge(part_id) or decision.outcome is Outcome.ERROR:
            return decision
        now = datetime.now(UTC)
        if not self._challenge.holding(now):
            return decision
        detail = f"the challenge test failed: {self._challenge.status(now).detail}"
        return refuse(Reason.CHALLENGE_FAILED, detail, self._calibration)

    def conclude(self, part_id: str, decision: Decision) -> None:
        """Take note of the decision on a challenge part; of others nothing is noted."""
        if self._challenge is not None:
            self._challenge.conclude(part_id, decision.outcome, datetime.now(UTC))

    def begin_challenge(self) -> bool:
        """Let a run of the challenge test begin now; False where there is no such test."""
        if self._challenge is not None:
            self._challenge.begin(datetime.now(UTC))
        return self._challenge is not None

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
                alarming=alarming,
            )
        else:
            log.info("no watch alarms any more; that does not prove that the cause is gone", station=self._station)

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
