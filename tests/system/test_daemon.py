"""The daemon as its own process, between a real folder and a real broker."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from calibration import store
from daemon import images
from daemon.build import build_detector
from demo.parts import KINDS
from tests.brokers import Broker, Subscriber, eventually
from tests.system.conftest import Run, write_part


class Daemon:
    """`inspectd run` in a folder of its own, which a test may kill and start again."""

    def __init__(self, folder: Path, model: Path, port: int, more: str = "") -> None:
        self.folder = folder
        self.incoming = folder / "incoming"
        self.incoming.mkdir(exist_ok=True)
        self.log = folder / "daemon.log"
        self.config = folder / "inspectd.toml"
        self.config.write_text(
            f'[mqtt]\nhost = "127.0.0.1"\nport = {port}\n{more}\n'
            f'[[station]]\nname = "cam1"\nmodel = "{model}"\n[station.source]\ntype = "folder"\npath = "incoming"\n'
        )
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, environ: dict[str, str] | None = None) -> None:
        program = Path(sys.executable).with_name("inspectd")
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                [program, "run", "--config", self.config], stderr=log, env=os.environ | (environ or {})
            )

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self._child is not None
        self._child.send_signal(number)
        return self._child.wait(timeout=60)

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def broker(mosquitto_or_amqtt: Broker) -> Broker:
    return mosquitto_or_amqtt


@pytest.fixture
def daemon(tmp_path: Path, model: Path, broker: Broker) -> Iterator[Daemon]:
    made = Daemon(tmp_path, model, broker.port)
    yield made
    if made.alive:
        made.end(signal.SIGKILL)


def verdicts(subscriber: Subscriber) -> dict[str, dict[str, Any]]:
    return distinct([message.content for message in subscriber.of("verdict")])


def distinct(messages: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The record as a careful subscriber keeps it: by id, repeated ones once."""
    found: dict[str, dict[str, Any]] = {}
    for verdict in messages:
        earlier = found.setdefault(verdict["id"], verdict)
        assert earlier | {"replayed": None} == verdict | {"replayed": None}, "a repeated message differs"
    return found


def left_behind(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.is_file() and "done" not in p.parts and "failed" not in p.parts]


class Historian:
    """mosquitto_sub with a session of its own, so that it too misses nothing while the broker is down."""

    def __init__(self, broker: Broker, log: Path) -> None:
        session = [
            "mosquitto_sub",
            "-p",
            str(broker.port),
            "-c",
            "-i",
            "historian",
            "-q",
            "1",
            "-t",
            "inspectd/cam1/verdict",
        ]
        subprocess.run([*session, "-E"], check=True)  # the session exists from here on
        self._log = log
        with log.open("wb") as out:
            self._child = subprocess.Popen([*session, "-F", "%p"], stdout=out, stderr=subprocess.DEVNULL)

    def verdicts(self) -> dict[str, dict[str, Any]]:
        *whole, _ = self._log.read_text().split("\n")
        return distinct([json.loads(line) for line in whole])

    def close(self) -> None:
        self._child.terminate()
        self._child.wait(10)


def survive(daemon: Daemon, broker: Broker, drop: Callable[[int], None], count: int) -> dict[str, dict[str, Any]]:
    """Stop and start the broker twice and kill the daemon once while `count` parts come in; give their verdicts."""
    historian = Historian(broker, daemon.folder / "historian.log")
    quarter = count // 4
    try:
        daemon.start()
        eventually(lambda: '"ready"' in daemon.said(), "the daemon to be ready")
        drop(quarter)
        eventually(lambda: len(historian.verdicts()) > 5, "the first verdicts")
        broker.stop()
        drop(quarter)
        eventually(lambda: daemon.said().count('"event": "verdict"') > quarter + 5, "verdicts given without a broker")
        daemon.end(signal.SIGKILL)
        drop(quarter)
        broker.start()
        daemon.start()
        eventually(lambda: len(historian.verdicts()) > quarter + 5, "the verdicts from the outbox")
        broker.stop()
        drop(count - 3 * quarter)
        broker.start()
        eventually(lambda: len(historian.verdicts()) == count, f"all {count} verdicts")
        eventually(lambda: left_behind(daemon.incoming) == [], "all files to be put away")
        assert daemon.end() == 0
        assert len(historian.verdicts()) == count
    finally:
        historian.close()
    return historian.verdicts()


def assert_right(found: dict[str, dict[str, Any]], daemon: Daemon, model: Path) -> None:
    """Every verdict is what the model and its calibration say of that file, judged again here."""
    detector = build_detector(model, "cpu")
    calibration = store.load(model / "calibration.json", detector.fingerprint)
    for verdict in found.values():
        (file,) = daemon.incoming.rglob(f"{verdict['part_id']}.*")
        (prediction,) = detector.predict([images.read(file)])
        assert verdict["score_raw"] == pytest.approx(prediction.anomaly_score, rel=1e-4)
        assert verdict["threshold_raw"] == pytest.approx(calibration.threshold, rel=1e-5)
        assert verdict["reject"] == (verdict["score_raw"] > verdict["threshold_raw"])


def test_every_part_gets_its_right_verdict_though_broker_and_daemon_are_struck_down(
    tmp_path: Path, model: Path, mosquitto: Callable[..., Broker]
) -> None:
    broker = mosquitto("persistence true", f"persistence_location {tmp_path}/")
    daemon = Daemon(tmp_path, model, broker.port)
    kinds = {f"part{i:03d}": ("good", *KINDS)[i % 5] for i in range(60)}
    names = list(kinds)

    def drop(count: int) -> None:
        for _ in range(count):
            name = names.pop(0)
            write_part(daemon.incoming / f"{name}.png", 1000 + len(names), kinds[name])

    found = survive(daemon, broker, drop, len(kinds))
    assert sorted(v["part_id"] for v in found.values()) == sorted(kinds)
    assert sorted(v["seq"] for v in found.values()) == list(range(1, 61))
    assert_right(found, daemon, model)


@pytest.mark.long
@pytest.mark.skipif("INSPECTD_DATA" not in os.environ, reason="INSPECTD_DATA names no folder of real images")
def test_two_hundred_real_parts_survive_the_same(
    tmp_path: Path, inspectd: Run, mosquitto: Callable[..., Broker]
) -> None:
    screw = Path(os.environ["INSPECTD_DATA"], "mvtec_ad/screw")
    model = tmp_path / "model"
    # Hardly trained, it tells no screw from another: what is rejected are a third of all, which serves here.
    options = ["--size", "64", "--epochs", "2", "--alpha", "0.3"]
    done = inspectd("train", "--good", screw / "train/good", "--out", model, *options)
    assert done.returncode == 0, done.stderr
    files = dict(enumerate([*sorted((screw / "test").rglob("*.*")), *sorted((screw / "train/good").iterdir())][:200]))
    assert len(files) == 200
    broker = mosquitto("persistence true", f"persistence_location {tmp_path}/")
    daemon = Daemon(tmp_path, model, broker.port)

    def drop(count: int) -> None:
        for _ in range(count):
            number, file = files.popitem()
            shutil.copy(file, daemon.incoming / f"{number:03d}-{file.parent.name}{file.suffix}")

    found = survive(daemon, broker, drop, 200)
    assert sorted(v["seq"] for v in found.values()) == list(range(1, 201))
    assert {v["verdict"] for v in found.values()} == {"PASS", "FAIL"}
    assert_right(found, daemon, model)


def test_a_file_that_is_no_image_is_an_error_for_the_line_and_kept_with_its_reason(
    daemon: Daemon, broker: Broker
) -> None:
    text = daemon.config.read_text().replace("[mqtt]", "[mqtt]\nactuation_ttl_s = 100.0")
    daemon.config.write_text(text + "give_up_s = 0.5\n")
    with closing(Subscriber(broker.port, "inspectd/#")) as listener:
        daemon.start()
        (daemon.incoming / "torn.png").write_text("hello")
        (daemon.incoming / "empty.jpg").write_bytes(b"")
        eventually(lambda: len(verdicts(listener)) == 2, "two verdicts")
        gate = [m.content for m in listener.of("plc")]
        assert daemon.end() == 0
    assert {v["verdict"] for v in verdicts(listener).values()} == {"ERROR"}
    assert {v["reason"] for v in verdicts(listener).values()} == {"decode_failed"}
    assert all(v["reject"] for v in verdicts(listener).values())
    assert [(g["c"], g["r"]) for g in gate] == [(0, True)] * 2
    reasons = {p.name: p.read_text() for p in daemon.incoming.rglob("*.reason.txt")}
    assert "empty" in reasons["empty.jpg.reason.txt"]
    assert "not a PNG, JPEG, BMP or TIFF" in reasons["torn.png.reason.txt"]


def test_the_gate_hears_nothing_of_parts_that_came_long_ago_and_the_record_all(daemon: Daemon, broker: Broker) -> None:
    for seed in range(3):
        write_part(daemon.incoming / f"old{seed}.png", seed)
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace("[mqtt]", "[mqtt]\nactuation_ttl_s = 0.001"))
    with closing(Subscriber(broker.port, "inspectd/#")) as listener:
        daemon.start()
        eventually(lambda: len(verdicts(listener)) == 3, "three verdicts")
        assert daemon.end() == 0
    assert listener.of("plc") == []
    assert "the gate is not told of parts that came long ago" in daemon.said()


def test_a_missing_folder_is_shown_and_waited_for(daemon: Daemon, broker: Broker) -> None:
    daemon.incoming.rmdir()
    with closing(Subscriber(broker.port, "inspectd/#")) as listener:
        daemon.start()

        def state() -> dict[str, Any]:
            said = listener.of("state")
            return said[-1].content if said else {}

        eventually(lambda: state().get("state") == "Error", "the state Error")
        assert state()["camera"] == "offline"
        assert state()["ready"] is False
        assert f"mkdir -p {daemon.incoming}" in daemon.said()
        daemon.incoming.mkdir()
        eventually(lambda: state().get("camera") == "online", "the folder to be found")
        write_part(daemon.incoming / "first.png", 1)
        eventually(lambda: len(verdicts(listener)) == 1, "a verdict")
        assert daemon.end() == 0


def test_presence_and_pictures_reach_a_subscriber(daemon: Daemon, broker: Broker) -> None:
    daemon.config.write_text(daemon.config.read_text().replace("[mqtt]", '[mqtt]\noverlays = "all"'))
    with closing(Subscriber(broker.port, "inspectd/#")) as listener:
        daemon.start()
        write_part(daemon.incoming / "first.png", 1)
        eventually(lambda: bool(listener.of("image/overlay")), "an overlay")
        picture = listener.of("image/overlay")[0].payload
        (verdict,) = verdicts(listener).values()
        comment = re.search(rb'\{"id":.*?\}', picture)
        assert picture.startswith(b"\xff\xd8")
        assert comment is not None
        assert json.loads(comment[0])["id"] == verdict["id"]
        assert daemon.end() == 0
        eventually(
            lambda: listener.of("status")[-1].content["reason"] == "stopped",
            "the status stopped",
        )
    assert [m.content["reason"] for m in listener.of("status")] == [
        "running",
        "stopped",
    ]
    assert listener.of("state")[-1].content["state"] == "Halted"
    assert listener.of("state")[-1].content["ready"] is False


def test_a_killed_daemon_is_reported_lost_by_the_broker(daemon: Daemon, broker: Broker) -> None:
    with closing(Subscriber(broker.port, "inspectd/#")) as listener:
        daemon.start()
        eventually(lambda: len(listener.of("status")) == 1, "the status running")
        daemon.end(signal.SIGKILL)
        eventually(lambda: len(listener.of("status")) == 2, "the last will")
    running, lost = (m.content for m in listener.of("status"))
    assert (running["online"], lost["online"], lost["reason"]) == (True, False, "lost")
    assert running["boot_id"] == lost["boot_id"]


def test_a_dead_audit_trail_is_an_alarm_and_nothing_of_it_is_lost(daemon: Daemon, broker: Broker) -> None:
    subscriber = Subscriber(broker.port, "inspectd/cam1/#")
    trail = daemon.folder / "state/audit.jsonl"
    trail.mkdir(parents=True)
    daemon.start()

    def active() -> set[str]:
        return {alarm["alarm_id"] for alarm in subscriber.of("alarm/active")[-1].content["active"]}

    subscriber.wait(lambda: subscriber.of("alarm/active") and "AUDIT_BLOCKED" in active(), "the alarm")
    write_part(daemon.incoming / "part.png", 1)
    subscriber.wait(lambda: subscriber.of("verdict"), "a verdict all the same")
    assert subscriber.of("event") == []
    trail.rmdir()
    started = subscriber.wait(lambda: subscriber.of("event"), "the event that had to wait")[0].content
    assert (started["kind"], len(started["chain"])) == ("started", 64)
    subscriber.wait(lambda: "AUDIT_BLOCKED" not in active(), "the alarm to be over")
    subscriber.close()


def test_two_daemons_cannot_share_a_state_folder(daemon: Daemon, inspectd: Run) -> None:
    daemon.start()
    eventually(lambda: '"ready"' in daemon.said(), "the daemon to be ready")
    done = inspectd("run", "--config", daemon.config)
    assert done.returncode == 1
    assert "in use by another inspectd" in done.stderr
    assert daemon.end() == 0


def test_a_model_that_was_edited_never_starts(daemon: Daemon, model: Path, inspectd: Run) -> None:
    edited = daemon.folder / "edited"
    shutil.copytree(model, edited)
    calibration = edited / "calibration.json"
    content = json.loads(calibration.read_text())
    content["threshold"] *= 2
    calibration.write_text(json.dumps(content))
    daemon.config.write_text(daemon.config.read_text().replace(str(model), str(edited)))
    done = inspectd("run", "--config", daemon.config)
    assert done.returncode == 78
    assert "edited" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_service_manager_hears_when_it_is_ready_and_when_it_stops(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(daemon.folder / "notify"))
        manager.settimeout(60)
        daemon.start({"NOTIFY_SOCKET": str(daemon.folder / "notify")})
        assert manager.recv(4096).decode().startswith("EXTEND_TIMEOUT_USEC=120000000\nSTATUS=loading ")
        assert manager.recv(4096).decode().startswith("READY=1\nSTATUS=cam1:")
        assert manager.recv(4096).decode().startswith("WATCHDOG=1\nSTATUS=cam1:")
        write_part(daemon.incoming / "first.png", 1)
        eventually(
            lambda: "1 PASS" in (said := manager.recv(4096).decode()) or "1 FAIL" in said, "the count in the status"
        )
        assert daemon.end() == 0
        while "STOPPING=1" not in manager.recv(4096).decode():
            pass
