"""A connection's life: refused, silent, lost, replaced, ended; and secrets, names and clocks that change meanwhile."""

import gc
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from config.load import ConfigError, load
from daemon import contract, link
from daemon.build import build_broker
from daemon.link import DeliveryError, Link
from daemon.messages import Outcome
from daemon.outbox import Entry
from daemon.sinks.mqtt import PictureSink
from daemon.sources.folder.source import FolderSource
from tests.brokers import DEADLINE_S, HOST, PUBACK, ROOT, Broker, Cable, Subscriber, eventually, free_port
from tests.component.test_mqtt_security import NAME, Authority, serving
from tests.component.test_mqtt_sink import (
    IDENTITY,
    NEVER_S,
    QUIET_S,
    Station,
    actuation,
    nobody,
    numbers,
    picture,
    refusals,
    settings,
    station,
    statuses,
    verdict,
)

USER = "inspectd.edge7.top"
"""The client id of the station's session."""
OLD, NEW = "swordfish-of-spring", "swordfish-of-autumn"
HOUR_S = 3600
STOP_S = 22.0
"""What the service manager leaves to the sink of the 30 s for a stop, once it has had its 8 s for the record."""


def said(logs: list[Any], what: str) -> list[str]:
    return [entry["event"] for entry in logs if what in entry["event"]]


def complaints(logs: list[Any]) -> list[str]:
    return [entry["event"] for entry in logs if entry["log_level"] != "info"]


def logins(folder: Path) -> list[str]:
    """How Mosquitto let the station in, one line each."""
    return re.findall(f"New client connected from .* as {USER} .*", (folder / "mosquitto.log").read_text())


def connections(port: int) -> int:
    """How many TCP connections of this process to a port stand."""
    return sum(
        bool(c.raddr) and c.raddr.port == port and c.status == psutil.CONN_ESTABLISHED
        for c in psutil.Process().net_connections("tcp")
    )


def clients() -> list[str]:
    """The threads that serve the station's connections."""
    return [thread.name for thread in threading.enumerate() if thread.name.endswith(USER)]


@contextmanager
def answering(answer: bytes, *, close: bool = True) -> Iterator[int]:
    """A listener that says the same to everyone who says anything; gives its port."""

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(answer)
                while not close and self.request.recv(65536):
                    pass

    with ThreadingTCPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="listener", kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def silent() -> Iterator[int]:
    """A listener that takes connections and never says a word."""
    with socket.create_server((HOST, 0)) as listener:
        yield listener.getsockname()[1]


@contextmanager
def black_hole() -> Iterator[int]:
    """A port that leaves who knocks without any answer: its queue is full."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)  # noqa: FBT003 -- the library's signature
            one.connect_ex(address)
        try:
            yield address[1]
        finally:
            for one in waiting:
                one.close()


def failure(broker: link.Broker, *, timeout_s: float = 5.0) -> tuple[str, bool]:
    """What a connection that cannot be says, and whether it counts as a refusal."""
    try:
        Link(broker, USER, timeout_s=timeout_s).close()
    except DeliveryError as error:  # not by pytest.raises, whose memory of it would keep the sockets
        return str(error), error.refused
    pytest.fail(f"{broker} took the connection")


@pytest.fixture
def passwords(tmp_path: Path) -> Path:
    """A password file of Mosquitto, still empty."""
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    file = tmp_path / "passwords"
    file.touch(mode=0o600)
    return file


def put(file: Path, text: str) -> None:
    """Replace a file as a whole."""
    file.with_suffix(".new").write_text(text)
    file.with_suffix(".new").rename(file)


def admit(passwords: Path, password: str) -> None:
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "inspector", password], check=True)


# The first connection, and those that fail


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("refused port", "Connection refused"),
        ("black hole", "timed out"),
        ("silence", "silence"),
        ("web server", "did not answer as an MQTT broker does"),
        ("shell server", "did not answer as an MQTT broker does"),
        ("closed at once", "did not answer as an MQTT broker does"),
        ("half an answer", "did not answer as an MQTT broker does"),
        ("unknown name", "cannot be reached"),
        ("impossible name", "cannot be reached"),
    ],
)
def test_whatever_stands_at_the_address_the_failure_is_said_with_it_and_leaves_no_socket_and_no_thread(
    trouble: str, says: str
) -> None:
    host = {"unknown name": "no-such-broker.invalid", "impossible name": "x" * 64 + ".invalid"}.get(trouble, HOST)
    with (
        silent() as quiet,
        black_hole() as hole,
        answering(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n") as web,
        answering(b"SSH-2.0-OpenSSH_9.2p1\r\n", close=False) as shell,
        answering(b"") as closing,
        answering(b"\x20\x03", close=False) as halting,
    ):
        ports = {
            "black hole": hole,
            "silence": quiet,
            "web server": web,
            "shell server": shell,
            "closed at once": closing,
            "half an answer": halting,
        }
        broker = link.Broker(host, ports.get(trouble) or free_port())
        gc.collect()
        gc.disable()
        try:
            process = psutil.Process()
            before = process.num_fds(), threading.active_count(), connections(broker.port)
            for _ in range(2):
                told, refused = failure(broker, timeout_s=0.2)
                assert str(broker) in told
                assert says in told
                assert not refused
            eventually(
                lambda: (process.num_fds(), threading.active_count(), connections(broker.port)) == before,
                "the end of all that an attempt began, on the listener's side too",
            )
        finally:
            gc.enable()


def test_a_failed_first_connection_does_not_spoil_the_later_ones(
    tmp_path: Path, broker: Broker, cable_to: Callable[[Broker], Cable], subscribe: Callable[..., Subscriber]
) -> None:
    cable = cable_to(broker)
    cable.unplug()
    watching = subscribe(broker)
    with capture_logs() as logs, station(tmp_path, settings(broker, cable)) as working:
        working.keep(2)
        eventually(lambda: said(logs, "cannot be reached"), "the first failure")
        cable.plug()
        working.empty()
        watching.wait(lambda: numbers(watching.of("verdict")) == [1, 2], "the verdicts")
        assert len(clients()) == 1
    assert len(said(logs, "connected to the broker")) == 1
    assert len(complaints(logs)) == 1


@pytest.mark.parametrize("code", [0x80, 0x83, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8C, 0x90, 0x95, 0x97, 0x9C, 0x9F])
def test_a_refusal_by_mqtt_5_is_never_a_connection(code: int) -> None:
    with answering(bytes([0x20, 3, 0, code, 0])) as port:
        told, refused = failure(link.Broker(HOST, port))
        assert f"broker {HOST}:{port} refused" in told
        assert refused
        assert connections(port) == 0


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_a_refusal_by_mqtt_3_1_1_is_never_a_connection(code: int) -> None:
    with answering(bytes([0x20, 2, 0, code])) as port:
        told, refused = failure(link.Broker(HOST, port, "3.1.1"))
        assert f"broker {HOST}:{port} refused" in told
        assert refused
        assert connections(port) == 0


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_refused_station_says_so_once_tells_the_gate_nothing_and_comes_in_when_the_broker_is_mended(
    tmp_path: Path,
    mosquitto: Callable[..., Broker],
    passwords: Path,
    protocol: str,
) -> None:
    admit(passwords, NEW)
    broker = mosquitto(f"password_file {passwords}")
    account = settings(broker, username="inspector", password=OLD, protocol=protocol)
    with capture_logs() as logs, station(tmp_path, account) as working:
        working.keep(1)
        eventually(lambda: refusals(tmp_path) >= 3, "three attempts")
        working.sink.actuate(actuation(1))
        assert working.sink.actuations_dropped == 1
        assert said(logs, "connected to the broker") == []
        assert len(said(logs, "refused user 'inspector'")) == 1
        assert logins(tmp_path) == []
        admit(passwords, OLD)
        broker.reload()
        working.empty()
    assert len(said(logs, "connected to the broker")) == 1
    assert len(said(logs, "refused")) == 1


def test_a_refusal_waits_for_the_longest_pause_and_an_absence_for_a_short_one(
    tmp_path: Path, mosquitto: Callable[..., Broker], passwords: Path
) -> None:
    broker = mosquitto(f"password_file {passwords}")
    pauses = (0.001, NEVER_S[1])
    with capture_logs() as logs, station(tmp_path, settings(broker), backoff_s=pauses):
        eventually(lambda: said(logs, "refused a client without a user name"), "the refusal")
        threading.Event().wait(QUIET_S)
        assert refusals(tmp_path) == 1
    asked = 0

    def count() -> link.Broker:
        nonlocal asked
        asked += 1
        return nobody()

    with station(tmp_path, count, backoff_s=pauses):
        eventually(lambda: asked >= 4, "more attempts than one")


def test_attempts_go_on_through_a_weekend_without_a_broker(tmp_path: Path, mosquitto_or_amqtt: Broker) -> None:
    attempts = 0

    def count() -> link.Broker:
        nonlocal attempts
        attempts += 1
        if attempts <= 1100:  # two to this power is no float
            raise DeliveryError("nobody is there")
        return settings(mosquitto_or_amqtt)

    with capture_logs() as logs, station(tmp_path, count, backoff_s=(1e-5, 5e-3)) as working:
        working.keep(1)
        working.empty()
    assert complaints(logs) == ["nobody is there"]


def test_a_broker_that_ends_each_connection_at_once_is_not_asked_again_without_a_pause(tmp_path: Path) -> None:
    asked = 0

    def count() -> link.Broker:
        nonlocal asked
        asked += 1
        return link.Broker(HOST, port, "5")

    with answering(b"\x20\x03\0\0\0") as port, capture_logs() as logs:
        with station(tmp_path, count, backoff_s=(QUIET_S, DEADLINE_S)) as working:
            working.keep(1)
            eventually(lambda: asked >= 2, "two attempts")
            threading.Event().wait(QUIET_S)
        assert asked < 20
        assert working.outbox.quarantined("top") == 0
    assert said(logs, "lost the broker")


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        *(("port", bad) for bad in ("0", "-1", "65536", "1883.5", '"mqtt"', "true")),
        *(("keepalive_s", bad) for bad in ("0", "4", "-10", "3601", "2.5", "nan", "inf", '"10"')),
        *(("actuation_ttl_s", bad) for bad in ("0", "-1", "nan", "inf", "-inf", "1e9", '"2"')),
        *(("replay_rate", bad) for bad in ("0", "-1", "inf")),
    ],
)
def test_a_time_or_a_port_with_which_nothing_could_work_is_refused_before_a_thread_has_it(
    tmp_path: Path, option: str, bad: str
) -> None:
    with pytest.raises(ConfigError, match=option):
        load(configured(tmp_path, f"{option} = {bad}"), {})


# One connection at a time


def test_there_is_one_connection_of_a_name_however_often_it_breaks(
    tmp_path: Path, mosquitto: Callable[..., Broker], cable_to: Callable[[Broker], Cable]
) -> None:
    broker = mosquitto()
    cable = cable_to(broker)
    with station(tmp_path, settings(broker, cable), backoff_s=(0.001, 0.01)) as working:
        for count in range(1, 11):
            eventually(lambda: len(logins(tmp_path)) >= count, "a connection")  # noqa: B023 -- awaited here
            working.keep(1)
            cable.unplug()
            cable.plug()
        working.empty()
        eventually(lambda: connections(cable.port) == 1, "the connection")
        threading.Event().wait(QUIET_S)
        assert connections(cable.port) == 1
        assert len(clients()) == 1
    assert connections(cable.port) == 0
    assert clients() == []


def test_when_the_address_has_changed_the_new_broker_is_used_and_the_old_one_hears_nothing_more(
    tmp_path: Path, mosquitto: Callable[..., Broker], amqtt: Broker, cable_to: Callable[[Broker], Cable]
) -> None:
    old, new = cable_to(amqtt), mosquitto()
    addresses = [settings(amqtt, old), settings(new)]
    watching = Subscriber(new.port, "inspectd/#")
    with station(tmp_path, lambda: addresses[0]) as working:
        working.keep(1)
        working.empty()
        addresses.pop(0)
        old.unplug()
        old.plug()
        working.keep(2)
        working.empty()
        watching.wait(lambda: numbers(watching.of("verdict")) == [2, 3], "the verdicts at the new one")
        assert (connections(old.port), connections(new.port)) == (0, 2)  # the watcher's too
        assert len(clients()) == 1
    watching.close()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_user_name_is_sent_without_a_password(
    tmp_path: Path, mosquitto: Callable[..., Broker], protocol: str
) -> None:
    broker = mosquitto()
    with station(tmp_path, settings(broker, username="inspector", protocol=protocol)) as working:
        working.keep(1)
        working.empty()
    (login,) = logins(tmp_path)
    assert "u'inspector'" in login


# Answers that are late, and peers that are gone


def test_an_acknowledgement_that_is_late_is_waited_for_and_the_verdict_comes_once(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    with capture_logs() as logs, station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        broker.freeze()
        working.keep(3)
        threading.Event().wait(1.0)  # some waits for an acknowledgement long
        assert working.outbox.depth("top") == 3
        broker.thaw()
        working.empty()
        watching.wait(lambda: len(watching.of("verdict")) >= 3, "the verdicts")
        working.keep(1)
        working.empty()
    watching.wait(lambda: statuses(watching)[-1] == "stopped", "the end")
    assert numbers(watching.of("verdict")) == [1, 2, 3, 4]
    assert complaints(logs) == []


def test_a_verdict_of_unknown_fate_stays_and_comes_again_as_itself(
    tmp_path: Path, amqtt: Broker, cable_to: Callable[[Broker], Cable], subscribe: Callable[..., Subscriber]
) -> None:
    cable = cable_to(amqtt)
    watching = subscribe(amqtt)
    with station(tmp_path, settings(amqtt, cable)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        cable.deaf.add(PUBACK)
        working.keep(2)
        watching.wait(lambda: numbers(watching.of("verdict")) == [1, 2], "the verdicts")
        cable.unplug()
        assert working.outbox.depth("top") == 2
        cable.deaf.clear()
        cable.plug()
        working.empty()
        watching.wait(lambda: len(watching.of("verdict")) == 4, "them again")
    first, again = watching.of("verdict")[:2], watching.of("verdict")[2:]
    assert [message.content["replayed"] for message in first + again] == [False, False, True, True]
    assert [m.content | {"replayed": True} for m in first] == [message.content for message in again]


def test_a_broker_that_is_restarted_is_found_again_and_gets_each_verdict_once(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    with capture_logs() as logs, station(tmp_path, settings(broker)) as working:
        working.keep(3)
        working.empty()
        broker.stop()
        eventually(lambda: said(logs, "lost the broker"), "the loss")
        working.keep(3)
        broker.start()
        watching = subscribe(broker)
        working.empty()
        working.keep(1)
        working.empty()
        watching.wait(lambda: 7 in numbers(watching.of("verdict")), "the last verdict")
    came = numbers(watching.of("verdict"))  # the first may have come before anyone listened
    assert came == sorted(set(came) & {4, 5, 6, 7})
    assert len(said(logs, "connected to the broker")) == 2


@pytest.mark.parametrize("waiting", [0, 5])
def test_a_peer_that_vanished_without_a_word_is_noticed_within_two_keepalives_and_nothing_is_lost(
    tmp_path: Path,
    mosquitto: Callable[..., Broker],
    cable_to: Callable[[Broker], Cable],
    subscribe: Callable[..., Subscriber],
    waiting: int,
) -> None:
    broker, keepalive_s = mosquitto(), 2
    cable = cable_to(broker)
    watching = subscribe(broker)
    account = settings(broker, cable, keepalive_s=keepalive_s)
    with capture_logs() as logs, station(tmp_path, account) as working:
        working.keep(2)
        working.empty()
        cable.vanish()
        since = time.monotonic()
        working.keep(waiting)
        eventually(lambda: said(logs, "lost the broker"), "the loss")
        assert time.monotonic() - since < 2 * keepalive_s + 3  # it is looked for once a second, on a busy machine
        working.keep(1)
        working.empty()
        watching.wait(lambda: set(numbers(watching.of("verdict"))) == set(range(1, waiting + 4)), "all verdicts")
        assert working.outbox.quarantined("top") == 0


def test_a_broker_that_is_frozen_when_it_is_greeted_is_said_once_and_found_when_it_thaws(
    tmp_path: Path, mosquitto: Callable[..., Broker]
) -> None:
    broker = mosquitto()
    broker.freeze()
    with capture_logs() as logs, station(tmp_path, settings(broker, protocol="5")) as working:
        working.keep(1)
        eventually(lambda: said(logs, "did not answer as an MQTT broker does (silence)"), "the silence")
        broker.thaw()
        working.empty()
    assert len(complaints(logs)) == 1


@pytest.mark.parametrize("trouble", ["away", "black hole", "silent"])
def test_a_stop_does_not_wait_for_a_broker_that_never_answered(tmp_path: Path, trouble: str) -> None:
    with silent() as quiet, black_hole() as hole:
        port = {"silent": quiet, "black hole": hole}.get(trouble) or free_port()
        working = Station(tmp_path, link.Broker(HOST, port), drain_s=8.0)
        working.keep(3)
        threading.Event().wait(QUIET_S)  # it has begun to connect
        since = time.monotonic()
        working.stop()
        assert time.monotonic() - since < STOP_S
        assert working.outbox.depth("top") == 3
        working.close()


def test_an_end_that_is_asked_for_twice_is_one_end(broker: Broker) -> None:
    connection = Link(settings(broker), USER)
    connection.close()
    connection.close()
    assert connections(broker.port) == 0
    with pytest.raises(DeliveryError):
        connection.publish(actuation(1))


# Secrets that change


def configured(folder: Path, *lines: str, more: str = "") -> Path:
    """A configuration with some options of [mqtt]."""
    file = folder / "inspectd.toml"
    file.write_text(
        "\n".join(["[mqtt]", f'host = "{NAME}"', *lines, more])
        + '\n[[station]]\nname = "top"\nmodel = "m"\n[station.source]\ntype = "folder"\npath = "incoming"\n'
    )
    return file


def with_password(folder: Path, broker: Broker, password: str) -> tuple[Path, Callable[[], link.Broker]]:
    """The daemon's password file, and what a daemon makes of the configuration that names it."""
    file = folder / "mqtt_password"
    file.write_text(password)
    lines = (f"port = {broker.port}", 'username = "inspector"', 'password_file = "mqtt_password"')
    return file, build_broker(load(configured(folder, *lines), {}).mqtt)


def test_a_password_that_is_changed_on_both_sides_is_used_at_the_next_connection(
    tmp_path: Path, mosquitto: Callable[..., Broker], passwords: Path
) -> None:
    admit(passwords, OLD)
    broker = mosquitto(f"password_file {passwords}")
    file, account = with_password(tmp_path, broker, OLD)
    pictures = PictureSink(account, "edge7", retry_s=0.01)
    with capture_logs() as logs, station(tmp_path, account) as working:
        working.keep(1)
        working.empty()
        eventually(lambda: shown(pictures), "a picture by the old password")
        put(file, NEW)
        working.keep(1)
        working.empty()  # the connection that stands is left alone
        admit(passwords, NEW)
        broker.stop()
        broker.start()
        working.keep(1)
        working.empty()
        eventually(lambda: shown(pictures), "a picture by the new password")
    pictures.close()
    assert said(logs, "refused user") == []
    assert len(logins(tmp_path)) == 2
    assert OLD not in str(logs)
    assert NEW not in str(logs)


def test_a_station_that_is_to_sign_in_anew_uses_the_new_password_and_never_seems_away(
    tmp_path: Path, mosquitto: Callable[..., Broker], passwords: Path
) -> None:
    admit(passwords, OLD)
    broker = mosquitto(f"password_file {passwords}\nallow_anonymous true")
    file, account = with_password(tmp_path, broker, OLD)
    subscriber = Subscriber(broker.port, "inspectd/top/#")
    with station(tmp_path, account) as working:
        working.keep(1)
        working.empty()
        put(file, NEW)
        admit(passwords, NEW)
        broker.reload()
        working.sink.reconnect()
        subscriber.wait(lambda: len(subscriber.of("status")) >= 2, "the station to say again that it is there")
        working.keep(1)
        working.empty()
        assert {message.content["online"] for message in subscriber.of("status")} == {True}
        assert "Halted" not in {message.content["state"] for message in subscriber.of("state")}
    subscriber.close()
    assert len(logins(tmp_path)) == 2


def shown(pictures: PictureSink) -> bool:
    before = pictures.dropped
    pictures.show(picture(10))
    return pictures.dropped == before


def test_a_refused_station_comes_in_with_the_password_that_is_put_into_its_file(
    tmp_path: Path, mosquitto: Callable[..., Broker], passwords: Path
) -> None:
    admit(passwords, NEW)
    file, account = with_password(tmp_path, mosquitto(f"password_file {passwords}"), OLD)
    with capture_logs() as logs, station(tmp_path, account) as working:
        working.keep(1)
        eventually(lambda: refusals(tmp_path) >= 2, "two attempts")
        put(file, NEW)
        working.empty()
    assert len(said(logs, "refused user 'inspector'")) == 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda file: file.unlink(), "cannot be read (No such file or directory)"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "is not UTF-8 text"),
    ],
    ids=["away", "empty", "torn"],
)
def test_a_password_file_that_cannot_be_used_is_said_once_and_read_again_until_it_can(
    tmp_path: Path,
    mosquitto: Callable[..., Broker],
    passwords: Path,
    spoil: Callable[[Path], None],
    says: str,
) -> None:
    admit(passwords, OLD)
    broker = mosquitto(f"password_file {passwords}")
    file, account = with_password(tmp_path, broker, OLD)
    asked = 0

    def count() -> link.Broker:
        nonlocal asked
        asked += 1
        return account()

    spoil(file)
    with pytest.raises(ConfigError, match=re.escape(says)):
        build_broker(load(tmp_path / "inspectd.toml", {}).mqtt)
    with capture_logs() as logs, station(tmp_path, count) as working:
        working.keep(1)
        eventually(lambda: asked >= 3, "three attempts")
        put(file, OLD)
        working.empty()
    (complaint,) = complaints(logs)
    assert f"broker {NAME}:{broker.port}" in complaint
    assert str(file) in complaint
    assert says in complaint


def test_certificates_that_are_replaced_are_used_at_the_next_connection(
    tmp_path: Path, mosquitto: Callable[..., Broker]
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (apt-get install openssl)")
    old, new = Authority(tmp_path / "old").found(), Authority(tmp_path / "new").found()
    for authority in (old, new):
        authority.sign("broker", f"DNS:{NAME}")
        authority.sign("inspectd")
    serving_files = tmp_path / "serving"
    shutil.copytree(old.folder, serving_files)
    broker = mosquitto(*serving(Authority(serving_files)), "require_certificate true")
    own = tmp_path / "own"
    shutil.copytree(old.folder, own)
    tls = '[mqtt.tls]\nca_file = "own/ca.crt"\ncertificate_file = "own/inspectd.crt"\nkey_file = "own/inspectd.key"'
    account = build_broker(load(configured(tmp_path, f"port = {broker.port}", more=tls), {}).mqtt)
    with capture_logs() as logs, station(tmp_path, account) as working:
        working.keep(1)
        working.empty()
        broker.stop()
        shutil.copytree(new.folder, serving_files, dirs_exist_ok=True)
        broker.start()
        eventually(lambda: said(logs, "is not trusted"), "the distrust")
        shutil.copy(new.folder / "inspectd.key", own)  # a key before its certificate: torn
        eventually(lambda: said(logs, "is not the key of"), "the torn pair")
        shutil.copytree(new.folder, own, dirs_exist_ok=True)
        working.keep(1)
        working.empty()
    assert len(said(logs, "connected to the broker")) == 2


def test_at_the_start_a_wrong_secret_still_ends_the_daemon_with_78(tmp_path: Path) -> None:
    file = configured(tmp_path, 'username = "inspector"', 'password_file = "mqtt_password"')
    (tmp_path / "m").mkdir()
    (tmp_path / "incoming").mkdir()
    program = Path(sys.executable).with_name("inspectd")
    ended = subprocess.run(
        [program, "run", "--config", file], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == os.EX_CONFIG
    assert "mqtt_password: mqtt.password_file: cannot be read" in ended.stderr


# Names and clocks that change, in a process of their own


class Child:
    """A station in another process, told by a line how many parts to conclude."""

    def __init__(self, command: list[str], folder: Path, broker: link.Broker, environ: dict[str, str]) -> None:
        self._log = folder / "child.log"
        script = "from tests.component.test_mqtt_life_cycle import live; live()"
        place = [str(folder), broker.host, str(broker.port), broker.protocol, str(broker.keepalive_s)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, sys.executable, "-c", script, *place],
                cwd=ROOT,
                env=os.environ | environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
            )

    def keep(self, count: int) -> None:
        assert self._process.stdin is not None
        print(count, file=self._process.stdin, flush=True)

    def said(self, what: str) -> int:
        return self._log.read_text().count(what)

    def stop(self) -> None:
        """End it in order."""
        self._process.communicate(timeout=DEADLINE_S)
        assert self._process.returncode == 0, self._log.read_text()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


def live() -> None:
    """What the child does: claim parts from a folder, give them verdicts and deliver these until its input ends."""
    folder, host, port, protocol, keepalive_s = sys.argv[1:]
    incoming = Path(folder, "incoming")
    incoming.mkdir()
    working = Station(Path(folder), link.Broker(host, int(port), protocol, keepalive_s=int(keepalive_s)))
    source = FolderSource(
        "top", incoming, concluded=working.outbox.concluded, settle_ms=0, give_up_s=0.0, rescan_s=0.05
    )
    parts = (part for part in source.frames(threading.Event()) if part is not None)
    for line in sys.stdin:
        for _ in range(int(line)):
            seq = working.outbox.last_seq("top") + 1
            Path(incoming, ".part").write_text("no image")
            Path(incoming, ".part").rename(incoming / f"{seq}.png")
            capture = next(parts).capture
            now = replace(verdict(seq), capture=capture, decided_at=datetime.now(UTC))
            working.outbox.keep([Entry("top", seq, capture.id, contract.encode_verdict(IDENTITY, now), Outcome.ERROR)])
            working.sink.notify()
    working.close()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(command: list[str], broker: link.Broker, **environ: str) -> Child:
        children.append(Child(command, tmp_path, broker, environ))
        return children[-1]

    yield start
    for one in children:
        one.end()


def test_a_broker_whose_name_is_not_known_yet_is_found_when_it_is(
    tmp_path: Path,
    mosquitto_or_amqtt: Broker,
    subscribe: Callable[..., Subscriber],
    child: Callable[..., Child],
) -> None:
    broker = mosquitto_or_amqtt
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    hosts, resolver = tmp_path / "hosts", tmp_path / "resolv.conf"
    mount = f"mount --bind {hosts} /etc/hosts && mount --bind {resolver} /etc/resolv.conf && "
    hosts.touch()
    resolver.write_text(f"nameserver {HOST}\noptions timeout:1 attempts:1\n")  # where none listens
    if shutil.which("unshare") is None or subprocess.run([*alone, "sh", "-c", f"{mount}true"], check=False).returncode:
        pytest.skip("no mount namespace for a list of hosts of its own: run as root, or allow user namespaces")
    watching = subscribe(broker)
    account = settings(broker, keepalive_s=10)
    named = replace(account, host="broker.plant.test")
    working = child([*alone, "sh", "-c", f'{mount}exec "$@"', "sh"], named)
    working.keep(3)
    eventually(lambda: working.said("broker.plant.test"), "the failure")
    assert working.said("cannot be reached") == 1
    hosts.write_text(f"{HOST} broker.plant.test\n")
    watching.wait(lambda: numbers(watching.of("verdict")) == [1, 2, 3], "the verdicts")
    working.stop()
    assert working.said("cannot be reached") == 1


def test_a_clock_that_is_set_by_an_hour_either_way_disturbs_neither_delivery_nor_patience_nor_the_order_of_ids(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber], child: Callable[..., Child]
) -> None:
    (library, *_) = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None]
    if library is None:
        pytest.skip("libfaketime is not installed (apt-get install libfaketime)")
    clock = tmp_path / "clock"
    broker = mosquitto()
    watching = subscribe(broker)

    put(clock, "+0\n")
    working = child(
        [],
        settings(broker, keepalive_s=2),
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        DONT_FAKE_MONOTONIC="1",
    )
    began = time.time()
    for count, offset_s in enumerate((0, HOUR_S, -HOUR_S), 1):
        put(clock, f"{offset_s:+d}\n")
        working.keep(2)
        watching.wait(lambda: len(watching.of("verdict")) >= 2 * count, "the verdicts")  # noqa: B023 -- awaited here
        shown = watching.of("verdict")[-1].content["ts_ms"] / 1000 - began
        assert abs(shown - offset_s) < HOUR_S / 2, "the clock was not set"
    assert working.said("lost the broker") == 0
    broker.freeze()
    working.keep(2)
    eventually(lambda: working.said("lost the broker"), "its patience to end")
    broker.thaw()
    watching.wait(lambda: set(numbers(watching.of("verdict"))) == set(range(1, 9)), "the rest")
    working.stop()
    ids = {content["seq"]: content["id"] for content in (m.content for m in watching.of("verdict"))}
    assert [ids[seq] for seq in sorted(ids)] == sorted(ids.values())
