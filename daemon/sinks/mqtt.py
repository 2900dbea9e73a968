"""MQTT, in two kinds of session: one per station for its record and its reject gate, one per node for pictures.

A `Link` is one connection and never reconnects: when it is lost it is thrown away, together with paho's memory of
what was in flight. The only memory of the record is the outbox, so nothing stale is ever sent again behind our back
(an actuation message least of all), and a refused or half-dead client cannot poison the next one.
"""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Condition, Event, Lock

import structlog
from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from daemon import contract
from daemon.contract import Identity, Message, StationState
from daemon.outbox import Entry, Outbox, OutboxError

WINDOW = 12
"""Verdicts in flight at once: below the 20 that Mosquitto grants, so that actuation always has room."""
CONNECT_TIMEOUT_S = 5.0
HEARTBEAT_S = 10.0
LAST_INTERVAL_S = 0.2
BACKOFF_S = (0.5, 30.0)

log = structlog.get_logger()


class DeliveryError(Exception):
    """The broker is away or refuses us; `refused` says which. The message is for an operator."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True, slots=True, repr=False)
class Broker:
    """Where and as whom to connect. `protocol` is "auto" (5, then 3.1.1), "5" or "3.1.1"."""

    host: str
    port: int
    protocol: str = "auto"
    username: str | None = None
    password: str | None = None
    keepalive_s: int = 10

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Link:
    """One connection to a broker, from CONNACK to its loss. Any thread may publish."""

    def __init__(self, broker: Broker, client_id: str, will: Message | None = None) -> None:
        """Connect, and wait for the broker's answer.

        Raises:
            DeliveryError: no answer, or a refusal.
        """
        self._changed = Condition()
        self._answer: ReasonCode | None = None
        self._lost: str | None = None
        self._acknowledged: set[int] = set()
        versions = _VERSIONS[broker.protocol]
        for version in versions:
            self._v5 = version is MQTTProtocolVersion.MQTTv5
            self._client = self._make(broker, client_id, will, version)
            try:
                self._connect(broker)
            except DeliveryError:
                self._client.loop_stop()
                # A 3.1.1 broker answers MQTT 5 with "unsupported version", or closes the connection, or is silent.
                understood = self._answer is not None and self._answer.value not in _NOT_MQTT_5
                if understood or version is versions[-1]:
                    raise
                self._answer = self._lost = None
            else:
                return

    @property
    def lost(self) -> str | None:
        """Why the connection is gone, None while it stands."""
        return self._lost

    def publish(self, message: Message) -> int:
        """Hand a message to the socket; gives the number under which it will be acknowledged.

        Raises:
            DeliveryError: the connection is gone.
        """
        properties = Properties(PacketTypes.PUBLISH) if self._v5 else None  # type: ignore[no-untyped-call] # paho's
        if properties is not None:
            properties.ContentType = message.content_type
            if message.expires_s is not None:
                properties.MessageExpiryInterval = message.expires_s
        info: MQTTMessageInfo = self._client.publish(
            message.topic, message.payload, message.qos, message.retain, properties
        )
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise DeliveryError(self._lost or f"publishing on {message.topic} failed: {info.rc.name}")
        return info.mid

    def take_acknowledged(self, wait_s: float) -> set[int]:
        """Numbers acknowledged since the last call; waits a while for the first, `wake` or the loss ends the wait."""
        with self._changed:
            if not self._acknowledged and self._lost is None:
                self._changed.wait(wait_s)
            taken, self._acknowledged = self._acknowledged, set()
        return taken

    def wake(self) -> None:
        """End a wait in `take_acknowledged`."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Say goodbye (which cancels the will) and stop the network thread."""
        self._client.disconnect()
        self._client.loop_stop()

    def _make(self, broker: Broker, client_id: str, will: Message | None, version: MQTTProtocolVersion) -> Client:
        five = version is MQTTProtocolVersion.MQTTv5
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=None if five else True,
            protocol=version,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        if broker.username is not None:
            client.username_pw_set(broker.username, broker.password)
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        return client

    def _connect(self, broker: Broker) -> None:
        try:
            self._client.connect(broker.host, broker.port, broker.keepalive_s)
        except (OSError, ValueError) as error:
            raise DeliveryError(f"broker {broker} cannot be reached: {error}") from error
        self._client.loop_start()
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None or self._lost is not None, CONNECT_TIMEOUT_S)
        if self._answer is None:
            raise DeliveryError(f"broker {broker} did not answer as an MQTT broker does ({self._lost or 'silence'})")
        if self._answer.is_failure:
            user = f"user {broker.username!r}" if broker.username else "a client without a user name"
            raise DeliveryError(
                f"broker {broker} refused {user}: {self._answer}; check username and password_file in [mqtt] and the "
                "broker's own access list",
                refused=True,
            )

    def _on_connect(self, _: Client, __: object, ___: ConnectFlags, answer: ReasonCode, ____: object) -> None:
        with self._changed:
            self._answer = answer
            self._changed.notify_all()

    def _on_disconnect(self, _: Client, __: object, ___: DisconnectFlags, why: ReasonCode, ____: object) -> None:
        with self._changed:
            self._lost = str(why)
            self._changed.notify_all()

    def _on_publish(self, _: Client, __: object, mid: int, ___: ReasonCode, ____: object) -> None:
        with self._changed:
            self._acknowledged.add(mid)
            self._changed.notify_all()


_VERSIONS = {
    "auto": (MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311),
    "5": (MQTTProtocolVersion.MQTTv5,),
    "3.1.1": (MQTTProtocolVersion.MQTTv311,),
}
_NOT_MQTT_5 = (132, 1)  # unsupported protocol version, as MQTT 5 and as 3.1.1 number it


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
        actuation_ttl_s: float,
    ) -> None:
        self._broker = broker
        self._identity = identity
        self._outbox = outbox
        self._state = state
        self._ttl_s = actuation_ttl_s
        self._link: Link | None = None
        self._gate: dict[int, float] = {}
        self._gate_lock = Lock()
        self._said = ""
        self.actuations_dropped = 0

    def actuate(self, message: Message) -> None:
        """Send to the reject gate now or never: without a live connection the message is dropped and counted.

        A connection that has not acknowledged an earlier one within its time to live counts as dead, so that a broker
        that wakes up does not find a queue of stale commands.
        """
        link = self._link
        with self._gate_lock:  # held over the publication, so that its acknowledgement cannot overtake the entry
            stalled = any(time.monotonic() - sent > self._ttl_s for sent in self._gate.values())
            if link is not None and link.lost is None and not stalled:
                with suppress(DeliveryError):
                    self._gate[link.publish(message)] = time.monotonic()
                    return
        self.actuations_dropped += 1

    def notify(self) -> None:
        """Say that the outbox or the state has something new."""
        link = self._link
        if link is not None:
            link.wake()

    def run(self, stop: Event, drain_s: float) -> None:
        """Deliver until `stop`, then until the outbox is empty or `drain_s` is over; reconnect as often as it takes."""
        attempt = 0
        while True:
            try:
                link = Link(self._broker, self._client_id, self._status(online=False, reason="lost"))
            except DeliveryError as error:
                self._complain(str(error))
                attempt += 1
                if stop.wait(_backoff_s(attempt, refused=error.refused)):
                    return
                continue
            attempt = 0
            self._said = ""
            log.info("connected to the broker", station=self._identity.station, broker=str(self._broker))
            try:
                self._link = link
                self._deliver(_Delivery(link, self._identity, self._outbox), stop, drain_s)
            except DeliveryError as error:
                self._complain(f"lost the broker {self._broker}: {error}")
            else:
                return
            finally:
                self._link = None
                with self._gate_lock:
                    self._gate.clear()
                link.close()

    def _deliver(self, delivery: "_Delivery", stop: Event, drain_s: float) -> None:
        """Use one connection until it is lost (DeliveryError) or the work is done."""
        delivery.tell(self._state())
        delivery.link.publish(self._status(online=True, reason="running"))
        while not stop.is_set() or drain_s > 0:
            began = time.monotonic()
            delivery.send_record()
            delivery.tell(self._state())
            if stop.is_set() and delivery.complete:
                break
            acknowledged = delivery.settle(LAST_INTERVAL_S)
            with self._gate_lock:
                for mid in acknowledged:
                    self._gate.pop(mid, None)
            if stop.is_set():
                drain_s -= time.monotonic() - began
        delivery.link.publish(self._status(online=False, reason="stopped"))

    @property
    def _client_id(self) -> str:
        return f"inspectd-{self._identity.node}-{self._identity.station}"

    def _status(self, *, online: bool, reason: str) -> Message:
        return contract.encode_status(self._identity, online=online, reason=reason, at=datetime.now(UTC))

    def _complain(self, what: str) -> None:
        """Log a trouble once, not at every attempt."""
        if what != self._said:
            log.warning(what, station=self._identity.station, outbox=self._outbox.depth(self._identity.station))
        self._said = what


class _Delivery:
    """What one connection has sent of a station's record and state, and what of it has arrived."""

    def __init__(self, link: Link, identity: Identity, outbox: Outbox) -> None:
        self.link = link
        self._identity = identity
        self._outbox = outbox
        self._in_flight: dict[int, int] = {}
        self._arrived: list[int] = []
        self._sent = 0
        self._late_until = outbox.last_seq(identity.station)
        self._newest: Entry | None = None
        self._last_at = self._told_at = -HEARTBEAT_S
        self._told = ("", "")

    @property
    def complete(self) -> bool:
        """Everything sent has arrived, and `last` shows the newest."""
        return not self._in_flight and self._newest is None

    def send_record(self) -> None:
        """Send what the outbox holds, in order, as far as the window allows; then `last`, at most 5 times a second."""
        room = WINDOW - len(self._in_flight)
        for entry in self._outbox.entries(self._identity.station, self._sent, room):
            payload = contract.as_replayed(entry.payload) if entry.seq <= self._late_until else entry.payload
            self._in_flight[self.link.publish(contract.record(self._identity, payload))] = entry.seq
            self._sent = entry.seq
            self._newest = entry
        now = time.monotonic()
        if self._newest is not None and now - self._last_at >= LAST_INTERVAL_S:
            self.link.publish(contract.last(self._identity, self._newest.payload))
            self._newest, self._last_at = None, now

    def tell(self, state: StationState) -> None:
        """Publish the state if it changed, or as a heartbeat."""
        now = time.monotonic()
        essence = (state.state, state.camera)
        if essence != self._told or now - self._told_at >= HEARTBEAT_S:
            self.link.publish(contract.encode_state(self._identity, state, datetime.now(UTC)))
            self._told, self._told_at = essence, now

    def settle(self, wait_s: float) -> set[int]:
        """Wait a little for acknowledgements and forget the verdicts that have arrived; gives all their numbers."""
        acknowledged = self.link.take_acknowledged(wait_s)
        self._arrived += [self._in_flight.pop(mid) for mid in acknowledged if mid in self._in_flight]
        if self._arrived:
            with suppress(OutboxError):  # a full disk, say; they are forgotten when it has room
                self._outbox.forget(self._identity.station, self._arrived)
                self._arrived = []
        if self.link.lost is not None:
            raise DeliveryError(self.link.lost)
        return acknowledged


def _backoff_s(attempt: int, *, refused: bool) -> float:
    """Seconds before the next attempt: full jitter up to a doubling ceiling; a refusal waits for a person, 30 s."""
    shortest, longest = BACKOFF_S
    return longest if refused else random.uniform(0, min(longest, shortest * 2**attempt))  # noqa: S311 -- jitter


class PictureSink:
    """A node's session for pictures: QoS 0 and apart, so that no picture holds up or disconnects a verdict.

    One thread. Without a connection a picture is dropped, and a new connection is tried at most every 5 seconds.
    """

    def __init__(self, broker: Broker, node: str) -> None:
        self._broker = broker
        self._client_id = f"inspectd-{node}-bulk"
        self._link: Link | None = None
        self._next_try = 0.0
        self.dropped = 0

    def show(self, message: Message) -> None:
        """Send a picture, or drop and count it."""
        if self._link is not None and self._link.lost is not None:
            self.close()
        if self._link is None and time.monotonic() >= self._next_try:
            self._next_try = time.monotonic() + 5.0
            with suppress(DeliveryError):  # the station's own session reports a broker that is away
                self._link = Link(self._broker, self._client_id)
        if self._link is not None:
            with suppress(DeliveryError):
                self._link.publish(message)
                return
        self.dropped += 1

    def close(self) -> None:
        """End the connection if there is one."""
        if self._link is not None:
            self._link.close()
            self._link = None
