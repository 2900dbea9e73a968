"""Two daemons that share one stream of images: each image is answered, also when one of them is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import cv2
import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from demo.parts import KINDS, render
from tests.brokers import HOST, Broker, eventually
from tests.system.conftest import SIDE

ANSWERS = "lines/answers"
START_S = 90.0


class Daemon:
    """`inspectd run` on images from the broker, in a folder of its own."""

    def __init__(self, folder: Path, model: Path, port: int, name: str, more: str = "") -> None:
        folder.mkdir()
        self.log = folder / "daemon.log"
        self._config = folder / "inspectd.toml"
        self._config.write_text(
            f'node = "{name}"\n[mqtt]\nhost = "{HOST}"\nport = {port}\noverlays = "none"\n'
            f'[[station]]\nname = "{name}"\nmodel = "{model}"\n'
            f'[station.source]\ntype = "mqtt"\ntopic = "lines/images"\n{more}'
        )
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = Path(sys.executable).with_name("inspectd")
        with self.log.open("ab") as log:
            self._child = subprocess.Popen([program, "run", "--config", self._config], stderr=log, env=os.environ)

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while '"images are awaited"' not in (said := self.log.read_text()):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self._child is not None
        self._child.send_signal(number)
        code = self._child.wait(timeout=60)
        self._child = None
        return code

    def close(self) -> None:
        if self._child is not None:
            self.end(signal.SIGKILL)


class Robot:
    """A client that sends numbered images and notes the answers to each."""

    def __init__(self, port: int) -> None:
        self.answers: dict[int, list[dict[str, Any]]] = {}
        self._lock = Lock()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = self._on_message
        self._client.connect(HOST, port)
        self._client.loop_start()
        self._client.subscribe(f"{ANSWERS}/#", 1)
        self._images = [
            cv2.imencode(".png", render(seed, ("good", *KINDS)[seed % 5], SIDE).image[..., ::-1])[1].tobytes()
            for seed in range(20)
        ]

    def send(self, numbers: range) -> None:
        for number in numbers:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call] # paho's
            properties.ResponseTopic = f"{ANSWERS}/robot"
            properties.CorrelationData = number.to_bytes(4, "big")
            properties.UserProperty = [("part_id", f"part-{number}")]
            self._client.publish("lines/images", self._images[number % 20], 1, properties=properties)

    def answered(self) -> int:
        with self._lock:
            return len(self.answers)

    def shares(self) -> Counter[str]:
        with self._lock:
            return Counter(answers[0]["station"] for answers in self.answers.values())

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _: Client, __: object, message: MQTTMessage) -> None:
        number = int.from_bytes(message.properties.CorrelationData, "big")  # type: ignore[union-attr] # paho's
        with self._lock:
            self.answers.setdefault(number, []).append(json.loads(message.payload))


@pytest.fixture
def broker(tmp_path: Path, mosquitto: Callable[..., Broker]) -> Broker:
    return mosquitto("persistence true", f"persistence_location {tmp_path}/", "max_queued_messages 0")


@pytest.fixture
def robot(broker: Broker) -> Iterator[Robot]:
    asking = Robot(broker.port)
    yield asking
    asking.close()


@contextmanager
def sharing(folder: Path, model: Path, broker: Broker, count: int, more: str = "") -> Iterator[list[Daemon]]:
    options = f'group = "lines"\n{more}\n'
    daemons = [Daemon(folder / f"cam{i}", model, broker.port, f"cam{i}", options) for i in range(count)]
    try:
        for daemon in daemons:
            daemon.start()
        for daemon in daemons:
            daemon.wait()
        yield daemons
    finally:
        for daemon in daemons:
            daemon.close()


def patiently(robot: Robot, count: int) -> None:
    """Wait for the answers to so many images, as long as more of them come."""
    answered, since = -1, time.monotonic()
    while (now := robot.answered()) < count:
        if now != answered:
            answered, since = now, time.monotonic()
        assert time.monotonic() - since < 30, f"{now} of {count} images are answered"
        time.sleep(0.05)


@pytest.mark.long
def test_two_daemons_share_a_stream_and_each_image_is_answered_once(
    tmp_path: Path, model: Path, broker: Broker, robot: Robot
) -> None:
    with sharing(tmp_path, model, broker, 2) as daemons:
        robot.send(range(200))
        patiently(robot, 200)
        assert [daemon.end() for daemon in daemons] == [0, 0]
    assert {len(answers) for answers in robot.answers.values()} == {1}
    assert all(answers[0]["part_id"] == f"part-{number}" for number, answers in robot.answers.items())
    assert {answers[0]["schema"] for answers in robot.answers.values()} == {"inspectd.verdict/1"}
    assert robot.shares() == {"cam0": 100, "cam1": 100}


@pytest.mark.long
def test_none_of_a_thousand_images_is_unanswered_though_a_daemon_is_killed(
    tmp_path: Path, model: Path, broker: Broker, robot: Robot
) -> None:
    with sharing(tmp_path, model, broker, 2) as daemons:
        began = time.monotonic()
        robot.send(range(1000))
        patiently(robot, 1000)
        took_s = time.monotonic() - began
        assert {len(answers) for answers in robot.answers.values()} == {1}
        print(f"two daemons: {1000 / took_s:.1f} images a second, shares {dict(robot.shares())}")  # noqa: T201 -- the figure
        robot.send(range(1000, 2000))
        eventually(lambda: robot.answered() > 1200, "the middle")
        daemons[0].end(signal.SIGKILL)
        eventually(lambda: robot.shares()["cam1"] >= 1000, "the other to have answered its half")
        daemons[0].start()
        patiently(robot, 2000)
        assert [daemon.end() for daemon in daemons] == [0, 0]
    twice = {number: answers for number, answers in robot.answers.items() if len(answers) > 1}
    print(f"answered twice: {len(twice)}")  # noqa: T201 -- the figure
    for answers in twice.values():
        assert answers[0] == answers[1]
    assert set(robot.answers) == set(range(2000))
    for daemon in ("cam0", "cam1"):
        seqs = {a["seq"] for answers in robot.answers.values() for a in answers if a["station"] == daemon}
        assert seqs == set(range(1, len(seqs) + 1))
