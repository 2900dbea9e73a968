"""The sink against real brokers that stop, freeze, refuse and take no more: nothing of the record is lost by it."""

import gc
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from socketserver import BaseRequestHandler, StreamRequestHandler, ThreadingTCPServer
from threading import Event, Thread
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from calibration.calibration import Provenance, fit
from calibration.drift import Reading
from daemon import contract, link
from daemon.boards import quality_board, state_board
from daemon.challenge import ChallengeStatus
from daemon.contract import Identity, Message, Picture, Quality, StationState
from daemon.link import DeliveryError, Link
from daemon.messages import Capture, Decision, Latency, Outcome, Reason, Verdict
from daemon.outbox import Entry, Outbox, OutboxError
from daemon.requests import Received
from daemon.sinks.mqtt import PictureSink, StationSink
from tests.brokers import (
    DEADLINE_S,
    HOST,
    PUBACK,
    ROOT,
    Broker,
    Cable,
    Subscriber,
    eventually,
    free_port,
)

IDENTITY = Identity("inspectd", "edge7", "top", "9f31c2aa", "flange-a", "3b7e" * 16, "51c0ffee51c0", 0.01)
AT = datetime(2026, 11, 22, 7, 58, 3, 482_000, UTC)
CALIBRATION = fit([1.0, 2.0, 3.0], alpha=0.3, provenance=Provenance("3b7e" * 16, "d", AT))
QUIET_S = 0.3
NEVER_S = (36_000.0, 36_000.0)


def verdict(seq: int) -> Verdict:
    decision = Decision(Outcome.FAIL, Reason.SCORE_ABOVE_THRESHOLD, "", 0.75, 0.01, 0.5, 0.5)
    capture = Capture(f"{seq:026}", "top", f"part-{seq}", AT, AT, 0.0, f"/in/part-{seq}.png")
    return Verdict(seq, capture, decision, AT, Latency(0.0, 1.0, 2.0))


def large(seq: int) -> Verdict:
    """A verdict with texts as long as they may be."""
    usual = verdict(seq)
    return replace(usual, capture=replace(usual.capture, part_id="p" * 128, origin="/" + "o" * 400))


def actuation(seq: int) -> Message:
    return contract.encode_actuation(IDENTITY, verdict(seq), 2.0)


def settings(broker: Broker, cable: Cable | None = None, **options: Any) -> link.Broker:
    """How to connect, through a cable if there is one. amqtt is asked for what it speaks: it hangs on MQTT 5 wills."""
    protocol = "auto" if broker.five else "3.1.1"
    return link.Broker(HOST, cable.port if cable else broker.port, **{"protocol": protocol, **options})


def nobody() -> link.Broker:
    return link.Broker(HOST, free_port())


Send = Callable[[Message], None]
Obey = Callable[[Received, Send], bool]


class Obeying:
    """Obeys by a function, at once."""

    def __init__(self, obey: Obey) -> None:
        self.obey = obey

    def conclude(self, send: Send) -> None:
        """Nothing takes longer."""


class Station:
    """A sink at work in its thread, on an outbox of its own."""

    def __init__(
        self,
        folder: Path,
        broker: link.Broker | Callable[[], link.Broker],
        *,
        ttl_s: float = DEADLINE_S,
        backoff_s: tuple[float, float] = (0.02, 0.1),
        drain_s: float = DEADLINE_S,
        replay_rate: int = 100_000,
        max_rows: int = 1_000_000,
        obey: Obey = lambda _, __: False,
    ) -> None:
        self.outbox = Outbox(folder / "outbox.sqlite3", max_rows=max_rows)
        self.condition = StationState("ContinuousExecution", "online", "ok", "off", 1, 0, 0, 1)
        self.quality = Quality(CALIBRATION, "ok", {}, None)
        self.sink = StationSink(
            broker if callable(broker) else lambda: broker,
            IDENTITY,
            self.outbox,
            halted=lambda: contract.encode_state(IDENTITY, replace(self.condition, state="Halted"), datetime.now(UTC)),
            boards=[
                state_board(lambda: IDENTITY, lambda: self.condition),
                quality_board(lambda: IDENTITY, lambda: self.quality),
            ],
            commands=Obeying(obey),
            actuation_ttl_s=ttl_s,
            replay_rate=replay_rate,
            backoff_s=backoff_s,
        )
        self.failure: Exception | None = None
        self._drain_s = drain_s
        self._stop = Event()
        self._thread = Thread(target=self._run, name="sink")
        self._thread.start()

    def keep(self, count: int, *, at_once: int = 1, make: Callable[[int], Verdict] = verdict) -> None:
        """Conclude some parts."""
        for first in range(self.outbox.last_seq("top") + 1, self.outbox.last_seq("top") + 1 + count, at_once):
            seqs = range(first, first + at_once)
            self.outbox.keep(
                [
                    Entry("top", seq, f"{seq:026}", contract.encode_verdict(IDENTITY, make(seq)), Outcome.FAIL)
                    for seq in seqs
                ]
            )
            self.sink.notify()

    def empty(self) -> None:
        """Wait until everything was acknowledged."""
        eventually(lambda: self.outbox.depth("top") == 0, "the outbox to be empty")

    def stop(self) -> None:
        self._stop.set()
        self.sink.notify()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the sink does not stop"

    def close(self) -> None:
        self.stop()
        self.outbox.close()

    def _run(self) -> None:
        try:
            self.sink.run(self._stop, self._drain_s)
        except OutboxError as failure:
            self.failure = failure


@contextmanager
def station(folder: Path, broker: link.Broker | Callable[[], link.Broker], **options: Any) -> Iterator[Station]:
    working = Station(folder, broker, **options)
    try:
        yield working
    finally:
        working.close()


def statuses(subscriber: Subscriber) -> list[str]:
    return [message.content["reason"] for message in subscriber.of("status")]


def numbers(messages: list[Any], key: str = "seq") -> list[int]:
    return [message.content[key] for message in messages]


# Presence


def test_a_station_says_its_state_and_quality_then_that_it_is_online_and_at_the_end_that_it_has_stopped(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    with station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: statuses(watching) == ["running"], "the station to be online")
        assert [message.leaf for message in watching.messages] == ["state", "quality", "status"]
        late = subscribe(broker)
        late.wait(lambda: {message.leaf for message in late.messages} == {"state", "quality", "status"}, "the retained")
        assert all(message.retain for message in late.messages)
        assert late.of("status")[0].content["online"] is True
        working.keep(3)
        working.sink.actuate(actuation(3))
        watching.wait(lambda: numbers(watching.of("last"))[-1:] == [3], "the newest verdict")
    watching.wait(lambda: statuses(watching) == ["running", "stopped"], "the station to say that it has stopped")
    later = subscribe(broker)
    retained = {"state", "quality", "status", "last"}
    later.wait(lambda: {message.leaf for message in later.messages} >= retained, "what is retained")
    assert {message.leaf for message in later.messages} == retained
    assert later.of("status")[0].content == watching.of("status")[-1].content
    assert later.of("status")[0].content["online"] is False
    assert later.of("last")[0].content["seq"] == 3


def test_the_state_is_told_again_when_it_changes(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    with station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        working.condition = replace(working.condition, state="Error", camera="offline")
        working.sink.notify()
        watching.wait(lambda: len(watching.of("state")) == 2, "the new state")
    assert [message.content["state"] for message in watching.of("state")] == ["ContinuousExecution", "Error", "Halted"]


def test_the_state_is_told_again_when_drift_or_the_challenge_test_changes(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    with station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        drifting = replace(working.condition, drift="light")
        for number, working.condition in enumerate((drifting, replace(drifting, challenge="failed")), 2):
            working.sink.notify()
            watching.wait(lambda number=number: len(watching.of("state")) == number, "the state")  # type: ignore[misc]
    told = [(message.content["drift"], message.content["challenge"]) for message in watching.of("state")]
    assert told == [("ok", "off"), ("light", "off"), ("light", "failed"), ("light", "failed")]


def test_the_quality_is_told_again_when_something_begins_or_ends_and_not_with_every_part(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    steady = Reading(1, "ok", "ok", "ok", 0.5, 1.0, 0.0, -1.0, "")
    alarming = replace(steady, parts=3, cusum="alarm", cusum_up=13.0, direction="up")
    failed = ChallengeStatus("failed", None, None, 0, 4, "LS-12 (bad) passed")
    with station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        working.quality = Quality(CALIBRATION, "ok", {"score": replace(steady, parts=2)}, None)
        for number, camera in enumerate(("offline", "online"), 2):  # between two states the sink looks at the quality
            working.condition = replace(working.condition, camera=camera)
            working.sink.notify()
            watching.wait(lambda number=number: len(watching.of("state")) == number, "the state")  # type: ignore[misc]
        changes = [
            Quality(CALIBRATION, "product", {"score": alarming}, None),
            Quality(CALIBRATION, "product", {"score": alarming}, failed),
            Quality(CALIBRATION, "product", {"score": alarming}, replace(failed, passed=1)),
            Quality(CALIBRATION, "ok", {"score": replace(steady, parts=4)}, replace(failed, passed=1)),
        ]
        for number, working.quality in enumerate(changes, 2):
            working.sink.notify()
            watching.wait(lambda number=number: len(watching.of("quality")) == number, "it")  # type: ignore[misc]
    told = [message.content for message in watching.of("quality")]
    assert [content["drift"]["status"] for content in told] == ["ok", "product", "product", "product", "ok"]
    assert [content["drift"]["score"]["parts"] for content in told] == [0, 3, 3, 3, 4]
    assert [content["challenge"]["status"] for content in told] == ["off", "off", "failed", "failed", "failed"]
    assert [content["challenge"]["passed"] for content in told] == [0, 0, 0, 1, 1]


def test_a_station_that_is_killed_is_reported_lost_by_the_broker(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from daemon.link import Broker\n"
        "from tests.component.test_mqtt_sink import Station\n"
        "Station(Path(sys.argv[1]), Broker('127.0.0.1', int(sys.argv[2]), sys.argv[3]))\n"
        "time.sleep(60)\n"
    )
    arguments = [str(tmp_path), str(broker.port), "5" if broker.five else "3.1.1"]
    child = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT)
    try:
        watching.wait(lambda: statuses(watching) == ["running"], "the station to be online")
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait(DEADLINE_S)
    watching.wait(lambda: statuses(watching) == ["running", "lost"], "the will")
    late = subscribe(broker, "inspectd/top/status")
    late.wait(lambda: late.of("status"), "the retained will")
    will = late.of("status")[0]
    assert will.retain
    assert (will.content["online"], will.content["boot_id"]) == (False, "9f31c2aa")


def test_a_clean_stop_is_not_reported_as_a_loss_by_a_broker_that_is_late_with_its_answers(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber]
) -> None:
    broker = mosquitto()
    watching = subscribe(broker)
    with station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        broker.freeze()
        for seq in range(1, 6):
            working.sink.actuate(actuation(seq))
        stopping = Thread(target=working.stop)
        stopping.start()
        stopping.join(QUIET_S)
        broker.thaw()
        stopping.join()
    watching.wait(lambda: len(watching.of("status")) == 2, "the end")
    late = subscribe(broker)
    late.wait(lambda: late.of("status"), "the retained status")
    assert late.of("status")[0].content["reason"] == "stopped"
    assert statuses(watching) == ["running", "stopped"]


def test_a_sink_whose_outbox_fails_leaves_with_the_reason_and_does_not_stay_online(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    with station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        working.outbox.close()
        watching.wait(lambda: statuses(watching)[-1] in {"stopped", "lost"}, "the end")
        working.stop()
        assert isinstance(working.failure, OutboxError)


# The record


def test_no_verdict_is_lost_and_those_of_one_kind_come_in_order_when_the_broker_restarts_twice(
    tmp_path: Path, broker: Broker, cable_to: Callable[[Broker], Cable], subscribe: Callable[..., Subscriber]
) -> None:
    cable = cable_to(broker)
    watching = subscribe(broker)
    arrived = []
    with station(tmp_path, settings(broker, cable)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        working.keep(40)
        for _ in range(2):
            working.empty()
            watching.wait(lambda: len(watching.of("verdict")) >= 40, "the live verdicts")  # noqa: B023 -- awaited here
            arrived += watching.of("verdict")
            cable.unplug()
            broker.stop()
            working.keep(40, at_once=8)
            broker.start()
            watching = subscribe(broker)
            cable.plug()
            watching.wait(lambda: len(watching.of("verdict")) == 40, "the record")  # noqa: B023
            arrived += watching.of("verdict")
            watching.messages.clear()
            working.empty()
            working.keep(40)
        watching.wait(lambda: len(watching.of("verdict")) == 40, "the last verdicts")
        arrived += watching.of("verdict")
        working.empty()
    assert numbers(arrived) == list(range(1, 201))
    assert [message.content["id"] for message in arrived] == [f"{seq:026}" for seq in range(1, 201)]
    kept_while_away = [*range(41, 81), *range(121, 161)]
    assert [message.content["seq"] for message in arrived if message.content["replayed"]] == kept_while_away
    assert not any(message.retain for message in arrived)


def test_no_verdict_is_lost_when_the_connection_breaks_in_the_middle(
    tmp_path: Path, broker: Broker, cable_to: Callable[[Broker], Cable], subscribe: Callable[..., Subscriber]
) -> None:
    cable = cable_to(broker)
    watching = subscribe(broker)
    with station(tmp_path, settings(broker, cable)) as working:
        working.keep(200, at_once=50)
        for part in (30, 90):
            watching.wait(lambda part=part: len(watching.of("verdict")) > part, "some")  # type: ignore[misc]
            cable.unplug()
            cable.plug()
        working.empty()
        watching.wait(lambda: set(numbers(watching.of("verdict"))) == set(range(1, 201)), "all verdicts")
        assert working.outbox.quarantined("top") == 0


def test_no_verdict_is_lost_when_the_broker_freezes_for_longer_than_the_keepalive(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    protocol = "5" if broker.five else "3.1.1"
    with capture_logs() as logs, station(tmp_path, settings(broker, keepalive_s=1, protocol=protocol)) as working:
        working.keep(5)
        working.empty()
        broker.freeze()
        working.keep(20)
        eventually(lambda: [said for said in logs if "lost the broker" in said["event"]], "the loss")
        broker.thaw()
        working.empty()
        watching.wait(lambda: 25 in numbers(watching.of("verdict")), "the last verdict")
    assert set(numbers(watching.of("verdict"))) == set(range(1, 26))


def test_a_broker_that_answers_pings_but_acknowledges_nothing_is_left_and_sought_again(
    tmp_path: Path, amqtt: Broker, cable_to: Callable[[Broker], Cable], subscribe: Callable[..., Subscriber]
) -> None:
    cable = cable_to(amqtt)
    watching = subscribe(amqtt)
    with capture_logs() as logs, station(tmp_path, settings(amqtt, cable, keepalive_s=1)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        cable.deaf.add(PUBACK)
        working.keep(3)
        eventually(lambda: [said for said in logs if "acknowledged no verdict" in said["event"]], "its patience to end")
        assert working.outbox.depth("top") == 3
        cable.deaf.clear()
        working.empty()
        watching.wait(lambda: set(numbers(watching.of("verdict"))) == {1, 2, 3}, "the verdicts")


def test_a_verdict_that_the_access_list_refuses_stays_in_the_outbox_until_it_is_allowed(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber]
) -> None:
    allowed = tmp_path / "acl"
    leaves = ("status", "state", "quality")
    allowed.write_text("topic read #\n" + "".join(f"topic write inspectd/top/{leaf}\n" for leaf in leaves))
    broker = mosquitto(f"acl_file {allowed}")
    with capture_logs() as logs, station(tmp_path, settings(broker)) as working:
        working.keep(2)
        eventually(lambda: [said for said in logs if "refuses a message" in said["event"]], "the refusal")
        assert working.outbox.depth("top") == 2
        assert working.outbox.quarantined("top") == 0
        watching = subscribe(broker)
        allowed.write_text("topic readwrite #\n")
        broker.reload()
        working.empty()
        watching.wait(lambda: {1, 2} <= set(numbers(watching.of("verdict"))), "the verdicts")


def test_what_the_broker_grants_bounds_what_is_in_flight(tmp_path: Path, mosquitto: Callable[..., Broker]) -> None:
    broker = mosquitto("max_inflight_messages 3")
    link = Link(settings(broker), "c")
    link.close()
    assert link.window == 1
    with station(tmp_path, settings(broker)) as working:
        working.keep(30, at_once=30)
        working.empty()


def test_an_outbox_is_emptied_after_the_stop_and_what_a_lost_broker_leaves_waits_for_the_next_start(
    tmp_path: Path, broker: Broker, cable_to: Callable[[Broker], Cable], subscribe: Callable[..., Subscriber]
) -> None:
    cable = cable_to(broker)
    watching = subscribe(broker)
    with station(tmp_path, settings(broker, cable)) as working:
        working.keep(60, at_once=60)
        working.stop()
        assert working.outbox.depth("top") == 0
    cable.unplug()
    with station(tmp_path, settings(broker, cable)) as working:
        working.keep(5)
        working.stop()
        assert working.outbox.depth("top") == 5
    cable.plug()
    with station(tmp_path, settings(broker, cable)) as working:
        working.empty()
    watching.wait(lambda: len(watching.of("verdict")) == 65, "all verdicts")
    assert set(numbers(watching.of("verdict"))) == set(range(1, 66))


def test_stopping_in_front_of_a_frozen_broker_ends_when_the_time_to_drain_is_over(
    tmp_path: Path, amqtt: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(amqtt)
    with station(tmp_path, settings(amqtt, keepalive_s=3600), drain_s=0.5) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        amqtt.freeze()
        working.keep(3)
        working.stop()
        assert working.outbox.depth("top") == 3
        amqtt.thaw()


# What is new, what waited, and what must arrive besides


class Picky:
    """A broker that takes no subscriptions, but answers each verdict and event as `answer` says of leaf and content.

    A number is the reason code of the acknowledgement, WITHHELD sends it only when asked, CLOSED ends the connection.
    """

    WITHHELD, CLOSED = -1, -2

    def __init__(self, answer: Callable[[str, dict[str, Any]], int]) -> None:
        self.answer = answer
        self.connections = 0
        self.got: list[tuple[int, str, dict[str, Any]]] = []
        self._withheld: list[tuple[BaseRequestHandler, bytes]] = []
        picky = self

        class Handler(StreamRequestHandler):
            def handle(self) -> None:
                picky.connections += 1
                with suppress(OSError, EOFError):
                    picky._serve(self, picky.connections)

        self._server = ThreadingTCPServer((HOST, 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, name="picky", kwargs={"poll_interval": 0.02})
        self._thread.start()

    def of(self, leaf: str) -> list[dict[str, Any]]:
        return [content for _, came_by, content in self.got if came_by == leaf]

    def acknowledge(self) -> None:
        """Send what was withheld."""
        for handler, packet in self._withheld:
            handler.request.sendall(packet)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, handler: StreamRequestHandler, connection: int) -> None:
        five = False
        while True:
            kind, body = self._packet(handler)
            if kind & 0xF0 == 0x10:
                five = body[6] == 5
                handler.request.sendall(b"\x20\x03\0\0\0" if five else b"\x20\x02\0\0")
            elif kind & 0xF0 == 0xC0:
                handler.request.sendall(b"\xd0\0")
            elif kind & 0xF0 == 0xE0:
                return
            elif kind & 0xF0 == 0x30:
                end = 2 + int.from_bytes(body[:2])
                leaf, mid = body[2:end].decode().split("/", 2)[2], body[end : end + 2]
                content = json.loads(body[end + 2 + (1 + body[end + 2] if five else 0) :])
                record = leaf in {"verdict", "event"}
                if record:
                    self.got.append((connection, leaf, content))
                reason = self.answer(leaf, content) if record else 0
                if reason == self.CLOSED:
                    return
                packet = b"\x40\x03" + mid + bytes([max(0, reason)]) if five else b"\x40\x02" + mid
                if reason == self.WITHHELD:
                    self._withheld.append((handler, packet))
                else:
                    handler.request.sendall(packet)

    def _packet(self, handler: StreamRequestHandler) -> tuple[int, bytes]:
        head = self._exactly(handler, 2)
        while head[-1] & 0x80:
            head += self._exactly(handler, 1)
        return head[0], self._exactly(handler, sum((byte & 0x7F) << 7 * n for n, byte in enumerate(head[1:])))

    def _exactly(self, handler: StreamRequestHandler, count: int) -> bytes:
        data = handler.rfile.read(count)
        if len(data) < count:
            raise EOFError
        return data


@contextmanager
def picky(answer: Callable[[str, dict[str, Any]], int]) -> Iterator[Picky]:
    broker = Picky(answer)
    try:
        yield broker
    finally:
        broker.close()


def numbers_of(broker: Picky) -> list[int]:
    return [content["seq"] for content in broker.of("verdict")]


def with_backlog(folder: Path, count: int) -> None:
    """An outbox that a run without a broker has left behind."""
    with station(folder, nobody()) as working:
        working.keep(count, at_once=count)


def test_what_waited_never_takes_more_than_half_of_the_window_from_what_is_new(tmp_path: Path) -> None:
    with_backlog(tmp_path, 40)
    with (
        picky(lambda _, content: Picky.WITHHELD if content["seq"] <= 40 else 0) as broker,
        station(tmp_path, link.Broker(HOST, broker.port)) as working,
    ):
        eventually(lambda: len(broker.of("verdict")) == link.WINDOW // 2, "half a window")
        working.keep(30, at_once=10)
        eventually(lambda: working.outbox.depth("top") == 40, "the new verdicts to be acknowledged")
        assert numbers_of(broker) == [*range(1, 7), *range(41, 71)]
        assert [content["replayed"] for content in broker.of("verdict")] == [True] * 6 + [False] * 30
        broker.answer = lambda _, __: 0
        broker.acknowledge()
        working.empty()
        assert numbers_of(broker)[36:] == list(range(7, 41))


def test_what_waited_is_sent_at_its_rate_while_what_is_new_overtakes_it(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    with_backlog(tmp_path, 60)
    watching = subscribe(broker)
    with station(tmp_path, settings(broker), replay_rate=1, drain_s=0) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        for newest in (70, 80, 90):
            working.keep(10)
            watching.wait(lambda newest=newest: newest in numbers(watching.of("verdict")), "it")  # type: ignore[misc]
        watching.wait(lambda: numbers(watching.of("last"))[-1:] == [90], "the newest verdict")
        late = [message.content["seq"] for message in watching.of("verdict") if message.content["replayed"]]
        assert late == list(range(1, len(late) + 1))
        assert 0 < len(late) < 60
        new = [message.content["seq"] for message in watching.of("verdict") if not message.content["replayed"]]
        assert new == list(range(61, 91))
        assert numbers(watching.of("last")) == sorted(numbers(watching.of("last")))
        assert not set(numbers(watching.of("last"))) & set(late)


def test_after_a_backlog_last_shows_the_newest_of_it_and_none_before(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    with_backlog(tmp_path, 50)
    watching = subscribe(broker)
    with station(tmp_path, settings(broker)) as working:
        working.empty()
        watching.wait(lambda: watching.of("last"), "the newest")
    assert numbers(watching.of("verdict")) == list(range(1, 51))
    assert numbers(watching.of("last")) == [50]


def test_events_that_waited_for_the_broker_arrive_in_their_order_beside_a_record_without_gaps(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    with station(tmp_path, nobody()) as working:
        working.keep(2)
        for number in range(1, 31):
            working.outbox.tell("top", "event", b'{"number":%d}' % number)
        working.outbox.tell("top", "alarm/event", b'{"alarm":true}')
        working.keep(2)
    watching = subscribe(broker)
    with station(tmp_path, settings(broker)) as working:
        working.empty()
        watching.wait(lambda: watching.of("alarm/event"), "the alarm")
        working.outbox.tell("top", "event", b'{"number":31}')
        working.sink.notify()
        watching.wait(lambda: len(watching.of("event")) == 31, "the events")
        eventually(lambda: not working.outbox.notes("top", 0, 1), "their acknowledgement")
    assert numbers(watching.of("event"), "number") == list(range(1, 32))
    assert numbers(watching.of("verdict")) == [1, 2, 3, 4]
    assert not any(message.retain for message in watching.of("event") + watching.of("alarm/event"))


def test_verdicts_dropped_for_want_of_room_are_told_by_one_event_that_names_them(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    with station(tmp_path, nobody(), max_rows=10) as working:
        working.keep(30)
    with station(tmp_path, settings(broker), max_rows=10) as working:
        working.empty()
        watching.wait(lambda: watching.of("event"), "the event")
        eventually(lambda: not working.outbox.notes("top", 0, 1), "its acknowledgement")
    (gap,) = [message.content for message in watching.of("event")]
    assert (gap["schema"], gap["kind"], gap["first_seq"], gap["last_seq"]) == ("inspectd.event/1", "gap", 1, 20)
    assert "20 verdicts" in gap["detail"]
    assert numbers(watching.of("verdict")) == list(range(21, 31))


# What no broker takes


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_verdict_larger_than_the_broker_takes_is_put_aside_told_and_tried_again_by_the_next_run(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber], protocol: str
) -> None:
    broker = mosquitto("max_packet_size 1100")
    watching = subscribe(broker)
    with capture_logs() as logs, station(tmp_path, settings(broker, protocol=protocol)) as working:
        working.keep(3)
        working.keep(1, make=large)
        working.keep(20)
        watching.wait(lambda: set(numbers(watching.of("verdict"))) == {*range(1, 25)} - {4}, "the others")
        watching.wait(lambda: watching.of("event"), "the event")
        eventually(lambda: working.outbox.depth("top") == 0, "their acknowledgement")
        assert working.outbox.quarantined("top") == 1
        watching.wait(lambda: numbers(watching.of("last"))[-1:] == [24], "the newest verdict")
        assert 4 not in numbers(watching.of("last"))
    told = watching.of("event")[0].content
    assert (told["kind"], told["subject"], told["first_seq"], told["last_seq"]) == ("quarantined", f"{4:026}", 4, 4)
    assert len(watching.of("event")) == 1
    assert [said["seq"] for said in logs if "put aside" in said["event"]] == [4]
    losses = [said for said in logs if "lost the broker" in said["event"]]
    assert (losses == []) == (protocol == "5")
    broker.stop()
    generous = mosquitto()
    watching = subscribe(generous)
    with station(tmp_path, settings(generous, protocol=protocol)) as working:
        watching.wait(lambda: numbers(watching.of("verdict")) == [4], "the verdict that was put aside")
        eventually(lambda: working.outbox.depth("top") == 0, "its acknowledgement")
        assert working.outbox.quarantined("top") == 0


def test_what_a_broker_of_small_packets_does_not_take_costs_neither_the_connection_nor_the_gate(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber]
) -> None:
    broker = mosquitto("max_packet_size 640")
    watching = subscribe(broker)
    with station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        working.keep(5)
        eventually(lambda: working.outbox.quarantined("top") == 5, "the verdicts to be put aside")
        working.sink.actuate(actuation(5))
        watching.wait(lambda: watching.of("plc"), "the gate's message")
        watching.wait(lambda: len(watching.of("event")) == 5, "the events")
        assert working.outbox.depth("top") == 0
    watching.wait(lambda: statuses(watching) == ["running", "stopped"], "the end")


@pytest.mark.parametrize("reason", [0x80, 0x83, 0x90, 0x97, 0x99])
def test_a_verdict_that_the_broker_refuses_twice_is_put_aside_without_losing_the_connection(
    tmp_path: Path, reason: int
) -> None:
    with (
        picky(lambda leaf, content: reason if leaf == "verdict" and content["seq"] == 2 else 0) as broker,
        station(tmp_path, link.Broker(HOST, broker.port)) as working,
    ):
        eventually(lambda: broker.connections, "the connection")
        working.keep(5)
        eventually(lambda: broker.of("event"), "the event")
        eventually(lambda: working.outbox.depth("top") == 0, "the others")
        assert (working.outbox.quarantined("top"), broker.connections) == (1, 1)
        assert set(numbers_of(broker)) == {1, 2, 3, 4, 5}
        assert broker.of("event")[0]["first_seq"] == 2


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_verdict_that_breaks_each_connection_is_put_aside_and_those_in_flight_with_it_are_not(
    tmp_path: Path, protocol: str
) -> None:
    with_backlog(tmp_path, 30)
    with (
        picky(lambda leaf, content: Picky.CLOSED if leaf == "verdict" and content["seq"] == 1 else 0) as broker,
        station(tmp_path, link.Broker(HOST, broker.port, protocol)) as working,
    ):
        eventually(lambda: broker.of("event"), "the event")
        eventually(lambda: working.outbox.depth("top") == 0, "the others")
        assert working.outbox.quarantined("top") == 1
        assert set(numbers_of(broker)) == set(range(1, 31))
        assert broker.of("event")[0]["first_seq"] == 1
        # A connection that breaks while the next is being published says nothing of the first, which goes once more.
        assert 2 <= numbers_of(broker).count(1) <= 4


def test_a_broker_that_closes_the_connection_at_every_verdict_is_not_put_down_to_the_verdicts(tmp_path: Path) -> None:
    with (
        picky(lambda leaf, _: Picky.CLOSED if leaf == "verdict" else 0) as broker,
        station(tmp_path, link.Broker(HOST, broker.port)) as working,
    ):
        working.keep(3)
        eventually(lambda: set(numbers_of(broker)) == {1, 2, 3} and broker.connections > 3, "several attempts")
        assert (working.outbox.depth("top"), working.outbox.quarantined("top")) == (3, 0)
        broker.answer = lambda _, __: 0
        working.keep(1)
        working.empty()
        assert (working.outbox.quarantined("top"), broker.of("event")) == (0, [])


def test_an_event_that_the_broker_refuses_is_put_aside_without_another_event(tmp_path: Path) -> None:
    with (
        picky(lambda leaf, _: 0x83 if leaf == "event" else 0) as broker,
        station(tmp_path, link.Broker(HOST, broker.port)) as working,
    ):
        working.outbox.tell("top", "event", b'{"odd":1}')
        working.keep(1)
        eventually(lambda: broker.of("event"), "the first attempt")
        working.keep(1)
        eventually(lambda: not working.outbox.notes("top", 0, 1), "it to be put aside")
        working.empty()
    assert broker.of("event") == [{"odd": 1}] * len(broker.of("event"))


# The reject gate


def test_a_message_to_the_reject_gate_is_not_retained_and_expires(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber]
) -> None:
    broker = mosquitto()
    watching = subscribe(broker, five=True)
    with station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        working.sink.actuate(actuation(1))
        working.keep(1)
        watching.wait(lambda: watching.of("plc") and watching.of("last"), "both messages")
    gate, record, last = watching.of("plc")[0], watching.of("verdict")[0], watching.of("last")[0]
    assert gate.payload == actuation(1).payload
    assert (gate.retain, gate.expires_s, gate.content_type) == (False, 2, "application/json")
    assert (record.retain, record.expires_s, record.content_type) == (False, None, "application/json")
    assert (last.retain, last.expires_s) == (True, 3600)
    assert all(message.retain for message in watching.of("state") + watching.of("quality") + watching.of("status"))


@pytest.mark.skipif(shutil.which("mosquitto_sub") is None, reason="mosquitto_sub is not installed")
def test_mosquitto_sub_sees_each_leaf_as_the_contract_has_it(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber]
) -> None:
    broker = mosquitto()
    watching = subscribe(broker)
    command = ["mosquitto_sub", "-V", "5", "-h", HOST, "-p", str(broker.port), "-t", "inspectd/top/+", "-q", "1"]
    command += ["--retain-as-published", "-F", "%t|%r|%q|%E|%C|%p", "-W", str(round(DEADLINE_S)), "-C", "6"]
    with station(tmp_path, settings(broker)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(3)]  # what is retained, so it has subscribed
            working.sink.actuate(actuation(1))
            working.keep(1)
            lines += list(child.stdout)
    seen = {}
    for line in lines:
        topic, retain, qos, expiry, content_type, payload = line.strip().split("|")
        assert content_type == "application/json"
        assert json.loads(payload)
        seen[topic] = (retain, qos, expiry)
    assert {topic: marks[:2] for topic, marks in seen.items()} == {
        "inspectd/top/state": ("1", "1"),
        "inspectd/top/quality": ("1", "1"),
        "inspectd/top/status": ("1", "1"),
        "inspectd/top/verdict": ("0", "1"),
        "inspectd/top/last": ("1", "1"),
        "inspectd/top/plc": ("0", "1"),
    }
    assert int(seen["inspectd/top/plc"][2]) <= 2


def test_while_the_broker_is_away_actuation_is_dropped_counted_and_never_sent_later(
    tmp_path: Path, broker: Broker, cable_to: Callable[[Broker], Cable], subscribe: Callable[..., Subscriber]
) -> None:
    cable = cable_to(broker)
    watching = subscribe(broker)
    with station(tmp_path, settings(broker, cable)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        working.sink.actuate(actuation(1))
        watching.wait(lambda: watching.of("plc"), "the first actuation")
        cable.unplug()
        broker.stop()
        missed = iter(range(2, 100_000))

        def dropped() -> bool:
            working.sink.actuate(actuation(next(missed)))
            return working.sink.actuations_dropped >= 3

        eventually(dropped, "the sink to notice")
        working.keep(1)
        broker.start()
        watching = subscribe(broker)
        cable.plug()
        watching.wait(lambda: watching.of("verdict"), "the record")
        working.sink.actuate(actuation(100_000))
        watching.wait(lambda: watching.of("plc"), "the next actuation")
    assert numbers(watching.of("plc"), "s") == [100_000]


def test_before_the_first_connection_actuation_is_dropped_and_counted(tmp_path: Path) -> None:
    with station(tmp_path, nobody()) as working:
        working.sink.actuate(actuation(1))
        working.sink.actuate(actuation(2))
        assert working.sink.actuations_dropped == 2


def test_a_stalled_connection_gets_no_more_actuation_than_its_time_to_live_allows(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    with station(tmp_path, settings(broker, keepalive_s=3600), ttl_s=0.3) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        broker.freeze()
        working.sink.actuate(actuation(1))
        eventually(lambda: stalls(working), "the sink to notice")
        dropped = working.sink.actuations_dropped
        for seq in range(1000, 1050):
            working.sink.actuate(actuation(seq))
        assert working.sink.actuations_dropped == dropped + 50
        broker.thaw()
        watching.wait(lambda: watching.of("plc"), "what was sent in time")
        eventually(lambda: not stalls(working), "the sink to trust the connection again")
        working.sink.actuate(actuation(2000))
        watching.wait(lambda: 2000 in numbers(watching.of("plc"), "s"), "the next actuation")
    watching.wait(lambda: "stopped" in statuses(watching), "the end")
    assert not set(range(1000, 1050)) & set(numbers(watching.of("plc"), "s"))
    assert statuses(watching) == ["running", "stopped"]


def stalls(working: Station) -> bool:
    """Whether an actuation is dropped at this moment."""
    before = working.sink.actuations_dropped
    working.sink.actuate(actuation(500))
    return working.sink.actuations_dropped > before


def test_actuation_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, broker: Broker, subscribe: Callable[..., Subscriber]
) -> None:
    watching = subscribe(broker)
    with station(tmp_path, settings(broker)) as working:
        working.keep(1)
        watching.wait(lambda: watching.of("last"), "the station to be at work")
        other = sqlite3.connect(tmp_path / "outbox.sqlite3", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        recording = Thread(target=working.keep, args=(1,))
        recording.start()
        for seq in range(2, 6):
            working.sink.actuate(actuation(seq))
            watching.wait(lambda seq=seq: seq in numbers(watching.of("plc"), "s"), "it")  # type: ignore[misc]
        assert recording.is_alive(), "the commit did not wait"
        assert numbers(watching.of("verdict")) == [1]
        other.execute("ROLLBACK")
        other.close()
        recording.join()
        watching.wait(lambda: numbers(watching.of("verdict")) == [1, 2], "the verdict")
        assert working.sink.actuations_dropped == 0


# Refusals and the way back


def test_a_refused_password_is_said_once_without_it_and_mended_without_a_restart(
    tmp_path: Path, mosquitto: Callable[..., Broker]
) -> None:
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed")
    passwords = tmp_path / "passwords"
    set_password = ["mosquitto_passwd", "-b", str(passwords), "inspector"]
    passwords.touch(mode=0o600)
    subprocess.run([*set_password, "something-else"], check=True)
    broker = mosquitto(f"password_file {passwords}", "allow_anonymous false")
    account = settings(broker, username="inspector", password="swordfish")  # noqa: S106 -- of no account
    with capture_logs() as logs, station(tmp_path, account) as working:
        working.keep(1)
        eventually(lambda: logs, "the warning")
        eventually(lambda: refusals(tmp_path) >= 3, "three attempts")
        subprocess.run([*set_password, "swordfish"], check=True)
        broker.reload()
        working.empty()
    warnings = [said["event"] for said in logs if said["log_level"] == "warning"]
    assert len(warnings) == 1
    assert f"{HOST}:{broker.port}" in warnings[0]
    assert "inspector" in warnings[0]
    assert "password_file" in warnings[0]
    assert "swordfish" not in str(logs)


def refusals(folder: Path) -> int:
    return (folder / "mosquitto.log").read_text().count("not authorised")


def test_a_broker_never_shows_its_password() -> None:
    broker = link.Broker(HOST, 1883, username="inspector", password="swordfish")  # noqa: S106 -- of no account
    assert "swordfish" not in f"{broker!r} {broker}"
    assert str(broker) == f"{HOST}:1883"


@pytest.mark.parametrize("protocol", ["auto", "3.1.1"])
def test_a_broker_without_mqtt_5_gets_the_same_bytes_by_3_1_1(
    tmp_path: Path, amqtt: Broker, subscribe: Callable[..., Subscriber], protocol: str
) -> None:
    watching = subscribe(amqtt)
    with station(tmp_path, settings(amqtt, protocol=protocol)) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        working.keep(1)
        working.sink.actuate(actuation(1))
        watching.wait(lambda: watching.of("last") and watching.of("plc"), "its messages")
    assert watching.of("verdict")[0].payload == contract.encode_verdict(IDENTITY, verdict(1))
    assert watching.of("plc")[0].payload == actuation(1).payload


def test_a_broker_that_only_speaks_3_1_1_is_refused_where_5_is_demanded(amqtt: Broker) -> None:
    with pytest.raises(DeliveryError, match=f"{HOST}:{amqtt.port}"):
        Link(settings(amqtt, protocol="5"), "c")


def test_a_broker_that_is_away_is_said_with_its_address(tmp_path: Path) -> None:
    broker = nobody()
    with capture_logs() as logs, station(tmp_path, broker):
        eventually(lambda: logs, "the warning")
    assert str(broker) in logs[0]["event"]


def test_connections_that_ended_leave_no_socket_open_even_before_garbage_is_collected(amqtt: Broker) -> None:
    gc.collect()
    gc.disable()
    try:
        before = psutil.Process().num_fds()
        for _ in range(3):
            Link(settings(amqtt), "c").close()
            with pytest.raises(DeliveryError):
                Link(settings(amqtt, protocol="5"), "c")
        assert psutil.Process().num_fds() == before
    finally:
        gc.enable()


def test_a_sink_whose_connection_is_taken_pauses_before_it_takes_it_back(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber]
) -> None:
    broker = mosquitto()
    watching = subscribe(broker)
    with capture_logs() as logs, station(tmp_path, settings(broker), backoff_s=NEVER_S):
        watching.wait(lambda: watching.of("status"), "the station to be online")
        other = Link(settings(broker), "inspectd.edge7.top")
        eventually(lambda: [said for said in logs if "lost the broker" in said["event"]], "the loss")
        Event().wait(QUIET_S)
        assert other.lost is None
        other.close()


def test_a_woken_link_does_not_wait_even_if_it_was_woken_before(broker: Broker) -> None:
    link = Link(settings(broker), "c")
    link.wake()
    waiting = Thread(target=link.take_acknowledged, args=(3600.0,))
    waiting.start()
    waiting.join(DEADLINE_S)
    woken = not waiting.is_alive()
    link.wake()
    waiting.join(DEADLINE_S)
    link.close()
    assert woken


# Pictures


def picture(size: int) -> Message:
    return contract.picture(IDENTITY, Picture.OVERLAY, b"\xff\xd8" + bytes(size - 2))


def test_pictures_without_a_broker_are_dropped_and_counted() -> None:
    sink = PictureSink(nobody, "edge7")
    for _ in range(5):
        sink.show(picture(1000))
    sink.close()
    assert sink.dropped == 5


def test_a_picture_arrives_as_it_is_and_is_not_retained(broker: Broker, subscribe: Callable[..., Subscriber]) -> None:
    watching = subscribe(broker, five=broker.five)
    sink = PictureSink(lambda: settings(broker), "edge7")
    sink.show(picture(300_000))
    watching.wait(lambda: watching.messages, "the picture")
    sink.close()
    assert watching.messages[0].leaf == "image/overlay"
    assert watching.messages[0].payload == picture(300_000).payload
    assert not watching.messages[0].retain
    assert sink.dropped == 0


def test_pictures_come_again_after_the_broker_was_away(
    broker: Broker, cable_to: Callable[[Broker], Cable], subscribe: Callable[..., Subscriber]
) -> None:
    cable = cable_to(broker)
    watching = subscribe(broker)
    sink = PictureSink(lambda: settings(broker, cable), "edge7", retry_s=0.01)
    sink.show(picture(10))
    watching.wait(lambda: watching.messages, "the first picture")
    cable.unplug()

    def dropped() -> bool:
        sink.show(picture(20))
        return sink.dropped > 0

    eventually(dropped, "the sink to notice")
    cable.plug()

    def shown() -> bool:
        sink.show(picture(30))
        return any(len(message.payload) == 30 for message in watching.messages)

    eventually(shown, "a picture after the outage")
    sink.close()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_picture_larger_than_the_broker_takes_does_not_disturb_the_station(
    tmp_path: Path, mosquitto: Callable[..., Broker], subscribe: Callable[..., Subscriber], protocol: str
) -> None:
    broker = mosquitto("max_packet_size 2000000")
    watching = subscribe(broker)
    account = settings(broker, protocol=protocol)
    pictures = PictureSink(lambda: account, "edge7", retry_s=0.01)
    with station(tmp_path, account) as working:
        watching.wait(lambda: watching.of("status"), "the station to be online")
        pictures.show(picture(2_100_000))
        working.keep(20)
        working.empty()
        eventually(lambda: shown_small(pictures, watching), "a picture that fits")
    pictures.close()
    watching.wait(lambda: "stopped" in statuses(watching), "the end")
    assert numbers(watching.of("verdict")) == list(range(1, 21))
    assert statuses(watching) == ["running", "stopped"]
    if protocol == "5":
        assert pictures.dropped == 1


def shown_small(pictures: PictureSink, watching: Subscriber) -> bool:
    pictures.show(picture(40))
    return bool(watching.of("image/overlay"))


def test_pictures_in_front_of_a_frozen_broker_are_dropped_and_do_not_hold_up_the_stop(broker: Broker) -> None:
    sink = PictureSink(lambda: settings(broker, keepalive_s=3600), "edge7")
    sink.show(picture(10))
    broker.freeze()
    sink.show(picture(40_000_000))  # more than the buffers of two sockets hold
    for _ in range(10):
        sink.show(picture(10))
    assert sink.dropped >= 6
    closing = Thread(target=sink.close)
    closing.start()
    closing.join(DEADLINE_S)
    held_up = closing.is_alive()
    broker.thaw()
    closing.join()
    assert not held_up


def test_no_small_message_waits_for_the_acknowledgement_of_the_one_before(mosquitto: Callable[..., Broker]) -> None:
    broker = mosquitto()
    connection = Link(settings(broker), "prompt")
    # By its type alone: `isinstance` would wake up what is lazy among all objects that there are.
    every = [each for each in gc.get_objects() if type(each) is socket.socket]
    prompt = [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in every if peer(each) == broker.port]
    connection.close()
    assert prompt == [1]


def peer(connection: socket.socket) -> int | None:
    """The port at the other end, if there is one."""
    with suppress(OSError):
        return int(connection.getpeername()[1])
    return None
