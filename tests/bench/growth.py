"""How cost grows: with the image, the stations that share a detector, the batch, and the backlog.

    python -m tests.bench.growth [--out build/growth.json] [--plot docs/growth.svg]

Each curve should be smooth: twice as much of something costs about twice as much, and no more beyond some size. The
*step* is the largest ratio of cost per pixel or part between neighbouring points of a curve: 2 and more is a cliff.

A small model is trained for two steps, for speed does not depend on weights. Images of noise are judged by it alone,
whole and in tiles; parts go through the stages of the daemon, with its outbox on a real disk, and a backlog through the
source of a watched folder as well. All in this process; minutes.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import numpy as np
import structlog
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from daemon.build import build_detector
from daemon.desk.charts import PALETTE, drawing
from daemon.messages import Frame
from daemon.outbox import Outbox
from daemon.pipeline import acquire
from daemon.sources.folder.source import FolderSource
from detectors.base import Detector, Image
from detectors.tiling import TiledDetector, Tiling
from tests.brokers import eventually
from tests.component.test_pipeline import Line, capture
from tests.component.test_pipeline import station as line_station
from tests.system.conftest import write_part

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 64
TILING = Tiling(512, 64)
MEGAPIXELS = (0.25, 0.5, 1, 2, 3, 5, 8, 12)
STATIONS = (1, 2, 3, 4, 5, 6, 7, 8)
BATCHES = (1, 2, 4, 6, 8, 12, 16)
TICKS_MS = (20, 50, 100, 200, 500)
BACKLOGS = (10, 30, 100, 300, 1000, 2000)
PARTS = 64
SIDE = 256
"""Of the parts that go through the stages, in pixels."""
REPEATS = 3
PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Curve:
    """Milliseconds over something; what `per_part` is not a matter of, as time an image, grows with it by right."""

    panel: str
    axis: str
    name: str
    at: tuple[float, ...]
    ms: tuple[float, ...]
    per_part: bool = True

    @property
    def step(self) -> float:
        """The largest ratio of cost per part, or else per unit of the axis, from one point to the next."""
        cost = self.ms if self.per_part else [ms / at for ms, at in zip(self.ms, self.at, strict=True)]
        return max(after / before for before, after in pairwise(cost))


def train(folder: Path) -> Path:
    """A model that has hardly learned."""
    for number in range(12):
        write_part(folder / f"good/{number:03d}.png", number)
    program = str(Path(sys.executable).with_name("inspectd"))
    length = ["--size", str(SIZE), "--steps", "2", "--device", "cpu"]
    command = [program, "train", "--good", str(folder / "good"), "--out", str(folder / "model"), *length]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "model"


def noise(height: int, width: int) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def timed(judge: Callable[[Sequence[Image]], object], images: Sequence[Image]) -> float:
    """Milliseconds that judging takes, the least of a few: whatever else runs can only add to it."""
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        judge(images)
        taken.append(1000 * (time.perf_counter() - begun))
    return min(taken)


def over_images(detector: Detector) -> Iterator[Curve]:
    """One image at a time, whole and in tiles, 4:3."""
    shapes = [(round((1e6 * size * 3 / 4) ** 0.5), round((1e6 * size * 4 / 3) ** 0.5)) for size in MEGAPIXELS]
    for name, judging in (("whole", detector), (f"tiles of {TILING.side} px", TiledDetector(detector, TILING))):
        judging.predict([noise(64, 64)])
        ms = [timed(judging.predict, [noise(*shape)]) for shape in shapes]
        yield Curve("an image, by its size", "megapixels", name, MEGAPIXELS, tuple(ms), per_part=False)


def through_stages(folder: Path, detector: Detector, stations: int, batch: int) -> float:
    """Milliseconds a part, of parts that wait at stations with one detector."""
    outbox = Outbox(folder / "outbox.sqlite3")
    line = Line(outbox, *(line_station(f"cam{number}", detector=detector) for number in range(stations)), batch=batch)
    image = noise(SIDE, SIDE)
    names = list(line.stations)
    begun = time.perf_counter()
    for thread in line.threads:
        thread.start()
    for number in range(PARTS):
        line.put(Frame(capture(number, names[number % stations]), image))
    line.frames.close()
    line.join()
    taken = time.perf_counter() - begun
    assert not line.failures, line.failures
    assert sum(outbox.last_seq(name) for name in names) == PARTS
    outbox.close()
    return 1000 * taken / PARTS


def through_a_folder(folder: Path, detector: Detector, count: int) -> float:
    """Milliseconds a part, of files that wait when the source begins."""
    write_part(folder / "part.png", 1)
    incoming = folder / "incoming"
    incoming.mkdir()
    for number in range(count):
        shutil.copy(folder / "part.png", incoming / f"{number:05d}.png")
    outbox = Outbox(folder / "outbox.sqlite3")
    source = FolderSource("cam1", incoming, concluded=outbox.concluded, settle_ms=0)
    cam = replace(line_station(detector=detector), source=source)
    line = Line(outbox, cam)
    acquiring = Thread(target=acquire, args=(cam, line.frames, line.stop))
    begun = time.perf_counter()
    for thread in (*line.threads, acquiring):
        thread.start()
    health = cam.health
    eventually(lambda: health.newest and health.newest.seq == count, "the backlog to be judged", PATIENCE_S)
    taken = time.perf_counter() - begun
    line.stop.set()
    acquiring.join()
    line.frames.close()
    line.join()
    assert not line.failures, line.failures
    assert sum(1 for _ in (incoming / "done").rglob("*.png")) == count
    outbox.close()
    return 1000 * taken / count


def measure(folder: Path) -> Iterator[Curve]:
    """All curves, one after the other."""
    detector = build_detector(train(folder), "cpu")
    number = 0

    def fresh() -> Path:
        nonlocal number
        number += 1
        room = folder / f"{number}"
        room.mkdir()
        return room

    yield from over_images(detector)
    through_stages(fresh(), detector, 1, 4)  # what is slow the first time is paid here
    ms = [min(through_stages(fresh(), detector, count, 4) for _ in range(REPEATS)) for count in STATIONS]
    yield Curve("a part, by the stations that share a detector", "stations", "", STATIONS, tuple(ms))
    ms = [min(through_stages(fresh(), detector, 1, batch) for _ in range(REPEATS)) for batch in BATCHES]
    yield Curve("a part, by the most that are judged at once", "batch", "", BATCHES, tuple(ms))
    ms = [through_a_folder(fresh(), detector, count) for count in BACKLOGS]
    yield Curve("a part, by the files that wait in a folder", "files", "", BACKLOGS, tuple(ms))


def chart(curves: Sequence[Curve]) -> "Figure":
    """A panel for each kind of growth; both axes of the first, and the files of the last, are logarithmic."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(curve.panel for curve in curves))
    figure = Figure(figsize=(11.4, 6.6))
    grid = figure.subplots(2, 2, gridspec_kw={"hspace": 0.5, "wspace": 0.16})
    figure.subplots_adjust(left=0.055, right=0.975, top=0.92, bottom=0.09)
    for axes, panel in zip(grid.flat, panels, strict=True):
        drawn = [curve for curve in curves if curve.panel == panel]
        for colour, curve in zip(PALETTE, drawn, strict=False):
            axes.plot(curve.at, curve.ms, "o-", color=colour, linewidth=1.5, markersize=5, markeredgewidth=0)
            if curve.name:
                axes.annotate(
                    curve.name,
                    (curve.at[-1], curve.ms[-1]),
                    (-4, 9),
                    textcoords="offset points",
                    ha="right",
                    annotation_clip=False,
                )
        first = drawn[0]
        if first.per_part:
            axes.set_ylim(0, 1.25 * max(first.ms))
        else:
            axes.set_yscale("log")
            axes.margins(y=0.15)
            axes.set_yticks(TICKS_MS, [f"{tick:g}" for tick in TICKS_MS])
            axes.set_yticks([], minor=True)
        if first.at[-1] / first.at[0] > 20:
            axes.set_xscale("log")
        axes.set_xticks(first.at, [f"{at:,g}" for at in first.at])
        axes.set_xticks([], minor=True)
        axes.grid()
        axes.set_xlabel(first.axis)
        axes.set_title(f"ms {panel}")
    return figure


def main(
    out_file: Annotated[Path, typer.Option("--out", help="File for the figures.")] = Path("build/growth.json"),
    plot: Annotated[Path | None, typer.Option(help="File for the curves, .svg or .png.")] = None,
) -> None:
    """Measure how cost grows on this machine's processor."""
    console = Console()
    console.width = console.width if console.is_terminal else 110
    table = Table("ms", "at: ms", "step", box=SIMPLE_HEAD)
    curves = []
    with tempfile.TemporaryDirectory(prefix="inspectd-growth-") as folder, Path(folder, "log").open("w") as log:
        structlog.configure(  # each verdict costs a line, as with the daemon
            processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.PrintLoggerFactory(log)
        )
        for curve in measure(Path(folder)):
            curves.append(curve)
            points = "   ".join(f"{at:g}: {ms:.3g}" for at, ms in zip(curve.at, curve.ms, strict=True))
            table.add_row(f"{curve.panel} {curve.name}", points, f"{curve.step:.2f}")
            console.print(f"measured: {curve.panel} {curve.name}")
    console.print(table)
    content = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "size": SIZE,
        "curves": [asdict(curve) | {"step": curve.step} for curve in curves],
    }
    out_file.parent.mkdir(parents=True, exist_ok=True)
    out_file.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"also in {out_file}")
    if plot is not None:
        with drawing():
            chart(curves).savefig(plot, metadata={"Date": None} if plot.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
