"""All that the installed program publishes in a shift with every kind of part, held against its published schemas."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import cv2
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from daemon import schemas
from daemon.contract import TOPICS
from daemon.pipeline import PICTURE_INTERVAL_S
from tests.brokers import Broker, Subscriber, eventually
from tests.payloads import parse
from tests.system.conftest import Run, write_part
from tests.system.test_daemon import Daemon

MORE = 'tags = true\nmaps = true\nsources = true\noverlays = "all"'
PLAIN = {"verdict_code": int, "seq": int, "score": float}


@pytest.fixture(params=["mosquitto", "amqtt"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """MQTT 5, and 3.1.1 alone."""
    running = request.getfixturevalue(request.param)
    return running if isinstance(running, Broker) else running()


def test_a_subscriber_gets_the_schemas_by_the_command(inspectd: Run) -> None:
    assert inspectd("schema").stdout.split() == schemas.names()
    assert inspectd("schema", "verdict").stdout.strip() == schemas.read("verdict").strip()


@pytest.fixture
def heard(tmp_path: Path, model: Path, broker: Broker) -> Iterator[Subscriber]:
    """All topics of a daemon that saw good, bad and damaged parts, obeyed commands, was killed and started again."""
    ear = Subscriber(broker.port, "inspectd/cam1/#")
    daemon = Daemon(tmp_path, model, broker.port, MORE)
    daemon.config.write_text(daemon.config.read_text() + "give_up_s = 0.5\n")
    daemon.start()
    eventually(lambda: ear.of("state"), "the station")
    for number in range(3):
        write_part(daemon.incoming / f"good{number}.png", number)
        write_part(daemon.incoming / f"bad{number}.png", 50 + number, "scratch")
    (daemon.incoming / "torn.png").write_bytes(b"\x89PNG torn")
    eventually(lambda: len(ear.of("verdict")) >= 7, "seven verdicts")
    eventually(lambda: ear.of("image/overlay"), "a picture")
    Event().wait(PICTURE_INTERVAL_S)
    write_part(daemon.incoming / "seen.png", 9)
    eventually(lambda: ear.of("image/source"), "its picture")
    ask(broker.port, "stop", "c1")
    eventually(lambda: ear.of("state")[-1].content["state"] == "Ready", "Ready")
    ask(broker.port, "trigger", "c2", {"part_id": "mine", "meta": {"cavity": 3, "oven": 231.5}})
    eventually(lambda: len(ear.of("cmd/response")) >= 2, "ACCEPTED")
    write_part(daemon.incoming / "late.png", 7)
    eventually(lambda: len(ear.of("verdict")) >= 9, "the trigger's verdict")
    ask(broker.port, "dance", "c3")
    ask(broker.port, "start", "c4")
    eventually(lambda: len(ear.of("cmd/response")) >= 4, "all answers")
    daemon.end()
    eventually(lambda: ear.of("status")[-1].content["reason"] == "stopped", "the end")
    yield ear
    ear.close()


def ask(port: int, action: str, cmd_id: str, args: dict[str, Any] | None = None) -> None:
    request = json.dumps({"cmd_id": cmd_id, "action": action, "args": args or {}})
    command = ["mosquitto_pub", "-p", str(port), "-q", "1", "-t", "inspectd/cam1/cmd/request", "-m", request]
    subprocess.run(command, check=True)


def test_every_payload_of_a_shift_follows_its_schema_by_mqtt_5_and_by_3_1_1(
    heard: Subscriber,
) -> None:
    leaves = {message.leaf for message in heard.messages}
    assert leaves - {"cmd/request"} == set(TOPICS) - {"alarm/event"} | leaves & {"alarm/event"}
    for message in heard.messages:
        kind = TOPICS.get(message.leaf, "inspectd.command/1")
        if message.leaf == "cmd/request":
            continue  # what was asked, wrongly too
        if kind.startswith("inspectd."):
            content = parse(message.payload)
            assert content.get("schema", kind) == kind
            name = kind.removeprefix("inspectd.").removesuffix("/1")
            Draft202012Validator(json.loads(schemas.read(name))).validate(content)
        elif kind.startswith("image/"):
            assert cv2.imdecode(np.frombuffer(message.payload, np.uint8), cv2.IMREAD_UNCHANGED) is not None
        else:
            PLAIN.get(message.leaf.removeprefix("tag/"), str)(message.payload.decode())
    outcomes = {message.content["verdict"] for message in heard.of("verdict")}
    assert {"ERROR", "FAIL"} <= outcomes or {"ERROR", "PASS"} <= outcomes
    answers = {message.content["cmd_id"]: message.content["code"] for message in heard.of("cmd/response")}
    assert answers == {"c1": 0, "c2": 1, "c3": 12, "c4": 0}
    mine = heard.of("verdict")[-1].content
    assert (mine["part_id"], mine["trigger_id"], mine["meta"]) == ("mine", "c2", {"cavity": 3, "oven": 231.5})
