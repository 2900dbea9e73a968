"""A station that obeys over a real broker: a folder, a small detector, all its threads, and a PLC that is not ours."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import cv2
import numpy as np
import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from ulid import ULID

from calibration.calibration import Provenance, fit
from daemon import boards, link, pipeline
from daemon.announcements import Birth, EventKind, encode_event
from daemon.announcements import Event as Noted
from daemon.challenge import Challenge, ChallengeSet
from daemon.channel import Channel, Overflow
from daemon.contract import Identity, Message, encode_state
from daemon.control import Control, standing, unkept
from daemon.execution import UNACKNOWLEDGED, Execution, Mode
from daemon.health import StationHealth
from daemon.messages import Capture, Frame, Outcome, Unreadable
from daemon.outbox import ANSWERS_KEPT_S, Answer, Outbox, OutboxError, Promise
from daemon.pipeline import Concluded, Station
from daemon.quality import StationQuality
from daemon.recipes import Load, Recipe, Recipes
from daemon.requests import REQUEST, REQUEST_LIMIT, RESPONSE, TRIGGER, Action, Code, Received
from daemon.sinks.mqtt import StationSink
from daemon.sources.base import ALWAYS, Demand
from daemon.sources.folder.source import FolderSource
from daemon.stats import Drop, Window
from detectors.base import ArtifactError, Image
from detectors.template import TemplateDetector
from tests.brokers import DEADLINE_S, HOST, Broker

GOOD = np.full((8, 8, 3), 100, np.uint8)
BAD = np.full((8, 8, 3), 200, np.uint8)
LIKE = {"plates": GOOD, "rings": BAD}
"""What a good part of each recipe looks like."""
B = "inspectd/top"
FOR_EVER = 3600.0
QUIET_S = 0.3


class FullDisk(Outbox):
    """An outbox whose disk has no room for answers."""

    full = True

    def answer(self, answer: Answer, promise: Promise | None = None, **more: Any) -> None:
        if self.full:
            raise OutboxError("disk full")
        super().answer(answer, promise, **more)


class Cell:
    """One station with all that `service` gives it but a configuration."""

    def __init__(
        self,
        folder: Path,
        *,
        mode: Mode = Mode.READY,
        timeout_s: float = FOR_EVER,
        acknowledged: bool = False,
        outbox: Outbox | None = None,
        tested: bool = False,
        held: int = 8,
    ) -> None:
        self.incoming = folder / "incoming"
        self.incoming.mkdir(exist_ok=True)
        self.outbox = outbox or Outbox(folder / "outbox.sqlite3")
        self.recipes = Recipes(
            {name: partial(_recipe, index, name, folder, tested=tested) for index, name in enumerate(LIKE, 1)},
            self.outbox.prepared("top"),
            held=held,
        )
        last_seq = self.outbox.last_seq("top")
        self.execution = Execution(
            "top",
            mode,
            last_seq,
            timeout_s=timeout_s,
            acknowledged=acknowledged,
            aborted=unkept(self.outbox, "top"),
        )
        self.health = StationHealth("top", last_seq, self.recipes, self.execution, self.outbox.counters("top"))
        self.health.source_is(available=True)
        self.control = Control(self.identity, self.execution, self.recipes, self.health, self.outbox, self._note)

    @property
    def identity(self) -> Identity:
        return self.recipes.current.identity

    def drop(self, name: str, image: Image = GOOD) -> None:
        """A part comes: its file appears whole."""
        hidden = self.incoming / f".{name}"
        hidden.write_bytes(cv2.imencode(".png", image)[1].tobytes())
        hidden.rename(self.incoming / f"{name}.png")

    def waiting(self) -> list[str]:
        """Parts that nobody has touched."""
        return sorted(file.stem for file in self.incoming.glob("*.png"))

    def verdicts(self) -> list[dict[str, Any]]:
        return [json.loads(entry.payload) for entry in self.outbox.entries("top", 0, 1000)]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(note.payload) for note in self.outbox.notes("top", 0, 1000)]

    def ask(self, content: object, leaf: str = REQUEST, **more: Any) -> dict[str, Any]:
        """What a command is answered, without a broker."""
        return dict(json.loads(self.answer(content, leaf, **more).payload))

    def answer(self, content: object, leaf: str = REQUEST, **more: Any) -> Message:
        sent: list[Message] = []
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.control.obey(Received(f"{B}/{leaf}", payload, **more), sent.append)
        (answer,) = sent
        return answer

    def do(self, action: str, cmd_id: str = "", **args: Any) -> dict[str, Any]:
        return self.ask({"cmd_id": cmd_id or str(ULID()), "action": action, "args": args})

    @contextmanager
    def running(self, broker: link.Broker) -> Iterator[None]:
        """All threads at work."""
        stop, drained = Event(), Event()
        sink = StationSink(
            lambda: broker,
            self.identity,
            self.outbox,
            halted=lambda: encode_state(self.identity, self.health.state(0), datetime.now(UTC)),
            boards=[
                boards.birth_board(
                    lambda: self.identity, lambda: Birth("1", "folder", "", 1, 1, "", (), tuple(LIKE), ())
                ),
                boards.state_board(lambda: self.identity, lambda: self.health.state(0)),
                boards.quality_board(lambda: self.identity, self.health.quality.report),
                boards.alarms_board(self.identity, self.health.alarms.active),
            ],
            commands=self.control,
            actuation_ttl_s=DEADLINE_S,
            backoff_s=(0.02, 0.1),
        )
        source = FolderSource("top", self.incoming, concluded=self.outbox.concluded, settle_ms=20, rescan_s=0.2)
        station = Station("top", source, self.recipes, sink, self.health, self.execution, DEADLINE_S)
        frames = pipeline.lanes(["top"])
        concluded: Channel[Concluded] = Channel(8, Overflow.WAIT)
        pictures: Channel[Concluded] = Channel(1, Overflow.DROP_OLDEST)
        failures: list[BaseException] = []

        def guarded(stage: Callable[[], None]) -> None:
            try:
                stage()
            except BaseException as failure:  # noqa: BLE001 -- what the service would end for
                failures.append(failure)

        stages: list[Callable[[], None]] = [
            lambda: pipeline.acquire(station, frames, stop),
            lambda: pipeline.inspect(frames, {"top": station}, concluded, 8),
            lambda: pipeline.record(concluded, {"top": station}, self.outbox, pictures, stop),
            lambda: sink.run(drained, DEADLINE_S),
        ]
        threads = [Thread(target=guarded, args=(stage,)) for stage in stages]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            threads[0].join(DEADLINE_S)
            frames.close()
            for thread in threads[1:3]:
                thread.join(DEADLINE_S)
            drained.set()
            sink.notify()
            threads[3].join(DEADLINE_S)
            assert not [thread for thread in threads if thread.is_alive()]
            assert failures == []

    def _note(self, kind: EventKind, subject: str, detail: str, _user: str) -> None:
        at = datetime.now(UTC)
        self.outbox.tell(
            "top", "event", encode_event(self.identity, Noted(str(ULID()), kind, subject, detail, at)).payload
        )


def _recipe(index: int, name: str, folder: Path, *, tested: bool) -> Recipe:
    detector = TemplateDetector(LIKE[name])
    made = Provenance(detector.fingerprint, "d", datetime.now(UTC))
    calibration = fit([1.0, 2.0, 3.0], alpha=0.3, provenance=made)
    fingerprint, carried = detector.fingerprint, calibration.alpha_carried
    identity = Identity("inspectd", "edge", "top", "b001", "m", fingerprint, calibration.id, carried, name, index)
    parts = ChallengeSet("box", frozenset({"g"}), frozenset({"b"}), timedelta(hours=8), timedelta(minutes=30))
    challenge = Challenge(parts, f"top.{name}", folder, holds_station=False) if tested else None
    return Recipe(identity, detector, calibration, StationQuality("top", calibration, challenge))


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Callable[..., Cell]]:
    """Stations, one after the other, that end with the test."""
    with ExitStack() as stack:

        def make(**options: Any) -> Cell:
            made = Cell(tmp_path, **options)
            stack.callback(made.outbox.close)
            return made

        yield make


@dataclass(frozen=True, slots=True)
class Heard:
    """A message as the PLC got it."""

    topic: str
    payload: bytes
    correlation: bytes | None

    @property
    def content(self) -> dict[str, Any]:
        return dict(json.loads(self.payload))


class Plc:
    """A plain paho client that hears everything."""

    def __init__(self, broker: Broker, *, five: bool = True) -> None:
        self._changed = threading.Condition()
        self._subscribed = False
        self.heard: list[Heard] = []
        version = MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311
        for _ in range(3):  # amqtt has been seen to leave one who comes just after others have left without an answer
            self._client = Client(CallbackAPIVersion.VERSION2, protocol=version, reconnect_on_failure=False)
            self._client.on_connect = lambda client, *_: client.subscribe("#", 1)
            self._client.on_subscribe = self._on_subscribe
            self._client.on_message = self._on_message
            self._client.connect(HOST, broker.port)
            self._client.loop_start()
            with self._changed:
                if self._changed.wait_for(lambda: self._subscribed, DEADLINE_S / 3):
                    break
            self.close()
        assert self._subscribed
        self.wait(lambda: self.of("status"), "the station to be online")

    def of(self, leaf: str) -> list[dict[str, Any]]:
        return [heard.content for heard in self.heard if heard.topic == f"{B}/{leaf}"]

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        with self._changed:
            held = self._changed.wait_for(condition, DEADLINE_S)
        assert held, f"still waiting for {what}; heard {[(heard.topic, heard.payload) for heard in self.heard[-9:]]}"

    def publish(
        self,
        content: object,
        leaf: str = REQUEST,
        *,
        retain: bool = False,
        reply_to: str | None = None,
        correlation: bytes | None = None,
    ) -> None:
        properties = None
        if reply_to is not None:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call] # paho's
            properties.ResponseTopic = reply_to
        if correlation is not None:
            assert properties is not None
            properties.CorrelationData = correlation
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._client.publish(f"{B}/{leaf}", payload, 1, retain, properties)

    def ask(self, content: object, leaf: str = REQUEST, **more: Any) -> dict[str, Any]:
        """The next answer on the station's own topic."""
        before = len(self.of(RESPONSE))
        self.publish(content, leaf, **more)
        self.wait(lambda: len(self.of(RESPONSE)) > before, "an answer")
        return self.of(RESPONSE)[before]

    def wait_for(self, leaf: str, count: int) -> list[dict[str, Any]]:
        self.wait(lambda: len(self.of(leaf)) >= count, f"{count} of {leaf}")
        return self.of(leaf)

    def wait_for_verdicts(self, count: int) -> list[dict[str, Any]]:
        return self.wait_for("verdict", count)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_subscribe(self, *_: object) -> None:
        with self._changed:
            self._subscribed = True
            self._changed.notify_all()

    def _on_message(self, _: Client, __: object, message: MQTTMessage) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        with self._changed:
            self.heard.append(Heard(message.topic, bytes(message.payload), correlation))
            self._changed.notify_all()


@contextmanager
def talking(cell: Cell, broker: Broker) -> Iterator[Plc]:
    """A running station and the PLC that is connected to it."""
    with ExitStack() as stack:
        stack.enter_context(cell.running(settings(broker)))
        plc = Plc(broker, five=broker.five)
        stack.callback(plc.close)
        yield plc


def settings(broker: Broker) -> link.Broker:
    return link.Broker(HOST, broker.port, protocol="auto" if broker.five else "3.1.1")


def trigger(cmd_id: str, **more: Any) -> dict[str, Any]:
    return {"cmd_id": cmd_id, **more}


# The handshake


def test_a_trigger_is_accepted_with_the_number_that_its_messages_then_carry(
    broker: Broker, cell: Callable[..., Cell]
) -> None:
    made = cell()
    with talking(made, broker) as plc:
        said = {"trigger_id": "T-1", "part_id": "SN-1", "batch_id": "B-1", "meta": {"cavity": 3, "oven": "north"}}
        accepted = plc.ask(trigger("c1", **said), TRIGGER)
        assert (accepted["code"], accepted["result"], accepted["seq"]) == (1, "ACCEPTED", 1)
        assert (accepted["cmd_id"], accepted["action"], accepted["station"]) == ("c1", "trigger", "top")
        made.drop("file1")
        (verdict,) = plc.wait_for_verdicts(1)
        slow = plc.ask({"cmd_id": "c2", "action": "trigger", "args": {"part_id": "SN-2"}})
        made.drop("file2", BAD)
        second = plc.wait_for_verdicts(2)[1]
        plc.wait(lambda: len(plc.of("plc")) == 2, "both messages to the gate")
    assert {key: verdict[key] for key in said} == said
    assert (verdict["seq"], verdict["verdict"], verdict["result_state"]) == (1, "PASS", 1)
    assert verdict["source"].endswith("file1.png")
    assert (slow["seq"], second["seq"], second["verdict"]) == (2, 2, "FAIL")
    assert (second["trigger_id"], second["part_id"]) == ("c2", "SN-2")
    gate = [(told["s"], told["tr"], told["p"], told["r"]) for told in plc.of("plc")]
    assert gate == [(1, "T-1", "SN-1", False), (2, "c2", "SN-2", True)]
    leaves = [heard.topic.removeprefix(f"{B}/") for heard in plc.heard]
    assert leaves.index(RESPONSE) < leaves.index("plc")


def test_a_command_that_comes_again_is_answered_by_the_same_bytes_and_obeyed_once_over_a_restart_too(
    broker: Broker, cell: Callable[..., Cell]
) -> None:
    made = cell()
    late = int(time.time() * 1000) + 500
    asked = [
        ({"cmd_id": "c1", "part_id": "SN-1", "expires_ms": late}, TRIGGER),
        ({"cmd_id": "c2", "action": "prepare_recipe", "args": {"recipe": "rings"}}, REQUEST),
        ({"cmd_id": "c3", "action": "prepare_recipe", "args": {"recipe": "cubes"}}, REQUEST),
    ]
    with talking(made, broker) as plc:
        plc.ask(*asked[0])
        plc.ask(*asked[0])
        made.drop("one")
        plc.wait_for_verdicts(1)
        for content, leaf in asked:
            plc.ask(content, leaf)
        first = answers(plc)
    assert first["c1"][0] == first["c1"][1] == first["c1"][2]
    Event().wait(max(0.0, late / 1000 - time.time()))
    again = cell()
    assert again.recipes.current.name == "rings"
    with talking(again, broker) as plc:
        for content, leaf in asked:
            plc.ask(content, leaf)
        repeated = answers(plc)
        again.drop("nobody's")
        state = plc.ask({"cmd_id": "s", "action": "get_state"})
    assert {cmd_id: repeated[cmd_id][0] for cmd_id in first} == {cmd_id: said[0] for cmd_id, said in first.items()}
    assert state["state"] == "Ready"
    assert again.outbox.last_seq("top") == 1
    assert [event["subject"] for event in again.events()] == []
    assert again.waiting() == ["nobody's"]


def answers(plc: Plc) -> dict[str, list[bytes]]:
    """What each command was answered, in order."""
    found: dict[str, list[bytes]] = {}
    for heard in plc.heard:
        if heard.topic == f"{B}/{RESPONSE}":
            found.setdefault(heard.content["cmd_id"], []).append(heard.payload)
    return found


def test_an_answer_goes_where_mqtt_5_says_with_its_correlation_data_and_never_where_stations_speak(
    mosquitto: Callable[..., Broker], cell: Callable[..., Cell]
) -> None:
    with talking(cell(), mosquitto()) as plc:
        state = {"cmd_id": "s", "action": "get_state"}
        plc.publish(state, reply_to="plc7/answers", correlation=b"\x00\xff")
        plc.wait(lambda: [heard for heard in plc.heard if heard.topic == "plc7/answers"], "the answer")
        (answer,) = [heard for heard in plc.heard if heard.topic == "plc7/answers"]
        assert answer.correlation == b"\x00\xff"
        assert (answer.content["cmd_id"], answer.content["code"]) == ("s", 0)
        assert plc.of(RESPONSE) == []
        for topic in (f"{B}/verdict", f"{B}/plc", "inspectd/side/cmd/response", f"{B}/{TRIGGER}"):
            before = len(plc.heard)
            refused = plc.ask({"cmd_id": topic, "action": "halt"}, reply_to=topic)
            assert (refused["cmd_id"], refused["code"], refused["state"]) == (topic, 13, "Ready")
            assert topic not in [heard.topic for heard in plc.heard[before:] if heard.topic != f"{B}/{RESPONSE}"]
        assert plc.ask(state, reply_to="plc7/x", correlation=bytes(257))["code"] == 13


def test_an_answer_that_the_broker_does_not_let_through_costs_the_station_nothing(
    tmp_path: Path, mosquitto: Callable[..., Broker], cell: Callable[..., Cell]
) -> None:
    rights = tmp_path / "acl"
    rights.write_text("topic readwrite inspectd/#\ntopic read #\n")
    rights.chmod(0o600)
    made = cell()
    with talking(made, mosquitto(f"acl_file {rights}")) as plc:
        for n in range(3):
            plc.publish({"cmd_id": str(n), "action": "get_state"}, reply_to="plc7/answers")
        assert plc.ask(trigger("c1"), TRIGGER)["code"] == 1
        made.drop("one")
        plc.wait_for_verdicts(1)
        assert [status["reason"] for status in plc.of("status")] == ["running"]


def test_a_retained_command_is_refused_and_never_obeyed(
    mosquitto: Callable[..., Broker], cell: Callable[..., Cell]
) -> None:
    broker, made = mosquitto(), cell()
    with talking(made, broker) as plc:
        assert plc.ask({"cmd_id": "r1", "action": "halt"}, retain=True)["code"] == 17
        assert plc.ask(trigger("r2"), TRIGGER, retain=True)["code"] == 17
    again = cell()
    with talking(again, broker) as plc:
        plc.wait(lambda: len(plc.of(RESPONSE)) == 2, "the refusals at the next connection")
        assert sorted((answer["cmd_id"], answer["code"]) for answer in plc.of(RESPONSE)) == [("r1", 17), ("r2", 17)]
        assert plc.ask({"cmd_id": "s", "action": "get_state"})["state"] == "Ready"
    assert again.verdicts() == again.events() == []


GARBAGE = [
    b"",
    b"\x00\x01\xff",
    b"[" * 1024,
    b"{" * 20_000,
    b'{"cmd_id":"1","action":"stop"}'.ljust(REQUEST_LIMIT + 1),
    b'{"cmd_id":"\\ud800","action":"stop"}',
    b'{"cmd_id":"1","action":"trigger","args":{"meta":{"a":1e999}}}',
    b'{"cmd_id":"1","action":"ack_result","args":{"seq":%s}}' % (b"9" * 500),
    b'{"cmd_id":"1","action":"trigger","args":{"meta":%s}}' % (b"[" * 480 + b"]" * 480),
    b"null",
]


@pytest.mark.parametrize("leaf", [REQUEST, TRIGGER])
def test_whatever_comes_is_answered_and_the_station_goes_on(
    broker: Broker, cell: Callable[..., Cell], leaf: str
) -> None:
    made = cell()
    with talking(made, broker) as plc:
        for payload in GARBAGE:
            assert plc.ask(payload, leaf)["code"] == 13, payload
        assert plc.ask({"cmd_id": "1", "action": "fly"}, leaf)["code"] == 12
        assert plc.ask({"cmd_id": "1", "action": "trigger", "expires_ms": 1}, leaf)["code"] == 16
        assert plc.ask({"cmd_id": "1", "action": "trigger"}, leaf)["seq"] == 1
        made.drop("one")
        assert plc.wait_for_verdicts(1)[0]["trigger_id"] == "1"


# Triggers that get no part


def test_a_trigger_without_a_part_has_its_verdict_in_time_also_while_there_is_no_folder(
    mosquitto: Callable[..., Broker], cell: Callable[..., Cell]
) -> None:
    made = cell(timeout_s=0.2)
    with talking(made, mosquitto()) as plc:
        assert plc.ask(trigger("c1", part_id="SN-1"), TRIGGER)["seq"] == 1
        plc.wait_for_verdicts(1)
        for room in made.incoming.iterdir():
            room.rmdir()
        made.incoming.rmdir()
        plc.wait(lambda: plc.of("state")[-1]["camera"] == "offline", "the station to miss its folder")
        assert plc.ask(trigger("c2", meta={"a": 1}), TRIGGER)["seq"] == 2
        first, second = plc.wait_for_verdicts(2)
        plc.wait(lambda: len(plc.of("plc")) == 2, "the messages to the gate")
    assert (first["verdict"], first["reason_code"], first["result_state"]) == ("ERROR", 300, 4)
    assert (first["seq"], first["trigger_id"], first["part_id"], first["reject"]) == (1, "c1", "SN-1", True)
    assert (second["seq"], second["reason_code"], second["meta"]) == (2, 300, {"a": 1})
    assert [(gate["s"], gate["tr"], gate["r"]) for gate in plc.of("plc")] == [(1, "c1", True), (2, "c2", True)]


def test_a_trigger_that_comes_while_another_waits_is_busy_and_has_its_own_verdict(
    mosquitto: Callable[..., Broker], cell: Callable[..., Cell]
) -> None:
    made = cell()
    with talking(made, mosquitto()) as plc:
        made.drop("before")
        Event().wait(QUIET_S)
        assert made.waiting() == ["before"]
        first, second = plc.ask(trigger("c1"), TRIGGER), plc.ask(trigger("c2", part_id="SN-2"), TRIGGER)
        assert (first["code"], second["code"], first["seq"], second["seq"]) == (1, 10, 1, 2)
        assert second["state"] == "SingleExecution"
        made.drop("mine")
        plc.wait_for_verdicts(2)
        assert made.waiting() == ["before"]
        assert plc.ask({"cmd_id": "c3", "action": "start"})["code"] == 0
        told = plc.wait_for_verdicts(3)
    assert [(v["seq"], v["trigger_id"], v["part_id"], v["reason_code"]) for v in told] == [
        (1, "c1", "mine", 0),
        (2, "c2", "SN-2", 302),
        (3, "", "before", 0),
    ]


def test_the_part_of_a_trigger_is_found_behind_a_folder_of_older_files_which_stay_where_they_are(
    mosquitto: Callable[..., Broker], cell: Callable[..., Cell]
) -> None:
    made = cell()
    for number in range(300):
        made.drop(f"old{number:03d}")
    with talking(made, mosquitto()) as plc:
        for number in range(3):
            assert plc.ask(trigger(f"c{number}"), TRIGGER)["code"] == 1
            made.drop(f"new{number}")
            plc.wait_for_verdicts(number + 1)
        told = plc.wait_for_verdicts(3)
    assert [(v["trigger_id"], v["part_id"], v["reason_code"]) for v in told] == [
        ("c0", "new0", 0),
        ("c1", "new1", 0),
        ("c2", "new2", 0),
    ]
    assert len(made.waiting()) == 300


def test_a_station_whose_prepared_recipe_is_gone_is_halted(cell: Callable[..., Cell]) -> None:
    made = cell()
    first, second = made.recipes.identities
    assert made.do("prepare_recipe", recipe=second.recipe)["code"] == 0
    assert standing(made.outbox, "top", Mode.CONTINUOUS, made.recipes) is Mode.CONTINUOUS
    without = Recipes({first.recipe: partial(made.recipes.load, first.recipe)}, second.recipe)
    assert standing(made.outbox, "top", Mode.CONTINUOUS, without) is Mode.HALTED


def test_what_a_command_told_the_station_to_do_is_known_to_the_next_run(cell: Callable[..., Cell]) -> None:
    made = cell()
    assert made.outbox.mode("top") is None
    for action, mode in (("halt", "Halted"), ("reset", "Ready"), ("start", "ContinuousExecution"), ("stop", "Ready")):
        assert made.do(action)["code"] == 0
        assert made.outbox.mode("top") == mode
        assert standing(made.outbox, "top", Mode.CONTINUOUS, made.recipes).value == mode
    assert made.do("reset_stats")["code"] == 0
    assert made.outbox.mode("top") == "Ready"


def test_a_restart_aborts_what_it_had_accepted_with_the_number_that_it_had_promised(
    mosquitto: Callable[..., Broker], cell: Callable[..., Cell]
) -> None:
    broker, made = mosquitto(), cell()
    with talking(made, broker) as plc:
        assert plc.ask(trigger("c1", part_id="SN-1"), TRIGGER)["seq"] == 1
        assert plc.ask(trigger("c2"), TRIGGER)["seq"] == 2
    assert made.verdicts() == []
    again = cell()
    with talking(again, broker) as plc:
        told = plc.wait_for_verdicts(2)
        assert plc.ask(trigger("c1", part_id="SN-1"), TRIGGER)["seq"] == 1
        assert plc.ask(trigger("c3"), TRIGGER)["seq"] == 3
        again.drop("three")
        third = plc.wait_for_verdicts(3)[2]
    assert [(v["seq"], v["trigger_id"], v["reason_code"], v["result_state"]) for v in told] == [
        (1, "c1", 305, 3),
        (2, "c2", 305, 3),
    ]
    assert (third["seq"], third["trigger_id"], third["verdict"]) == (3, "c3", "PASS")
    assert again.outbox.promises("top") == []


def test_a_promised_number_holds_though_parts_before_it_were_lost_with_the_run(cell: Callable[..., Cell]) -> None:
    made = cell(mode=Mode.CONTINUOUS)
    for name in ("a", "b"):
        made.execution.admit(came(name, GOOD))
    made.do("stop")
    assert [made.do("trigger", cmd_id)["seq"] for cmd_id in ("c1", "c2")] == [3, 4]
    again = cell()
    told = conveyed(again, lambda: came("a", GOOD))
    assert [(v["seq"], v["trigger_id"], v["part_id"], v["reason_code"]) for v in told] == [
        (1, "", "", 305),
        (2, "", "", 305),
        (3, "c1", "", 305),
        (4, "c2", "", 305),
        (5, "", "a", 0),
    ]
    assert again.outbox.promises("top") == []


def test_eight_results_without_acknowledgement_are_enough_until_one_is_acknowledged(
    mosquitto: Callable[..., Broker], cell: Callable[..., Cell]
) -> None:
    made = cell(acknowledged=True)
    with talking(made, mosquitto()) as plc:
        for n in range(UNACKNOWLEDGED):
            assert plc.ask(trigger(f"c{n}"), TRIGGER)["code"] == 1
            made.drop(f"part{n}")
            plc.wait_for_verdicts(n + 1)
        plc.wait(lambda: plc.of("state")[-1]["ready"] is False, "the station not to be ready")
        refused = plc.ask(trigger("over"), TRIGGER)
        assert (refused["code"], refused["seq"]) == (10, UNACKNOWLEDGED + 1)
        assert plc.wait_for_verdicts(9)[8]["reason_code"] == 302
        assert plc.ask({"cmd_id": "a0", "action": "ack_result", "args": {"seq": 9}})["code"] == 14
        assert plc.ask({"cmd_id": "a1", "action": "ack_result", "args": {"seq": 3}})["code"] == 0
        assert plc.ask({"cmd_id": "a2", "action": "ack_result", "args": {"seq": 3}})["code"] == 14
        assert (
            plc.ask({"cmd_id": "a3", "action": "ack_result", "args": {"id": plc.of("verdict")[0]["id"]}})["code"] == 0
        )
        plc.wait(lambda: plc.of("state")[-1]["ready"] is True, "the station to be ready")
        assert plc.ask({"cmd_id": "g", "action": "republish"})["code"] == 0
        plc.wait(lambda: plc.of("state")[-1]["unacknowledged"] == 6, "the count")
        assert plc.ask(trigger("next"), TRIGGER)["code"] == 1


# Modes


def test_a_station_that_was_stopped_leaves_the_files_alone_until_it_is_started(
    broker: Broker, cell: Callable[..., Cell]
) -> None:
    made = cell(mode=Mode.CONTINUOUS)
    with talking(made, broker) as plc:
        made.drop("one")
        plc.wait_for_verdicts(1)
        refused = plc.ask(trigger("c1"), TRIGGER)
        assert (refused["code"], refused["seq"], refused["state"]) == (11, 0, "ContinuousExecution")
        assert plc.ask({"cmd_id": "c2", "action": "stop", "user": "m.weber"})["state"] == "Ready"
        made.drop("two")
        made.drop("three")
        Event().wait(QUIET_S)
        assert made.waiting() == ["three", "two"]
        assert plc.ask({"cmd_id": "c3", "action": "start"})["state"] == "ContinuousExecution"
        told = plc.wait_for_verdicts(3)
        plc.wait(lambda: len(plc.of("event")) == 2, "the events")
    assert [v["seq"] for v in told] == [1, 2, 3]
    assert {v["trigger_id"] for v in told} == {""}
    events = [(event["kind"], event["subject"], event["detail"]) for event in plc.of("event")]
    assert events == [("command", "stop", "DONE by m.weber"), ("command", "start", "DONE")]


READY, SINGLE, CONTINUOUS, HALTED = Mode.READY, Mode.SINGLE, Mode.CONTINUOUS, Mode.HALTED
TABLE: dict[str, dict[Mode, Mode | None]] = {
    "start": {READY: CONTINUOUS, CONTINUOUS: CONTINUOUS, SINGLE: None, HALTED: None},
    "stop": {READY: READY, CONTINUOUS: READY, SINGLE: SINGLE, HALTED: None},
    "abort": {READY: READY, CONTINUOUS: READY, SINGLE: READY, HALTED: None},
    "halt": {READY: HALTED, CONTINUOUS: HALTED, SINGLE: HALTED, HALTED: HALTED},
    "reset": {READY: READY, CONTINUOUS: None, SINGLE: None, HALTED: READY},
}


@pytest.mark.parametrize("action", TABLE)
@pytest.mark.parametrize("mode", [READY, SINGLE, CONTINUOUS, HALTED])
def test_each_command_leads_from_mode_to_mode_as_opc_40100_has_it(
    cell: Callable[..., Cell], action: str, mode: Mode
) -> None:
    made = cell(mode=READY if mode is SINGLE else mode)
    if mode is SINGLE:
        made.do("trigger")
    to = TABLE[action][mode]
    answer = made.do(action)
    assert (answer["code"], answer["state"]) == ((0, to.value) if to else (11, mode.value))
    ended = made.execution.admit(None)
    aborted = [item.reason for item in ended if isinstance(item, Unreadable)]
    assert bool(aborted) == (mode is SINGLE and action in {"abort", "halt"})
    assert made.execution.mode is (to or mode)


@pytest.mark.parametrize("mode", [CONTINUOUS, HALTED])
def test_a_trigger_in_the_wrong_state_is_promised_nothing_and_told_the_way_out(
    cell: Callable[..., Cell], mode: Mode
) -> None:
    made = cell(mode=mode)
    refused = made.do("trigger")
    assert (refused["code"], refused["seq"], refused["state"]) == (11, 0, mode.value)
    way_out = "reset" if mode is HALTED else "stop"
    assert way_out in refused["message"]
    assert made.do(way_out)["code"] == 0
    assert made.do("trigger")["code"] == 1


# Recipes


def test_another_recipe_is_for_the_parts_that_come_from_then_on_and_outlives_a_restart(
    mosquitto: Callable[..., Broker], cell: Callable[..., Cell]
) -> None:
    broker, made = mosquitto(), cell()
    with talking(made, broker) as plc:
        for n, (recipe, image) in enumerate([("plates", GOOD), ("rings", BAD), ("plates", BAD)]):
            assert plc.ask({"cmd_id": f"p{n}", "action": "prepare_recipe", "args": {"recipe": recipe}})["code"] == 0
            plc.ask(trigger(f"t{n}"), TRIGGER)
            busy = plc.ask({"cmd_id": f"b{n}", "action": "prepare_recipe", "args": {"index": 2}})
            assert busy["code"] == 10
            made.drop(f"part{n}", image)
            plc.wait_for_verdicts(n + 1)
        unknown = plc.ask({"cmd_id": "u", "action": "prepare_recipe", "args": {"index": 3}})
        assert (unknown["code"], "rings" in unknown["message"]) == (14, True)
        assert plc.ask({"cmd_id": "last", "action": "prepare_recipe", "args": {"index": 2}})["message"] == "2 rings"
        plc.wait(lambda: plc.of("state")[-1]["recipe"] == "rings", "the state to say so")
        plc.wait(lambda: plc.of("birth")[-1]["recipe_index"] == 2, "the birth to say so")
    assert [(v["recipe"], v["verdict"]) for v in plc.of("verdict")] == [
        ("plates", "PASS"),
        ("rings", "PASS"),
        ("plates", "FAIL"),
    ]
    assert cell().recipes.current.name == "rings"


class Belt:
    """A source that does what the test tells it, in the thread that acquires."""

    def __init__(self, steps: Sequence[Callable[[], Frame | None]]) -> None:
        self._steps = steps

    def frames(self, stop: Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:  # noqa: ARG002 -- the protocol's signature
        for step in self._steps:
            yield step()
        stop.set()

    def settle(self, capture: Capture, failure: str | None) -> bool:  # noqa: ARG002 -- the protocol's signature
        return True


class Deaf:
    def actuate(self, message: Message) -> None:
        pass

    def notify(self) -> None:
        pass


def conveyed(
    cell: Cell, *steps: Callable[[], Frame | None], overflow: Overflow = Overflow.WAIT
) -> list[dict[str, Any]]:
    """The verdicts on what a source gives, all of which is on its way before the first is judged."""
    station = Station("top", Belt(steps), cell.recipes, Deaf(), cell.health, cell.execution, 5.0, overflow)
    frames = pipeline.lanes(["top"])
    concluded: Channel[Concluded] = Channel(100, Overflow.WAIT)
    pictures: Channel[Concluded] = Channel(1, Overflow.DROP_OLDEST)
    acquiring = Thread(target=pipeline.acquire, args=(station, frames, Event()))
    acquiring.start()
    acquiring.join(QUIET_S)

    def close() -> None:
        acquiring.join()
        frames.close()

    closing = Thread(target=close)
    closing.start()
    pipeline.inspect(frames, {"top": station}, concluded, 8)
    pipeline.record(concluded, {"top": station}, cell.outbox, pictures, Event())
    closing.join()
    return cell.verdicts()


def came(name: str, image: Image, ago: timedelta = timedelta(0)) -> Frame:
    at = datetime.now(UTC) - ago
    return Frame(Capture(str(ULID()), "top", name, at, at, time.monotonic(), f"/in/{name}.png"), image)


LONG_AGO = timedelta(seconds=60)


def test_parts_keep_the_recipe_and_the_number_that_they_came_under_though_they_are_judged_together(
    cell: Callable[..., Cell],
) -> None:
    made = cell(mode=CONTINUOUS)

    def second() -> Frame:
        assert made.do("prepare_recipe", recipe="rings")["code"] == 0
        return came("b", BAD)

    def third() -> Frame:
        assert [made.do(*asked)["code"] for asked in (("stop",), ("reset",))] == [0, 0]
        assert made.do("prepare_recipe", index=1)["code"] == 0
        assert made.do("trigger", "c1")["seq"] == 3
        return came("c", GOOD)

    told = conveyed(made, lambda: came("a", GOOD), second, third)
    assert [(v["seq"], v["part_id"], v["recipe"], v["verdict"]) for v in told] == [
        (1, "a", "plates", "PASS"),
        (2, "b", "rings", "PASS"),
        (3, "c", "plates", "PASS"),
    ]


def test_where_old_parts_give_way_to_new_ones_none_does_that_a_promised_number_counts(
    cell: Callable[..., Cell],
) -> None:
    made = cell(mode=CONTINUOUS)

    def answer() -> Frame:
        assert made.do("stop")["code"] == 0
        assert made.do("trigger", "c1")["seq"] == pipeline.FRAMES
        return came("old", GOOD, LONG_AGO)

    # With the part of the trigger there is no room left for the one that came before it.
    names = [f"part{n}" for n in range(1, pipeline.FRAMES)]
    parts = [partial(came, name, GOOD) for name in names]
    told = conveyed(made, *parts, answer, lambda: came("mine", GOOD), overflow=Overflow.DROP_OLDEST)
    assert [(v["part_id"], v["trigger_id"]) for v in told] == [
        *((name, "") for name in names),
        ("mine", "c1"),
        ("old", ""),
    ]
    assert [v["seq"] for v in told] == list(range(1, len(told) + 1))


def test_where_old_parts_give_way_to_new_ones_they_do_so_as_long_as_no_number_is_promised(
    cell: Callable[..., Cell],
) -> None:
    made = cell(mode=CONTINUOUS)
    parts = [partial(came, f"part{n}", GOOD) for n in range(pipeline.FRAMES + 2)]
    told = conveyed(made, *parts, overflow=Overflow.DROP_OLDEST)
    assert [v["part_id"] for v in told] == [f"part{n}" for n in range(2, pipeline.FRAMES + 2)]
    assert [v["seq"] for v in told] == list(range(1, pipeline.FRAMES + 1))
    assert made.health.counters.snapshot(datetime.now(UTC)).dropped[Drop.QUEUE] == 2


# Figures, tests and all that is retained


def test_what_is_retained_comes_again_on_demand(mosquitto: Callable[..., Broker], cell: Callable[..., Cell]) -> None:
    with talking(cell(), mosquitto()) as plc:
        retained = ("birth", "state", "quality", "alarm/active")
        for times in range(1, 4):
            for leaf in retained:
                plc.wait_for(leaf, times)
            assert plc.ask({"cmd_id": "again", "action": "republish"})["code"] == 0


def test_the_state_is_of_now_however_often_it_is_asked_for_under_one_id(cell: Callable[..., Cell]) -> None:
    made = cell()
    assert made.do("get_state", "s")["state"] == "Ready"
    made.do("halt")
    assert made.do("get_state", "s")["state"] == "Halted"
    made.health.source_is(available=False)
    assert made.do("get_state", "s")["state"] == "Error"
    assert made.do("reset")["state"] == "Error"


def test_figures_begin_anew_on_demand(cell: Callable[..., Cell]) -> None:
    made = cell()
    made.health.frame_arrived(seen=True)
    assert made.health.counters.snapshot(datetime.now(UTC)).pending == 1
    since = made.health.counters.snapshot(datetime.now(UTC)).since
    assert made.do("reset_stats", "r")["code"] == 0
    assert made.health.counters.snapshot(datetime.now(UTC)).since > since
    assert made.health.counters.figures.total.since == since


def test_figures_that_begin_anew_tell_the_old_ones_once_with_the_numbers_of_their_verdicts(
    cell: Callable[..., Cell],
) -> None:
    made = cell(mode=CONTINUOUS)
    conveyed(made, *[partial(came, f"part{n}", image) for n, image in enumerate((GOOD, BAD, GOOD))])
    for _ in range(2):
        assert made.do("reset_stats", "r")["code"] == 0
    (told,) = [event for event in made.events() if event["kind"] == "shift"]
    assert (told["subject"], told["first_seq"], told["last_seq"]) == ("reset_stats", 1, 3)
    assert " inspected=3 pass=2 fail=1 uncertain=0 error=0 dropped=0 " in told["detail"]
    now = datetime.now(UTC)
    assert made.health.counters.snapshot(now).inspected == 0
    assert made.health.counters.snapshot(now, Window.TOTAL).inspected == made.outbox.last_seq("top") == 3
    assert made.do("reset_stats", "again")["code"] == 0
    empty = [event for event in made.events() if event["kind"] == "shift"][-1]
    assert (empty["first_seq"], empty["last_seq"]) == (0, 0)


def test_triggers_are_answered_or_errors_and_a_verdict_is_counted_once(cell: Callable[..., Cell]) -> None:
    made = cell()
    for name in ("one", "busy"):  # the second comes while the first waits
        made.do("trigger", name)
    assert [v["reason"] for v in conveyed(made, partial(came, "one", GOOD))] == ["none", "trigger_while_busy"]
    made.do("trigger", "aborted")
    made.do("abort")
    made.execution.admit(None)
    stats = made.health.counters.snapshot(datetime.now(UTC))
    assert (stats.triggers, stats.answered, stats.trigger_errors) == (2, 1, 1)
    assert (stats.inspected, stats.outcomes[Outcome.ERROR]) == (2, 1)


def test_a_challenge_test_begins_on_demand_where_there_is_one(cell: Callable[..., Cell]) -> None:
    assert cell().do("challenge")["code"] == 14
    made = cell(tested=True)
    answer = made.do("challenge")
    assert (answer["code"], answer["message"]) == (0, "send all 2 parts of the set")
    test = made.health.quality.report().challenge
    assert test is not None
    assert "0 of 2 parts were right" in test.detail


def test_commands_that_change_the_station_leave_an_event_with_the_user_and_others_none(
    cell: Callable[..., Cell],
) -> None:
    made = cell(tested=True)
    args = {"prepare_recipe": {"recipe": "rings"}, "ack_result": {"seq": 1}}
    for action in Action:
        if action is Action.PREPARE_RECIPE:
            made.execution.admit(came("one", GOOD))
        for _ in range(2):  # what comes again leaves no second event
            made.ask({"cmd_id": action.value, "action": action, "args": args.get(action, {}), "user": "m.weber"})
    commands = [event for event in made.events() if event["kind"] == "command"]
    told = {event["subject"]: event["detail"] for event in commands}
    assert len(told) == len(commands)
    changing = {"start", "stop", "abort", "halt", "reset", "prepare_recipe", "reset_stats", "challenge"}
    assert set(told) == changing
    assert told["prepare_recipe"].endswith("by m.weber: 2 rings")
    assert told["start"].startswith("WRONG_STATE by m.weber: the station is in SingleExecution;")


# The disk, and the memory of answers


@pytest.mark.parametrize("mode", [READY, CONTINUOUS])
@pytest.mark.parametrize("action", [action for action in Action if action not in {"get_state", "republish"}])
def test_what_the_disk_cannot_record_is_not_obeyed_and_may_be_asked_for_again(
    tmp_path: Path, cell: Callable[..., Cell], action: Action, mode: Mode
) -> None:
    outbox = FullDisk(tmp_path / "outbox.sqlite3")
    made = cell(mode=mode, outbox=outbox, acknowledged=True, tested=True)
    if mode is READY:
        outbox.full = False
        made.do("trigger", "first")
        made.execution.number(made.execution.admit(came("one", GOOD))[0])
        outbox.full = True
    args = {"prepare_recipe": {"index": 2}, "ack_result": {"seq": 1}}.get(action, {})
    before = snapshot(made)
    answer = made.do(action, "c1", **args)
    assert (answer["code"], answer["seq"]) == (50, 0)
    assert "disk full" in answer["message"]
    assert snapshot(made) == before
    assert made.execution.admit(None) == []
    assert made.do("get_state")["code"] == 0
    outbox.full = False
    assert made.do(action, "c1", **args)["code"] != 50


def snapshot(cell: Cell) -> tuple[object, ...]:
    """All that a command may change."""
    test, since = cell.health.quality.report().challenge, cell.health.counters.snapshot(datetime.now(UTC)).since
    prepared = cell.recipes.current.name, cell.outbox.prepared("top")
    promises, modes = cell.outbox.promises("top"), (cell.execution.mode, cell.execution.unacknowledged)
    return (*prepared, promises, modes, test, since, cell.events())


def test_a_command_is_forgotten_after_a_day(cell: Callable[..., Cell]) -> None:
    made = cell()
    now = round(time.time() * 1000)
    day = 1000 * ANSWERS_KEPT_S
    for cmd_id, at_ms in (
        ("yesterday", now - day - 1000),
        ("today", now - day + 60_000),
        ("clock", now + day + 60_000),
    ):
        made.outbox.answer(Answer("top", "other", at_ms, b"{}"))
        made.outbox.answer(Answer("top", cmd_id, at_ms, b'{"code":99}'))
        assert made.do("reset", cmd_id)["code"] == (99 if cmd_id == "today" else 0)


def test_a_late_command_is_refused_unless_it_was_obeyed_in_time(cell: Callable[..., Cell]) -> None:
    made = cell()
    soon = round(time.time() * 1000) + 200
    in_time = made.answer({"cmd_id": "c1", "action": "trigger", "expires_ms": soon})
    Event().wait(max(0.0, soon / 1000 + 0.01 - time.time()))
    assert made.answer({"cmd_id": "c1", "action": "trigger", "expires_ms": soon}).payload == in_time.payload
    late = made.ask({"cmd_id": "c2", "action": "halt", "expires_ms": soon})
    assert (late["cmd_id"], late["action"], late["code"]) == ("c2", "halt", Code.EXPIRED)
    assert made.ask({"cmd_id": "c3", "action": "get_state", "expires_ms": soon})["code"] == Code.EXPIRED
    assert made.execution.mode is Mode.SINGLE


def test_too_many_triggers_are_answered_without_a_promise_and_may_be_repeated(cell: Callable[..., Cell]) -> None:
    made = cell()
    seqs = [made.do("trigger", f"c{n}")["seq"] for n in range(64)]
    assert seqs == list(range(1, 65))
    over = made.do("trigger", "over")
    assert (over["code"], over["seq"]) == (10, 0)
    stats = made.health.counters.snapshot(datetime.now(UTC))
    assert (stats.triggers, stats.trigger_errors, stats.dropped[Drop.MISSED], stats.inspected) == (1, 1, 1, 0)
    made.execution.admit(came("one", GOOD))
    assert made.do("trigger", "over")["seq"] == 65


def slowly(made: Cell) -> Event:
    """Let a cell's second recipe be loaded only when the event that is given is set."""
    may = Event()
    recipe = _recipe(2, "rings", made.incoming.parent, tested=False)

    def load() -> Recipe:
        assert may.wait(DEADLINE_S)
        return recipe

    first, second = made.recipes.identities
    loads: dict[str, Load] = {first.recipe: partial(made.recipes.load, first.recipe), second.recipe: load}
    made.recipes.replace(loads, {first.recipe: first, second.recipe: recipe.identity}, {})
    return may


def concluded_answers(made: Cell) -> list[dict[str, Any]]:
    """What is answered once what was being loaded is there."""
    sent: list[Message] = []
    deadline = time.monotonic() + DEADLINE_S
    while not sent and time.monotonic() < deadline:
        made.control.conclude(sent.append)
    return [json.loads(message.payload) for message in sent]


def test_a_recipe_that_is_not_in_memory_is_loaded_while_the_station_goes_on_and_prepared_then(
    cell: Callable[..., Cell],
) -> None:
    made = cell(held=1, mode=Mode.CONTINUOUS)
    may = slowly(made)
    assert made.do("prepare_recipe", "p", recipe="rings")["result"] == "ACCEPTED"
    assert made.do("prepare_recipe", "p", recipe="rings")["result"] == "ACCEPTED"
    assert made.do("prepare_recipe", "q", recipe="plates")["result"] == "BUSY"
    assert made.do("get_state")["result"] == "DONE"
    assert made.recipes.current.name == "plates"
    may.set()
    (answer,) = concluded_answers(made)
    assert (answer["cmd_id"], answer["result"], answer["message"]) == ("p", "DONE", "2 rings")
    assert made.recipes.current.name == "rings"
    assert made.recipes.loaded("plates") is None
    assert made.outbox.prepared("top") == "rings"
    assert made.do("prepare_recipe", "p", recipe="rings")["result"] == "DONE"


def test_a_recipe_that_cannot_be_loaded_leaves_the_station_with_what_it_has(cell: Callable[..., Cell]) -> None:
    made = cell(held=1)
    first, second = made.recipes.identities

    def fail() -> Recipe:
        raise ArtifactError("weights.safetensors is truncated")

    loads: dict[str, Load] = {first.recipe: partial(made.recipes.load, first.recipe), second.recipe: fail}
    made.recipes.replace(loads, {first.recipe: first, second.recipe: second}, {})
    assert made.do("prepare_recipe", "p", recipe="rings")["result"] == "ACCEPTED"
    (answer,) = concluded_answers(made)
    assert answer["result"] == "INTERNAL"
    assert "weights.safetensors is truncated" in answer["message"]
    assert (made.recipes.current.name, made.outbox.prepared("top")) == ("plates", None)


def test_a_recipe_that_was_loaded_waits_for_the_part_of_a_trigger(cell: Callable[..., Cell]) -> None:
    made = cell(held=1)
    may = slowly(made)
    assert made.do("prepare_recipe", "p", recipe="rings")["result"] == "ACCEPTED"
    assert made.do("trigger", "t")["result"] == "ACCEPTED"
    may.set()
    time.sleep(QUIET_S)
    sent: list[Message] = []
    made.control.conclude(sent.append)
    assert sent == []
    assert [v["recipe"] for v in conveyed(made, partial(came, "one", GOOD))] == ["plates"]
    assert [answer["result"] for answer in concluded_answers(made)] == ["DONE"]


def test_a_plc_hears_of_a_recipe_that_had_to_be_loaded(
    cell: Callable[..., Cell], mosquitto: Callable[..., Broker]
) -> None:
    made = cell(held=1)
    may = slowly(made)
    with talking(made, mosquitto()) as plc:
        assert plc.ask({"cmd_id": "p", "action": "prepare_recipe", "args": {"index": 2}})["result"] == "ACCEPTED"
        may.set()
        plc.wait(lambda: plc.of("cmd/response")[-1]["result"] == "DONE", "the recipe to be prepared")
        plc.wait(lambda: plc.of("state")[-1]["recipe"] == "rings", "the state to say so")
