"""Images as MQTT messages through a real broker: judged once, answered at least once, lost never."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from structlog.testing import capture_logs

from config import schema
from daemon import images, link
from daemon.build import build_source
from daemon.framing import Framing
from daemon.link import Link, Session
from daemon.messages import Clock, Frame, Outcome, Reply, Unreadable
from daemon.outbox import Entry, Outbox
from daemon.sources.base import SourceUnavailableError
from daemon.sources.mqtt import MqttSource
from detectors.base import Image
from tests.brokers import DEADLINE_S, HOST, Broker, Cable, eventually
from tests.component.test_mqtt_sink import IDENTITY, Station, nobody, settings, station

TOPIC = "lines/images"
ANSWERS = "lines/answers"


def picture(seed: int) -> Image:
    return np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)


def png(seed: int) -> bytes:
    return cv2.imencode(".png", picture(seed)[..., ::-1])[1].tobytes()


class Wish:
    """Whether parts are wanted, as the test says. Satisfies `Demand`."""

    since = None

    def __init__(self) -> None:
        self.said = Event()
        self.said.set()

    def wanted(self, wait_s: float = 0.0) -> bool:
        return self.said.wait(wait_s)


class Inspector:
    """A source at work in its thread. What comes is judged and settled at once, unless the test will do it."""

    def __init__(
        self,
        outbox: Outbox,
        broker: link.Broker,
        *,
        node: str = "edge7",
        judges: bool = True,
        window: int = 8,
        **options: Any,
    ) -> None:
        self.outbox = outbox
        self.wish = Wish()
        self.came: list[Frame | Unreadable] = []
        self.complaints: list[str] = []
        self.source = MqttSource(
            lambda: broker,
            replace(IDENTITY, node=node),
            TOPIC,
            answer_again=partial(outbox.tell_again, "top"),
            window=window,
            **options,
        )
        self._judges = judges
        self._stop = Event()
        self._subscribed = Event()
        self._thread = Thread(target=self._run, name="source")
        self._thread.start()
        assert self._subscribed.wait(DEADLINE_S), self.complaints

    def judge(self, item: Frame | Unreadable) -> None:
        capture, seq = item.capture, self.outbox.last_seq("top") + 1
        payload = json.dumps({"seq": seq, "id": capture.id, "part_id": capture.part_id}).encode()
        self.outbox.keep([Entry("top", seq, capture.id, payload, Outcome.PASS, capture.reply)])

    def settle(self, item: Frame | Unreadable) -> None:
        assert self.source.settle(item.capture, None)

    def wait(self, count: int) -> None:
        eventually(lambda: len(self.came) >= count, f"{count} images, of which {len(self.came)} came")

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the source does not stop"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                for item in self.source.frames(self._stop, self.wish):
                    self._subscribed.set()
                    if item is not None:
                        self.came.append(item)
                        if self._judges:
                            self.judge(item)
                            self.settle(item)
            except SourceUnavailableError as error:
                self.complaints.append(str(error))
                self._stop.wait(0.05)


@contextmanager
def inspector(outbox: Outbox, broker: link.Broker, **options: Any) -> Iterator[Inspector]:
    working = Inspector(outbox, broker, **options)
    try:
        yield working
    finally:
        working.stop()


class Asker:
    """A client of MQTT 5 that sends images and keeps their answers, with what came along."""

    def __init__(self, broker: Broker) -> None:
        self.answers: list[tuple[bytes, dict[str, Any]]] = []
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = self._on_message
        self._client.connect(HOST, broker.port)
        self._client.loop_start()
        self._client.subscribe(f"{ANSWERS}/#", 1)

    def ask(self, payload: bytes, correlation: bytes | None = None, topic: str | None = f"{ANSWERS}/a") -> None:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call] # paho's
        if topic is not None:
            properties.ResponseTopic = topic
        if correlation is not None:
            properties.CorrelationData = correlation
        self._client.publish(TOPIC, payload, 1, properties=properties).wait_for_publish(DEADLINE_S)

    def wait(self, count: int) -> None:
        eventually(lambda: len(self.answers) >= count, f"{count} answers; there are {self.answers}")

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _: Client, __: object, message: MQTTMessage) -> None:
        self.answers.append((getattr(message.properties, "CorrelationData", b""), json.loads(message.payload)))


@pytest.fixture
def broker(mosquitto: Callable[..., Broker]) -> Broker:
    return mosquitto()


@pytest.fixture
def asker(broker: Broker) -> Iterator[Asker]:
    asking = Asker(broker)
    yield asking
    asking.close()


@pytest.fixture
def working(tmp_path: Path, broker: Broker) -> Iterator[Station]:
    """What delivers the record and the answers."""
    with station(tmp_path, settings(broker)) as delivering:
        yield delivering


def session_of(broker: Broker, node: str = "edge7") -> Link:
    """A connection that goes on with the session of an inspector."""
    return Link(settings(broker), f"inspectd.{node}.top.images", session=Session(3600, 64))


def left(broker: Broker, node: str = "edge7") -> int:
    """How many images the broker still keeps for an inspector that is away."""
    going_on = session_of(broker, node)
    found = len(going_on.take_delivered(0.5))
    going_on.close()
    return found


def publish(broker: Broker, tmp_path: Path, payload: bytes, *options: str) -> None:
    file = tmp_path / "published"
    file.write_bytes(payload)
    subprocess.run(
        ["mosquitto_pub", "-p", str(broker.port), "-q", "1", "-t", TOPIC, "-f", str(file), *options], check=True
    )


# What comes and what goes back


def test_an_image_is_judged_and_its_verdict_comes_back_with_what_was_sent_along(
    tmp_path: Path, broker: Broker, working: Station
) -> None:
    listener = ["mosquitto_sub", "-p", str(broker.port), "-V", "5", "-i", "robot", "-x", "60", "-c", "-q", "1"]
    listener += ["-t", f"{ANSWERS}/robot"]
    subprocess.run([*listener, "-E"], check=True)  # the session exists from here on
    options = ["-V", "5", "-D", "PUBLISH", "response-topic", f"{ANSWERS}/robot"]
    options += ["-D", "PUBLISH", "correlation-data", "order-1"]
    for key, value in {"part_id": "SN 7", "batch_id": "B1", "shift": "late"}.items():
        options += ["-D", "PUBLISH", "user-property", key, value]
    with inspector(working.outbox, settings(broker)) as inspecting:
        publish(broker, tmp_path, png(1), *options)
        inspecting.wait(1)
        done = subprocess.run(
            [*listener, "-C", "1", "-W", "20", "-F", "%D %p"], check=True, capture_output=True, text=True
        )
    (frame,) = inspecting.came
    assert isinstance(frame, Frame)
    assert (frame.image == picture(1)).all()
    capture = frame.capture
    assert (capture.part_id, capture.batch_id, capture.meta) == ("SN_7", "B1", {"shift": "late"})
    assert (capture.station, capture.origin, capture.clock) == ("top", TOPIC, Clock.HOST_ARRIVAL)
    assert capture.reply == Reply(f"{ANSWERS}/robot", b"order-1")
    correlation, _, answer = done.stdout.partition(" ")
    assert correlation == "order-1"
    assert json.loads(answer) == {"seq": 1, "id": capture.id, "part_id": "SN_7"}
    assert left(broker) == 0


def test_an_image_is_shrunk_while_it_is_decoded(tmp_path: Path, broker: Broker, working: Station) -> None:
    jpeg = cv2.imencode(".jpg", np.kron(picture(1), np.ones((4, 4, 1), np.uint8)))[1].tobytes()
    framing, where = Framing(shrink=2, rotate=180), schema.MqttSource(type="mqtt", topic=TOPIC)
    top = schema.Station(name="top", model=tmp_path, source=where)
    source = build_source(top, framing, tmp_path, working.outbox, lambda *_: None, lambda: settings(broker), IDENTITY)
    stop = Event()
    parts = source.frames(stop)
    publish(broker, tmp_path, jpeg)
    frame = next(part for part in parts if part is not None)
    assert isinstance(frame, Frame)
    assert np.array_equal(frame.image, images.decode(jpeg, 2)[::-1, ::-1])
    stop.set()
    assert not any(parts)


def test_what_is_no_image_is_answered_too(broker: Broker, working: Station, asker: Asker) -> None:
    with inspector(working.outbox, settings(broker)) as inspecting:
        asker.ask(b"hello", b"1")
        asker.ask(b"", b"2")
        asker.wait(2)
    assert all(isinstance(item, Unreadable) for item in inspecting.came)
    assert [correlation for correlation, _ in asker.answers] == [b"1", b"2"]


def test_an_image_by_an_older_version_of_mqtt_is_judged_and_nobody_is_answered(
    tmp_path: Path, broker: Broker, working: Station
) -> None:
    with inspector(working.outbox, settings(broker, protocol="3.1.1"), group="lines") as inspecting:
        publish(broker, tmp_path, png(3), "-V", "311")
        inspecting.wait(1)
    assert isinstance(inspecting.came[0], Frame)
    assert inspecting.came[0].capture.reply == Reply("")
    assert working.outbox.notes("top", 0, 9) == []


def test_an_image_that_was_retained_is_left_out_and_that_is_said_once(
    tmp_path: Path, broker: Broker, working: Station, asker: Asker
) -> None:
    publish(broker, tmp_path, png(1), "-r")
    with capture_logs() as logs:
        for number in (2, 3):
            with inspector(working.outbox, settings(broker)) as inspecting:
                asker.ask(png(number), b"live")
                asker.wait(number - 1)
            assert len(inspecting.came) == 1
    assert len([said for said in logs if "retained" in said["event"]]) == 1


def test_an_answer_never_goes_where_a_station_speaks(broker: Broker, working: Station, asker: Asker) -> None:
    with capture_logs() as logs, inspector(working.outbox, settings(broker)) as inspecting:
        for number in range(2):
            asker.ask(png(number), bytes([number]), topic="inspectd/top/plc")
        inspecting.wait(2)
    assert working.outbox.notes("top", 0, 9) == []
    assert len([said for said in logs if "cannot be answered" in said["event"]]) == 1


def test_an_answer_that_the_access_list_refuses_does_not_hold_up_the_record(
    tmp_path: Path, mosquitto: Callable[..., Broker]
) -> None:
    (tmp_path / "acl").write_text("topic readwrite inspectd/#\ntopic read #\n")
    closed = mosquitto(f"acl_file {tmp_path / 'acl'}")
    with capture_logs() as logs, station(tmp_path, settings(closed)) as delivering:
        for seq in range(1, 21):
            delivering.outbox.keep([Entry("top", seq, str(seq), b"{}", Outcome.PASS, Reply(f"{ANSWERS}/a", b"1"))])
            delivering.sink.notify()
        delivering.empty()
        eventually(lambda: not delivering.outbox.notes("top", 0, 1), "the answers to be given up")
    assert [said["topic"] for said in logs if "let us answer" in said["event"]] == [f"{ANSWERS}/a"]
    assert not [said for said in logs if "lost the broker" in said["event"]]


# What comes twice


def test_an_image_is_the_same_for_every_daemon_if_it_says_which_it_is(
    tmp_path: Path, broker: Broker, working: Station, asker: Asker
) -> None:
    other = Outbox(tmp_path / "other.sqlite3")
    with (
        inspector(working.outbox, settings(broker)) as one,
        inspector(other, settings(broker), node="edge8") as two,
    ):
        for payload, correlation in ((png(1), b"1"), (png(2), b"1"), (png(1), b"2"), (png(1), None)):
            asker.ask(payload, correlation)
        one.wait(4)
        two.wait(4)
    ids, others = ([item.capture.id for item in inspecting.came] for inspecting in (one, two))
    assert ids[:3] == others[:3]
    assert ids[3] != others[3]
    assert len(set(ids)) == 4
    assert all(len(id_) == 26 for id_ in ids)
    other.close()


def test_whoever_asks_again_is_answered_again_and_the_image_is_judged_once(
    broker: Broker, working: Station, asker: Asker
) -> None:
    with inspector(working.outbox, settings(broker)) as inspecting:
        for number in range(3):
            asker.ask(png(1), b"1")
            asker.wait(number + 1)
    assert len(inspecting.came) == 1
    assert asker.answers == [asker.answers[0]] * 3


@pytest.mark.parametrize("correlation", [b"1", None])
def test_an_image_whose_acknowledgement_got_lost_is_answered_again_and_judged_once(
    broker: Broker, working: Station, asker: Asker, cable_to: Callable[[Broker], Cable], correlation: bytes | None
) -> None:
    cable = cable_to(broker)
    with inspector(working.outbox, settings(broker, cable), judges=False) as inspecting:
        asker.ask(png(1), correlation)
        inspecting.wait(1)
        cable.unplug()
        inspecting.judge(inspecting.came[0])
        inspecting.settle(inspecting.came[0])
        working.sink.notify()
        asker.wait(1)
        cable.plug()
        asker.wait(2)
    assert len(inspecting.came) == 1
    assert asker.answers[0] == asker.answers[1]
    assert left(broker) == 0


@pytest.mark.parametrize("correlation", [b"1", None])
def test_an_image_that_comes_again_before_its_verdict_is_judged_once_and_answered_once(
    broker: Broker, working: Station, asker: Asker, cable_to: Callable[[Broker], Cable], correlation: bytes | None
) -> None:
    cable = cable_to(broker)
    with inspector(working.outbox, settings(broker, cable), judges=False) as inspecting:
        asker.ask(png(1), correlation)
        inspecting.wait(1)
        cable.unplug()
        eventually(lambda: inspecting.complaints, "the loss")
        cable.plug()
        asker.ask(png(2), b"2")
        inspecting.wait(2)  # the first has come again before it
        for item in inspecting.came:
            inspecting.judge(item)
            inspecting.settle(item)
        working.sink.notify()
        asker.wait(2)
    assert len(inspecting.came) == len(asker.answers) == 2
    assert left(broker) == 0


def test_after_the_death_of_the_daemon_the_record_knows_what_was_judged(
    broker: Broker, working: Station, asker: Asker, cable_to: Callable[[Broker], Cable]
) -> None:
    cable = cable_to(broker)
    with inspector(working.outbox, settings(broker, cable), judges=False) as dying:
        for number in range(4):
            asker.ask(png(number), bytes([number]))
        dying.wait(4)
        for item in dying.came[:2]:
            dying.judge(item)
        cable.unplug()  # as if killed: nothing of what was judged is acknowledged
    with inspector(working.outbox, settings(broker)) as heir:
        heir.wait(2)
        asker.wait(4)
    assert [item.capture.id for item in heir.came] == [item.capture.id for item in dying.came[2:]]
    assert {correlation for correlation, _ in asker.answers} == {bytes([number]) for number in range(4)}
    assert left(broker) == 0


# What stays at the broker


def test_while_no_part_is_wanted_images_stay_at_the_broker(broker: Broker, working: Station, asker: Asker) -> None:
    with inspector(working.outbox, settings(broker), window=2) as idle:
        idle.wish.said.clear()
        for number in range(5):
            asker.ask(png(number), bytes([number]))
    assert idle.came == []
    with inspector(working.outbox, settings(broker), window=2) as inspecting:
        asker.wait(5)
    assert len(inspecting.came) == 5


def test_the_broker_sends_no_more_than_the_window_and_hears_of_images_in_their_order(
    broker: Broker, asker: Asker
) -> None:
    receiving = Link(settings(broker), "c", session=Session(60, 3))
    receiving.subscribe(TOPIC)
    receiving.await_subscriptions()
    for number in range(5):
        asker.ask(bytes([number]))
    came = receiving.take_delivered(DEADLINE_S)
    while len(came) < 3:
        came += receiving.take_delivered(DEADLINE_S)
    assert receiving.take_delivered(0.3) == []
    receiving.acknowledge(came[1].number)
    assert receiving.take_delivered(0.3) == []
    receiving.acknowledge(came[0].number)
    while len(came) < 5:
        came += receiving.take_delivered(DEADLINE_S)
    assert [one.received.payload for one in came] == [bytes([number]) for number in range(5)]
    receiving.close()


def test_what_was_handed_over_can_be_settled_after_the_end(broker: Broker, working: Station, asker: Asker) -> None:
    with inspector(working.outbox, settings(broker), judges=False) as inspecting:
        for number in range(3):
            asker.ask(png(number), bytes([number]))
        inspecting.wait(3)
    for item in inspecting.came:
        inspecting.judge(item)
        inspecting.settle(item)
    assert left(broker) == 0


def test_nothing_is_lost_when_the_broker_is_started_anew(tmp_path: Path, mosquitto: Callable[..., Broker]) -> None:
    lasting = mosquitto("persistence true", f"persistence_location {tmp_path}/")
    outbox = Outbox(tmp_path / "images.sqlite3")
    with inspector(outbox, settings(lasting), judges=False) as inspecting:
        for number in range(6):
            publish(lasting, tmp_path, png(number), "-V", "5", "-D", "PUBLISH", "user-property", "id", str(number))
        lasting.stop()
        eventually(lambda: inspecting.complaints, "the loss")
        lasting.start()
        for number in range(6, 16):
            publish(lasting, tmp_path, png(number), "-V", "5", "-D", "PUBLISH", "user-property", "id", str(number))
        judged = 0
        while judged < 16:
            inspecting.wait(judged + 1)
            inspecting.judge(inspecting.came[judged])
            inspecting.settle(inspecting.came[judged])
            judged += 1
    images = [item.image for item in inspecting.came if isinstance(item, Frame)]
    seen = [next(seed for seed in range(16) if (image == picture(seed)).all()) for image in images]
    assert sorted(seen) == list(range(16))
    assert left(lasting) == 0
    outbox.close()


def test_a_broker_that_is_away_is_said_with_a_cure(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "images.sqlite3")
    source = MqttSource(nobody, IDENTITY, TOPIC, answer_again=partial(outbox.tell_again, "top"))
    with pytest.raises(SourceUnavailableError, match=r"no images can come: .* cannot be reached.*\[mqtt\]"):
        source.frames(Event())
    outbox.close()
