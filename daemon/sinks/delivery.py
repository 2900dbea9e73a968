"""What one connection sends of a station's record, state and quality, and what of it has arrived."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import takewhile

import structlog
from ulid import ULID

from daemon import contract
from daemon.announcements import Event, EventKind, encode_event
from daemon.contract import Identity, Message
from daemon.link import DeliveryError, Link
from daemon.messages import Reply
from daemon.outbox import Entry, Gap, Note, Outbox, OutboxError

LAST_INTERVAL_S = 0.2
CLOSED = 100
"""Topics on which nobody may be answered, of which it is said."""
GAP_INTERVAL_S = 10.0
"""Seconds from one event about dropped verdicts to the next."""
PATIENT_RETRY_S = 30.0
"""Seconds that a connection has stood when it is risked for a message that has already broken one alone."""
_UNKNOWN = 0
"""Stands for the number of a message that the connection broke under; MQTT counts from 1."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, eq=False)
class Board:
    """Something that is always to be seen of a station, told anew when its essence changes and every so often.

    `read` gives the essence, which is never None, and a function that makes the messages at a time in UTC. The first is
    called after every few verdicts, the second only when there is something to tell; both from the sink's thread.
    """

    read: Callable[[], tuple[object, Callable[[datetime], Sequence[Message]]]]
    every_s: float


@dataclass(slots=True)
class Carried:
    """What outlives a connection.

    `suspects` were in flight when one broke, or were refused; True says that one of them has already done so alone.
    `unshown` is the newest verdict that has arrived, if `last` does not show it yet. Of the topics in `closed` it was
    said that nobody may be answered there.
    """

    suspects: dict[Entry | Note, bool] = field(default_factory=dict)
    unshown: Entry | None = None
    closed: set[str] = field(default_factory=set)


class Delivery:
    """Sends what is new first, then what waited, at a bounded rate and with half of the window at most.

    A message that breaks the connection must not hold up those behind it, nor one that is innocent be put aside for a
    broken cable. So what was in flight at a break is suspect, and is sent again with nothing else in flight. What then
    breaks the connection, or is refused, once more is quarantined, provided that this connection has taken another
    verdict. Where it has not, the fault may be the broker's: the message is tried again after one, or in a while.

    Belongs to one thread.
    """

    def __init__(
        self,
        link: Link,
        identity: Identity,
        outbox: Outbox,
        carried: Carried,
        *,
        replay_rate: int,
        patience_s: float,
    ) -> None:
        self.link = link
        self._identity = identity
        self._outbox = outbox
        self._carried = carried
        self._replay_rate = replay_rate
        self._patience_s = patience_s
        self._in_flight: dict[int, Entry | Note] = {}
        self._arrived: list[Entry | Note] = []
        self._served = False
        self._late_until = self._sent = outbox.last_seq(identity.station)
        self._replayed = self._noted = 0
        self._behind = self._late_until > 0
        self._allowance = 1.0
        self._calm_since = self._allowed_at = self._heard_at = time.monotonic()
        self._last_at = -LAST_INTERVAL_S
        self._gap_at = -GAP_INTERVAL_S
        self._boards: dict[Board, tuple[object, float]] = {}
        self._too_large: set[str] = set()

    @property
    def complete(self) -> bool:
        """Everything that can be sent has arrived, and `last` shows the newest."""
        return not self._in_flight and not self._behind and self._carried.unshown is None

    def send_record(self) -> None:
        """Send what the outbox holds, as far as the window allows; then `last`, at most 5 times a second."""
        suspect = self._next_suspect()
        if suspect is None:
            self._tell_gap()
            self._send_new()
            self._send_late()
        elif not self._in_flight:
            self._send(suspect)
        now = time.monotonic()
        if self._carried.unshown is not None and now - self._last_at >= LAST_INTERVAL_S:
            self._offer(contract.last(self._identity, self._carried.unshown.payload))
            self._carried.unshown, self._last_at = None, now

    def show(self, boards: Sequence[Board]) -> None:
        """Publish what each board says, if its essence changed since this connection last did, or it is time."""
        now = time.monotonic()
        for board in boards:
            essence, encode = board.read()
            shown, at = self._boards.get(board, (None, -math.inf))
            if essence != shown or now - at >= board.every_s:
                for message in encode(datetime.now(UTC)):
                    self._offer(message)
                self._boards[board] = (essence, now)

    def forget_boards(self) -> None:
        """Let `show` publish every board anew."""
        self._boards = {}

    def settle(self) -> None:
        """Wait a little for acknowledgements, and forget what has arrived.

        Raises:
            DeliveryError: the connection is gone, or does not acknowledge.
        """
        acknowledged = self.link.take_acknowledged(self._pause_s)
        arrived = [self._in_flight.pop(mid) for mid in acknowledged if mid in self._in_flight]
        for message in arrived:
            self._carried.suspects.pop(message, None)
            if isinstance(message, Entry):
                self._served = True
                self._show(message)
        for mid, refusal in self.link.take_refused().items():
            refused = self._in_flight.get(mid)
            if refusal.forbidden and isinstance(refused, Note) and refused.reply is not None:
                arrived.append(self._in_flight.pop(mid))
                self._carried.suspects.pop(refused, None)
                self._complain_of_answer(refused.reply, refusal.reason)
            elif refusal.forbidden:
                self.link.refuse(refusal)
            elif refused is not None:
                self._suspect(self._in_flight.pop(mid), f"the broker refuses it: {refusal.reason}")
        now = time.monotonic()
        if arrived or not self._in_flight:
            self._heard_at = now
        self._arrived += arrived
        if self._arrived:
            with suppress(OutboxError):  # a full disk, say; they are forgotten when it has room
                self._outbox.forget(
                    self._identity.station,
                    [entry.seq for entry in self._arrived if isinstance(entry, Entry)],
                    [note.number for note in self._arrived if isinstance(note, Note)],
                )
                self._arrived = []
        self.link.check()
        if now - self._heard_at > self._patience_s:  # a broker may answer pings and still take nothing
            raise DeliveryError(f"it has acknowledged no verdict for {self._patience_s:.0f} s")

    def break_off(self) -> None:
        """Remember what may have broken the connection, if a message may have."""
        if not self.link.blames_a_message:
            return
        alone = len(self._in_flight) == 1
        for message in self._in_flight.values():
            if alone:
                self._suspect(message, "the connection breaks whenever it is sent")
            else:
                self._carried.suspects.setdefault(message, False)

    @property
    def _pause_s(self) -> float:
        if self._behind and self._allowance < 1:
            return min(LAST_INTERVAL_S, (1 - self._allowance) / self._replay_rate)
        return LAST_INTERVAL_S

    @property
    def _room(self) -> int:
        return self.link.window - len(self._in_flight)

    def _next_suspect(self) -> Entry | Note | None:
        """What is to be sent alone now; a message that has failed alone only when there is proof or patience."""
        again = self._served or time.monotonic() - self._calm_since >= PATIENT_RETRY_S
        for message, failed_alone in self._carried.suspects.items():
            if again or not failed_alone or message in self._in_flight.values():
                return message
        return None

    def _send_new(self) -> None:
        for entry in self._outbox.entries(self._identity.station, self._sent, self._room):
            self._sent = entry.seq
            self._send(entry)
        for note in self._outbox.notes(self._identity.station, self._noted, self._room):
            self._noted = note.number
            if note not in self._carried.suspects:
                self._send(note)

    def _send_late(self) -> None:
        now = time.monotonic()
        share = max(1, self.link.window // 2)
        self._allowance = min(share, self._allowance + (now - self._allowed_at) * self._replay_rate)
        self._allowed_at = now
        late = sum(isinstance(m, Entry) and m.seq <= self._late_until for m in self._in_flight.values())
        room = min(self._room, share - late, int(self._allowance))
        if not self._behind or room <= 0:
            return
        waiting = self._outbox.entries(self._identity.station, self._replayed, room)
        entries = list(takewhile(lambda entry: entry.seq <= self._late_until, waiting))
        self._behind = len(entries) == room
        for entry in entries:
            self._replayed = entry.seq
            if entry not in self._carried.suspects:
                self._allowance -= 1
                self._send(entry)

    def _send(self, message: Entry | Note) -> None:
        if isinstance(message, Note):
            reply = message.reply or Reply(self._identity.topic(message.leaf))
            publication = Message(reply.topic, message.payload, correlation=reply.correlation)
        else:
            late = message.seq <= self._late_until
            payload = contract.as_replayed(message.payload) if late else message.payload
            publication = contract.record(self._identity, payload)
        if not self.link.fits(publication):
            self._quarantine(message, "it is larger than the packets that the broker takes; raise its packet limit")
            return
        self.link.check()
        try:
            self._in_flight[self.link.publish(publication).mid] = message
        except DeliveryError:
            self._in_flight[_UNKNOWN] = message  # it may have left, and be the cause
            raise

    def _suspect(self, message: Entry | Note, why: str) -> None:
        """Take note of a message that failed alone or by name; the second time it is put aside, if that is just."""
        failed_before = message in self._carried.suspects
        self._carried.suspects[message] = failed_before
        self._calm_since = time.monotonic()
        if failed_before and self._served:
            self._quarantine(message, why)

    def _quarantine(self, message: Entry | Note, why: str) -> None:
        if isinstance(message, Entry):
            leaf, seq = "verdict", message.seq
            told = self._event(EventKind.QUARANTINED, message.id, why, seq, seq)
        else:  # an event about an event might share its fate
            leaf, seq, told = message.leaf, 0, b""
        try:
            self._outbox.quarantine(message, "event", told)
        except OutboxError:  # a full disk, say; it is met again
            self._served = False
            return
        self._carried.suspects.pop(message, None)
        log.warning(
            "a message that the broker does not take is put aside; it is tried again when inspectd starts anew",
            station=self._identity.station,
            reason=why,
            leaf=leaf,
            seq=seq,
            **({"id": message.id} if isinstance(message, Entry) else {}),
            quarantined=self._outbox.quarantined(self._identity.station),
        )

    def _complain_of_answer(self, reply: Reply, why: str) -> None:
        """Say once that nobody may be answered on a topic: that is no reason to hold up the record."""
        if reply.topic not in self._carried.closed and len(self._carried.closed) < CLOSED:
            self._carried.closed.add(reply.topic)
            log.warning(
                "the broker does not let us answer where an image asks for it; let the daemon's user write there",
                station=self._identity.station,
                topic=reply.topic,
                reason=why,
            )

    def _tell_gap(self) -> None:
        now = time.monotonic()
        if now - self._gap_at >= GAP_INTERVAL_S:
            with suppress(OutboxError):  # it goes on growing
                if self._outbox.tell_gap(self._identity.station, "event", self._encode_gap):
                    self._gap_at = now

    def _encode_gap(self, gap: Gap) -> bytes:
        why = f"the outbox was full: {gap.count} verdicts were dropped"
        log.warning(why, station=self._identity.station, first_seq=gap.first_seq, last_seq=gap.last_seq)
        return self._event(EventKind.GAP, "", why, gap.first_seq, gap.last_seq)

    def _event(self, kind: EventKind, subject: str, why: str, first_seq: int, last_seq: int) -> bytes:
        event = Event(str(ULID()), kind, subject, why, datetime.now(UTC), first_seq, last_seq)
        return encode_event(self._identity, event).payload

    def _show(self, entry: Entry) -> None:
        """Let `last` show a verdict that has arrived, unless a newer one is known: it never goes back."""
        newest = self._carried.unshown
        if entry.seq >= max(self._late_until, newest.seq if newest else 0):
            self._carried.unshown = entry

    def _offer(self, message: Message) -> None:
        """Publish what is retained, unless the broker takes nothing so large: it shall not cost the connection."""
        if self.link.fits(message):
            self.link.publish(message)
        elif message.topic not in self._too_large:
            self._too_large.add(message.topic)
            log.warning(
                "a message is larger than the packets that the broker takes; raise its packet limit",
                topic=message.topic,
                bytes=len(message.payload),
            )
