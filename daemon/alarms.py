"""What is wrong with a station, said once, until it is right again. Pure: conditions and a clock in, changes out.

A condition becomes an alarm when it has lasted for the alarm's on-delay, and the alarm ends when the condition has been
away for its off-delay: a contact that chatters is one alarm, not a hundred. The delays are those of ISA-18.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum

from ulid import ULID


class AlarmId(StrEnum):
    """All that may be wrong. Names are never reused."""

    CAMERA_OFFLINE = "CAMERA_OFFLINE"
    RECORD_BLOCKED = "RECORD_BLOCKED"
    INFERENCE_FAILED = "INFERENCE_FAILED"
    CHALLENGE_FAILED = "CHALLENGE_FAILED"
    TRIGGER_OVERRUN = "TRIGGER_OVERRUN"
    OUTBOX_HIGH = "OUTBOX_HIGH"
    REJECT_RATE_HIGH = "REJECT_RATE_HIGH"
    DRIFT = "DRIFT"
    CHALLENGE_DUE = "CHALLENGE_DUE"
    NOT_CALIBRATED = "NOT_CALIBRATED"
    VIEW_MISSING = "VIEW_MISSING"
    DISK_LOW = "DISK_LOW"
    AUDIT_BLOCKED = "AUDIT_BLOCKED"


@dataclass(frozen=True, slots=True)
class Definition:
    """What never changes of an alarm.

    Attributes:
        priority: 1, parts are not judged; 2, they are, but act now; 3, see to it this shift; 4, note it.
        text: what is wrong.
        advice: what the operator does.
        on_s: seconds that the condition must last.
        off_s: seconds that it must be away.
    """

    priority: int
    text: str
    advice: str
    on_s: float
    off_s: float


DEFINITIONS: Mapping[AlarmId, Definition] = {
    AlarmId.CAMERA_OFFLINE: Definition(
        1,
        "the camera or folder cannot be read",
        "Check its power, cable or mount; inspection goes on by itself.",
        on_s=5,
        off_s=5,
    ),
    AlarmId.RECORD_BLOCKED: Definition(
        1,
        "verdicts cannot be written to disk; the line is held",
        "Make room on the disk of state_dir or mend its rights; inspection goes on by itself.",
        on_s=2,
        off_s=5,
    ),
    AlarmId.INFERENCE_FAILED: Definition(
        1,
        "the detector fails; its parts are rejected",
        "Look for the first failure in the log; restart the service if it lasts.",
        on_s=0,
        off_s=60,
    ),
    AlarmId.CHALLENGE_FAILED: Definition(
        1,
        "the challenge test failed",
        "Mend the cause, then send the whole set through.",
        on_s=0,
        off_s=0,
    ),
    AlarmId.TRIGGER_OVERRUN: Definition(
        2,
        "a trigger came before the station was ready; its part is rejected",
        "Let the PLC wait for ready and acknowledge results, or slow the line down.",
        on_s=0,
        off_s=60,
    ),
    AlarmId.OUTBOX_HIGH: Definition(
        2,
        "many verdicts wait for the broker",
        "Check the network and the broker; nothing is lost while the disk has room.",
        on_s=10,
        off_s=30,
    ),
    AlarmId.REJECT_RATE_HIGH: Definition(
        2,
        "many of the last parts were rejected",
        "Look at the overlays: if the parts are good, check light, lens and position.",
        on_s=0,
        off_s=60,
    ),
    AlarmId.DRIFT: Definition(
        3,
        "parts or pictures are not as they were at calibration",
        "Look at what is named; if the change is to stay, calibrate again.",
        on_s=0,
        off_s=60,
    ),
    AlarmId.CHALLENGE_DUE: Definition(
        3,
        "the challenge test is due",
        "Send the whole set through.",
        on_s=0,
        off_s=0,
    ),
    AlarmId.NOT_CALIBRATED: Definition(
        3,
        "the calibration carries less than was asked for",
        "Calibrate again with more good parts.",
        on_s=0,
        off_s=0,
    ),
    AlarmId.VIEW_MISSING: Definition(
        2,
        "a view of a part is missing; the part is rejected",
        "Look at the station that is named: its camera, its triggers, its ids.",
        on_s=0,
        off_s=60,
    ),
    AlarmId.DISK_LOW: Definition(
        3,
        "images are not archived; parts are judged all the same",
        "Make room on the disk of [archive], or mend its mount and rights.",
        on_s=5,
        off_s=60,
    ),
    AlarmId.AUDIT_BLOCKED: Definition(
        2,
        "the audit trail cannot be written; the line runs all the same",
        "Mend the rights of audit.jsonl in state_dir or make room, before the service stops: events wait in memory.",
        on_s=2,
        off_s=5,
    ),
}
"""Every alarm there is."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One time that something is wrong.

    Attributes:
        id: what is wrong.
        instance: a ULID, the same from raising to clearing.
        detail: the newest words of its condition.
        since: when it was raised, UTC.
        count: how often the condition came, 1 at first.
    """

    id: AlarmId
    instance: str
    detail: str
    since: datetime
    count: int

    @property
    def definition(self) -> Definition:
        """What never changes of it."""
        return DEFINITIONS[self.id]


@dataclass(frozen=True, slots=True)
class Change:
    """An alarm that was raised, or cleared."""

    alarm: Alarm
    active: bool


@dataclass(frozen=True, slots=True)
class _Course:
    """How one alarm stands.

    `turned` is when the condition last came, while there is no alarm, or last went, while there is one; None while it
    is as the alarm says.
    """

    alarm: Alarm | None = None
    turned: float | None = None


class Alarms:
    """The alarms of one station. One thread updates; any may ask."""

    def __init__(self) -> None:
        self._courses: Mapping[AlarmId, _Course] = dict.fromkeys(AlarmId, _Course())

    def update(self, conditions: Mapping[AlarmId, str | None], now: float, at: datetime) -> list[Change]:
        """Tell what is wrong now, and learn which alarms that raises or clears.

        Delays pass only with updates, so call it every second or so.

        Args:
            conditions: words for what is wrong, which may be empty; None, or no entry, where nothing is.
            now: seconds of a monotonic clock.
            at: the same moment in UTC, for people.
        """
        steps = {id_: _step(id_, course, conditions.get(id_), now, at) for id_, course in self._courses.items()}
        # In one assignment, so that whoever asks meanwhile sees all as before or all as after.
        self._courses = {id_: after for id_, (after, _) in steps.items()}
        return [change for _, change in steps.values() if change is not None]

    def active(self) -> list[Alarm]:
        """What is wrong, the most urgent first and among those the oldest."""
        alarms = [course.alarm for course in self._courses.values() if course.alarm is not None]
        return sorted(alarms, key=lambda alarm: (alarm.definition.priority, alarm.since))


def _step(id_: AlarmId, course: _Course, detail: str | None, now: float, at: datetime) -> tuple[_Course, Change | None]:
    """How an alarm stands after one update, and whether that raised or cleared it."""
    if course.alarm is None:
        if detail is None:
            return _Course(), None
        came = now if course.turned is None else course.turned
        if now - came < DEFINITIONS[id_].on_s:
            return _Course(turned=came), None
        alarm = Alarm(id_, str(ULID.from_datetime(at)), detail, at, 1)
        return _Course(alarm), Change(alarm, active=True)
    if detail is not None:
        again = 0 if course.turned is None else 1
        return _Course(replace(course.alarm, detail=detail, count=course.alarm.count + again)), None
    went = now if course.turned is None else course.turned
    if now - went < DEFINITIONS[id_].off_s:
        return _Course(course.alarm, turned=went), None
    return _Course(), Change(course.alarm, active=False)
