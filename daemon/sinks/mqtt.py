"""MQTT, in two kinds of session: one per station for its record and its reject gate, one per node for pictures."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from threading import Event, Lock
from typing import Protocol

import structlog
from paho.mqtt.client import MQTTMessageInfo

from daemon import contract
from daemon.contract import Identity, Message
from daemon.link import GOODBYE_S, Broker, DeliveryError, Link
from daemon.outbox import Outbox, OutboxError
from daemon.pulse import Beat, unwatched
from daemon.requests import REQUEST, TRIGGER, Received
from daemon.sinks.delivery import Board, Carried, Delivery

BACKLOG = 4
"""Pictures that may wait for the socket."""
PICTURE_CONNECT_TIMEOUT_S = 2.0
REPLAY_RATE = 200
BACKOFF_S = (0.5, 30.0)
"""Seconds of the first and the longest pause before another attempt."""
PICTURE_RETRY_S = 5.0


class Commands(Protocol):
    """What obeys a station's commands, in the sink's thread, and answers by the function that it is given."""

    def obey(self, received: Received, send: Callable[[Message], None]) -> bool:
        """Obey one; True if all that is retained is to be shown anew."""

    def conclude(self, send: Callable[[Message], None]) -> None:
        """Answer those that have taken longer, now that they are done."""


log = structlog.get_logger()


class StationSink:
    """One station's session: presence, state, the record, the reject gate's message, and the commands.

    `broker` is asked anew before each connection, so that passwords and certificates may be replaced meanwhile; it may
    raise DeliveryError. Without `commands` nobody listens for any. `run` belongs to one thread; all else may come from
    any.
    """

    def __init__(
        self,
        broker: Callable[[], Broker],
        identity: Identity,
        outbox: Outbox,
        *,
        halted: Callable[[], Message],
        boards: Sequence[Board],
        commands: Commands | None,
        actuation_ttl_s: float,
        replay_rate: int = REPLAY_RATE,
        backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:
        self._broker = broker
        self._identity = identity
        self._outbox = outbox
        self._halted = halted
        self._boards = boards
        self._commands = commands
        self._ttl_s = actuation_ttl_s
        self._replay_rate = replay_rate
        self._backoff_s = backoff_s
        self._asked = () if commands is None else tuple(identity.topic(leaf) for leaf in (REQUEST, TRIGGER))
        self._carried = Carried()
        self._stale = Event()
        self._link: Link | None = None
        self._gate: list[tuple[MQTTMessageInfo, float]] = []
        self._gate_lock = Lock()
        self._gate_open = True
        self._said = ""
        self.actuations_dropped = 0

    @property
    def connected(self) -> bool:
        """Whether a broker is there."""
        return self._link is not None

    def actuate(self, message: Message) -> None:
        """Send to the reject gate now or never: without a live connection the message is dropped and counted.

        A connection that has not acknowledged an earlier one within its time to live counts as dead, so that a broker
        that wakes up does not find a queue of stale commands.
        """
        now = time.monotonic()
        with self._gate_lock:
            self._gate = [(receipt, sent) for receipt, sent in self._gate if not receipt.is_published()]
            stalled = any(now - sent > self._ttl_s for _, sent in self._gate)
            if self._link is not None and not stalled:
                with suppress(DeliveryError):
                    self._gate.append((self._link.publish(message), now))
                    self._gate_open = True
                    return
            self.actuations_dropped += 1
            first_of_outage, self._gate_open = self._gate_open, False
        if first_of_outage:
            log.warning("the gate cannot be told of parts; silence is a reject", station=self._identity.station)

    def notify(self) -> None:
        """Say that the outbox or the state has something new."""
        link = self._link
        if link is not None:
            link.wake()

    def reconnect(self) -> None:
        """Sign in anew, with what `broker` says by now; the gate hears nothing for a moment."""
        self._stale.set()
        self.notify()

    def run(self, stop: Event, drain_s: float, beat: Beat = unwatched) -> None:
        """Deliver until `stop`, then until the outbox is empty or `drain_s` is over.

        A lost broker is sought again as often as it takes, but not after `stop`: what is left waits in the outbox. What
        an earlier run has quarantined is tried again.
        """
        with suppress(OutboxError):  # a full disk, say; they wait for the next start
            self._outbox.release(self._identity.station)
        attempt = 0
        while True:
            beat()
            began = time.monotonic()
            try:
                self._use_connection(stop, drain_s, beat)
            except DeliveryError as error:
                self._complain(str(error))
                # A connection that is lost at once is no better than none, so only a long one starts from the shortest.
                attempt = attempt + 1 if time.monotonic() - began < self._backoff_s[1] else 1
                if stop.wait(self._pause_s(attempt, refused=error.refused)):
                    return
            else:
                if stop.is_set():
                    return

    def _use_connection(self, stop: Event, drain_s: float, beat: Beat) -> None:
        self._stale.clear()
        broker = self._broker()
        link = Link(broker, self._client_id, self._status(online=False, reason="lost"))
        self._said = ""
        log.info("connected to the broker", station=self._identity.station, broker=str(broker), protocol=link.protocol)
        try:
            with self._gate_lock:
                self._link = link
            delivery = Delivery(
                link,
                self._identity,
                self._outbox,
                self._carried,
                replay_rate=self._replay_rate,
                patience_s=2 * broker.keepalive_s,
            )
            try:
                self._deliver(delivery, stop, drain_s, beat)
            finally:
                delivery.break_off()
        except DeliveryError as error:
            raise DeliveryError(f"lost the broker {broker}: {error}", refused=error.refused) from error
        finally:
            with self._gate_lock:
                self._link, self._gate = None, []
            link.close()

    def _deliver(self, delivery: Delivery, stop: Event, drain_s: float, beat: Beat) -> None:
        """Use one connection until it is lost (DeliveryError), is to be made anew, or the work is done."""
        for topic in self._asked:
            delivery.link.subscribe(topic)
        delivery.show(self._boards)
        delivery.link.publish(self._status(online=True, reason="running"))
        leaving = True
        try:
            while not stop.is_set() or drain_s > 0:
                beat()
                began = time.monotonic()
                self._hear(delivery)
                delivery.send_record()
                delivery.show(self._boards)
                if stop.is_set() and delivery.complete:
                    break
                if self._stale.is_set() and not stop.is_set():
                    leaving = False
                    break
                delivery.settle()
                if stop.is_set():
                    drain_s -= time.monotonic() - began
        finally:
            with suppress(DeliveryError):
                if leaving:
                    self._say_goodbye(delivery)

    def _say_goodbye(self, delivery: Delivery) -> None:
        delivery.link.publish(self._halted())
        # Once this is acknowledged, no answer is on its way that could reset the closed connection: a reset makes the
        # broker publish the will.
        delivery.link.publish(self._status(online=False, reason="stopped")).wait_for_publish(GOODBYE_S)

    def _hear(self, delivery: Delivery) -> None:
        """Obey what has come; without commands the station inspects as ever."""
        for topic in delivery.link.take_denied():
            log.warning(
                "the broker lets no commands through; let the daemon's user read the station's cmd topics",
                station=self._identity.station,
                topic=topic,
            )
        if overflown := delivery.link.take_overflown():
            log.warning(
                "commands come faster than they are obeyed; these were not, and must be sent again",
                station=self._identity.station,
                count=overflown,
            )
        if self._commands is not None:
            self._obey(self._commands, delivery)

    def _obey(self, commands: Commands, delivery: Delivery) -> None:
        def send(message: Message) -> None:
            with suppress(DeliveryError):  # whoever asked hears nothing, and asks again under the same id
                delivery.link.publish(message)

        for received in delivery.link.take_received():
            # amqtt has been seen to deliver what others subscribed to
            if received.topic in self._asked and commands.obey(received, send):
                delivery.forget_boards()
        commands.conclude(send)

    @property
    def _client_id(self) -> str:
        return f"inspectd.{self._identity.node}.{self._identity.station}"  # names have no dots

    def _status(self, *, online: bool, reason: str) -> Message:
        return contract.encode_status(self._identity, online=online, reason=reason, at=datetime.now(UTC))

    def _complain(self, what: str) -> None:
        """Log a trouble once, not at every attempt."""
        if what != self._said:
            log.warning(what, station=self._identity.station, outbox=self._outbox.depth(self._identity.station))
        self._said = what

    def _pause_s(self, attempt: int, *, refused: bool) -> float:
        """Full jitter up to a doubling ceiling; a refusal waits for a person, so the longest."""
        shortest, longest = self._backoff_s
        ceiling = min(longest, shortest * 2 ** min(attempt, 16))  # after a night of attempts the power is no float
        return longest if refused else random.uniform(0, ceiling)  # noqa: S311 -- jitter


class PictureSink:
    """A node's session for pictures: QoS 0 and apart, so that no picture holds up or disconnects a verdict.

    One thread. Without a connection, or behind pictures that do not get away, a picture is dropped; a new connection
    is tried at most every `retry_s` seconds, with what `broker` says then, as of a station's.
    """

    def __init__(self, broker: Callable[[], Broker], node: str, *, retry_s: float = PICTURE_RETRY_S) -> None:
        self._broker = broker
        self._client_id = f"inspectd.{node}"
        self._retry_s = retry_s
        self._link: Link | None = None
        self._next_try = 0.0
        self._unsent: set[int] = set()
        self._stale = Event()
        self.dropped = 0

    def reconnect(self) -> None:
        """Sign in anew for the next picture. Any thread may call."""
        self._stale.set()

    def show(self, message: Message) -> None:
        """Send a picture, or drop and count it."""
        if self._link is not None and (self._link.lost is not None or self._stale.is_set()):
            self.close()
        self._stale.clear()
        if self._link is None and time.monotonic() >= self._next_try:
            with suppress(DeliveryError):  # the station's own session reports a broker that is away
                self._link = Link(self._broker(), self._client_id, timeout_s=PICTURE_CONNECT_TIMEOUT_S)
            self._next_try = time.monotonic() + self._retry_s
        if self._link is not None:
            self._unsent -= self._link.take_acknowledged(0)
            if len(self._unsent) < BACKLOG:
                with suppress(DeliveryError):
                    self._unsent.add(self._link.publish(message).mid)
                    return
        self.dropped += 1

    def close(self) -> None:
        """End the connection if there is one."""
        if self._link is not None:
            self._link.close()
            self._link = None
            self._unsent = set()
