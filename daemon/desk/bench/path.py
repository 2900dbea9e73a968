"""The whole path: from a file that is closed in the watched folder to the gate's message at a subscriber.

The installed daemon with a folder, a real broker and its defaults, and beside it the bare engine as a contender, which
sleeps while the daemon works. They take turns at full load; then parts come at half of what the daemon can judge.
"""

import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import numpy as np

from daemon.desk.bench.contest import PAUSE_S, Ratio, frame_ms, of_rounds
from daemon.desk.bench.rival import Rival
from daemon.link import Broker, DeliveryError, Link, Session

HOST = "127.0.0.1"
WAITING = 16
"""Files that wait in the folder at full load; more would measure the disk."""
HALF = 0.5
TURN_S = 4.0
FEWEST, MOST = 30, 1000
"""Parts in a turn, and at half load."""
WARM_UP = 10
PATIENCE_S = 120.0
GOODBYE_S = 20.0
STATION = "bench"
NO_BROKER = "the whole path needs a broker, and there is none: apt-get install mosquitto, or pip install amqtt"
GOAL_SHARE, GOAL_P50_MS, GOAL_P99_MS = 0.95, 3.0, 10.0
"""Throughput of the daemon by that of the bare engine; what all but reading and judging may add to a part."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Sum up."""
        return cls(*map(float, np.percentile(values, [50, 95, 99])))


@dataclass(frozen=True, slots=True)
class WholePath:
    """What the daemon adds to its engine.

    `gate` is from the closed file to the gate's message, at half load; `added` is that without what the engine alone
    takes: to read a file, and the part's own time in the network. `infer_ms` is the daemon's median in the network,
    `alone_ms` the bare engine's. `share` is the throughput at full load by the bare engine's from files.
    """

    broker: str
    engine: str
    parts: int
    gate: Percentiles
    added: Percentiles
    read_ms: float
    infer_ms: float
    alone_ms: float
    per_second: float
    share: Ratio | None


class PathError(Exception):
    """The whole path could not be measured; the message says why."""


def measure(
    model: Path, engine: str, images: Sequence[Path], device: str, bare: Rival, folder: Path, rounds: int
) -> Iterator[int | WholePath]:
    """Run the daemon; yields percents that are done, and the result last.

    Args:
        model: a calibrated model folder.
        engine: the key of the engine that its calibration was made with.
        images: what parts look like, files.
        device: where the network runs, as the configuration says it.
        bare: the same engine as a contender, ready.
        folder: an empty folder to work in.
        rounds: turns that each has at full load; at half load parts come for as long as these take.

    Raises:
        PathError: the daemon or the broker does not do its part.
        FallenError: the bare engine has ended.
    """
    try:
        with (
            _broker(folder) as (broker, port),
            _daemon(folder, model, device, port) as daemon,
            closing(_Line(folder, port, images, daemon)) as line,
        ):
            for _ in range(WARM_UP):
                line.drop()
            line.await_verdicts()
            alone_ms = frame_ms(bare.measure("file", WARM_UP))
            parts = max(FEWEST, int(TURN_S * 1000 / alone_ms))
            shares, rates = [], []
            for number in range(rounds):
                time.sleep(PAUSE_S)
                turn = bare.measure("file", parts)
                time.sleep(PAUSE_S)
                rates.append(line.flood(parts))
                shares.append(rates[-1] * sum(turn.ms) / 1000 / parts)
                yield 10 + 60 * number // rounds
            per_second = statistics.median(rates)
            memory, read_ms = bare.measure("memory", FEWEST), frame_ms(bare.measure("decode", FEWEST))
            yield 70
            several = max(FEWEST, min(MOST, int(2 * rounds * TURN_S * HALF * per_second)))
            names = line.trickle(several, 1 / (HALF * per_second))
            yield 100
    except DeliveryError as error:
        raise PathError(str(error)) from error
    gate = [line.gate[name] - line.closed[name] for name in names if name in line.gate]
    added = [
        1000 * (line.gate[name] - line.closed[name]) - line.infer[name] - read_ms for name in names if name in line.gate
    ]
    if not gate:
        raise PathError("no message for the gate has come")
    yield WholePath(
        broker=broker,
        engine=engine,
        parts=len(gate),
        gate=Percentiles.of([1000 * seconds for seconds in gate]),
        added=Percentiles.of(added),
        read_ms=read_ms,
        infer_ms=statistics.median(line.infer[name] for name in names),
        alone_ms=frame_ms(memory),
        per_second=per_second,
        share=of_rounds(shares),
    )


class _Line:
    """The folder of a daemon, and who hears the gate and the record. Times are `time.monotonic()` seconds."""

    def __init__(self, folder: Path, port: int, images: Sequence[Path], daemon: "_Daemon") -> None:
        self.closed: dict[str, float] = {}
        self.gate: dict[str, float] = {}
        self.verdicts: dict[str, float] = {}
        self.infer: dict[str, float] = {}
        self._daemon = daemon
        self._incoming = folder / "incoming"
        self._images = [(path.read_bytes(), path.suffix) for path in images]
        self._link = Link(Broker(HOST, port), "bench", session=Session(expiry_s=60, window=100))
        for leaf in ("plc", "verdict"):
            self._link.subscribe(f"inspectd/{STATION}/{leaf}")
        self._link.await_subscriptions()

    def close(self) -> None:
        """Hang up."""
        self._link.close()

    def drop(self) -> str:
        """Let a part come, and give its name."""
        number = len(self.closed)
        content, suffix = self._images[number % len(self._images)]
        name = f"part{number:07}"
        with (self._incoming / (name + suffix)).open("wb") as file:
            file.write(content)
        self.closed[name] = time.monotonic()
        return name

    def flood(self, parts: int) -> float:
        """Let parts come as fast as they are judged; gives verdicts a second."""
        names: list[str] = []
        while len(names) < parts:
            while len(self.closed) - len(self.verdicts) < WAITING and len(names) < parts:
                names.append(self.drop())
            self._listen(time.monotonic() + 1)
        self.await_verdicts()
        heard = sorted(self.verdicts[name] for name in names)
        return (parts - 1) / (heard[-1] - heard[0])

    def trickle(self, parts: int, interval_s: float) -> list[str]:
        """Let parts come at a steady pace; gives their names."""
        names: list[str] = []
        due = time.monotonic()
        for _ in range(parts):
            names.append(self.drop())
            due += interval_s
            while time.monotonic() < due:
                self._listen(due)
        self.await_verdicts()
        return names

    def await_verdicts(self) -> None:
        """Listen until each part has its verdict.

        Raises:
            PathError: one has none for long.
        """
        deadline = time.monotonic() + PATIENCE_S
        while len(self.verdicts) < len(self.closed):
            if time.monotonic() > deadline:
                raise PathError(
                    f"{len(self.closed) - len(self.verdicts)} parts have no verdict after {PATIENCE_S:.0f} s; the "
                    f"daemon said last: {self._daemon.last_words()}"
                )
            self._listen(time.monotonic() + 1)

    def _listen(self, until: float) -> None:
        """Hear what comes first, or nothing until then."""
        self._daemon.check()
        self._link.check()
        for delivered in self._link.take_delivered(max(0.0, until - time.monotonic())):
            self._link.acknowledge(delivered.number)
            content = json.loads(delivered.received.payload)
            if delivered.received.topic.endswith("/plc"):
                self.gate.setdefault(Path(content["p"]).stem, delivered.seen_at)
            else:
                name = Path(content["part_id"]).stem
                self.verdicts.setdefault(name, delivered.seen_at)
                self.infer[name] = content["latency_ms"]["infer"]


class _Daemon:
    """`inspectd run`, and its log."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self._process = process
        self._log = log

    def check(self) -> None:
        """See that it runs.

        Raises:
            PathError: it does not.
        """
        if self._process.poll() is not None:
            raise PathError(f"the daemon has ended with status {self._process.returncode}: {self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]) or "nothing"


@contextmanager
def _daemon(folder: Path, model: Path, device: str, port: int) -> Iterator[_Daemon]:
    (folder / "incoming").mkdir()
    configuration = folder / "inspectd.toml"
    configuration.write_text(
        f'state_dir = "state"\ndevice = "{device}"\n[mqtt]\nhost = "{HOST}"\nport = {port}\n'
        f'[[station]]\nname = "{STATION}"\nmodel = {json.dumps(str(model.resolve()))}\n'
        '[station.source]\ntype = "folder"\npath = "incoming"\nkeep = "delete"\n',
        encoding="utf-8",
    )
    with _running([sys.executable, "-m", "daemon", "run", "--config", str(configuration)], folder / "daemon.log") as it:
        yield _Daemon(it, folder / "daemon.log")


def find_broker() -> list[str] | None:
    """The command of a broker on this machine but for its configuration; None if there is none."""
    # Debian puts it where only root's PATH leads.
    mosquitto = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if mosquitto is not None:
        return [mosquitto, "-c"]
    if find_spec("amqtt") is not None:
        return [sys.executable, "-c", "from amqtt.scripts.broker_script import main; main()", "-c"]
    return None


@contextmanager
def _broker(folder: Path) -> Iterator[tuple[str, int]]:
    command = find_broker()
    if command is None:
        raise PathError(NO_BROKER)
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
    configuration = folder / "broker.conf"
    if "mosquitto" in command[0]:
        name, content = "Mosquitto", f"listener {port} {HOST}\nallow_anonymous true\npersistence false\n"
    else:
        access = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
        listeners = {"default": {"type": "tcp", "bind": f"{HOST}:{port}"}}
        name, content = "amqtt", json.dumps({"listeners": listeners, "plugins": access})  # JSON is YAML
    configuration.write_text(content, encoding="utf-8")
    with _running([*command, str(configuration)], folder / "broker.log") as process:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection((HOST, port), timeout=1).close()
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    said = (folder / "broker.log").read_text(encoding="utf-8", errors="replace")[-300:]
                    raise PathError(f"{name} does not start: {said}") from None
                time.sleep(0.05)
            else:
                break
        yield name, port


@contextmanager
def _running(command: Sequence[str], log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
