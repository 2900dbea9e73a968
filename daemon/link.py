"""One connection to an MQTT broker, from CONNACK to its loss.

A `Link` never reconnects: when it is lost it is thrown away, together with paho's memory of what was in flight. The
only memory of the record is the outbox, so nothing stale is ever sent again behind our back (an actuation message least
of all), and a refused or half-dead client cannot poison the next one.
"""

import socket
import ssl
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Condition
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from daemon.contract import Message
from daemon.requests import Received

WINDOW = 12
"""Verdicts in flight at once, where the broker grants as much."""
RESERVE = 8
"""Of what the broker grants in flight, this is left to actuation and state."""
CONNECT_TIMEOUT_S = 5.0
GOODBYE_S = 1.0
RECEIVED = 256
"""Messages that may wait to be taken; what comes beyond is let go of."""
_PACKET_HEAD = 64
"""More bytes than a PUBLISH packet has besides its topic and payload."""


class DeliveryError(Exception):
    """The broker is away or refuses us; `refused` says which. The message is for an operator."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


@dataclass(frozen=True, slots=True, repr=False)
class Broker:
    """Where and as whom to connect. `protocol` is "auto" (5, then 3.1.1), "5" or "3.1.1"; `tls` None is plain."""

    host: str
    port: int
    protocol: str = "auto"
    username: str | None = None
    password: str | None = None
    keepalive_s: int = 10
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Session:
    """What the broker shall keep for us while we are away, and how much it may send before we acknowledge any.

    After `expiry_s` seconds without us it forgets the session; `window` bounds messages. Both by MQTT 5 alone: by 3.1.1
    a session lasts, and the broker sends as much as it is set to.
    """

    expiry_s: int
    window: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message that the broker keeps until it is acknowledged by its `number`.

    `again`: it was sent before. `said` are its user properties. It came `at`, UTC, and at `seen_at` monotonic seconds.
    """

    received: Received
    number: int
    again: bool
    said: tuple[tuple[str, str], ...]
    at: datetime
    seen_at: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the broker did not take one message; `forbidden` if it does not let us write there."""

    reason: str
    forbidden: bool


class _TlsSocket(ssl.SSLSocket):
    """Is closed when the handshake fails, which paho leaves to the collector, and remembers why it was put off.

    By TLS 1.3 a broker refuses a client's certificate after the handshake, in what should have been its first answer.
    """

    refusal: str | None = None

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002 -- as inherited
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(buflen, flags)
        except ssl.SSLError as error:
            if error.reason and "ALERT" in error.reason:
                self.refusal = error.reason
            raise

    def send(self, data: Any, flags: int = 0) -> int:
        try:
            return super().send(data, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError:
            with suppress(OSError):  # what the broker said before it closed may still be unread
                self.recv(flags=flags)
            raise


class Link:
    """One connection to a broker, from CONNACK to its loss. Any thread may publish.

    `window` is how many verdicts may be in flight at once.
    """

    def __init__(
        self,
        broker: Broker,
        client_id: str,
        will: Message | None = None,
        *,
        session: Session | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Connect, and wait for the broker's answer.

        With a session, which goes on from the last connection of this client id, each message is `take_delivered` and
        is to be acknowledged. Without one, messages are `take_received`, and the broker forgets us when we go.

        Raises:
            DeliveryError: no answer within `timeout_s`, or a refusal.
        """
        self._changed = Condition()
        self._answer: ReasonCode | None = None
        self._lost: str | None = None
        self._refusal: str | None = None
        self._refused = self._woken = False
        self._acknowledged: set[int] = set()
        self._put_off: dict[int, Refusal] = {}
        self._session = session
        self._received: deque[Received] = deque()
        self._delivered: deque[Delivered] = deque()
        self._owed: dict[int, bool] = {}  # messages without our acknowledgement, in order; True once it may be sent
        self._overflown = 0
        self._subscribed: dict[int, str] = {}
        self._heard: set[int] = set()
        self._denied: list[int] = []
        self._blamed = False
        self.window = WINDOW
        self._largest: int | None = None
        versions = _VERSIONS[broker.protocol]
        for version in versions:
            self._v5 = version is MQTTProtocolVersion.MQTTv5
            self._client = self._make(broker, client_id, will, version)
            self._client.connect_timeout = timeout_s
            try:
                self._connect(broker)
            except (OSError, ValueError) as error:
                raise _unreached(broker, error) from error
            try:
                self._greet(broker, timeout_s)
            except DeliveryError:
                self.close()
                # A 3.1.1 broker answers MQTT 5 with "unsupported version", or closes the connection, or is silent.
                understood = self._answer is not None and self._answer.value not in _NOT_MQTT_5
                if understood or self._refusal is not None or version is versions[-1]:
                    raise
                self._answer = self._lost = None
            else:
                return

    @property
    def protocol(self) -> str:
        """The version spoken, "5" or "3.1.1"."""
        return "5" if self._v5 else "3.1.1"

    @property
    def lost(self) -> str | None:
        """Why the connection is gone, None while it stands."""
        return self._lost

    @property
    def blames_a_message(self) -> bool:
        """Whether the broker may have ended the connection for a message in flight."""
        return self._blamed

    def check(self) -> None:
        """See that the connection stands.

        Raises:
            DeliveryError: it is gone, or the broker does not let us write.
        """
        if self._lost is not None:
            raise DeliveryError(self._lost, refused=self._refused)

    def fits(self, message: Message) -> bool:
        """Whether the broker takes a packet of this size, as far as it has said."""
        return self._largest is None or _size(message) <= self._largest

    def publish(self, message: Message) -> MQTTMessageInfo:
        """Hand a message to the socket; the receipt has the number `mid` under which it will be acknowledged.

        Raises:
            DeliveryError: the connection is gone, or the broker takes no packet of this size.
        """
        self.check()
        if not self.fits(message):
            raise DeliveryError(
                f"a message on {message.topic} needs {_size(message)} bytes, and the broker takes {self._largest}; "
                "raise its packet limit"
            )
        properties = Properties(PacketTypes.PUBLISH) if self._v5 else None  # type: ignore[no-untyped-call] # paho's
        if properties is not None:
            properties.ContentType = message.content_type
            if message.expires_s is not None:
                properties.MessageExpiryInterval = message.expires_s
            if message.correlation is not None:
                properties.CorrelationData = message.correlation
        receipt = self._client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        if receipt.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise DeliveryError(self._lost or f"publishing on {message.topic} failed: {receipt.rc.name}")
        return receipt

    def subscribe(self, topic: str) -> None:
        """Ask for what is published on a topic, once at least, the retained too. What is published later comes later.

        With a session and MQTT 5, what is retained comes at the first subscription alone, and of what is published
        later it is not said whether it was to be retained.

        Raises:
            DeliveryError: the connection is gone.
        """
        self.check()
        if self._v5:
            lasting = self._session is not None
            options = SubscribeOptions(
                qos=1,
                retainAsPublished=not lasting,
                retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB if lasting else 0,
            )
            result, mid = self._client.subscribe(topic, options=options)
        else:
            result, mid = self._client.subscribe(topic, qos=1)
        if result != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise DeliveryError(self._lost or f"subscribing to {topic} failed: {result.name}")
        self._subscribed[mid] = topic

    def await_subscriptions(self, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Wait until the broker has said of each subscription whether it is granted.

        Raises:
            DeliveryError: the connection is gone, or the broker says nothing.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._subscribed.keys() <= self._heard or self._lost is not None, timeout_s)
            self.check()
            if not self._subscribed.keys() <= self._heard:
                raise DeliveryError("it does not answer a subscription")

    def take_denied(self) -> list[str]:
        """Topics that the broker has refused to let us hear since the last call."""
        with self._changed:
            denied = [self._subscribed.get(mid, "") for mid in self._denied]
            self._denied = []
        return denied

    def take_received(self) -> list[Received]:
        """What has come on subscribed topics since the last call, in order."""
        with self._changed:
            taken = list(self._received)
            self._received.clear()
        return taken

    def take_delivered(self, wait_s: float) -> list[Delivered]:
        """What has come in our session since the last call, in order; waits a while for the first, the loss ends it."""
        with self._changed:
            self._changed.wait_for(lambda: self._delivered or self._lost is not None, wait_s)
            taken = list(self._delivered)
            self._delivered.clear()
        return taken

    def acknowledge(self, number: int) -> None:
        """Let the broker forget a delivered message. One that came before it and is not acknowledged yet goes first.

        On a connection that is gone nothing happens: the broker delivers it again. Of QoS 0 it waits for nothing.
        """
        with self._changed:
            if number not in self._owed:
                return
            self._owed[number] = True
            ready = []
            for owed, may in self._owed.items():  # MQTT wants them in the order of what they answer
                if not may:
                    break
                ready.append(owed)
            for owed in ready:
                del self._owed[owed]
            # Within, so that no other thread's are sent between them; paho only queues them here.
            if self._lost is None:
                for owed in ready:
                    self._client.ack(owed, 1)

    def take_overflown(self) -> int:
        """How many messages have been let go of since the last call, for too many were waiting."""
        with self._changed:
            overflown, self._overflown = self._overflown, 0
        return overflown

    def take_acknowledged(self, wait_s: float) -> set[int]:
        """Numbers acknowledged since the last call; waits a while for the first, `wake` or the loss ends the wait."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._acknowledged or self._put_off or self._woken or self._lost is not None, wait_s
            )
            self._woken = False
            taken, self._acknowledged = self._acknowledged, set()
        return taken

    def take_refused(self) -> dict[int, Refusal]:
        """Numbers of messages that the broker refused for themselves since the last call, and why."""
        with self._changed:
            taken, self._put_off = self._put_off, {}
        return taken

    def refuse(self, refusal: Refusal) -> None:
        """Count the connection as lost, since the broker does not let us write where we must."""
        with self._changed:
            self._lost = (
                self._lost or f"it refuses a message: {refusal.reason}; let the user write to the station's topics"
            )
            self._refused = True
            self._changed.notify_all()

    def wake(self) -> None:
        """End a wait in `take_acknowledged`, this one or the next."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of the connection even if the broker does not listen.

        A sound one is ended with a goodbye, which cancels the will; of a refused one the will shall speak.
        """
        if self._lost is None and self._client.disconnect() == MQTTErrorCode.MQTT_ERR_SUCCESS:
            with self._changed:
                self._changed.wait_for(lambda: self._lost is not None, GOODBYE_S)
        connection = self._client.socket()
        if isinstance(connection, socket.socket):
            with suppress(OSError):
                # Not its own `shutdown`, which by TLS ends encryption first: another thread may be sending.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self._client.loop_stop()
        # Without the circle of references the sockets are closed now, not when garbage is next collected.
        self._client.on_connect = self._client.on_disconnect = self._client.on_publish = None
        self._client.on_message = self._client.on_subscribe = self._client.on_socket_close = None

    def _make(self, broker: Broker, client_id: str, will: Message | None, version: MQTTProtocolVersion) -> Client:
        five = version is MQTTProtocolVersion.MQTTv5
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=None if five else self._session is None,
            protocol=version,
            reconnect_on_failure=False,
            manual_ack=self._session is not None,
        )
        if broker.tls is not None:
            broker.tls.sslsocket_class = _TlsSocket
            client.tls_set_context(broker.tls)
        if broker.username is not None:
            client.username_pw_set(broker.username, broker.password)
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        client.on_socket_close = self._on_socket_close
        client.on_socket_open = _send_at_once
        return client

    def _connect(self, broker: Broker) -> None:
        if self._session is None or not self._v5:
            self._client.connect(broker.host, broker.port, broker.keepalive_s)
            return
        asked = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho's
        asked.SessionExpiryInterval = self._session.expiry_s
        asked.ReceiveMaximum = self._session.window
        self._client.connect(broker.host, broker.port, broker.keepalive_s, clean_start=False, properties=asked)

    def _greet(self, broker: Broker, timeout_s: float) -> None:
        self._client.loop_start()
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None or self._lost is not None, timeout_s)
        if self._refusal is not None:
            raise _put_off(broker, self._refusal)
        if self._answer is None:
            hint = "; if it expects TLS, add a section [mqtt.tls]" if broker.tls is None else ""
            raise DeliveryError(
                f"broker {broker} did not answer as an MQTT broker does ({self._lost or 'silence'}){hint}"
            )
        if self._answer.is_failure:
            user = f"user {broker.username!r}" if broker.username else "a client without a user name"
            raise DeliveryError(
                f"broker {broker} refused {user}: {self._answer}; check username and password_file in [mqtt] and the "
                "broker's own access list",
                refused=True,
            )

    def _on_connect(
        self, _: Client, __: object, ___: ConnectFlags, answer: ReasonCode, properties: Properties | None
    ) -> None:
        with self._changed:
            granted = getattr(properties, "ReceiveMaximum", WINDOW + RESERVE)
            self.window = max(1, min(WINDOW, granted - RESERVE))
            self._largest = getattr(properties, "MaximumPacketSize", None)
            self._answer = answer
            self._changed.notify_all()

    def _on_disconnect(self, _: Client, __: object, ___: DisconnectFlags, why: ReasonCode, ____: object) -> None:
        with self._changed:
            self._blamed = not self._refused and why.value in _FOR_A_MESSAGE
            self._lost = self._lost or ("the connection broke" if why == "Unspecified error" else str(why))
            self._changed.notify_all()

    def _on_socket_close(self, _: Client, __: object, closing: object) -> None:
        if isinstance(closing, _TlsSocket):
            self._refusal = closing.refusal

    def _on_message(self, _: Client, __: object, message: MQTTMessage) -> None:
        asked = message.properties
        reply_to, correlation = (getattr(asked, name, None) for name in ("ResponseTopic", "CorrelationData"))
        received = Received(message.topic, bytes(message.payload), message.retain, reply_to, correlation)
        with self._changed:
            if self._session is not None:
                said = tuple(getattr(asked, "UserProperty", ()))
                at, seen_at = datetime.now(UTC), time.monotonic()
                if message.qos > 0:
                    self._owed[message.mid] = False
                elif len(self._delivered) >= RECEIVED:  # such the broker does not hold back
                    self._overflown += 1
                    return
                self._delivered.append(Delivered(received, message.mid, message.dup, said, at, seen_at))
            elif len(self._received) < RECEIVED:
                self._received.append(received)
            else:
                self._overflown += 1
            self._woken = True
            self._changed.notify_all()

    def _on_subscribe(self, _: Client, __: object, mid: int, answers: list[ReasonCode], ___: object) -> None:
        with self._changed:
            self._heard.add(mid)
            if any(answer.is_failure for answer in answers):
                self._denied.append(mid)
                self._woken = True
            self._changed.notify_all()

    def _on_publish(self, _: Client, __: object, mid: int, answer: ReasonCode, ____: object) -> None:
        with self._changed:
            if answer.is_failure:
                self._put_off[mid] = Refusal(str(answer), answer.value == _NOT_AUTHORIZED)
            else:
                self._acknowledged.add(mid)
            self._changed.notify_all()


def _send_at_once(_: Client, __: object, connection: object) -> None:
    """Let no gate message wait for the acknowledgement of what was sent before it, some 40 ms on many systems."""
    if isinstance(connection, socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _size(message: Message) -> int:
    """Bytes of the packet, at the most."""
    return len(message.topic) + len(message.payload) + len(message.correlation or b"") + _PACKET_HEAD


def _unreached(broker: Broker, error: Exception) -> DeliveryError:
    """Why there is no connection, and the cure. What only a person can mend counts as a refusal."""
    match error:
        case ssl.SSLCertVerificationError():
            why = _DISTRUST.get(error.verify_code, _UNKNOWN_AUTHORITY)
            why = why.format(host=broker.host, reason=error.verify_message)
            return DeliveryError(f"broker {broker} is not trusted: {why}", refused=True)
        case ssl.SSLError():
            return _put_off(broker, error.reason or str(error))
        case ConnectionResetError() | BrokenPipeError() | TimeoutError() if broker.tls is not None:
            return _put_off(broker, str(error))
        case _:
            return DeliveryError(f"broker {broker} cannot be reached: {error}")


def _put_off(broker: Broker, reason: str) -> DeliveryError:
    """Why the broker does not go on with TLS, from what OpenSSL calls it, and the cure."""
    if "ALERT" in reason and any(word in reason for word in _CERTIFICATE_ALERTS):
        return DeliveryError(
            f"broker {broker} refuses the daemon's certificate, or that it shows none ({reason}); set certificate_file "
            "and key_file in [mqtt.tls] to a valid one from an authority that the broker trusts",
            refused=True,
        )
    if "PROTOCOL" in reason:
        return DeliveryError(
            f"broker {broker} speaks no version of TLS that is safe ({reason}); let it speak 1.2 or later", refused=True
        )
    return DeliveryError(
        f"broker {broker} cannot be reached by TLS ({reason}); see that port in [mqtt] is the one for TLS, mostly 8883"
    )


# By TLS 1.2 a missing certificate is a failed handshake and nothing more.
# One from an authority that has the name but not the key of the right one is an error of decryption.
_CERTIFICATE_ALERTS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "HANDSHAKE_FAILURE", "DECRYPT_ERROR")
_UNKNOWN_AUTHORITY = (
    "its certificate comes from no authority that this machine knows ({reason}); set ca_file in [mqtt.tls] to the "
    "certificate of the authority that signed it"
)
_OTHER_NAME = (
    "its certificate is not for {host} ({reason}); set host in [mqtt] to a name that the certificate has, or have one "
    "made for this name"
)
# By the numbers that OpenSSL gives to what is wrong with a certificate.
_DISTRUST = {
    9: "its certificate is not valid yet ({reason}); set the clocks of both machines",
    10: "its certificate has expired ({reason}); give the broker a new one, or set this machine's clock",
    62: _OTHER_NAME,
    64: _OTHER_NAME,
}

_VERSIONS = {
    "auto": (MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311),
    "5": (MQTTProtocolVersion.MQTTv5,),
    "3.1.1": (MQTTProtocolVersion.MQTTv311,),
}
_NOT_AUTHORIZED = 135
# Reasons to disconnect that a message may have given: unspecified (a connection closed without a word, too), malformed,
# protocol error, implementation specific, topic name, packet too large, quota, payload format. Not among them: the
# broker stops, is busy, heard nothing for long, or knows another client of this name.
_FOR_A_MESSAGE = (128, 129, 130, 131, 144, 149, 151, 153)
_NOT_MQTT_5 = (132, 1)  # unsupported protocol version, as MQTT 5 and as 3.1.1 number it
