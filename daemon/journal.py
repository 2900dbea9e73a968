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
        self._noted: deque[_Noted] = deque()
        self._waiting: deque[tuple[Identity, Message]] = deque()
        self._delivering = Lock()
        self._complaint = ""

    def note(self, identity: Identity, kind: EventKind, subject: str, detail: str, user: str = "") -> None:
        """Take down something for the audit, and who asked for it."""
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

    def _is_audited(self, noted: _Noted) -> bool:
        """Enter an event into the trail, behind what must be said of that itself; False if it cannot be."""
        try:
            while wrong := self._audit.unsaid():
                kind, detail = wrong
                log.error("the audit trail is not as it was left; see docs/audit.md", what=detail)
                self._enter(_Noted(noted.identity, _event(EventKind(kind), "", detail), ""))
            self._enter(noted)
        except AuditError as error:
            if self._complaint != str(error):
                log.error("events wait, for they cannot be audited", reason=str(error))  # noqa: TRY400 -- its text says all
            self._complaint = str(error)
            return False
        self._complaint = ""
        return True

    def _enter(self, noted: _Noted) -> None:
        identity, event = noted.identity, noted.event
        fact = Fact(event.at, identity.station, event.kind, event.subject, event.detail, noted.user, event.id)
        chained = replace(event, chain=self._audit.append(fact))
        self._waiting.append((identity, encode_event(identity, chained)))


def _event(kind: EventKind, subject: str, detail: str) -> Event:
    at = datetime.now(UTC)
    return Event(str(ULID.from_datetime(at)), kind, subject, detail, at)
