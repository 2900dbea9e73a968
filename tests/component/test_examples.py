"""docs/listening.md and docs/examples as they stand, by real clients where there are any, else by the contract."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon import announcements, contract, requests
from daemon.announcements import Event, EventKind
from daemon.contract import Message
from daemon.link import Link
from daemon.messages import Outcome, Verdict
from daemon.requests import Action, Code, Received, RefusedError
from tests import payloads
from tests.brokers import DEADLINE_S, HOST, ROOT, Broker, Subscriber, eventually, free_port
from tests.component import test_mqtt_sink as sink
from tests.component.test_control import BAD, GOOD, Cell

EXAMPLES = ROOT / "docs/examples"
PAGE = (ROOT / "docs/listening.md").read_text()
GOLDEN = {path.stem: path.read_bytes() for path in (ROOT / "tests/golden").glob("*.json")}
AT = datetime(2026, 11, 22, 7, 58, 3, 482_000, UTC)
clients = pytest.mark.skipif(
    shutil.which("mosquitto_rr") is None,
    reason="Mosquitto's clients are not installed (apt-get install mosquitto-clients)",
)


def section(title: str) -> str:
    _, found, text = PAGE.partition(f"\n## {title}\n")
    assert found, f"the page has no section {title}"
    return text.partition("\n## ")[0]


def blocks(title: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)


@contextmanager
def running(command: list[str] | str, log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose errors and words go to a file; it is ended at the end."""
    with log.open("ab") as out, subprocess.Popen(command, stdout=out, stderr=out, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


@contextmanager
def talking(broker: Broker) -> Iterator[Callable[..., None]]:
    """Publish below inspectd/top, each message with the broker's word that it has it."""
    link = Link(sink.settings(broker), "talker")

    def say(leaf: str, payload: bytes, *, retain: bool = False) -> None:
        link.publish(Message(f"inspectd/top/{leaf}", payload, retain=retain)).wait_for_publish(DEADLINE_S)

    try:
        yield say
    finally:
        link.close()


# A shell


def shell(number: int, broker: Broker) -> str:
    """A line of the page, for the test's broker and station. The shell gives way to the client."""
    lines = [line for block in blocks("A shell", "sh") for line in block.splitlines()]
    assert len(lines) == 8
    line = lines[number].replace("BROKER", f"{HOST} -p {broker.port}")
    return "exec " + line.replace("plant/line1/cam1", "inspectd/top").replace("plant/line1", "inspectd")


@clients
def test_the_lines_that_listen_hear_gate_record_picture_state_and_alarms(
    tmp_path: Path, mosquitto: Callable[..., Broker]
) -> None:
    broker = mosquitto("log_type all")
    log = tmp_path / "mosquitto.log"
    picture = cv2.imencode(".jpg", np.full((32, 32, 3), 90, np.uint8))[1].tobytes()
    with talking(broker) as say:
        for leaf, name in (("state", "state"), ("alarm/active", "alarms")):
            say(leaf, GOLDEN[name], retain=True)
        for number, name in ((3, "state"), (4, "alarms")):
            heard = subprocess.run(
                ["sh", "-c", shell(number, broker)], capture_output=True, check=True, timeout=DEADLINE_S
            )
            assert json.loads(heard.stdout) == json.loads(GOLDEN[name])
        with (
            running(["sh", "-c", shell(0, broker)], tmp_path / "gate"),
            running(["sh", "-c", shell(2, broker)], tmp_path / "errors", cwd=tmp_path) as one_picture,
        ):
            for topic in ("inspectd/+/plc", "inspectd/top/image/overlay"):
                eventually(lambda topic=topic: topic in log.read_text(), "the subscription")  # type: ignore[misc]
            say("plc", GOLDEN["plc"])
            say("image/overlay", picture)
            assert one_picture.wait(DEADLINE_S) == 0
            eventually(lambda: GOLDEN["plc"] in (tmp_path / "gate").read_bytes(), "the gate's message")
        assert (tmp_path / "gate").read_bytes() == b"inspectd/top/plc " + GOLDEN["plc"] + b"\n"
        assert (tmp_path / "overlay.jpg").read_bytes() == picture


@clients
def test_the_line_with_a_session_records_what_came_while_it_was_away(
    tmp_path: Path, mosquitto: Callable[..., Broker]
) -> None:
    broker = mosquitto("log_type all")
    record = tmp_path / "record.jsonl"
    command = ["sh", "-c", shell(1, broker)]
    with talking(broker) as say:
        with running(command, tmp_path / "errors", cwd=tmp_path):
            eventually(lambda: "inspectd/+/verdict" in (tmp_path / "mosquitto.log").read_text(), "the subscription")
        for name in ("verdict_pass", "verdict_fail"):
            say("verdict", GOLDEN[name])
        with running(command, tmp_path / "errors", cwd=tmp_path):
            eventually(lambda: len(record.read_text().splitlines()) == 2, "both verdicts")
    assert record.read_bytes() == GOLDEN["verdict_pass"] + b"\n" + GOLDEN["verdict_fail"] + b"\n"


def obey(received: Received, send: Callable[[Message], None]) -> bool:
    """Answer as a station in Ready does."""
    try:
        request = requests.parse(received)
    except RefusedError as refused:
        named, code, why = (refused.cmd_id, refused.action), refused.code, str(refused)
    else:
        named, why = (request.cmd_id, request.action.value), ""
        code = Code.ACCEPTED if request.action is Action.TRIGGER else Code.DONE
    seq = 7 if code is Code.ACCEPTED else 0
    answer = requests.encode_response(sink.IDENTITY, named, code, why, "Ready", AT, seq=seq)
    send(requests.response(sink.IDENTITY, received, answer))
    return False


@clients
def test_the_lines_that_ask_get_their_answers_and_a_retained_command_is_deleted(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber]
) -> None:
    broker = mosquitto()
    forgotten = b'{"cmd_id":"old","action":"stop"}'
    with talking(broker) as say:
        say("cmd/request", forgotten, retain=True)
    watching = subscribe(broker)
    with sink.station(tmp_path, sink.settings(broker), obey=obey):
        refusal = watching.wait(lambda: watching.of("cmd/response"), "the refusal of the retained command")[0]
        assert refusal.content["result"] == "RETAINED_REFUSED"
        answers = []
        for number in (5, 6):
            done = subprocess.run(
                ["sh", "-c", shell(number, broker)], capture_output=True, check=True, timeout=DEADLINE_S
            )
            answers.append(json.loads(done.stdout))
        subprocess.run(["sh", "-c", shell(7, broker)], check=True, timeout=DEADLINE_S)
    assert [(answer["cmd_id"], answer["result"], answer["seq"]) for answer in answers] == [
        ("me-1", "DONE", 0),
        ("me-2", "ACCEPTED", 7),
    ]
    late = subscribe(broker)
    late.wait(lambda: late.of("status"), "what is retained")
    assert not late.of("cmd/request")


# The record


def test_the_subscriber_keeps_the_record_over_doubles_disorder_gaps_and_its_own_end(
    tmp_path: Path, mosquitto: Callable[..., Broker]
) -> None:
    broker = mosquitto()
    file, log = tmp_path / "record.sqlite3", tmp_path / "log"
    command = [sys.executable, str(EXAMPLES / "subscriber.py"), HOST, "inspectd", str(file), str(broker.port)]
    lost = Event("0" * 26, EventKind.GAP, "", "the outbox was full", AT, 10, 11)

    def lines() -> list[str]:
        return log.read_text().splitlines()

    def stored() -> list[int]:
        with suppress(sqlite3.OperationalError):
            reading = sqlite3.connect(file)
            try:
                return [seq for (seq,) in reading.execute("SELECT seq FROM record ORDER BY base, seq")]
            finally:
                reading.close()
        return []

    with talking(broker) as say:

        def conclude(*seqs: int) -> None:
            for seq in seqs:
                say("verdict", contract.encode_verdict(sink.IDENTITY, sink.verdict(seq)))

        def listens() -> bool:
            conclude(1)
            return stored() == [1]

        with running(command, log):
            eventually(listens, "the subscriber")
            conclude(2, 2, 5, 4, 5, 3)
            eventually(lambda: stored() == [1, 2, 3, 4, 5], "the gap to be closed")
        conclude(6, 6, 8)
        say("event", announcements.encode_event(sink.IDENTITY, lost).payload)
        with running(command, log):
            conclude(7, 12)
            eventually(lambda: stored() == [1, 2, 3, 4, 5, 6, 7, 8, 12], "what came while it was away")
            eventually(lambda: len(lines()) == 6, "what it says")
    base = "inspectd/top"
    assert lines() == [
        f"{base}: 3 to 4 are missing: on their way",
        f"{base}: 3 has come and closes a gap",
        f"{base}: 7 to 7 are missing: on their way",
        f"{base}: 10 to 11 may never come: gap, the outbox was full",
        f"{base}: 7 has come and closes a gap",
        f"{base}: 9 to 11 are missing: gap, the outbox was full",
    ]
    [query] = blocks("The whole record, in Python", "sql")
    reading = sqlite3.connect(file)
    assert reading.execute(query).fetchall() == [(base, 9, 11, "gap, the outbox was full")]
    reading.close()


# The PLC


class Line:
    """A function block of the example in a PLC whose clock the test winds, beside a station with a base."""

    def __init__(self, program: Any, *, base: str = "plant/line1/cam1", **inputs: Any) -> None:
        self.block = program.block("FB_Inspect")
        self.now_ms = 1_795_334_284_001
        self.published: list[Received] = []
        self._program = program
        self._payload = bytearray(1024)
        self.base = base
        self._inputs = {"sBase": base.encode(), "sPartId": b"SN-1", **inputs}
        self.execute = False

    def cycle(self, leaf: str = "", payload: bytes = b"", *, after_ms: int = 10) -> None:
        """One cycle of the task, with a message if there is one."""
        self.now_ms += after_ms
        self._program.now_ms += after_ms
        self._payload[: len(payload)] = payload
        self.block(
            xExecute=self.execute,
            nNowMs=self.now_ms,
            xMessage=bool(leaf),
            sTopic=f"{self.base}/{leaf}".encode(),
            nLength=len(payload),
            aPayload=self._payload,
            **self._inputs,
        )
        if self.block.xPublish:
            topic, text = self.block.sPublishTopic.decode(), self.block.sPublishPayload
            self.published.append(Received(topic, text))

    def cycles(self, message: tuple[str, bytes], then_after_ms: int) -> None:
        """One with a message, and some time after it one without."""
        self.cycle(*message)
        self.cycle(after_ms=then_after_ms)

    def be_told(self) -> None:
        self.cycle(
            "status", contract.encode_status(payloads.IDENTITY, online=True, reason="running", at=self.at).payload
        )
        self.cycle("state", self.state())

    def be_ready(self) -> None:
        self.be_told()
        self.cycle()
        assert self.block.xReady

    def ask(self) -> str:
        """Trigger a part; gives the trigger's id."""
        self.execute = True
        self.cycle()
        return requests.parse(self.published[-1]).cmd_id

    @property
    def at(self) -> datetime:
        return datetime.fromtimestamp(self.now_ms / 1000, UTC)

    def state(self, *, ready: bool = True) -> bytes:
        state = replace(payloads.STATE, state="Ready" if ready else "SingleExecution")
        return contract.encode_state(payloads.IDENTITY, state, self.at).payload

    def answer(self, cmd_id: str, code: Code = Code.ACCEPTED) -> bytes:
        return requests.encode_response(payloads.IDENTITY, (cmd_id, "trigger"), code, "", "Ready", self.at, seq=184213)

    def result(self, trigger_id: str, *, seq: int = 184213, age_ms: int = 0, passed: bool = True) -> bytes:
        usual: Verdict = payloads.TRIGGERED if passed else payloads.FAILED
        trigger = payloads.TRIGGERED.capture.trigger
        assert trigger is not None
        capture = replace(usual.capture, trigger=replace(trigger, trigger_id=trigger_id))
        verdict = replace(usual, seq=seq, capture=capture, decided_at=self.at - timedelta(milliseconds=age_ms))
        return contract.encode_actuation(payloads.IDENTITY, verdict, 2.0).payload


@pytest.fixture(scope="module")
def program() -> Any:
    from tests.structured_text import Program

    return Program(EXAMPLES / "plc.st")


def test_a_part_that_passes_goes_through_the_whole_handshake_and_is_acknowledged(program: Any) -> None:
    line = Line(program, xAcknowledge=True)
    assert line.block.xReject
    line.be_ready()
    for seq in (184213, 184214):
        asked = line.ask()
        trigger = requests.parse(line.published[-1])
        assert line.published[-1].topic == "plant/line1/cam1/cmd/trigger"
        assert (trigger.action, trigger.args["part_id"]) == (Action.TRIGGER, "SN-1")
        assert trigger.expires_ms == line.now_ms + 2000
        line.cycle("cmd/response", line.answer("another's"))
        assert not line.block.xExpose
        line.cycle("cmd/response", line.answer(asked))
        assert line.block.xExpose
        line.cycle()
        assert not line.block.xExpose
        line.cycle("plc", line.result(asked, seq=seq))
        assert (line.block.xDone, line.block.xReject) == (True, False)
        assert (line.block.nResult, line.block.nSeq) == (Outcome.PASS.value, seq)
        acknowledgement = requests.parse(line.published[-1])
        assert line.published[-1].topic == "plant/line1/cam1/cmd/request"
        assert (acknowledgement.action, acknowledgement.args) == (Action.ACK_RESULT, {"seq": seq})
        line.execute = False
        line.cycle()
        assert not line.block.xDone
    assert len({requests.parse(received).cmd_id for received in line.published}) == 4


def test_a_result_that_overtakes_its_answer_counts(program: Any) -> None:
    line = Line(program)
    line.be_ready()
    line.cycle("plc", line.result(line.ask()))
    assert (line.block.xDone, line.block.xReject) == (True, False)
    assert len(line.published) == 1


FAULTS: dict[str, Callable[[Line, str], None]] = {
    "silence": lambda line, _: line.cycles(("", b""), 2000),
    "an answer and then silence": lambda line, asked: line.cycles(("cmd/response", line.answer(asked)), 2000),
    "a refusal": lambda line, asked: line.cycle("cmd/response", line.answer(asked, Code.BUSY)),
    "a part that failed": lambda line, asked: line.cycle("plc", line.result(asked, passed=False)),
    "the end of the daemon": lambda line, _: line.cycle("status", GOLDEN["status"].replace(b"true", b"false")),
    "a state that is 30 s old": lambda line, _: line.cycle("state", GOLDEN["state"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_rejects_the_part_at_once(program: Any, fault: str) -> None:
    line = Line(program)
    line.now_ms += 30_001  # the golden state is too old
    line.be_ready()
    FAULTS[fault](line, line.ask())
    assert (line.block.xDone, line.block.xReject) == (True, True)


def test_results_that_are_old_foreign_or_known_change_nothing(program: Any) -> None:
    line = Line(program)
    line.be_ready()
    first = line.ask()
    line.cycle("plc", line.result(first))
    line.execute = False
    line.cycle()
    second = line.ask()
    others = [
        line.result(second),  # the number of the first
        line.result(first, seq=184214),
        line.result("", seq=184215),
        line.result("PLC2-1", seq=184216),
        line.result(second, seq=184217, age_ms=2000),
        line.result(second, seq=184218, age_ms=-2000),
    ]
    for other in others:
        line.cycle("plc", other, after_ms=0)
        assert not line.block.xDone
        assert line.block.xReject


def test_a_station_that_is_not_ready_is_asked_nothing_and_its_part_is_rejected(program: Any) -> None:
    line = Line(program)
    line.be_ready()
    line.cycle("state", line.state(ready=False))
    line.execute = True
    line.cycle()
    assert (line.block.xDone, line.block.xReject, line.published) == (True, True, [])


def test_a_demand_that_stands_at_power_up_is_no_trigger_and_one_that_stays_is_no_second(program: Any) -> None:
    line = Line(program)
    line.execute = True
    line.be_told()
    assert (line.block.xDone, line.block.xReject, line.published) == (True, True, [])
    line.execute = False
    line.cycle()
    line.cycle("plc", line.result(line.ask()))
    for _ in range(3):
        line.cycle()
        assert (line.block.xDone, line.block.xReject, len(line.published)) == (True, False, 1)


def test_a_late_result_is_acknowledged_though_a_trigger_waits_to_be_sent_and_anothers_is_not(program: Any) -> None:
    line = Line(program, xAcknowledge=True)
    line.be_ready()
    late = line.ask()
    line.cycles(("", b""), 2000)
    line.execute = False
    line.cycle("plc", line.result("PLC10-1", seq=184212))
    line.execute = True
    line.cycle("plc", line.result(late))
    line.cycle()
    asked = [requests.parse(received).action for received in line.published]
    assert asked == [Action.TRIGGER, Action.ACK_RESULT, Action.TRIGGER]
    assert line.block.xReject


def test_a_result_that_is_cut_off_is_none_though_the_rest_of_it_lies_behind(program: Any) -> None:
    line = Line(program)
    line.be_ready()
    asked = line.ask()
    result = line.result(asked)
    line.cycle("last", result)
    line.cycle("plc", result[: result.index(asked.encode()) + len(asked) - 2])
    assert not line.block.xDone
    assert line.block.xReject


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_comes_a_part_passes_only_by_its_own_new_and_timely_result(program: Any, data: st.DataObject) -> None:
    line = Line(program, xAcknowledge=data.draw(st.booleans()))
    line.be_ready()
    known, asked, asked_ms = 0, "", 0
    for _ in range(data.draw(st.integers(1, 12))):
        line.execute = data.draw(st.sampled_from([True, True, True, False]))
        after_ms = data.draw(st.sampled_from([0, 10, 10, 10, 1990, 2000, 31_000]))
        seq, age_ms = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0, 0, 1999, 2000, 5000, -5000]))
        own, passed = data.draw(st.sampled_from([asked, asked, "PLC1-1", "X"])), data.draw(st.booleans())
        result = line.result(own, seq=seq, age_ms=age_ms - after_ms, passed=passed)
        leaf, payload = data.draw(
            st.sampled_from(
                [
                    ("", b""),
                    ("plc", result),
                    ("plc", result),
                    ("plc", result[: len(result) // 2]),
                    ("cmd/response", line.answer(asked)),
                    ("cmd/response", line.answer(asked, Code.BUSY)),
                    ("state", line.state()),
                    ("state", line.state(ready=False)),
                    ("status", GOLDEN["status"]),
                    ("status", GOLDEN["status"].replace(b"true", b"false")),
                ]
            )
        )
        before = line.block.xReject
        line.cycle(leaf, payload, after_ms=after_ms)
        if before and not line.block.xReject:
            assert payload == result
            assert passed
            assert own == asked != ""
            assert seq != known
            assert abs(age_ms) < 2000
            assert line.block.xDone or not line.execute
        if leaf == "plc" and payload == result and own.startswith("PLC1-"):
            known = seq
        if line.block.xPublish and line.published[-1].topic.endswith("cmd/trigger"):
            asked, asked_ms = requests.parse(line.published[-1]).cmd_id, line.now_ms
            assert line.block.xReject
    assert asked_ms <= line.now_ms


def test_the_block_and_a_live_station_inspect_parts_one_of_which_never_comes(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber], program: Any
) -> None:
    broker = mosquitto()
    patient = {"tCycle": 1000 * int(DEADLINE_S), "nTimeToLiveMs": 1000 * int(DEADLINE_S)}
    line = Line(program, base="inspectd/top", xAcknowledge=True, **patient)
    heard = subscribe(broker)
    taken = 0
    cell = Cell(tmp_path, timeout_s=0.5, acknowledged=True)
    parts = {"good": GOOD, "bad": BAD}

    with talking(broker) as say, cell.running(sink.settings(broker)):

        def cycle(part: str = "") -> Any:
            nonlocal taken
            message = heard.messages[taken] if taken < len(heard.messages) else None
            taken += message is not None
            leaf, payload = (message.leaf, message.payload) if message else ("", b"")
            wanted = leaf in {"plc", "state", "status", "cmd/response"}
            spoken = len(line.published)
            now_ms = int(datetime.now(UTC).timestamp() * 1000)
            line.cycle(leaf if wanted else "", payload if wanted else b"", after_ms=max(0, now_ms - line.now_ms))
            for request in line.published[spoken:]:
                say(request.topic.removeprefix("inspectd/top/"), request.payload)
            if line.block.xExpose and part in parts:
                cell.drop(part, parts[part])
            return line.block

        def inspect(part: str) -> tuple[bool, int]:
            eventually(lambda: cycle().xReady, "the station to be ready")
            line.execute = True
            eventually(lambda: cycle(part).xDone, "the block's word")
            line.execute = False
            cycle()
            return line.block.xReject, line.block.nResult

        assert inspect("good") == (False, Outcome.PASS.value)
        assert inspect("bad") == (True, Outcome.FAIL.value)
        assert inspect("none") == (True, Outcome.ERROR.value)
        eventually(lambda: cycle() and not cell.execution.unacknowledged, "every result to be acknowledged")
        heard.wait(lambda: len(heard.of("verdict")) == 3, "the record")
    cell.outbox.close()
    reasons = [message.content["reason"] for message in heard.of("verdict")]
    assert reasons == ["none", "score_above_threshold", "acquisition_timeout"]


def test_the_steps_of_the_page_are_those_of_the_block() -> None:
    text = (EXAMPLES / "plc.st").read_text()
    arms = re.findall(r"^    ([A-Z, ]+):\n(.*?)(?=^    [A-Z]|^END_CASE)", text, re.MULTILINE | re.DOTALL)
    leads = {
        step: set(re.findall(r"nStep := ([A-Z]+)", body)) - {step} for steps, body in arms for step in steps.split(", ")
    }
    rows = re.findall(r"^\| `([A-Z]+)` \| .* \| (.*) \|$", section("A PLC"), re.MULTILINE)
    assert {step: set(re.findall(r"`([A-Z]+)`", follows)) for step, follows in rows} == leads
    assert set(re.findall(r"`((?:[xns]|fb|t)[A-Z]\w+|aPayload)`", section("A PLC"))) <= set(re.findall(r"\w+", text))


# Node-RED

FLOW = EXAMPLES / "node-red.json"


def test_the_flow_for_node_red_hangs_together_and_names_topics_of_the_contract() -> None:
    nodes = json.loads(FLOW.read_text())
    ids = [node["id"] for node in nodes]
    assert len(ids) == len(set(ids))
    for node in nodes:
        assert {target for wire in node.get("wires", []) for target in wire} <= set(ids)
        assert {node.get("z", "inspectd"), node.get("broker", "broker")} - {HOST} <= set(ids)
    leaves = {node["topic"].split("/", 3)[3]: node for node in nodes if node["type"] in {"mqtt in", "mqtt out"}}
    assert set(leaves) <= {*contract.TOPICS, requests.REQUEST, requests.TRIGGER}
    assert {leaf for leaf, node in leaves.items() if node["type"] == "mqtt out"} == {requests.TRIGGER}
    assert leaves[requests.TRIGGER]["retain"] == "false"


def node_red() -> str | None:
    return os.environ.get("NODE_RED") or shutil.which("node-red")


@pytest.mark.skipif(node_red() is None, reason="Node-RED is not installed (npm install node-red; NODE_RED names it)")
def test_the_flow_runs_in_node_red(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber]
) -> None:
    program, broker, port = node_red(), mosquitto(), free_port()
    assert program is not None
    flow = FLOW.read_text().replace('"1883"', f'"{broker.port}"').replace("plant/line1/", "inspectd/")
    flow = flow.replace("inspectd/cam1/", "inspectd/top/").replace('"console": false', '"console": true')
    (tmp_path / "flows.json").write_text(flow)
    (tmp_path / "settings.js").write_text(
        f'module.exports = {{ uiPort: {port}, uiHost: "{HOST}", flowFile: "flows.json" }};'
    )
    log = tmp_path / "log"
    watching = subscribe(broker)

    def says(text: str) -> None:
        eventually(lambda: text in log.read_text(), f"{text!r} in what Node-RED says")

    def fetch(path: str, *, post: bool = False) -> bytes:
        request = HttpRequest(f"http://{HOST}:{port}{path}", method="POST" if post else "GET")
        with urlopen(request, timeout=DEADLINE_S) as answer:  # noqa: S310 -- http
            body: bytes = answer.read()
        return body

    with (
        running([program, "-u", str(tmp_path), "-s", str(tmp_path / "settings.js")], log, stdin=subprocess.DEVNULL),
        talking(broker) as say,
        sink.station(tmp_path, sink.settings(broker), obey=obey) as working,
    ):
        says("Connected to broker")
        says("[debug:state] ContinuousExecution")
        for verdict in (sink.verdict(1), sink.verdict(1), replace(payloads.PASSED, seq=2)):
            now = replace(verdict, decided_at=datetime.now(UTC))
            working.sink.actuate(contract.encode_actuation(sink.IDENTITY, now, 2.0))
            eventually(lambda seq=verdict.seq: seq in sink.numbers(watching.of("plc"), "s"), "plc")  # type: ignore[misc]
        say("plc", GOLDEN["plc"])
        says("[debug:reject]")
        says("[debug:pass]")
        working.keep(1)
        says("[debug:verdict]")
        say("alarm/active", GOLDEN["alarms"])
        says("CAMERA_OFFLINE")
        say("image/overlay", b"a JPEG")
        eventually(lambda: watching.of("image/overlay"), "the picture")
        assert fetch("/inspectd/overlay") == b"a JPEG"
        fetch("/inject/button", post=True)
        says("result: 'ACCEPTED'")
    told = log.read_text()
    assert [told.count(f"[debug:{name}]") for name in ("reject", "pass", "verdict")] == [1, 1, 1]


# Telegraf

CONFIGURATION = tomllib.loads((EXAMPLES / "telegraf.conf").read_text())
TYPES = {"int": (int, bool), "float": (float,), "bool": (bool,), "string": (str,)}


@dataclass(frozen=True, slots=True)
class Row:
    """What Telegraf makes of a message, by the configuration."""

    measurement: str
    tags: dict[str, str]
    fields: dict[str, Any]
    time_ns: int

    def __str__(self) -> str:
        """In InfluxDB's line protocol."""
        tags = "".join(f",{key}={value}" for key, value in self.tags.items())
        fields = ",".join(f"{key}={_literal(value)}" for key, value in self.fields.items())
        return f"{self.measurement}{tags} {fields} {self.time_ns}"


def _literal(value: Any) -> str:
    return f"{value}i" if type(value) is int else json.dumps(value)


def row(consumer: dict[str, Any], payload: bytes, station: str = "cam1") -> Row:
    """Take what the configuration names from a payload, and see that it has the type that it is to have."""
    content, [parser] = json.loads(payload), consumer["json_v2"]

    def named(path: str) -> Any:
        value = content
        for key in path.split("."):
            value = value[key]
        return value

    fields = {}
    for field in parser["field"]:
        value = named(field["path"])
        assert type(value) in TYPES[field["type"]], field["path"]
        fields[field.get("rename", field["path"])] = int(value) if field["type"] == "int" else value
    tags = {tag["path"]: named(tag["path"]) for tag in parser["tag"]} if "tag" in parser else {}
    assert all(type(value) is str for value in tags.values())
    for topic in consumer.get("topic_parsing", []):
        assert [topic["topic"]] == consumer["topics"]
        places = dict(zip(topic["tags"].split("/"), topic["topic"].split("/"), strict=True))
        assert places["station"] == "+"
        tags["station"] = station
    assert parser["timestamp_format"] == "unix_ms"
    assert "station" in tags
    return Row(parser["measurement_name"], tags, fields, 1_000_000 * named(parser["timestamp_path"]))


def test_telegraf_finds_in_every_payload_what_its_configuration_names() -> None:
    consumers = CONFIGURATION["inputs"]["mqtt_consumer"]
    assert len({consumer["client_id"] for consumer in consumers}) == len(consumers) == 3
    for consumer in consumers:
        assert (consumer["qos"], consumer["persistent_session"]) == (1, True)
        [topic] = consumer["topics"]
        leaf = topic.removeprefix("plant/line1/+/")
        assert leaf in contract.TOPICS
        rows = [row(consumer, payload) for name, payload in GOLDEN.items() if name.partition("_")[0] == leaf]
        assert rows
        assert {each.measurement for each in rows} == {leaf}
    verdicts = consumers[0]
    fail = row(verdicts, GOLDEN["verdict_fail"])
    assert (fail.tags["verdict"], fail.fields["rejected"], fail.fields["latency_ms"]) == ("FAIL", 1, 249.999)


def test_two_verdicts_of_one_millisecond_are_two_rows_and_a_double_is_one() -> None:
    [processor] = CONFIGURATION["processors"]["starlark"]
    scope: dict[str, Any] = {}
    exec(processor["source"], scope)  # noqa: S102 -- Starlark is a part of Python

    def time_ns(seq: int) -> int:
        content = json.loads(GOLDEN["verdict_pass"])
        taken = row(CONFIGURATION["inputs"]["mqtt_consumer"][0], json.dumps({**content, "seq": seq}).encode())
        metric = _Metric(taken.time_ns, taken.fields)
        result: int = scope["apply"](metric).time
        return result

    assert time_ns(184213) == time_ns(184213)
    assert time_ns(184213) != time_ns(184214)
    assert time_ns(184213) // 1_000_000 == json.loads(GOLDEN["verdict_pass"])["ts_ms"]


@dataclass(slots=True)
class _Metric:
    time: int
    fields: dict[str, Any]


@pytest.mark.skipif(shutil.which("influxd") is None, reason="InfluxDB is not installed (apt-get install influxdb)")
def test_the_queries_of_the_page_give_yield_and_scores(tmp_path: Path) -> None:
    port = free_port()
    folders = {"meta": ["dir"], "data": ["dir", "wal-dir"]}
    sections = "".join(
        f"[{name}]\n" + "".join(f'{key} = "{tmp_path / name / key}"\n' for key in keys)
        for name, keys in folders.items()
    )
    http = f'[http]\nbind-address = "{HOST}:{port}"\n'
    (tmp_path / "conf").write_text(
        f'reporting-disabled = true\nbind-address = "{HOST}:{free_port()}"\n{sections}{http}'
    )

    def ask(path: str, body: bytes | None = None, **parameters: str) -> Any:
        url = f"http://{HOST}:{port}/{path}?{urlencode(parameters)}"
        with urlopen(HttpRequest(url, body), timeout=DEADLINE_S) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def answers() -> bool:
        try:
            ask("ping")
        except URLError:
            return False
        return True

    now_ns = int(datetime.now(UTC).timestamp()) * 10**9
    verdicts = [GOLDEN[f"verdict_{name}"] for name in ("pass", "triggered", "fail", "error")]
    rows = [row(CONFIGURATION["inputs"]["mqtt_consumer"][0], payload) for payload in verdicts]
    lines = "\n".join(str(replace(each, time_ns=now_ns + place)) for place, each in enumerate(rows))
    with running(["influxd", "-config", str(tmp_path / "conf")], tmp_path / "log"):
        eventually(answers, "InfluxDB")
        ask("query", b"", q="CREATE DATABASE inspectd")
        ask("write", lines.encode(), db="inspectd")
        [queries] = blocks("Telegraf, InfluxDB, Grafana", "sql")
        found = [ask("query", db="inspectd", q=query)["results"][0]["series"][0] for query in queries.splitlines()]
    assert [series["tags"]["station"] for series in found] == ["top", "top"]
    assert [series["values"][0][1:] for series in found] == [[0.5], [0.875, 1.8375]]
