"""Eight stations in one process: does each get its share of the detector, whatever the others do?

    python -m tests.system.stations [--seconds 600] [--json FILE]

A GenICam camera (Aravis, 25 frames a second), an RTSP camera (30), four folders into which a part comes now and then,
one that has thousands of files waiting, and one that is not there. The installed daemon, one small model. Shows what
each station got, and how long its parts waited. Ends with status 1 if a station starved, or its seq has gaps.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.brokers import Subscriber, mosquitto
from tests.cameras import ADDRESS, Simulator
from tests.component.test_video_source import PYTHON, RTSP_SERVER
from tests.system.conftest import write_part
from tests.system.test_daemon import Daemon

SLOW = ("in1", "in2", "in3", "in4")
PACE_S = 1.0
"""Between two parts of a slow folder."""
BACKLOG = 5000
STARVED = 0.9
"""Of the parts that came, a slow station must have judged this share at the least."""


def configuration(folder: Path, rtsp: str) -> str:
    stations = [
        *((name, f'type = "folder"\npath = "{name}"') for name in (*SLOW, "flood", "gone")),
        ("camera", f'type = "genicam"\ncamera = "{ADDRESS}"\noverflow = "drop"'),
        ("rtsp", f'type = "video"\nplace = "{rtsp}"\noverflow = "drop"'),
    ]
    return "".join(
        f'[[station]]\nname = "{name}"\nmodel = "{folder / "m"}"\n[station.source]\n{source}\n'
        for name, source in stations
    )


def prepare(folder: Path) -> None:
    """A small model of rendered parts, and the folders."""
    for number in range(24):
        write_part(folder / f"good/{number:03d}.png", number)
    program = Path(sys.executable).with_name("inspectd")
    command = [
        str(program),
        "train",
        "--good",
        str(folder / "good"),
        "--out",
        str(folder / "m"),
        "--size",
        "64",
        "--epochs",
        "2",
    ]
    subprocess.run(command, check=True, capture_output=True)
    for name in (*SLOW, "flood"):
        (folder / name).mkdir()
    original = folder / "good/000.png"
    for number in range(BACKLOG):
        shutil.copy(original, folder / f"flood/part{number:05d}.png")


def feed(folder: Path, stop: threading.Event) -> None:
    """A part now and then for each of the slow folders."""
    part = folder / "good/001.png"
    for number in count():
        for name in SLOW:
            hidden = folder / name / f".{number}.png"
            shutil.copy(part, hidden)
            hidden.rename(folder / name / f"{number:05d}.png")
        if stop.wait(PACE_S):
            return


def watch(seconds: float) -> dict[str, Any]:
    """Let the daemon work for so long, and give what each station told."""
    folder = Path(tempfile.mkdtemp())
    simulator = Simulator()
    with ExitStack() as stack:
        stack.callback(simulator.close)
        broker = mosquitto(folder)
        broker.start()
        stack.callback(broker.stop)
        server = subprocess.Popen([PYTHON, "-c", RTSP_SERVER, "0"], stdout=subprocess.PIPE, text=True)
        stack.callback(server.kill)
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        prepare(folder)
        simulator.start()
        daemon = Daemon(folder, folder / "m", broker.port)
        head = daemon.config.read_text().partition("[[station]]")[0]
        daemon.config.write_text(head + configuration(folder, f"rtsp://operator:secret@127.0.0.1:{port}/part"))
        ear = stack.enter_context(closing(Subscriber(broker.port, "inspectd/+/verdict")))
        daemon.start()
        stack.callback(lambda: daemon.alive and daemon.end(signal.SIGKILL))
        while not ear.messages:
            time.sleep(0.1)
        stop = threading.Event()
        feeder = threading.Thread(target=feed, args=(folder, stop))
        feeder.start()
        time.sleep(seconds)
        stop.set()
        feeder.join()
        time.sleep(2)
        daemon.end()
        verdicts: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for message in list(ear.messages):
            content = message.content
            verdicts[content["station"]].append(content)
        return {"verdicts": dict(verdicts), "came": sum(1 for _ in (folder / "in1").rglob("*.png"))}


def main(
    seconds: Annotated[float, typer.Option(help="How long to look.")] = 600.0,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """Show the figures."""
    seen = watch(seconds)
    table = Table("station", "verdicts", "a second", "queue p50 ms", "queue p99 ms", "total p99 ms", box=SIMPLE_HEAD)
    figures = {}
    faults = []
    for name in (*SLOW, "flood", "camera", "rtsp", "gone"):
        mine = seen["verdicts"].get(name, [])
        queue = [verdict["latency_ms"]["queue"] for verdict in mine] or [0.0]
        total = [verdict["latency_ms"]["total"] for verdict in mine] or [0.0]
        p50, p99 = np.percentile(queue, [50, 99])
        figures[name] = [len(mine), len(mine) / seconds, p50, p99, float(np.percentile(total, 99))]
        table.add_row(name, *(f"{value:.1f}" if isinstance(value, float) else str(value) for value in figures[name]))
        if [verdict["seq"] for verdict in mine] != list(range(1, len(mine) + 1)):
            faults.append(f"{name}: seq has gaps")
        if name in SLOW and len(mine) < STARVED * seen["came"]:
            faults.append(f"{name} starved: {len(mine)} of {seen['came']} parts were judged")
    Console().print(table)
    for fault in faults:
        Console().print(f"[red]broken[/]  {fault}")
    if json_:
        json_.write_text(json.dumps(figures, indent=1))
    raise typer.Exit(bool(faults))


if __name__ == "__main__":
    typer.run(main)
