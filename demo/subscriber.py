"""What anyone on the network can see: a plain MQTT 3.1.1 client that knows nothing but the topics."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition
from typing import Self

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from demo.broker import HOST

_TOPICS = ("inspectd/+/verdict", "inspectd/+/plc", "inspectd/+/status", "inspectd/+/image/overlay")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One message on `verdict`; `at` is `time.monotonic()` at its arrival, a score is in thresholds, -1 is none."""

    at: float
    id: str
    seq: int
    part_id: str
    outcome: str
    reject: bool
    score: float
    p_value: float
    fpr_target: float
    infer_ms: float


@dataclass(frozen=True, slots=True)
class Status:
    """One message on `status`: a daemon, known by its `boot_id`, is there or not."""

    online: bool
    reason: str
    boot_id: str


class Subscriber:
    """Receives in a thread of its own; what it keeps only grows, and may be read at any time.

    `news` holds verdicts and statuses in the order of their arrival. As a context it listens while in it.
    """

    def __init__(self, port: int) -> None:
        self.news: list[Verdict | Status] = []
        self.actuations = 0
        self.pictures = 0
        self._changed = Condition()
        self._port = port
        self._client = Client(CallbackAPIVersion.VERSION2, "demo", protocol=MQTTProtocolVersion.MQTTv311)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message

    def __enter__(self) -> Self:
        self._client.connect(HOST, self._port)
        self._client.loop_start()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def verdicts(self) -> list[Verdict]:
        """All verdicts so far, repeated deliveries included."""
        return [entry for entry in list(self.news) if isinstance(entry, Verdict)]

    @property
    def status(self) -> Status | None:
        """The newest status."""
        return next((entry for entry in reversed(list(self.news)) if isinstance(entry, Status)), None)

    def wait(self, seconds: float, done: Callable[[], bool]) -> bool:
        """Wait until `done`, asking at each message; False if it never was."""
        with self._changed:
            return self._changed.wait_for(done, seconds)

    def _on_connect(
        self, client: Client, _: object, __: ConnectFlags, ___: ReasonCode, ____: Properties | None
    ) -> None:
        client.subscribe([(topic, 1) for topic in _TOPICS])

    def _on_message(self, _: Client, __: object, message: MQTTMessage) -> None:
        now = time.monotonic()
        with self._changed:
            match message.topic.split("/", 2)[2]:
                case "verdict":
                    self.news.append(_verdict(message.payload, now))
                case "status":
                    content = json.loads(message.payload)
                    self.news.append(Status(content["online"], content["reason"], content["boot_id"]))
                case "plc":
                    self.actuations += 1
                case "image/overlay":
                    self.pictures += 1
                case _:
                    pass
            self._changed.notify_all()


def _verdict(payload: bytes | bytearray, now: float) -> Verdict:
    content = json.loads(payload)
    return Verdict(
        at=now,
        id=content["id"],
        seq=content["seq"],
        part_id=content["part_id"],
        outcome=content["verdict"],
        reject=content["reject"],
        score=content["score"],
        p_value=content["p_value"],
        fpr_target=content["fpr_target"],
        infer_ms=content["latency_ms"]["infer"],
    )
