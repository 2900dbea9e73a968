"""What happened, on its way into the record: events and alarms, which wait here while the disk refuses."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from threading import Lock

import structlog
from ulid import ULID

from daemon.alarms import Change
from daemon.announcements import Event, EventKind, encode_alarm, encode_event, encode_shift
from daemon.audit import Audit, AuditError, Fact
from daemon.contract import Identity, Message
from daemon.outbox import Outbox, OutboxError

WAITING = 10_000
"""Events that may wait for the audit trail; the oldest beyond that are lost."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Noted:
    """An event that is not in the audit trail yet."""

    identity: Identity
    event: Event
    user: str


class Journal:
    """Takes down what happened, in order. Any thread may call.

    No event is published before its entry in the audit trail is on the platter, and each carries that one's hash.
    Alarms have no entry, and wait for none.

    `told` is called with the name of each station that has something new in the outbox.
    """

    def __init__(self, outbox: Outbox, audit: Audit, told: Callable[[str], None]) -> None:
        self._outbox = outbox
        self._audit = audit
        self._told = told
        self._noted: deque[_Noted] = deque(maxlen=WAITING)
        self._lost = 0
        self._waiting: deque[tuple[Identity, Message]] = deque()
        self._delivering = Lock()
        self._complaint = ""

    @property
    def trouble(self) -> str | None:
        """Why events cannot be audited, and how many of them wait or were lost; None where nothing is wrong."""
        if not self._complaint:
            return None
        lost = f", {self._lost} are lost" if self._lost else ""
        return f"{len(self._noted)} events wait{lost}: {self._complaint}"

    def open(self) -> None:
        """Look at the audit trail, which takes seconds where it has 100,000 entries, so that no first event must.

        Whatever is wrong with it is only said: with the next event, or as `trouble`.
        """
        with self._delivering:
            try:
                self._audit.unsaid()
            except AuditError as error:
                self._complain(str(error))

    def note(self, identity: Identity, kind: EventKind, subject: str, detail: str, user: str = "") -> None:
        """Take down something for the audit, and who asked for it."""
        with self._delivering:
            if len(self._noted) == WAITING:
                if self._lost == 0:
                    log.error("no more events can wait to be audited; the oldest are lost", waiting=WAITING)
                self._lost += 1
            self._noted.append(_Noted(identity, _event(kind, subject, detail), user))
        self.deliver()

    def alarm(self, identity: Identity, change: Change) -> None:
        """Take down that an alarm was raised or cleared."""
        alarm = change.alarm
        log.warning("alarm", station=identity.station, alarm=alarm.id, active=change.active, detail=alarm.detail)
        self._waiting.append((identity, encode_alarm(identity, change, datetime.now(UTC))))
        self.deliver()

    def change_shift(self, identity: Identity, at: datetime) -> None:
        """Begin a new shift at a time in UTC, and tell the figures of the old one; not while the disk refuses."""
        try:
            self._outbox.close_shift(identity.station, at, partial(encode_shift, identity, "schedule"))
        except OutboxError as error:
            log.warning("the shift cannot be changed yet", station=identity.station, reason=str(error))
            return
        log.info("a new shift", station=identity.station)
        self._told(identity.station)

    def deliver(self) -> None:
        """Put into the audit trail and the outbox what they take."""
        with self._delivering:
            while self._noted and self._is_audited(self._noted[0]):
                self._noted.popleft()
            while self._waiting:
                identity, message = self._waiting[0]
                try:
                    self._outbox.tell(identity.station, message.topic.removeprefix(identity.topic("")), message.payload)
                except OutboxError:
                    return
                self._waiting.popleft()
                self._told(identity.station)

    def close(self) -> None:
        """Put away what can be, and say how much is lost, for it waits in memory alone. The last call."""
        self.deliver()
        with self._delivering:
            if self._complaint and (count := len(self._noted) + self._lost):
                log.error("events are lost: they could not be audited", count=count, reason=self._complaint)
            if self._waiting:
                log.error("events and alarms are lost: they could not be stored", count=len(self._waiting))

    def _is_audited(self, noted: _Noted) -> bool:
        """Enter an event into the trail, behind what must be said of that itself; False if it cannot be."""
        try:
            while wrong := self._audit.unsaid():
                kind, detail = wrong
                log.error("the audit trail is not as it was left; see docs/audit.md", what=detail)
                self._enter(_Noted(noted.identity, _event(EventKind(kind), "", detail), ""))
            self._enter(noted)
        except AuditError as error:
            self._complain(str(error))
            return False
        if self._complaint:
            log.warning("events are audited again", lost=self._lost)
        self._complaint, self._lost = "", 0
        return True

    def _complain(self, reason: str) -> None:
        if self._complaint != reason:
            log.error("events wait, for they cannot be audited", reason=reason)
        self._complaint = reason

    def _enter(self, noted: _Noted) -> None:
        identity, event = noted.identity, noted.event
        fact = Fact(event.at, identity.station, event.kind, event.subject, event.detail, noted.user, event.id)
        chained = replace(event, chain=self._audit.append(fact))
        self._waiting.append((identity, encode_event(identity, chained)))


def _event(kind: EventKind, subject: str, detail: str) -> Event:
    at = datetime.now(UTC)
    return Event(str(ULID.from_datetime(at)), kind, subject, detail, at)
