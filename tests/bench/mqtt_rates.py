"""How many verdicts a second reach a subscriber, and how soon the gate hears of a decision.

    python -m tests.bench.mqtt_rates [--backlog 20000] [--parts 3000] [--gate 400] [--out build/mqtt_rates.json]

The outbox, the sinks and the stages are the daemon's, in this process; Mosquitto and mosquitto_sub, which stamps each
arrival, are processes of their own on the same machine. A *backlog* waits in the outbox when the broker comes, and is
sent at the replay rate of the configuration and at one without effect. *Live* parts go through all stages, with the
smallest detector, as fast as they are taken. The gate's delay is from the call with the decision to the arrival, with
and without a stream of pictures over the daemon's other connection; a verdict goes into the record beside each.
"""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Annotated, Any

import numpy as np
import structlog
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from daemon.boards import state_board
from daemon.contract import Message, encode_state
from daemon.messages import Frame
from daemon.outbox import Outbox
from daemon.sinks.mqtt import REPLAY_RATE, PictureSink, StationSink
from detectors.template import TemplateDetector
from tests.brokers import Broker, eventually, find_mosquitto, mosquitto
from tests.component.test_mqtt_sink import IDENTITY, Station, actuation, nobody, settings
from tests.component.test_mqtt_sink import station as sink_station
from tests.component.test_pipeline import Line, capture
from tests.component.test_pipeline import station as line_station

UNBOUNDED = 1_000_000
PICTURE_BYTES = 2_100_000
PICTURES_A_SECOND = 2
GATE_INTERVAL_S = 0.05
SIDE = 256
PATIENCE_S = 600.0


class Ear:
    """mosquitto_sub on one topic, which stamps what arrives; ready when made."""

    def __init__(self, broker: Broker, topic: str, log: Path, *, payload: bool = True) -> None:
        self._log = log
        command = ["mosquitto_sub", "-p", str(broker.port), "-q", "1", "-t", topic, "-F", "%U %p" if payload else "%U"]
        with log.open("wb") as out:
            self._child = subprocess.Popen(command, stdout=out)
        probe = ["mosquitto_pub", "-p", str(broker.port), "-t", topic, "-m", "{}"]

        def listens() -> int:
            subprocess.run(probe, check=True)
            return log.stat().st_size

        eventually(listens, "mosquitto_sub to listen")

    def count(self) -> int:
        """How many have arrived, repeated ones and probes included."""
        return self._log.read_bytes().count(b"\n")

    def heard(self, key: str) -> dict[int, float]:
        """First arrival, in seconds since 1970, of each number under `key`."""
        arrivals: dict[int, float] = {}
        *whole, _ = self._log.read_text().split("\n")
        for line in whole:
            stamp, _, text = line.partition(" ")
            content = json.loads(text)
            if key in content:
                arrivals.setdefault(content[key], float(stamp))
        return arrivals

    def close(self) -> None:
        self._child.terminate()
        self._child.wait(10)


@contextmanager
def delivering(sink: StationSink) -> Iterator[None]:
    """Let a sink run in its thread."""
    stop = Event()
    thread = Thread(target=sink.run, args=(stop, 5.0), name="sink")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        sink.notify()
        thread.join()


@contextmanager
def listening(broker: Broker, topic: str, folder: Path, *, payload: bool = True) -> Iterator[Ear]:
    ear = Ear(broker, topic, folder / "heard.txt", payload=payload)
    try:
        yield ear
    finally:
        ear.close()


def wait_for(ear: Ear, count: int) -> None:
    """Wait until so many have arrived; seldom asked, for it costs the machine that is measured."""
    deadline = time.monotonic() + PATIENCE_S
    while ear.count() < count:
        assert time.monotonic() < deadline, f"only {ear.count()} of {count} arrived"
        time.sleep(0.5)


def rate(arrivals: dict[int, float]) -> float:
    """Arrivals a second, from the first to the last."""
    return (len(arrivals) - 1) / (max(arrivals.values()) - min(arrivals.values()))


def like(idle: Station, broker: Broker, outbox: Outbox, replay_rate: int) -> StationSink:
    return StationSink(
        lambda: settings(broker),
        IDENTITY,
        outbox,
        halted=lambda: encode_state(IDENTITY, idle.condition, datetime.now(UTC)),
        commands=None,
        boards=[state_board(lambda: IDENTITY, lambda: idle.condition)],
        actuation_ttl_s=2.0,
        replay_rate=replay_rate,
    )


def backlog(folder: Path, broker: Broker, count: int, replay_rate: int) -> float:
    """Verdicts a second from an outbox that has waited."""
    with sink_station(folder, nobody(), drain_s=0.0) as idle:
        idle.keep(count, at_once=1000)
    outbox = Outbox(folder / "outbox.sqlite3")
    with (
        listening(broker, IDENTITY.topic("verdict"), folder) as ear,
        delivering(like(idle, broker, outbox, replay_rate)),
    ):
        wait_for(ear, count)
        arrivals = ear.heard("seq")
    outbox.close()
    assert len(arrivals) == count
    return rate(arrivals)


def live(folder: Path, broker: Broker, parts: int) -> float:
    """Verdicts a second through the stages, from frames in memory to the subscriber."""
    image = np.full((SIDE, SIDE, 3), 100, np.uint8)
    outbox = Outbox(folder / "outbox.sqlite3")
    with sink_station(folder, nobody(), drain_s=0.0) as idle:
        pass
    cam = line_station(detector=TemplateDetector(image))
    sink = StationSink(
        lambda: settings(broker),
        cam.recipes.current.identity,
        outbox,
        halted=lambda: encode_state(IDENTITY, idle.condition, datetime.now(UTC)),
        commands=None,
        boards=[state_board(lambda: IDENTITY, lambda: idle.condition)],
        actuation_ttl_s=2.0,
        replay_rate=UNBOUNDED,
    )
    with listening(broker, cam.recipes.current.identity.topic("verdict"), folder) as ear, delivering(sink):
        line = Line(outbox, replace(cam, sink=sink))
        for thread in line.threads:
            thread.start()
        for number in range(parts):
            line.put(Frame(capture(number), image))
        line.frames.close()
        line.join()
        wait_for(ear, parts)
        arrivals = ear.heard("seq")
    outbox.close()
    return rate(arrivals)


def gate(folder: Path, broker: Broker, messages: int, *, pictures: bool) -> list[float]:
    """Seconds from the call with a decision to its arrival at the gate."""
    with ExitStack() as stack:
        working = stack.enter_context(sink_station(folder, settings(broker), ttl_s=2.0))
        ear = stack.enter_context(listening(broker, IDENTITY.topic("plc"), folder))
        if pictures:
            stack.enter_context(_picture_stream(broker, folder))
        eventually(lambda: working.sink.actuations_dropped or _connected(working), "the sink to connect")
        sent: dict[int, float] = {}
        due = time.monotonic()
        for number in track(range(1, messages + 1), "gate with pictures" if pictures else "gate", transient=True):
            message = actuation(number)
            sent[number] = time.time()
            working.sink.actuate(message)
            working.keep(1)
            due += GATE_INTERVAL_S
            time.sleep(max(0.0, due - time.monotonic()))
        wait_for(ear, messages - working.sink.actuations_dropped)
        heard = ear.heard("s")
    return [heard[number] - at for number, at in sent.items() if number in heard]


def _connected(working: Station) -> bool:
    working.keep(1)
    working.empty()
    return True


@contextmanager
def _picture_stream(broker: Broker, folder: Path) -> Iterator[None]:
    """Send large pictures through the daemon's picture session, to a subscriber that takes them."""
    (folder / "pictures").mkdir()
    stop = Event()
    message = Message(
        IDENTITY.topic("image/overlay"), np.random.default_rng(0).bytes(PICTURE_BYTES), qos=0, content_type="image/jpeg"
    )

    sent = 0

    def stream() -> None:
        nonlocal sent
        sink = PictureSink(lambda: settings(broker), IDENTITY.node)
        while not stop.wait(1 / PICTURES_A_SECOND):
            sink.show(message)
            sent += 1
        sink.close()

    topic = IDENTITY.topic("image/overlay")
    with listening(broker, topic, folder / "pictures", payload=False) as ear:
        thread = Thread(target=stream, name="pictures")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert ear.count() > 0.9 * sent, f"of {sent} pictures {ear.count()} arrived"


@dataclass(frozen=True, slots=True)
class Figure:
    """One row: a rate in verdicts a second, or delays in milliseconds."""

    what: str
    count: int
    per_second: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    worst_ms: float | None = None


def delays(what: str, seconds: Sequence[float]) -> Figure:
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return Figure(what, len(seconds), p50_ms=float(p50), p99_ms=float(p99), worst_ms=max(seconds) * 1000)


def measure(folder: Path, count: int, parts: int, messages: int) -> Iterator[Figure]:
    with ExitStack() as stack:

        def fresh(name: str) -> tuple[Path, Broker]:
            here = folder / name
            here.mkdir()
            broker = mosquitto(here, "max_queued_messages 0", "max_inflight_messages 0")
            broker.start()
            stack.callback(broker.stop)
            return here, broker

        few = min(count, 10 * REPLAY_RATE)
        yield Figure(f"backlog, replay rate {REPLAY_RATE}", few, backlog(*fresh("default"), few, REPLAY_RATE))
        yield Figure("backlog, unbounded", count, backlog(*fresh("unbounded"), count, UNBOUNDED))
        yield Figure("live through all stages", parts, live(*fresh("live"), parts))
        yield delays("decision → gate", gate(*fresh("gate"), messages, pictures=False))
        what = f"decision → gate, beside {PICTURES_A_SECOND} × {PICTURE_BYTES / 1e6:.1f} MB/s of pictures"
        yield delays(what, gate(*fresh("both"), messages, pictures=True))


def table(figures: Sequence[Figure]) -> Table:
    """The figures, aligned."""
    shown = Table("", box=SIMPLE_HEAD)
    for column in ("messages", "per second", "p50 ms", "p99 ms", "worst ms"):
        shown.add_column(column, justify="right")

    def text(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    for figure in figures:
        times = (text(value, 2) for value in (figure.p50_ms, figure.p99_ms, figure.worst_ms))
        shown.add_row(figure.what, f"{figure.count:,}", text(figure.per_second, 0), *times)
    return shown


def main(
    count: Annotated[int, typer.Option("--backlog", min=2000, help="Verdicts that wait for the broker.")] = 20_000,
    parts: Annotated[int, typer.Option(min=100, help="Parts that go through all stages.")] = 3_000,
    messages: Annotated[int, typer.Option("--gate", min=100, help="Messages to the gate, twice.")] = 400,
    out: Annotated[Path, typer.Option(help="File for the figures.")] = Path("build/mqtt_rates.json"),
) -> None:
    """Measure rates and delays against Mosquitto on this machine."""
    console = Console()
    console.width = console.width if console.is_terminal else 110
    if find_mosquitto() is None or shutil.which("mosquitto_sub") is None:
        console.print("this needs Mosquitto and its clients: apt-get install mosquitto mosquitto-clients")
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory(prefix="inspectd-rates-") as folder, Path(folder, "log").open("w") as log:
        structlog.configure(  # each verdict costs a line, as with the daemon
            processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.PrintLoggerFactory(log)
        )
        figures = []
        for figure in measure(Path(folder), count, parts, messages):
            console.print(f"measured: {figure.what}")
            figures.append(figure)
    console.print(table(figures))
    content: list[dict[str, Any]] = [asdict(figure) for figure in figures]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"also in {out}")


if __name__ == "__main__":
    typer.run(main)
