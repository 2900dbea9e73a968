"""Real brokers on free ports of the loopback, a cable to them that can be pulled, and subscribers that are not ours."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

HOST = "127.0.0.1"
DEADLINE_S = 30.0
ROOT = Path(__file__).parents[1]
PUBACK = 0x40

T = TypeVar("T")


def eventually(condition: Callable[[], T], what: str, patience_s: float = DEADLINE_S) -> T:
    """Wait until something holds that nobody announces."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.01)
    return value


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def find_mosquitto() -> str | None:
    # Debian puts it where only root's PATH leads.
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


class Broker:
    """A broker's process, which keeps its port over restarts. `five` says whether it speaks MQTT 5."""

    def __init__(self, command: list[str], port: int, log: Path, *, five: bool) -> None:
        self.port = port
        self.five = five
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=log, stderr=log)
        eventually(self._answers, "the broker to start")

    def stop(self) -> None:
        if self._process is not None:
            self.thaw()
            if self.five:
                self._process.terminate()
            else:  # amqtt may hang in saying goodbye to its clients
                self._process.kill()
            self._process.wait(DEADLINE_S)
            self._process = None

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def reload(self) -> None:
        """Let Mosquitto read its password file again."""
        self._signal(signal.SIGHUP)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the broker has ended:\n{self._log.read_text()}"
        try:
            socket.create_connection((HOST, self.port), timeout=1).close()
        except OSError:
            return False
        return True


def mosquitto(folder: Path, *options: str) -> Broker:
    """Mosquitto with some lines of its configuration; it must be installed."""
    program, port = find_mosquitto(), free_port()
    assert program is not None
    access = [] if any(option.startswith("password_file") for option in options) else ["allow_anonymous true"]
    memory = [] if any(option.startswith("persistence") for option in options) else ["persistence false"]
    lines = [f"listener {port} {HOST}", "user root", *memory, *access, *options]
    (folder / "mosquitto.conf").write_text("\n".join(lines) + "\n")
    return Broker([program, "-c", str(folder / "mosquitto.conf")], port, folder / "mosquitto.log", five=True)


def amqtt(folder: Path) -> Broker:
    """A broker in Python that speaks MQTT 3.1.1 alone."""
    port = free_port()
    return Broker([sys.executable, "-m", "demo.broker", str(port)], port, folder / "amqtt.log", five=False)


class Cable:
    """A TCP relay to a broker. Unplugged, its connections are reset and its port refuses new ones.

    `deaf` packets (their first byte) get lost on the way from the broker, as if it had not sent them.
    """

    def __init__(self, to_port: int) -> None:
        self.port = free_port()
        self.deaf: set[int] = set()
        self._vanished = threading.Event()
        self._to_port = to_port
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cable")
        self._thread.start()
        self.plug()

    def plug(self) -> None:
        self._do(self._listen())

    def unplug(self) -> None:
        self._do(self._cut())

    def vanish(self) -> None:
        """Let nothing more through the connections there are, without closing them; new ones work."""
        self._vanished.set()
        self._vanished = threading.Event()

    def close(self) -> None:
        self.unplug()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._relay, HOST, self.port)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    async def _relay(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        this = asyncio.current_task()
        assert this is not None
        self._relays.add(this)
        vanished = self._vanished
        try:
            far, to_far = await asyncio.open_connection(HOST, self._to_port)
            copies = [
                asyncio.create_task(_copy(near, to_far, vanished)),
                asyncio.create_task(self._copy_packets(far, to_near, vanished)),
            ]
            try:
                await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
                if vanished.is_set():  # neither end hears of the other's
                    await asyncio.Event().wait()
            finally:
                for copy in copies:
                    copy.cancel()
                await asyncio.gather(*copies, return_exceptions=True)
                to_far.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            to_near.transport.abort()
            self._relays.discard(this)

    async def _copy_packets(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, vanished: threading.Event
    ) -> None:
        while True:
            head = await reader.readexactly(2)
            while head[-1] & 0x80:  # the length goes on
                head += await reader.readexactly(1)
            length = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(head[1:]))
            body = await reader.readexactly(length)
            if head[0] not in self.deaf and not vanished.is_set():
                writer.write(head + body)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, vanished: threading.Event) -> None:
    while data := await reader.read(65536):
        if not vanished.is_set():
            writer.write(data)
            await writer.drain()


@dataclass(frozen=True, slots=True)
class Received:
    """A message as a subscriber got it; `leaf` is what follows the station in its topic."""

    leaf: str
    payload: bytes
    retain: bool
    expires_s: int | None
    content_type: str | None

    @property
    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.payload)
        return content


class Subscriber:
    """A plain paho client that keeps what arrives. With MQTT 5 it sees the retain flag as it was published."""

    def __init__(self, port: int, topic: str, *, five: bool = False) -> None:
        protocol = MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=protocol, reconnect_on_failure=False)
        self._changed = threading.Condition()
        self._subscribed = False
        self.messages: list[Received] = []
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        # Not before the broker has answered: amqtt has been seen to lose a subscription that came sooner.
        self._client.on_connect = lambda client, *_: (
            client.subscribe(topic, options=SubscribeOptions(qos=1, retainAsPublished=True))
            if five
            else client.subscribe(topic, 1)
        )
        self._client.connect(HOST, port)
        self._client.loop_start()
        with self._changed:
            assert self._changed.wait_for(lambda: self._subscribed, DEADLINE_S), "the broker does not answer"

    def of(self, leaf: str) -> list[Received]:
        return [message for message in self.messages if message.leaf == leaf]

    def wait(self, condition: Callable[[], T], what: str, patience_s: float = DEADLINE_S) -> T:
        """Wait for messages until something holds."""
        with self._changed:
            held = self._changed.wait_for(condition, patience_s)
        assert held, f"still waiting for {what}; arrived: {[message.leaf for message in self.messages]}"
        return held

    def publish(self, topic: str, payload: str) -> None:
        self._client.publish(topic, payload, 1)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_subscribe(self, *_: object) -> None:
        with self._changed:
            self._subscribed = True
            self._changed.notify_all()

    def _on_message(self, _: Client, __: object, message: MQTTMessage) -> None:
        leaf = message.topic.split("/", 2)[2]
        expires_s = getattr(message.properties, "MessageExpiryInterval", None)
        content_type = getattr(message.properties, "ContentType", None)
        with self._changed:
            self.messages.append(Received(leaf, bytes(message.payload), message.retain, expires_s, content_type))
            self._changed.notify_all()
