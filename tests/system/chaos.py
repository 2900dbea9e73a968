"""Parts come in while daemon, broker and disk are struck down at random: are the promises of docs/mqtt.md kept?

    python -m tests.system.chaos [--parts 2000] [--kills 20] [--seed 0] [--json FILE]

The installed daemon watches a real folder, between it and Mosquitto lies a cable, and three subscribers listen that
know nothing but the topics: paho and mosquitto_sub keep the record with sessions of their own, a third has none and
hears the gate as a PLC does. The seed draws when what is struck, after which part and until which. A broker that lost
its store has forgotten who listens, and confirms to the daemon what it gives to nobody; so its cable is plugged in only
when all have subscribed anew. Ends with status 1 if a promise was broken, and then leaves everything where it was.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Self, TypeVar

import psutil
import typer
from paho.mqtt.client import Client, ConnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from demo.parts import KINDS
from tests.brokers import HOST, Cable, find_mosquitto, mosquitto
from tests.system.conftest import write_part
from tests.system.test_daemon import Daemon, Historian, left_behind

PACE_S = 0.16
"""Between two parts of a whole run."""
TTL_S = 2.0
"""The daemon's default for the life of a gate's message."""
LIFE = 2.5
"""A daemon's life, on average, is so many times as long as it takes to start; on slow machines parts come slower."""
PATIENCE_S = 75.0
"""For the last verdict; the longest pause between two attempts to reach the broker is 30 s."""
SETTLED = (0.03, 0.8)
"""Which share of the parts sees breaks begin; the rest shows whether it recovers, and how large the daemon then is."""
BREAK_S = (0.5, 6.0)
DOWN_S = (0.0, 2.0)
"""How long a broken broker or disk, and a killed daemon, are left alone."""
DISK_BYTES = 8 << 20
WARM_PARTS = 40
"""So many parts a daemon puts away before its memory is measured first."""
MEMORY_MARGIN = 0.10
FILES_MARGIN = 4
"""The connections for record and pictures may stand at one time and not at the other; each is 2 or 3 files."""
TORN_EVERY = 50
"""Each such part is no image, and ends in failed/."""

T = TypeVar("T")


class Kind(StrEnum):
    """What is struck, and how."""

    KILL = "daemon killed"
    RESTART = "broker restarted"
    AMNESIA = "broker restarted without its store"
    FREEZE = "broker frozen"
    NARROW = "packet limit below pictures"
    REFUSE = "packet limit below verdicts"
    FULL = "state disk full"


BROKEN_BROKER = (Kind.RESTART, Kind.AMNESIA, Kind.FREEZE, Kind.NARROW, Kind.REFUSE)
PER_2000_PARTS = {Kind.RESTART: 5, Kind.AMNESIA: 4, Kind.FREEZE: 4, Kind.NARROW: 2, Kind.REFUSE: 2, Kind.FULL: 4}
PACKET_LIMIT = {Kind.NARROW: 4096, Kind.REFUSE: 700}
"""Bytes; a verdict has 2,048 at most, and never as few as 700."""


@dataclass(frozen=True, slots=True)
class Break:
    """Something is struck down before part `begins` and mended before part `ends`, both counted from 0."""

    kind: Kind
    begins: int
    ends: int


def draw(parts: int, counts: Mapping[Kind, int], seed: int, pace_s: float = PACE_S) -> list[Break]:
    """Draw breaks; of broker, daemon and disk each breaks only when it is whole, and they overlap as chance has it."""
    chance = random.Random(seed)
    breaks = []
    for track, lasting_s in ((BROKEN_BROKER, BREAK_S), ((Kind.KILL,), DOWN_S), ((Kind.FULL,), BREAK_S)):
        kinds = [kind for kind in track for _ in range(counts.get(kind, 0))]
        chance.shuffle(kinds)
        first, last = (share * parts for share in SETTLED)
        slot = (last - first) / max(1, len(kinds))
        for number, kind in enumerate(kinds):
            length = min(chance.uniform(*lasting_s) / pace_s, 0.8 * slot)
            begins = first + number * slot + chance.uniform(0, slot - length)
            breaks.append(Break(kind, int(begins), int(begins + length)))
    return breaks


class Listener:
    """Two paho clients: one records with a session of its own and misses nothing, one hears the gate as a PLC does."""

    def __init__(self, port: int) -> None:
        self.verdicts: dict[str, tuple[float, dict[str, Any]]] = {}
        self.gate: list[tuple[float, dict[str, Any]]] = []
        self.repeated = self.replayed = self.differing = 0
        self.called: set[str] = set()
        self._lock = Lock()
        self._calls = 0
        forever = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call] # paho's
        forever.SessionExpiryInterval = 3600
        self._recorder = _client("recorder", "inspectd/cam1/verdict", MQTTProtocolVersion.MQTTv5)
        self._recorder.on_message = self._record
        self._recorder.connect(HOST, port, clean_start=False, properties=forever)
        self._plc = _client("plc", "inspectd/cam1/plc", MQTTProtocolVersion.MQTTv311)
        self._plc.on_message = self._hear
        self._plc.connect(HOST, port)
        self._recorder.loop_start()
        self._plc.loop_start()

    def roll_call(self) -> str:
        """Publish to those who record, and say what they should have received."""
        self._calls += 1
        name = f"roll call {self._calls}"
        self._plc.publish("inspectd/cam1/verdict", json.dumps({"id": name}), 1)
        return name

    def close(self) -> None:
        for client in (self._recorder, self._plc):
            client.disconnect()
            client.loop_stop()

    def _record(self, _: Client, __: object, message: MQTTMessage) -> None:
        now, content = time.time(), json.loads(message.payload)
        with self._lock:
            if "seq" not in content:
                self.called.add(content["id"])
            elif content["id"] in self.verdicts:
                self.repeated += 1
                self.differing += self.verdicts[content["id"]][1] | {"replayed": None} != content | {"replayed": None}
            else:
                self.verdicts[content["id"]] = now, content
                self.replayed += content["replayed"]

    def _hear(self, _: Client, __: object, message: MQTTMessage) -> None:
        self.gate.append((time.time(), json.loads(message.payload)))


def _client(name: str, topic: str, protocol: MQTTProtocolVersion) -> Client:
    """A client that always comes back after a second, and subscribes each time."""

    def subscribe(client: Client, _: object, __: ConnectFlags, ___: object, ____: object) -> None:
        client.subscribe(topic, 1)

    client = Client(CallbackAPIVersion.VERSION2, name, protocol=protocol)
    client.reconnect_delay_set(1, 1)
    client.on_connect = subscribe
    return client


@dataclass(slots=True)
class Life:
    """One process of the daemon: its resident memory in bytes and its open files, warm and newest."""

    put_away_before: int
    warm: tuple[int, int] | None = None
    newest: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Struck:
    """A break as it happened, in seconds since 1970."""

    kind: Kind
    began: float
    ended: float


@dataclass(slots=True)
class Story:
    """What happened to the plant, for the judgement. Times are seconds since 1970."""

    dropped: dict[str, float] = field(default_factory=dict)
    struck: list[Struck] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    exits: list[tuple[int, bool]] = field(default_factory=list)
    """The status of each end that was not asked for, and whether its life saw a full disk."""
    skipped: str = ""
    last_exit: int | None = None


class Plant:
    """Folder, daemon, cable, broker and subscribers, while in this context; `strike` and `mend` break and repair."""

    def __init__(self, folder: Path, model: Path, *, disk: bool) -> None:
        self.story = Story()
        self.folder = folder
        self._model = model
        self._disk = disk
        self._up = False
        self._full = self._saw_full_disk = False
        self._restart_at = self._measured_at = 0.0
        self._began: dict[Kind, float] = {}
        self._put_away = 0

    def __enter__(self) -> Self:
        folder = self.folder
        with ExitStack() as stack:
            self._hog = folder / "state/hog"
            self._hog.parent.mkdir()
            if self._disk:
                self.story.skipped = stack.enter_context(_small_disk(folder / "state"))
            options = ("persistence true", f"persistence_location {folder}/")
            queues = ("max_queued_messages 0", "max_inflight_messages 0")  # a subscriber's lag is not what is tested
            self.broker = mosquitto(folder, *options, *queues)
            self.broker.start()
            stack.callback(self.broker.stop)
            self.cable = Cable(self.broker.port)
            stack.callback(self.cable.close)
            stack.callback(Historian(self.broker, folder / "historian.log").close)
            self.listener = Listener(self.broker.port)
            stack.callback(self.listener.close)
            self.daemon = Daemon(folder, self._model, self.cable.port, 'overlays = "all"\nkeepalive_s = 5')
            self.daemon.config.write_text(self.daemon.config.read_text() + "give_up_s = 0.5\n")
            stack.callback(self._kill)
            began = time.monotonic()
            self._start()
            _await(self._is_ready, 120, "the daemon to be ready")
            self.start_s = time.monotonic() - began
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def drop(self, number: int, images: Sequence[bytes]) -> None:
        """Write a part as a good camera does; one in fifty is no image."""
        name = f"part{number:05}"
        unfinished = self.daemon.incoming / f".{name}.png"
        torn = number % TORN_EVERY == TORN_EVERY // 2
        unfinished.write_bytes(b"no image" if torn else images[number % len(images)])
        self.story.dropped[name] = time.time()
        unfinished.rename(self.daemon.incoming / f"{name}.png")

    def strike(self, kind: Kind) -> None:
        """Break something."""
        self._began[kind] = time.time()
        match kind:
            case Kind.KILL:
                self._kill()
            case Kind.RESTART:
                self.broker.stop()
            case Kind.AMNESIA:
                self.broker.stop()
                (self.folder / "mosquitto.db").unlink(missing_ok=True)
            case Kind.NARROW | Kind.REFUSE:
                self._limit_packets(PACKET_LIMIT[kind])
            case Kind.FREEZE:
                self.broker.freeze()
            case Kind.FULL:
                self._full = self._saw_full_disk = True
                self._fill_disk()

    def mend(self, kind: Kind) -> None:
        """Repair what was broken."""
        match kind:
            case Kind.KILL:
                self._start()
            case Kind.RESTART:
                self.broker.start()
            case Kind.AMNESIA:
                self.cable.unplug()
                self.broker.start()
                self._call_roll()
                self.cable.plug()
            case Kind.NARROW | Kind.REFUSE:
                self._limit_packets(None)
                if kind is Kind.REFUSE and self._up:  # what was too large is tried again when the daemon starts anew
                    self._stop()
                    self._start()
            case Kind.FREEZE:
                self.broker.thaw()
            case Kind.FULL:
                self._hog.unlink()
                self._full = False
        self.story.struck.append(Struck(kind, self._began.pop(kind), time.time()))

    def watch(self) -> None:
        """Start the daemon again if it has ended by itself, as systemd does, and measure it once a second."""
        now = time.monotonic()
        if self._up and not self.daemon.alive:
            self.story.exits.append((self.daemon.end(), self._saw_full_disk))
            self._up = False
            self._restart_at = now + 1
        if not self._up and self._restart_at and now >= self._restart_at:
            self._start()
        if now >= self._measured_at + 1:
            self._measured_at = now
            self._measure()

    def complete(self) -> bool:
        """Whether every part has its verdict with both who record, and its file is put away."""
        self.watch()
        parts = len(self.story.dropped)
        return len(self.listener.verdicts) >= parts and self.put_away() >= parts and len(self.recorded()) >= parts

    def finish(self) -> None:
        """End the daemon as systemd does."""
        self._measure()
        self.story.last_exit = self.daemon.end() if self._up else None
        self._up = False

    def put_away(self) -> int:
        """How many files are in done/ and failed/."""
        return sum(1 for _ in _rested(self.daemon.incoming))

    def recorded(self) -> set[str]:
        """Ids of the verdicts that mosquitto_sub holds."""
        *whole, _ = (self.folder / "historian.log").read_text().split("\n")
        return {content["id"] for content in map(json.loads, whole) if "seq" in content}

    def _start(self) -> None:
        self._up, self._restart_at, self._saw_full_disk = True, 0.0, self._full
        self.story.lives.append(Life(self.put_away()))
        self.daemon.start({"OMP_NUM_THREADS": "1"})

    def _kill(self) -> None:
        self._up, self._restart_at = False, 0.0
        if self.daemon.alive:
            self.daemon.end(signal.SIGKILL)

    def _stop(self) -> None:
        status = self.daemon.end()
        if status not in {0, -signal.SIGTERM}:  # the latter while it is still starting
            self.story.exits.append((status, self._saw_full_disk))
        self._up = False

    def _is_ready(self) -> bool:
        assert self.daemon.alive, f"the daemon does not start:\n{self.daemon.said()}"
        return '"ready"' in self.daemon.said()

    def _measure(self) -> None:
        if not self._up:
            return
        life = self.story.lives[-1]
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process = psutil.Process(self.daemon.pid)
            life.newest = process.memory_info().rss, process.num_fds()
        if life.warm is None and self.put_away() - life.put_away_before >= WARM_PARTS:
            life.warm = life.newest

    def _fill_disk(self) -> None:
        # Commits would go on in the room that the write-ahead log already has, and feel nothing.
        with suppress(sqlite3.Error), closing(sqlite3.connect(self._hog.with_name("outbox.sqlite3"))) as outbox:
            outbox.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with suppress(OSError), self._hog.open("wb", buffering=0) as hog:
            while True:
                hog.write(bytes(4096))

    def _limit_packets(self, limit: int | None) -> None:
        self.broker.stop()
        config = self.folder / "mosquitto.conf"
        lines = [line for line in config.read_text().splitlines() if not line.startswith("max_packet_size")]
        config.write_text("\n".join([*lines, *([f"max_packet_size {limit}"] if limit else [])]) + "\n")
        self.broker.start()

    def _call_roll(self) -> None:
        def present() -> bool:
            name = self.listener.roll_call()
            time.sleep(0.1)
            return name in self.listener.called and name in (self.folder / "historian.log").read_text()

        _await(present, 60, "the subscribers to come back")


def _rested(incoming: Path) -> Iterator[str]:
    """Names of the parts that were put away, without the reasons beside them."""
    for path in (*incoming.glob("done/*/*"), *incoming.glob("failed/*/*")):
        if not path.name.endswith(".reason.txt"):
            yield path.name


@contextmanager
def _small_disk(folder: Path) -> Iterator[str]:
    """Mount a disk of a few megabytes; gives the reason where that cannot be."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "inspectd-chaos", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        yield f"no small disk can be mounted: {done.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _await(condition: Callable[[], T], patience_s: float, what: str) -> T:
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(0.05)
    return value


def run(
    plant: Plant, parts: int, breaks: Sequence[Break], images: Sequence[bytes], pace_s: float, progress: Progress
) -> None:
    """Drop the parts, strike and mend as drawn, and wait until everything is told and put away, or patience ends."""
    came = progress.add_task("parts dropped", total=parts)
    told = progress.add_task("verdicts received", total=parts)
    due = time.monotonic()
    for number in range(parts):
        for broken in breaks:
            if broken.begins == number:
                plant.strike(broken.kind)
            if broken.ends == number:
                plant.mend(broken.kind)
        plant.drop(number, images)
        plant.watch()
        progress.update(came, completed=number + 1)
        progress.update(told, completed=len(plant.listener.verdicts))
        due = max(due + pace_s, time.monotonic() - pace_s)
        time.sleep(max(0.0, due - time.monotonic()))
    deadline = time.monotonic() + PATIENCE_S
    while not plant.complete() and time.monotonic() < deadline:
        progress.update(told, completed=len(plant.listener.verdicts))
        time.sleep(0.2)
    progress.update(told, completed=len(plant.listener.verdicts))
    plant.finish()


@dataclass(frozen=True, slots=True)
class Finding:
    """A figure, what was promised of it, and whether that was kept; None where nothing is promised."""

    what: str
    found: str
    promised: str = ""
    kept: bool | None = None


def judge(plant: Plant) -> list[Finding]:
    """Compare what subscribers, folders and the process table saw with what was promised."""
    return [*_of_the_record(plant), *_of_the_gate(plant), *_of_the_files(plant), *_of_the_process(plant)]


def _of_the_record(plant: Plant) -> Iterator[Finding]:
    listener, dropped = plant.listener, plant.story.dropped
    verdicts = [verdict for _, verdict in listener.verdicts.values()]
    again = plant.recorded()
    parts = Counter(verdict["part_id"] for verdict in verdicts)
    yield Finding("parts", f"{len(dropped)}")
    yield Finding("parts with a verdict at paho", f"{len(parts)}", "all", set(parts) == set(dropped))
    yield Finding("verdicts at paho", f"{len(verdicts)}", "one a part", len(verdicts) == len(dropped))
    same = again == set(listener.verdicts)
    yield Finding("verdicts at mosquitto_sub", f"{len(again)}", "the same", same)
    seqs = sorted(verdict["seq"] for verdict in verdicts)
    gaps = sorted(set(range(1, max(seqs, default=0) + 1)) - set(seqs))
    numbered = seqs == list(range(1, len(dropped) + 1))
    yield Finding("seq", f"{seqs[0]} … {seqs[-1]}" if seqs else "none", f"1 … {len(dropped)}", numbered)
    yield Finding("gaps", ", ".join(map(str, gaps[:8])) or "none", "none", not gaps)
    yield Finding("repeated, differing", f"{listener.repeated}, {listener.differing}", "…, 0", listener.differing == 0)
    yield Finding("replayed", f"{listener.replayed}")
    arrivals = sorted(at for at, _ in listener.verdicts.values())
    silence = max((later - earlier for earlier, later in pairwise(arrivals)), default=0.0)
    yield Finding("longest silence", f"{silence:.1f} s")


def _of_the_gate(plant: Plant) -> Iterator[Finding]:
    """A frozen broker keeps what is already in its socket: that can be stale, but never more than was sent in a TTL."""
    heard = plant.listener.gate
    verdicts = {verdict["seq"]: verdict for _, verdict in plant.listener.verdicts.values()}
    stale = [content["t"] / 1000 for at, content in heard if at - content["t"] / 1000 > TTL_S]
    frozen = [struck for struck in plant.story.struck if struck.kind is Kind.FREEZE]
    held = [[sent for sent in stale if freeze.began - TTL_S <= sent <= freeze.ended] for freeze in frozen]
    bounded = all(max(sent) - min(sent) <= 1.5 * TTL_S for sent in held if sent)
    late = len(stale) - sum(map(len, held))
    wrong = [
        content
        for _, content in heard
        if (verdict := verdicts.get(content["s"])) is None
        or (verdict["part_id"][-32:], verdict["verdict_code"]) != (content["p"], content["c"])
    ]
    repeated = len(heard) - len({content["s"] for _, content in heard})
    oldest = max((at - content["t"] / 1000 for at, content in heard), default=0.0)
    yield Finding("gate messages", f"{len(heard)}")
    yield Finding("of them repeated", f"{repeated}", "0", repeated == 0)
    yield Finding("of them unlike the record", f"{len(wrong)}", "0", not wrong)
    yield Finding(f"older than {TTL_S:g} s at arrival", f"{late}", "0", late == 0)
    kept_back = f"{sum(map(len, held))}, oldest {oldest:.1f} s"
    yield Finding("the same, held by a frozen broker", kept_back, f"those of {TTL_S:g} s a freeze", bounded)


def _of_the_files(plant: Plant) -> Iterator[Finding]:
    names = Counter(_rested(plant.daemon.incoming))
    expected = {f"{part}.png" for part in plant.story.dropped}
    once = set(names) == expected and set(names.values()) <= {1}
    yield Finding("files in done/ and failed/", f"{names.total()}", "each part's once", once)
    left = left_behind(plant.daemon.incoming)
    yield Finding("files left elsewhere", f"{len(left)}", "0", not left)


def _of_the_process(plant: Plant) -> Iterator[Finding]:
    story = plant.story
    kills = sum(struck.kind is Kind.KILL for struck in story.struck)
    yield Finding("starts of the daemon", f"{len(story.lives)} ({kills} kills)")
    alone = sum(not full for _, full in story.exits)
    yield Finding("ends by itself", f"{len(story.exits)}, {alone} without a full disk", "…, 0", alone == 0)
    yield Finding("exit status at the end", f"{story.last_exit}", "0", story.last_exit == 0)
    measured = [(life.warm, life.newest) for life in story.lives if life.warm and life.newest]
    if measured:
        (warm, warm_files), (end, end_files) = measured[-1]
        grown = end <= warm * (1 + MEMORY_MARGIN)
        yield Finding(
            "memory of the last, warm → end",
            f"{warm / 2**20:.0f} → {end / 2**20:.0f} MiB",
            f"+{MEMORY_MARGIN:.0%} at most",
            grown,
        )
        flat = abs(end_files - warm_files) <= FILES_MARGIN
        yield Finding("open files, warm → end", f"{warm_files} → {end_files}", f"± {FILES_MARGIN}", flat)
    for kind in Kind:
        times = [catch_up_s(plant, struck) for struck in story.struck if struck.kind is kind]
        if times:
            caught_up = f"median {statistics.median(times):.1f} s, longest {max(times):.1f} s"
            yield Finding(f"{len(times)} × {kind}: caught up", caught_up)
    said = plant.daemon.said()
    yield Finding("daemon's complaints of a full disk", f"{said.count('the record cannot be written')}")
    yield Finding("uncaught errors in its log", f"{said.count('Traceback')}", "0", "Traceback" not in said)
    if story.skipped:
        yield Finding(Kind.FULL, f"skipped: {story.skipped}")


def catch_up_s(plant: Plant, struck: Struck) -> float:
    """From the repair until all parts that came before it have their verdicts; what broke meanwhile counts in."""
    before = {part for part, at in plant.story.dropped.items() if at <= struck.ended}
    arrived = [at for at, verdict in plant.listener.verdicts.values() if verdict["part_id"] in before]
    return max(0.0, max(arrived, default=struck.ended) - struck.ended)


def table(findings: Sequence[Finding], title: str) -> Table:
    """The figures, aligned."""
    shown = Table("", "found", "promised", "", title=title, title_justify="left", box=SIMPLE_HEAD)
    marks = {None: "", True: "[green]kept[/]", False: "[bold red]BROKEN[/]"}
    for finding in findings:
        shown.add_row(finding.what, finding.found, finding.promised, marks[finding.kept])
    return shown


def render_images(folder: Path) -> list[bytes]:
    """Some good and some bad parts as PNG files."""
    for number in range(20):
        write_part(folder / f"{number:02}.png", 1000 + number, ("good", "good", "good", "good", *KINDS)[number % 8])
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def train(folder: Path) -> Path:
    """Make a small model with the installed program."""
    for number in range(24):
        write_part(folder / f"good/{number:03}.png", number)
    program, model = Path(sys.executable).with_name("inspectd"), folder / "model"
    options = ("--detector", "patchcore", "--size", "64")
    subprocess.run(
        [program, "train", "--good", folder / "good", "--out", model, *options], check=True, capture_output=True
    )
    return model


def main(
    parts: Annotated[int, typer.Option(min=50, help="Parts that come in.")] = 2000,
    kills: Annotated[int, typer.Option(min=0, help="How often the daemon is killed.")] = 20,
    seed: Annotated[int, typer.Option(help="Draws when what is struck.")] = 0,
    figures: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
) -> None:
    """Strike down broker, daemon and disk while parts come in, and see whether the record keeps its promises."""
    console = Console()
    console.width = console.width if console.is_terminal else 120
    if find_mosquitto() is None or shutil.which("mosquitto_sub") is None:
        console.print("this needs Mosquitto and its clients: apt-get install mosquitto mosquitto-clients")
        raise typer.Exit(2)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    counts = {kind: max(1, round(count * parts / 2000)) for kind, count in PER_2000_PARTS.items()}
    breaks = draw(parts, {Kind.KILL: kills, **counts}, seed)
    folder = Path(tempfile.mkdtemp(prefix="inspectd-chaos-"))
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = time.monotonic()
    with Progress(*columns, console=console) as progress:
        learning = progress.add_task("learning", total=None)
        model = train(folder)
        progress.remove_task(learning)
        with Plant(folder, model, disk=True) as plant:
            pace_s = max(PACE_S, kills * LIFE * plant.start_s / (parts * (SETTLED[1] - SETTLED[0])))
            run(plant, parts, breaks, render_images(folder / "images"), pace_s, progress)
            findings = judge(plant)
            caught_up = [(struck, catch_up_s(plant, struck)) for struck in plant.story.struck]
    seconds = time.monotonic() - began
    console.print(table(findings, f"{parts} parts in {seconds:.0f} s, seed {seed}"))
    if figures is not None:
        content = {
            "parts": parts,
            "kills": kills,
            "seed": seed,
            "seconds": seconds,
            "findings": [asdict(finding) for finding in findings],
            "breaks": [asdict(struck) | {"caught_up_s": after} for struck, after in caught_up],
        }
        figures.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if any(finding.kept is False for finding in findings):
        console.print(f"what was left, with the daemon's log: {folder}")
        raise typer.Exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    typer.run(main)
