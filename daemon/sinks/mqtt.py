"""MQTT, in two kinds of session: one per station for its record and its reject gate, one per node for pictures."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from threading import Event, Lock

import structlog
from paho.mqtt.client import MQTTMessageInfo

from daemon import contract
from daemon.contract import Identity, Message, Quality, StationState
from daemon.outbox import Entry, Outbox, OutboxError
from daemon.sinks.link import GOODBYE_S, Broker, DeliveryError, Link

BACKLOG = 4
"""Pictures that may wait for the socket."""
PICTURE_CONNECT_TIMEOUT_S = 2.0
HEARTBEAT_S = 10.0
QUALITY_INTERVAL_S = 60.0
LAST_INTERVAL_S = 0.2
BACKOFF_S = (0.5, 30.0)
"""Seconds of the first and the longest pause before another attempt."""
PICTURE_RETRY_S = 5.0

log = structlog.get_logger()


class StationSink:
    """One station's session: presence, state, the record in order, and the reject gate's message.

    `run` belongs to one thread; `actuate` and `notify` may come from any.
    """

    def __init__(
        self,
        broker: Broker,
        identity: Identity,
        outbox: Outbox,
        *,
        state: Callable[[], StationState],
        quality: Callable[[], Quality],
        actuation_ttl_s: float,
        backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:
        self._broker = broker
        self._identity = identity
        self._outbox = outbox
        self._state = state
        self._quality = quality
        self._ttl_s = actuation_ttl_s
        self._backoff_s = backoff_s
        self._link: Link | None = None
        self._gate: list[tuple[MQTTMessageInfo, float]] = []
        self._gate_lock = Lock()
        self._gate_open = True
        self._said = ""
        self.actuations_dropped = 0

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

    def run(self, stop: Event, drain_s: float) -> None:
        """Deliver until `stop`, then until the outbox is empty or `drain_s` is over.

        A lost broker is sought again as often as it takes, but not after `stop`: what is left waits in the outbox.
        """
        attempt = 0
        while True:
            began = time.monotonic()
            try:
                self._use_connection(stop, drain_s)
            except DeliveryError as error:
                self._complain(str(error))
                # A connection that is lost at once is no better than none, so only a long one starts from the shortest.
                attempt = attempt + 1 if time.monotonic() - began < self._backoff_s[1] else 1
                if stop.wait(self._pause_s(attempt, refused=error.refused)):
                    return
            else:
                return

    def _use_connection(self, stop: Event, drain_s: float) -> None:
        link = Link(self._broker, self._client_id, self._status(online=False, reason="lost"))
        self._said = ""
        log.info(
            "connected to the broker", station=self._identity.station, broker=str(self._broker), protocol=link.protocol
        )
        try:
            with self._gate_lock:
                self._link = link
            delivery = _Delivery(link, self._identity, self._outbox, patience_s=2 * self._broker.keepalive_s)
            self._deliver(delivery, stop, drain_s)
        except DeliveryError as error:
            raise DeliveryError(f"lost the broker {self._broker}: {error}", refused=error.refused) from error
        finally:
            with self._gate_lock:
                self._link, self._gate = None, []
            link.close()

    def _deliver(self, delivery: "_Delivery", stop: Event, drain_s: float) -> None:
        """Use one connection until it is lost (DeliveryError) or the work is done."""
        delivery.tell(self._state())
        delivery.tell_quality(self._quality())
        delivery.link.publish(self._status(online=True, reason="running"))
        try:
            while not stop.is_set() or drain_s > 0:
                began = time.monotonic()
                delivery.send_record()
                delivery.tell(self._state())
                delivery.tell_quality(self._quality())
                if stop.is_set() and delivery.complete:
                    break
                delivery.settle(LAST_INTERVAL_S)
                if stop.is_set():
                    drain_s -= time.monotonic() - began
        finally:
            with suppress(DeliveryError):
                halted = replace(self._state(), state="Halted")
                delivery.link.publish(contract.encode_state(self._identity, halted, datetime.now(UTC)))
                # Once this is acknowledged, no answer is on its way that could reset the closed connection: a reset
                # makes the broker publish the will.
                delivery.link.publish(self._status(online=False, reason="stopped")).wait_for_publish(GOODBYE_S)

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
        return longest if refused else random.uniform(0, min(longest, shortest * 2**attempt))  # noqa: S311 -- jitter


class _Delivery:
    """What one connection has sent of a station's record and state, and what of it has arrived."""

    def __init__(self, link: Link, identity: Identity, outbox: Outbox, patience_s: float) -> None:
        self.link = link
        self._patience_s = patience_s
        self._identity = identity
        self._outbox = outbox
        self._in_flight: dict[int, int] = {}
        self._arrived: list[int] = []
        self._sent = 0
        self._late_until = outbox.last_seq(identity.station)
        self._newest: Entry | None = None
        self._last_at = self._told_at = -HEARTBEAT_S
        self._told: tuple[str, ...] = ()
        self._assured: tuple[object, ...] | None = None
        self._assured_at = 0.0
        self._heard_at = time.monotonic()

    @property
    def complete(self) -> bool:
        """Everything sent has arrived, and `last` shows the newest."""
        return not self._in_flight and self._newest is None

    def send_record(self) -> None:
        """Send what the outbox holds, in order, as far as the window allows; then `last`, at most 5 times a second."""
        room = self.link.window - len(self._in_flight)
        for entry in self._outbox.entries(self._identity.station, self._sent, room):
            payload = contract.as_replayed(entry.payload) if entry.seq <= self._late_until else entry.payload
            self._in_flight[self.link.publish(contract.record(self._identity, payload)).mid] = entry.seq
            self._sent = entry.seq
            self._newest = entry
        now = time.monotonic()
        if self._newest is not None and now - self._last_at >= LAST_INTERVAL_S:
            self.link.publish(contract.last(self._identity, self._newest.payload))
            self._newest, self._last_at = None, now

    def tell(self, state: StationState) -> None:
        """Publish the state if it changed, or as a heartbeat."""
        now = time.monotonic()
        essence = (state.state, state.camera, state.drift, state.challenge)
        if essence != self._told or now - self._told_at >= HEARTBEAT_S:
            self.link.publish(contract.encode_state(self._identity, state, datetime.now(UTC)))
            self._told, self._told_at = essence, now

    def tell_quality(self, quality: Quality) -> None:
        """Publish the quality if something began or ended, or once a minute."""
        now = time.monotonic()
        essence = (quality.challenge, *sorted(name for name, reading in quality.watches.items() if reading.alarm))
        if essence != self._assured or now - self._assured_at >= QUALITY_INTERVAL_S:
            self.link.publish(contract.encode_quality(self._identity, quality, datetime.now(UTC)))
            self._assured, self._assured_at = essence, now

    def settle(self, wait_s: float) -> None:
        """Wait a little for acknowledgements, and forget the verdicts that have arrived.

        Raises:
            DeliveryError: the connection is gone, or does not acknowledge.
        """
        acknowledged = self.link.take_acknowledged(wait_s)
        arrived = [self._in_flight.pop(mid) for mid in acknowledged if mid in self._in_flight]
        now = time.monotonic()
        if arrived or not self._in_flight:
            self._heard_at = now
        self._arrived += arrived
        if self._arrived:
            with suppress(OutboxError):  # a full disk, say; they are forgotten when it has room
                self._outbox.forget(self._identity.station, self._arrived)
                self._arrived = []
        self.link.check()
        if now - self._heard_at > self._patience_s:  # a broker may answer pings and still take nothing
            raise DeliveryError(f"it has acknowledged no verdict for {self._patience_s:.0f} s")


class PictureSink:
    """A node's session for pictures: QoS 0 and apart, so that no picture holds up or disconnects a verdict.

    One thread. Without a connection, or behind pictures that do not get away, a picture is dropped; a new connection
    is tried at most every `retry_s` seconds.
    """

    def __init__(self, broker: Broker, node: str, *, retry_s: float = PICTURE_RETRY_S) -> None:
        self._broker = broker
        self._client_id = f"inspectd.{node}"
        self._retry_s = retry_s
        self._link: Link | None = None
        self._next_try = 0.0
        self._unsent: set[int] = set()
        self.dropped = 0

    def show(self, message: Message) -> None:
        """Send a picture, or drop and count it."""
        if self._link is not None and self._link.lost is not None:
            self.close()
        if self._link is None and time.monotonic() >= self._next_try:
            with suppress(DeliveryError):  # the station's own session reports a broker that is away
                self._link = Link(self._broker, self._client_id, timeout_s=PICTURE_CONNECT_TIMEOUT_S)
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
