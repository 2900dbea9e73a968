"""A day of parts as fast as they can be judged: does anything grow that should not?

    python -m tests.system.soak [--parts 100000] [--plot FILE] [--json FILE]

The installed daemon with all that a plant may switch on: archive with quotas, metrics, pictures, tags, shifts. Memory,
open files, threads, the archive and the outbox are looked at all the while, and plotted. Ends with status 1 if a part
has no verdict or two, if seq has a gap, if the archive goes beyond its quota, or if memory, files or threads grow
after the first tenth.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from matplotlib.figure import Figure
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from daemon.terminal import progress
from demo.parts import KINDS
from tests.brokers import HOST, eventually, free_port, mosquitto
from tests.system.conftest import write_part
from tests.system.test_daemon import Daemon

WAITING = 64
"""Files that wait in the watched folder at most."""
IMAGES = 200
DEFECTIVE = 10
"""One in so many parts."""
QUOTA_GB = 0.05
LOOK_S = 5.0
GROWTH = 1.05
"""Memory may grow by this factor from the second tenth to the last, as caches fill."""
PATIENCE_S = 180.0
MORE = f"""tags = true
[archive]
path = "archive"
fail_gb = {QUOTA_GB}
uncertain_gb = {QUOTA_GB}
error_gb = {QUOTA_GB}
pass_gb = {QUOTA_GB}
pass_every = 5
[metrics]
port = {{port}}
"""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen at one moment: seconds since the start, verdicts heard, MB, and counts."""

    at_s: float
    verdicts: int
    memory_mb: float
    files: int
    threads: int
    archive_mb: float
    state_mb: float


class Ear:
    """Hears the record; keeps numbers alone."""

    def __init__(self, port: int) -> None:
        self.seqs: dict[int, str] = {}
        self.twice = 0
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.on_message = self._hear
        self._client.connect(HOST, port)
        self._client.subscribe("inspectd/cam1/verdict", 1)
        self._client.loop_start()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _hear(self, _: Client, __: object, message: MQTTMessage) -> None:
        content = json.loads(message.payload)
        self.twice += content["seq"] in self.seqs
        self.seqs[content["seq"]] = content["part_id"]


def prepare(folder: Path, port: int) -> tuple[Daemon, list[bytes]]:
    """A small and quick model, its daemon, and the images of parts."""
    for number in range(24):
        write_part(folder / f"good/{number:03d}.png", number)
    program = str(Path(sys.executable).with_name("inspectd"))
    options = ["--good", str(folder / "good"), "--out", str(folder / "m"), "--detector", "patchcore", "--size", "64"]
    subprocess.run([program, "train", *options], check=True, capture_output=True)
    images = []
    for number in range(IMAGES):
        bad = number % DEFECTIVE == 0
        file = folder / "part.png"
        write_part(file, 1000 + number, KINDS[number // DEFECTIVE % len(KINDS)] if bad else "good")
        images.append(file.read_bytes())
    daemon = Daemon(folder, folder / "m", port, MORE.format(port=free_port()))
    daemon.config.write_text(
        'threads = 1\nshifts = ["06:00", "14:00", "22:00"]\n'
        + daemon.config.read_text().replace('path = "incoming"', 'path = "incoming"\nkeep = "delete"')
    )
    return daemon, images


def feed(daemon: Daemon, images: Sequence[bytes], ear: Ear, parts: int) -> Iterator[int]:
    """Drop parts as fast as they are judged; gives now and then how many were dropped."""
    for number in range(parts):
        while number - len(ear.seqs) >= WAITING:
            time.sleep(0.002)
            yield number
        hidden = daemon.incoming / f".{number}"
        hidden.write_bytes(images[number % len(images)])
        hidden.rename(daemon.incoming / f"part{number:06}.png")
    yield parts


def size_mb(folder: Path) -> float:
    """What the files in a folder take; those that go meanwhile count as gone."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total / 1e6


def look(daemon: Daemon, process: psutil.Process, began: float, ear: Ear) -> Look:
    """See how the daemon is now."""
    with process.oneshot():
        memory, files, threads = process.memory_info().rss / 1e6, process.num_fds(), process.num_threads()
    archive, state = size_mb(daemon.folder / "archive"), size_mb(daemon.folder / "state")
    return Look(time.monotonic() - began, len(ear.seqs), memory, files, threads, archive, state)


def judge(looks: Sequence[Look], ear: Ear, parts: int) -> list[str]:
    """What is wrong, in words."""
    faults = []
    if sorted(ear.seqs) != list(range(1, parts + 1)):
        faults.append(f"seq has gaps: {parts} parts, {len(ear.seqs)} numbers")
    if len(set(ear.seqs.values())) != parts:
        faults.append("a part has no verdict, or two")
    settled = [one for one in looks if one.verdicts > parts / 10]
    first, last = settled[: max(1, len(settled) // 9)], settled[-max(1, len(settled) // 9) :]
    if np.median([x.memory_mb for x in last]) > GROWTH * np.median([x.memory_mb for x in first]):
        faults.append("memory grows")
    if np.median([x.files for x in last]) > np.median([x.files for x in first]):
        faults.append("open files grow")
    if np.median([x.threads for x in last]) > np.median([x.threads for x in first]):
        faults.append("threads grow")
    if max(one.archive_mb for one in looks) > 4 * 1000 * QUOTA_GB * 1.02:
        faults.append("the archive is beyond its quota")
    return faults


def plot(looks: Sequence[Look], file: Path) -> None:
    """Five curves over the verdicts."""
    drawn = {
        "memory_mb": "memory, MB",
        "files": "open files",
        "threads": "threads",
        "archive_mb": "archive, MB",
        "state_mb": "state folder, MB",
    }
    figure = Figure(figsize=(9, 10), layout="constrained")
    panels = figure.subplots(len(drawn), 1, sharex=True)
    for panel, (name, title) in zip(panels, drawn.items(), strict=True):
        values = [getattr(one, name) for one in looks]
        panel.plot([one.verdicts for one in looks], values, color="#1f5fa8", linewidth=1.2)
        panel.set_ylabel(title)
        panel.set_ylim(0, 1.15 * max(values) or 1)
        panel.grid(color="#e4e4e4")
        panel.spines[["top", "right"]].set_visible(False)
    hours = looks[-1].at_s / 3600
    panels[0].set_title(f"{looks[-1].verdicts:,} parts in {hours:.1f} hours", loc="left")
    panels[-1].set_xlabel("verdicts")
    figure.savefig(file, dpi=110)


def main(
    parts: Annotated[int, typer.Option(help="How many parts come.")] = 100_000,
    picture: Annotated[Path | None, typer.Option("--plot", help="Draw the curves there, a PNG.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Show the figures."""
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    looks: list[Look] = []
    with ExitStack() as stack:
        broker = mosquitto(folder)
        broker.start()
        stack.callback(broker.stop)
        daemon, images = prepare(folder, broker.port)
        ear = Ear(broker.port)
        stack.callback(ear.close)
        daemon.start({"MALLOC_ARENA_MAX": "2"})  # as its unit does
        stack.callback(lambda: daemon.alive and daemon.end(signal.SIGKILL))
        eventually(lambda: '"ready"' in daemon.said(), "the daemon to run", PATIENCE_S)
        process, began = psutil.Process(daemon.pid), time.monotonic()
        with progress() as bar:
            task = bar.add_task("parts", total=parts, note="")
            for _ in feed(daemon, images, ear, parts):
                if not looks or time.monotonic() - began - looks[-1].at_s > LOOK_S:
                    looks.append(look(daemon, process, began, ear))
                    rate = len(ear.seqs) / looks[-1].at_s
                    bar.update(task, completed=len(ear.seqs), note=f"{rate:.0f}/s, {looks[-1].memory_mb:.0f} MB")
        eventually(lambda: len(ear.seqs) >= parts, "the last verdicts", PATIENCE_S)
        looks.append(look(daemon, process, began, ear))
        status = daemon.end()
    faults = [*judge(looks, ear, parts), *([f"it ended with {status}"] if status else [])]
    table = Table("", "at 10 %", "at the end", "most", box=SIMPLE_HEAD)
    tenth = next(one for one in looks if one.verdicts >= parts / 10)
    for name in ("memory_mb", "files", "threads", "archive_mb", "state_mb"):
        values = [getattr(tenth, name), getattr(looks[-1], name), max(getattr(one, name) for one in looks)]
        table.add_row(name, *(f"{value:.0f}" for value in values))
    out = Console()
    out.print(table)
    rate = parts / looks[-1].at_s
    out.print(f"{parts} parts, {len(ear.seqs)} verdicts, {ear.twice} repeated, {rate:.1f} a second")
    for fault in faults:
        out.print(f"FAULT: {fault}", style="red")
    if picture is not None:
        plot(looks, picture)
    if json_ is not None:
        json_.write_text(json.dumps({"parts": parts, "faults": faults, "looks": [asdict(one) for one in looks]}))
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
