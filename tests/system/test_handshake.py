"""The handshake of a PLC with the installed program, by nothing but Mosquitto's own clients."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.brokers import HOST, Broker, eventually
from tests.system.conftest import write_part
from tests.system.test_daemon import Daemon

CLIENTS = ("mosquitto_pub", "mosquitto_sub", "mosquitto_rr")
B = "inspectd/cam1"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, CLIENTS)),
    reason="Mosquitto's clients are not installed (apt-get install mosquitto-clients)",
)


class Plc:
    """What a PLC does: it publishes with mosquitto_pub, and reads what mosquitto_sub has written down."""

    def __init__(self, broker: Broker, log: Path) -> None:
        self._at = ["-h", HOST, "-p", str(broker.port), "-q", "1"]
        self._log = log

    @contextmanager
    def listening(self) -> Iterator[None]:
        command = ["mosquitto_sub", *self._at, "-t", f"{B}/#", "-T", f"{B}/image/overlay", "-F", "%t %p"]
        with self._log.open("wb") as log, subprocess.Popen(command, stdout=log) as child:
            try:
                yield
            finally:
                child.terminate()

    def heard(self, leaf: str) -> list[dict[str, Any]]:
        return [json.loads(payload) for payload in self.payloads(leaf)]

    def payloads(self, leaf: str) -> list[str]:
        *whole, _ = self._log.read_text().split("\n")
        return [line.partition(" ")[2] for line in whole if line.partition(" ")[0] == f"{B}/{leaf}"]

    def wait(self, leaf: str, count: int) -> list[dict[str, Any]]:
        eventually(lambda: len(self.heard(leaf)) >= count, f"{count} of {leaf}")
        return self.heard(leaf)

    def ask(self, leaf: str, content: dict[str, Any], *options: str) -> dict[str, Any]:
        """The answer to a command, by MQTT 3.1.1."""
        before = len(self.heard("cmd/response"))
        message = ["-t", f"{B}/{leaf}", "-m", json.dumps(content)]
        subprocess.run(["mosquitto_pub", *self._at, *message, *options], check=True)
        return self.wait("cmd/response", before + 1)[before]

    def ask_there(self, leaf: str, content: dict[str, Any], reply_to: str) -> dict[str, Any]:
        """The answer where MQTT 5's request says."""
        message = ["-t", f"{B}/{leaf}", "-e", reply_to, "-m", json.dumps(content)]
        command = ["mosquitto_rr", "-V", "5", *self._at, *message, "-D", "publish", "correlation-data", "7", "-W", "30"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


@pytest.fixture
def daemon(tmp_path: Path, model: Path, mosquitto: Callable[..., Broker]) -> Iterator[tuple[Daemon, Plc]]:
    broker = mosquitto()
    made = Daemon(tmp_path, model, broker.port, "actuation_ttl_s = 100.0")
    made.config.write_text(made.config.read_text().replace("[station.source]", f"{STATION}\n[station.source]"))
    plc = Plc(broker, tmp_path / "plc.log")
    with plc.listening():
        yield made, plc
        if made.alive:
            made.end(signal.SIGKILL)


STATION = 'mode = "triggered"\nacknowledge = true\ntrigger_timeout_s = 60.0'


def test_a_plc_has_one_verdict_for_each_trigger_by_the_number_it_was_promised_though_the_daemon_is_killed(
    daemon: tuple[Daemon, Plc],
) -> None:
    inspectd, plc = daemon
    inspectd.start()
    plc.wait("status", 1)

    accepted = plc.ask("cmd/trigger", {"cmd_id": "c1", "trigger_id": "T-1", "part_id": "SN-1", "batch_id": "B-1"})
    assert (accepted["result"], accepted["seq"]) == ("ACCEPTED", 1)
    write_part(inspectd.incoming / "mine.png", 2)
    (first,) = plc.wait("verdict", 1)
    assert (first["seq"], first["trigger_id"], first["part_id"], first["batch_id"]) == (1, "T-1", "SN-1", "B-1")
    assert first["source"].endswith("mine.png")
    assert [(gate["s"], gate["tr"]) for gate in plc.wait("plc", 1)] == [(1, "T-1")]
    assert plc.ask("cmd/request", {"cmd_id": "a1", "action": "ack_result", "args": {"seq": 1}})["result"] == "DONE"

    waiting = plc.ask("cmd/trigger", {"cmd_id": "c2", "part_id": "SN-2"})
    busy = plc.ask("cmd/trigger", {"cmd_id": "c3"})
    assert [(answer["result"], answer["seq"]) for answer in (waiting, busy)] == [("ACCEPTED", 2), ("BUSY", 3)]
    inspectd.end(signal.SIGKILL)
    assert len(plc.heard("verdict")) == 1
    inspectd.start()
    told = plc.wait("verdict", 3)[1:]
    assert [(v["seq"], v["trigger_id"], v["part_id"], v["reason_code"], v["result_state"]) for v in told] == [
        (2, "c2", "SN-2", 305, 3),
        (3, "c3", "", 305, 3),
    ]
    assert all(gate["r"] for gate in plc.heard("plc")[1:])  # if the connection was there in time
    assert plc.ask("cmd/trigger", {"cmd_id": "c2", "part_id": "SN-2"}) == waiting

    there = plc.ask_there("cmd/trigger", {"cmd_id": "c4"}, "plc1/answers")
    assert (there["result"], there["seq"]) == ("ACCEPTED", 4)
    write_part(inspectd.incoming / "SN-3.png", 3)
    last = plc.wait("verdict", 4)[3]
    assert (last["seq"], last["trigger_id"], last["part_id"]) == (4, "c4", "SN-3")
    assert inspectd.end() == 0
    assert [verdict["seq"] for verdict in plc.heard("verdict")] == [1, 2, 3, 4]


def test_a_retained_trigger_never_fires_and_a_station_goes_from_mode_to_mode(daemon: tuple[Daemon, Plc]) -> None:
    inspectd, plc = daemon
    retained = ["mosquitto_pub", *plc._at, "-r", "-t", f"{B}/cmd/trigger", "-m", '{"cmd_id":"r"}']  # noqa: SLF001 -- ours
    subprocess.run(retained, check=True)
    inspectd.start()
    assert plc.wait("cmd/response", 1)[0]["result"] == "RETAINED_REFUSED"
    write_part(inspectd.incoming / "part.png", 1)
    assert (
        plc.ask("cmd/request", {"cmd_id": "1", "action": "start", "user": "m.weber"})["state"] == "ContinuousExecution"
    )
    assert plc.wait("verdict", 1)[0]["part_id"] == "part"
    assert plc.ask("cmd/request", {"cmd_id": "2", "action": "trigger"})["result"] == "WRONG_STATE"
    assert plc.ask("cmd/request", {"cmd_id": "3", "action": "halt"})["state"] == "Halted"
    assert plc.ask("cmd/request", {"cmd_id": "4", "action": "reset"})["state"] == "Ready"
    write_part(inspectd.incoming / "untouched.png", 2)
    assert plc.ask("cmd/request", {"cmd_id": "5", "action": "get_state"})["state"] == "Ready"
    assert inspectd.end() == 0
    assert (inspectd.incoming / "untouched.png").exists()
    assert [verdict["seq"] for verdict in plc.heard("verdict")] == [1]
    events = [(event["kind"], event["subject"]) for event in plc.heard("event")]
    assert events == [
        ("started", "0.1.0"),
        ("command", "start"),
        ("command", "halt"),
        ("command", "reset"),
        ("stopped", "0.1.0"),
    ]
