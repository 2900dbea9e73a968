"""What happened, on its way into the record: events and alarms, which wait here while the disk refuses."""

from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Lock

import structlog
from ulid import ULID

from daemon.alarms import Change
from daemon.announcements import Event, EventKind, encode_alarm, encode_event
from daemon.contract import Identity, Message
from daemon.outbox import Outbox, OutboxError

log = structlog.get_logger()


class Journal:
    """Takes down what happened, in order. Any thread may call.

    `told` is called with the name of each station that has something new in the outbox.
    """

    def __init__(self, outbox: Outbox, told: Callable[[str], None]) -> None:
        self._outbox = outbox
        self._told = told
        self._waiting: deque[tuple[Identity, Message]] = deque()
        self._delivering = Lock()

    def note(self, identity: Identity, kind: EventKind, subject: str, detail: str) -> None:
        """Take down something for the audit."""
        at = datetime.now(UTC)
        event = Event(str(ULID.from_datetime(at)), kind, subject, detail, at)
        self._waiting.append((identity, encode_event(identity, event)))
        self.deliver()

    def alarm(self, identity: Identity, change: Change) -> None:
        """Take down that an alarm was raised or cleared."""
        alarm = change.alarm
        log.warning("alarm", station=identity.station, alarm=alarm.id, active=change.active, detail=alarm.detail)
        self._waiting.append((identity, encode_alarm(identity, change, datetime.now(UTC))))
        self.deliver()

    def deliver(self) -> None:
        """Put into the outbox what it takes."""
        with self._delivering:
            while self._waiting:
                identity, message = self._waiting[0]
                try:
                    self._outbox.tell(identity.station, message.topic.removeprefix(identity.topic("")), message.payload)
                except OutboxError:
                    return
                self._waiting.popleft()
                self._told(identity.station)
