"""The challenge test: known good and bad parts sent through once a shift, which must be judged rightly.

It proves that camera, light, model and threshold together still tell good from bad, which no calibration can.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import Literal

import structlog

from calibration.store import write_whole
from daemon.messages import Outcome

SCHEMA = "inspectd.challenge/1"

_UNSTEADY = timedelta(seconds=1)
"""How far apart the clocks of two threads, or a clock and itself after a small correction, may be."""

_NAMED = 3
"""How many missing parts are named to an operator; the others are counted."""

_WRONG = {
    Outcome.ERROR: "could not be judged",
    Outcome.PASS: "passed",
    Outcome.FAIL: "failed",
    Outcome.UNCERTAIN: "was uncertain",
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ChallengeSet:
    """The parts, by their ids, how often they are due, and in what time all must have come.

    There is at least one good and one bad part, and none is both.
    """

    name: str
    good: frozenset[str]
    bad: frozenset[str]
    every: timedelta
    within: timedelta

    @property
    def parts(self) -> frozenset[str]:
        """All part ids."""
        return self.good | self.bad

    @property
    def fingerprint(self) -> str:
        """Name and parts as a SHA-256; when they are due is no matter of what was proven."""
        definition = json.dumps([self.name, sorted(self.good), sorted(self.bad)])
        return hashlib.sha256(definition.encode()).hexdigest()

    def fault(self, part_id: str, outcome: Outcome) -> str:
        """What is wrong with the outcome of a part of the set, in words; empty if it is right.

        A good part must pass. A bad one must be rejected for what is seen on it, so that an error is wrong for both.
        """
        kind, right = ("good", {Outcome.PASS}) if part_id in self.good else ("bad", {Outcome.FAIL, Outcome.UNCERTAIN})
        return "" if outcome in right else f"{part_id} ({kind}) {_WRONG[outcome]}"


@dataclass(frozen=True, slots=True)
class ChallengeStatus:
    """How the test stands at one moment; times are UTC.

    Attributes:
        status: "failed" from the first wrong outcome until the whole set passes; else "due" or "ok".
        last_passed: when the whole set last passed; None if never, or if that is not known.
        next_due: until when that pass counts; None if the test is due at once.
        passed: parts that were right in the present run; between runs all if `status` is "ok", else 0.
        expected: parts of the set.
        detail: why, and what is to be done, for an operator; empty if there is nothing to say.
    """

    status: Literal["ok", "due", "failed"]
    last_passed: datetime | None
    next_due: datetime | None
    passed: int
    expected: int
    detail: str


@dataclass(frozen=True, slots=True)
class _Result:
    """What outlives a restart."""

    last_passed: datetime | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class _Run:
    """The parts that were right so far."""

    started: datetime
    right: frozenset[str] = frozenset()


class Challenge:
    """The challenge test of one station. One thread concludes; any may ask.

    A run begins with any part of the set, goes in any order, and a part that was right may come again. Its result is
    kept in `challenge-STATION.json`, a run under way is not: after a restart the set is sent from the beginning.

    Args:
        parts: the set. If its name or parts are others than those of the result that was kept, the test is due.
        station: the station's name.
        state_dir: the folder for the result; it exists.
        holds_station: whether a failed test takes the station out of Ready.
    """

    def __init__(self, parts: ChallengeSet, station: str, state_dir: Path, *, holds_station: bool) -> None:
        self._set = parts
        self._station = station
        self._path = state_dir / f"challenge-{station}.json"
        self._holds_station = holds_station
        self._run: _Run | None = None
        self._result, self._note = self._restored()
        self._kept = self._result
        self._lock = Lock()

    def recognises(self, part_id: str) -> bool:
        """Whether a part is one of the set."""
        return part_id in self._set.parts

    def begin(self, at: datetime) -> None:
        """Begin a run now, at a time in UTC, without the parts that came before."""
        with self._lock:
            self._age(at)
            self._run, self._note = _Run(at), ""

    def conclude(self, part_id: str, outcome: Outcome, at: datetime) -> None:
        """Take note of a verdict, decided at a time in UTC; of parts that are not in the set nothing is noted.

        A result that the disk refuses counts all the same, and is written with the next part of the set.
        """
        if not self.recognises(part_id):
            return
        fault = self._set.fault(part_id, outcome)
        passed = False
        with self._lock:
            self._age(at)
            if fault:
                self._result, self._run, self._note = replace(self._result, failure=fault), None, ""
            else:
                run = self._run or _Run(at)
                self._run = replace(run, right=run.right | {part_id})
                passed = self._run.right == self._set.parts
            if passed:
                self._result, self._run, self._note = _Result(last_passed=at), None, ""
        if fault:
            log.warning("the challenge test failed", station=self._station, set=self._set.name, reason=fault)
        if passed:
            log.info("the challenge test passed", station=self._station, set=self._set.name)
        self._keep()

    def status(self, at: datetime) -> ChallengeStatus:
        """How the test stands at a time in UTC, which is now."""
        with self._lock:
            self._age(at)
            result, run, note = self._result, self._run, self._note
        next_due = None if result.failure or result.last_passed is None else result.last_passed + self._set.every
        in_time = next_due is not None and at < next_due
        status: Literal["ok", "due", "failed"] = "failed" if result.failure else "ok" if in_time else "due"
        expected = len(self._set.parts)
        why = [result.failure, note]
        if status == "due" and not note:
            why.append("due again" if result.last_passed else "never passed")
        if run is not None:
            passed = len(run.right)
            why.append(f"{passed} of {expected} parts were right, to come: {self._to_come(run)}")
        else:
            passed = expected if status == "ok" else 0
            if status != "ok":
                why.append(f'send all {expected} parts of "{self._set.name}"')
        return ChallengeStatus(
            status=status,
            last_passed=result.last_passed,
            next_due=next_due,
            passed=passed,
            expected=expected,
            detail="; ".join(filter(None, why)),
        )

    def holding(self, at: datetime) -> bool:
        """Whether the station is out of Ready, so that every part that is not of the set is rejected."""
        return self._holds_station and self.status(at).status == "failed"

    def _age(self, at: datetime) -> None:
        """Let go of what time has undone, for good: once the clock is right again, it must not come back to life."""
        run, last_passed = self._run, self._result.last_passed
        # A clock that was set back makes a run's age as unknown as a long wait does.
        if run is not None and abs(at - run.started) > self._set.within:
            minutes = self._set.within / timedelta(minutes=1)
            came = f"{len(run.right)} of {len(self._set.parts)} parts came within {minutes:g} min"
            self._run, self._note = None, f"the run before was dropped: {came}"
        if last_passed is not None and last_passed - at > _UNSTEADY:
            self._result = replace(self._result, last_passed=None)
            self._note = "the clock was set back to before the last pass, which counts no more"

    def _to_come(self, run: _Run) -> str:
        missing = sorted(self._set.parts - run.right)
        others = len(missing) - _NAMED
        return ", ".join(missing[:_NAMED]) + (f" and {others} more" if others > 0 else "")

    def _keep(self) -> None:
        result = self._result
        if result == self._kept:
            return
        document = {
            "schema": SCHEMA,
            "set": self._set.name,
            "set_sha256": self._set.fingerprint,
            "last_passed": result.last_passed and result.last_passed.isoformat(),
            "failure": result.failure,
        }
        try:
            write_whole(self._path, (json.dumps(document, indent=1) + "\n").encode())
        except OSError as error:
            log.warning(
                "the result of the challenge test cannot be kept, and a restart would forget it; see to the disk",
                station=self._station,
                reason=str(error),
            )
        else:
            self._kept = result

    def _restored(self) -> tuple[_Result, str]:
        """The result that was kept and, if it cannot be used, why.

        A failed test that may hold the station is not lifted by a damaged file or another set, only by a pass.
        """
        try:
            proven, result = _parse(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return _Result(), ""
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            log.warning(
                "the result of the last challenge test cannot be read; the test is due",
                station=self._station,
                file=str(self._path),
                reason=f"{type(error).__name__}: {error}",
            )
            unknown = "the result of the last test cannot be read"
            return _Result(failure=unknown if self._holds_station else ""), unknown * (not self._holds_station)
        if proven != self._set.fingerprint:
            return _Result(failure=result.failure), "the set is another one than that of the last test"
        return result, ""


def _parse(text: str) -> tuple[str, _Result]:
    """The fingerprint of a set, and its result.

    Raises:
        ValueError: the text is torn, of an unknown version, or its time is not one in UTC.
        KeyError: a value is missing.
        TypeError: a value is of another type.
        RecursionError: the text is something else altogether.
    """
    document = json.loads(text)
    if document["schema"] != SCHEMA:
        raise ValueError(f"version {document['schema']!r} is unknown, {SCHEMA!r} is read here")
    last_passed, failure = document["last_passed"], document["failure"]
    at = None if last_passed is None else datetime.fromisoformat(last_passed)
    if at is not None and at.utcoffset() != timedelta():
        raise ValueError(f"last_passed is {last_passed}, which is not in UTC")
    if not isinstance(failure, str):
        raise TypeError(f"failure is {failure!r}, which is not text")
    return document["set_sha256"], _Result(at, failure)
