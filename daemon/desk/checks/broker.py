"""The broker: the files that lead to it, the way there, and what it lets the daemon do, each really tried."""

import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from config.credentials import read_credentials
from config.load import ConfigError
from config.schema import Mqtt, MqttSource, Settings, is_loopback
from daemon import link
from daemon.build import build_broker
from daemon.contract import Message
from daemon.desk.checks.finding import Finding, fail, ok, warn
from daemon.desk.checks.machine import runs
from daemon.link import DeliveryError
from daemon.requests import REQUEST, TRIGGER, Action

SOON_DAYS = 30
"""A certificate that expires within these is worth a new one."""
SLOW_MS = 100.0
"""From a message to its acknowledgement."""
PROBE = "doctor"
"""The leaf of a station that is written to, to see whether it may be."""

_CONNECT_S = 4.0
_ANSWER_S = 3.0
_ECHO_S = 0.7


def access(settings: Settings) -> Iterator[Finding]:
    """Where verdicts would go, how safely, and as whom; nothing that is secret."""
    mqtt = settings.mqtt
    try:
        read_credentials(mqtt)
    except ConfigError as error:
        for fault in str(error).splitlines():
            yield fail("mqtt", fault)
        return
    user = "without a user name" if mqtt.username is None else f"as user {mqtt.username}"
    if mqtt.tls is None:
        safe, how, cure = is_loopback(mqtt.host), "without TLS", "add a section [mqtt.tls]: all of it can be read"
    else:
        safe, how = mqtt.tls.verify_host_name, "by TLS"
        cure = "have a certificate made for the host, and take verify_host_name away"
        if mqtt.tls.certificate_file is not None:
            user += f", with the certificate {mqtt.tls.certificate_file}"
        if not safe:
            how += " without verifying its host name"
    found = f"broker {mqtt.host}:{mqtt.port} {how}, {user}"
    yield ok("mqtt", found) if safe else warn("mqtt", found, cure)


def broker(settings: Settings) -> Iterator[Finding]:
    """Go the whole way: name, port, TLS, account, limits, access list. The first that fails ends it."""
    mqtt = settings.mqtt
    try:
        account = build_broker(mqtt)()
    except (ConfigError, DeliveryError):
        return  # its files are at fault, and `access` has said so
    try:
        found = socket.getaddrinfo(mqtt.host, mqtt.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        cure = f"correct host in [mqtt], or see to the name server (getent hosts {mqtt.host})"
        yield fail("broker", f"{mqtt.host} has no address: {getattr(error, 'strerror', error)}", cure)
        return
    began = time.monotonic()
    try:
        connection = socket.create_connection((mqtt.host, mqtt.port), timeout=_CONNECT_S)
    except OSError as error:
        cure = "start the broker; see to host and port in [mqtt], to the broker's listener, and to a firewall"
        yield fail("broker", f"nothing answers on {account}: {error}", cure)
        return
    took = 1000 * (time.monotonic() - began)
    addresses = ", ".join(dict.fromkeys(str(address[4][0]) for address in found))
    named = "" if addresses == mqtt.host else f" ({addresses})"
    yield ok("broker", f"{mqtt.host}{named} answers on port {mqtt.port} in {took:.1f} ms")
    with connection:
        if account.tls is not None:
            yield from _certificate(connection, account.tls, mqtt.host)
    client_id = f"inspectd.{settings.node}.{PROBE}"
    began = time.monotonic()
    try:
        asking = _Asking(account, client_id, timeout_s=_CONNECT_S)
    except DeliveryError as error:
        yield fail("broker", error)
        return
    try:
        yield from _version(asking, mqtt, time.monotonic() - began)
        yield from _limits(asking, settings)
        yield from _access_list(asking, settings)
    except DeliveryError as error:
        cure = "some brokers do so to who writes where he may not; let the daemon's user write to its topics"
        yield fail("broker", f"it ended the connection: {error}", cure)
    finally:
        asking.close()


class _Asking(link.Link):
    """A connection that keeps what the broker said of itself when it was made."""

    _said: object = None

    def said(self, name: str, default: int) -> int:
        """A property of MQTT 5's answer to a connection, by its name without spaces."""
        value: int = getattr(self._said, name, default)
        return value

    def _on_connect(self, *answer: Any) -> None:
        self._said = answer[-1]
        super()._on_connect(*answer)


def _certificate(connection: socket.socket, tls: ssl.SSLContext, host: str) -> Iterator[Finding]:
    """How long the broker's certificate is good for; what keeps TLS from standing is said when signing in."""
    with suppress(OSError), tls.wrap_socket(connection, server_hostname=host) as secured:
        version = secured.version()
        ends = str((secured.getpeercert() or {}).get("notAfter", ""))
        days = int((ssl.cert_time_to_seconds(ends) - time.time()) / 86400)
        found = f"{version}; the broker's certificate is good for {days} days more, until {ends}"
        cure = "have a new one made, and let the broker read it"
        yield warn("broker", found, cure) if days < SOON_DAYS else ok("broker", found)


def _version(asking: _Asking, mqtt: Mqtt, took_s: float) -> Iterator[Finding]:
    user = f"user {mqtt.username}" if mqtt.username else "without a user name"
    found = f"signed in, {user}, by MQTT {asking.protocol}"
    if mqtt.protocol == "auto" and asking.protocol != "5" and took_s > _CONNECT_S:
        cure = 'set protocol = "3.1.1" in [mqtt]'
        yield warn("broker", f"{found}; to MQTT 5 it is silent, which costs {took_s:.0f} s a connection", cure)
    else:
        yield ok("broker", found)


def _limits(asking: _Asking, settings: Settings) -> Iterator[Finding]:
    """What the broker grants at all, by MQTT 5; by 3.1.1 it does not say."""
    if asking.protocol != "5":
        return
    asked, largest = settings.mqtt.max_packet_bytes, asking.said("MaximumPacketSize", 0)
    if largest and largest < asked:
        cure = f"set max_packet_bytes = {largest} in [mqtt], or raise the broker's limit (Mosquitto: max_packet_size)"
        yield fail("broker", f"it takes packets of {largest} bytes, and max_packet_bytes is {asked}", cure)
    else:
        yield ok("broker", f"packets of {asked} bytes fit; it {f'takes {largest}' if largest else 'names no limit'}")
    if not asking.said("RetainAvailable", 1):
        cure = "let it retain messages (Mosquitto: retain_available true)"
        yield fail("broker", "it retains nothing: who comes late sees no state, and no alarms", cure)
    if not asking.said("MaximumQoS", 2):
        yield fail(
            "broker", "it acknowledges nothing (QoS 0): verdicts would be lost", "use a broker that grants QoS 1"
        )
    shared = [s.name for s in settings.stations if isinstance(s.source, MqttSource) and s.source.group]
    if shared and not asking.said("SharedSubscriptionAvailable", 1):
        cure = "use another broker, or take group away"
        yield fail(f"station {shared[0]}", "the broker knows no shared subscriptions, and its source has a group", cure)


@dataclass(slots=True)
class _Trial:
    """Messages that are sent to see what becomes of them, each known by a token in it, and what came of them."""

    asking: _Asking
    token: str
    sent: dict[str, tuple[int, float]] = field(default_factory=dict)
    acknowledged: dict[int, float] = field(default_factory=dict)
    refused: dict[int, link.Refusal] = field(default_factory=dict)
    echoed: set[str] = field(default_factory=set)
    statuses: dict[str, dict[str, Any]] = field(default_factory=dict)

    def send(self, topic: str, content: dict[str, Any]) -> None:
        """Publish something that nobody keeps."""
        at = time.monotonic()
        receipt = self.asking.publish(Message(topic, json.dumps(content).encode(), expires_s=1))
        self.sent[topic] = receipt.mid, at

    def await_answers(self) -> None:
        """Until all that was sent is answered, and what might come back of it has had its time."""
        owed = {number for number, _ in self.sent.values()}
        until = time.monotonic() + _ANSWER_S
        while time.monotonic() < until and owed - self.acknowledged.keys() - self.refused.keys():
            self._listen()
        until = time.monotonic() + _ECHO_S
        while time.monotonic() < until:
            self._listen()

    def refusal(self, topic: str) -> str:
        """Why the broker refused what was sent there; "" if it did not, or, by MQTT 3.1.1, could not say so."""
        number, _ = self.sent.get(topic, (0, 0.0))
        return self.refused[number].reason if number in self.refused else ""

    def took_ms(self, topic: str) -> float | None:
        """Until it was acknowledged."""
        number, at = self.sent[topic]
        return 1000 * (self.acknowledged[number] - at) if number in self.acknowledged else None

    def _listen(self) -> None:
        acknowledged = self.asking.take_acknowledged(0.02)
        self.acknowledged |= dict.fromkeys(acknowledged, time.monotonic())
        self.refused |= self.asking.take_refused()
        for message in self.asking.take_received():
            if self.token.encode() in message.payload:
                self.echoed.add(message.topic)
            elif message.retained and message.topic.endswith("/status"):
                with suppress(ValueError):
                    self.statuses[message.topic] = dict(json.loads(message.payload))
        self.asking.check()


def _access_list(asking: _Asking, settings: Settings) -> Iterator[Finding]:
    """Write and listen where the daemon would. What is sent means nothing to anybody, and nothing of it stays."""
    runs_here, prefix = runs(settings.state_dir), settings.mqtt.topic_prefix
    stations = {f"station {station.name}": f"{prefix}/{station.name}" for station in settings.stations}
    places = stations | {f"group {group.name}": f"{prefix}/{group.name}" for group in settings.groups}
    for place in places.values():
        asking.subscribe(f"{place}/{PROBE}")
        asking.subscribe(f"{place}/status")
    for place in stations.values():
        asking.subscribe(f"{place}/{REQUEST}")
        asking.subscribe(f"{place}/{TRIGGER}")
    asking.await_subscriptions(_ANSWER_S)
    denied = set(asking.take_denied())

    trial = _Trial(asking, f"{PROBE}-{time.time_ns()}")
    for place in places.values():
        trial.send(f"{place}/{PROBE}", {PROBE: trial.token})
    trial.await_answers()
    # A question whose time is over; where a daemon may hear it, it is not asked.
    for place in stations.values():
        if not runs_here and not trial.statuses.get(f"{place}/status", {}).get("online"):
            question = {"cmd_id": trial.token, "action": Action.GET_STATE.value, "expires_ms": 0}
            trial.send(f"{place}/{REQUEST}", question)
    trial.await_answers()

    for subject, place in places.items():
        yield from _presence(subject, trial.statuses.get(f"{place}/status"), settings.node, runs_here=runs_here)
        yield _writing(subject, place, trial)
        if subject in stations:
            yield _commands(subject, place, trial, denied)
    yield from _images(asking, settings)


def _presence(subject: str, status: dict[str, Any] | None, node: str, *, runs_here: bool) -> Iterator[Finding]:
    """Whether somebody else speaks for a station; unknown where `status` may not be read."""
    if status is None:
        return
    online, other = bool(status.get("online")), str(status.get("node", ""))
    if online and other != node:
        cure = "give one of the two another topic_prefix or station name"
        yield fail(subject, f"the node {other} speaks for it on this broker already", cure)
    elif online and not runs_here:
        cure = "give each machine a node of its own; a daemon that was just killed is online for some seconds more"
        yield fail(subject, f"a daemon elsewhere is online under this machine's name, {node}", cure)
    elif runs_here and not online:
        cure = "see journalctl -u inspectd for what the broker says to it"
        yield warn(subject, "a daemon runs here, and is offline on this broker", cure)
    elif online:
        yield ok(subject, f"online, by the daemon that runs here as {node}")


def _writing(subject: str, place: str, trial: _Trial) -> Finding:
    topic, cure = f"{place}/{PROBE}", f"let the daemon's user write to {place}/# (docs/mqtt.md, Security)"
    if refusal := trial.refusal(topic):
        return fail(subject, f"the broker refuses what is published below {place}/: {refusal}", cure)
    took = trial.took_ms(topic)
    if took is None:
        return fail(subject, f"the broker does not acknowledge {topic} within {_ANSWER_S:g} s", "see to its load")
    if trial.asking.protocol != "5" and not trial.echoed & {topic, f"{place}/{REQUEST}"}:
        found = f"the broker took {topic}, but by MQTT 3.1.1 it does not say whether it threw it away"
        return warn(subject, found, f"let the daemon's user write to {place}/#, and read {topic} to have it tried")
    found = f"may write to {place}/#; acknowledged in {took:.1f} ms"
    if took > SLOW_MS:
        return warn(subject, found, "see to the network and the broker's load; the gate waits for it")
    return ok(subject, found)


def _commands(subject: str, place: str, trial: _Trial, denied: set[str]) -> Finding:
    asked = f"{place}/{REQUEST}"
    cure = f"let the daemon's user read {asked} and {place}/{TRIGGER} (docs/mqtt.md, Security)"
    if refused := sorted(denied & {asked, f"{place}/{TRIGGER}"}):
        return fail(subject, f"the broker refuses the subscription to {', '.join(refused)}", cure)
    if asked in trial.echoed:
        return ok(subject, f"hears commands on {asked}")
    if asked not in trial.sent:
        return ok(subject, "may subscribe to commands; whether they come is not tried while a daemon is online")
    found = f"what is published on {asked} does not come, though the subscription was granted"
    if trial.refusal(asked) or trial.asking.protocol != "5":  # it may have been stopped on its way there
        return warn(subject, f"whether commands come on {asked} cannot be tried by this user", cure)
    return fail(subject, found, cure)


def _images(asking: _Asking, settings: Settings) -> Iterator[Finding]:
    """Whether images may be subscribed to; without the group, whose images are another daemon's."""
    topics = {s.name: s.source.topic for s in settings.stations if isinstance(s.source, MqttSource)}
    for topic in topics.values():
        asking.subscribe(topic)
    asking.await_subscriptions(_ANSWER_S)
    denied = set(asking.take_denied())
    for name, topic in topics.items():
        if topic in denied:
            cure = f"let the daemon's user read {topic}"
            yield fail(f"station {name}", f"the broker refuses the subscription to {topic}", cure)
        else:
            yield ok(f"station {name}", f"may subscribe to {topic}; Mosquitto grants any, so send an image to be sure")
