"""What each step down costs: smaller teachers, smaller inputs, rounder arithmetic.

    python -m tests.bench.pareto --data CATEGORY [--out build/pareto.json] [--plot docs/pareto.svg] MODEL…

Every model is exported for every engine of this CPU where that is not done yet (ranges of good parts that trained it),
and each engine scores the category's whole test set: what is drawn is accuracy through that engine, not through the
reference. Then all take turns at a few images each, so that ratios hold on a noisy machine. All in this process;
minutes. Nothing is chosen by these figures.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from calibration.metrics import image_auroc
from daemon import images
from daemon.build import build_detector, export_engine
from daemon.desk.charts import PALETTE, drawing
from daemon.desk.exporting import RANGES
from daemon.desk.training import unlearned
from detectors.artifact import read_manifest
from detectors.base import ArtifactError
from detectors.engines import store
from detectors.engines.base import REFERENCE
from detectors.engines.start import candidates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDS, TURN, REST_S = 8, 3, 0.3
_TICKS = (10, 20, 50, 100, 200, 500)


@dataclass(frozen=True, slots=True)
class Point:
    """A model by an engine: the median milliseconds of a frame in memory, and its image AUROC on the test set."""

    model: str
    teacher: str
    size: int
    engine: str
    ms: float
    image_auroc: float


def measure(models: Sequence[Path], data: Path) -> list[Point]:
    """Score the test set by all engines of all models, then let them take turns."""
    good = sorted((data / "train/good").iterdir())
    test = sorted((data / "test").glob("*/*"))
    bad = [path.parent.name != "good" for path in test]
    pixels = [images.read(path) for path in test]
    found, detectors = {}, {}
    for model in models:
        manifest = read_manifest(model)
        kept = set(unlearned(model, good))
        learned = [path for path in good if path not in kept][:RANGES]
        for name in [None, *candidates("cpu", manifest)]:
            key = REFERENCE
            if name is not None:
                known = [one for one in store.exports(model) if one.startswith(f"{name}/")]
                key = known[-1] if known else export_engine(model, name, map(images.read, learned))
            try:
                detector = build_detector(model, "cpu", engine=key)
            except ArtifactError as error:
                typer.echo(f"{model}: {error}")
                continue
            scores = [detector.predict([image])[0].anomaly_score for image in pixels]
            settings = manifest.settings
            found[model, key] = settings["backbone"], int(settings["size"]), image_auroc(scores, bad)
            detectors[model, key] = detector
            typer.echo(f"{model.name} {key}: image AUROC {found[model, key][2]:.4f}")
    took: dict[tuple[Path, str], list[float]] = {place: [] for place in detectors}
    for _ in range(ROUNDS):
        for place, detector in detectors.items():
            time.sleep(REST_S)  # until the pool of the one before has gone to sleep
            detector.predict(pixels[:1])
            for image in pixels[:TURN]:
                began = time.perf_counter()
                detector.predict([image])
                took[place].append(1000 * (time.perf_counter() - began))
    return [
        Point(model.name, *found[model, key][:2], key.partition("/")[0], float(np.median(ms)), found[model, key][2])
        for (model, key), ms in took.items()
    ]


def front(points: Sequence[Point]) -> list[Point]:
    """Those than which none is both faster and better, the fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.ms, -one.image_auroc)):
        if not best or point.image_auroc > best[-1].image_auroc:
            best.append(point)
    return best


def chart(points: Sequence[Point]) -> "Figure":
    """Accuracy over time, an engine a colour, the front as a line."""
    from matplotlib.figure import Figure

    engines = list(dict.fromkeys(point.engine for point in points))
    with drawing():
        figure = Figure(figsize=(8.4, 4.8), layout="constrained")
        axes = figure.subplots()
        edge = front(points)
        axes.step([p.ms for p in edge], [p.image_auroc for p in edge], where="post", color="#b4bac2", zorder=1)
        for engine, colour in zip(engines, PALETTE, strict=False):
            mine = [point for point in points if point.engine == engine]
            axes.scatter(
                [p.ms for p in mine], [p.image_auroc for p in mine], s=26, color=colour, label=engine, zorder=2
            )
        named = {(point.teacher, point.size): point for point in reversed(edge)}  # the fastest of each model
        for point in named.values():
            axes.annotate(
                f"{point.teacher} {point.size}",
                (point.ms, point.image_auroc),
                xytext=(6, -11),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("milliseconds a frame")
        axes.set_ylabel("image AUROC")
        axes.grid(visible=True, axis="y")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def main(
    models: Annotated[list[Path], typer.Argument(help="Model folders of that category.")],
    data: Annotated[Path, typer.Option(help="Category in MVTec layout.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("build/pareto.json"),
    plot: Annotated[Path | None, typer.Option(help="Chart to write, .svg or .png.")] = None,
) -> None:
    """Measure, print, draw."""
    points = measure(models, data)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n")
    edge = front(points)
    for point in sorted(points, key=lambda one: one.ms):
        mark = "front" if point in edge else ""
        typer.echo(
            f"| {point.teacher} {point.size} | {point.engine} | {point.ms:.1f} | {point.image_auroc:.3f} | {mark} |"
        )
    if plot is not None:
        chart(points).savefig(plot, metadata={"Date": None} if plot.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
