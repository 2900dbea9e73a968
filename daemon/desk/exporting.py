"""`inspectd export`: a faster engine for a model, let in only if it judges as the reference does."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

from calibration.calibration import Provenance, fit
from calibration.parity import Parity, Scores, compare
from daemon.desk import dataset
from daemon.desk.calibrating import How, asked_of, calibrate_through, not_learned
from daemon.desk.lens import Lens
from daemon.desk.target import REFERENCE, ConfigOption, ModelOption, RecipeOption, StationOption, Target, find
from daemon.terminal import Device, DeviceOption, out, progress
from detectors.base import ArtifactError, Detector

RANGES = 100
"""Good parts, at most, of which the ranges of int8 are taken."""


_NOWHERE = Provenance(model="", data_sha256="", made_at=datetime.now(UTC))
"""Of a threshold that only compares engines."""


@dataclass(frozen=True, slots=True)
class _Tried:
    """What came of one engine. `why` says why it may not be used; empty if it may."""

    name: str
    key: str
    ms: float
    parity: Parity | None
    why: str


@dataclass(frozen=True, slots=True)
class _Parts:
    """Images to compare on."""

    lens: Lens
    good: Sequence[Path]
    bad: Sequence[Path]


def export(
    good: Annotated[
        Path | None, typer.Option(help="Folder of good parts: those that trained the model, and some that did not.")
    ] = None,
    model: ModelOption = None,
    config: ConfigOption = None,
    station: StationOption = None,
    recipe: RecipeOption = None,
    bad: Annotated[
        Path | None, typer.Option(help="Folder of bad parts, to compare on too; they move no threshold.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Try this engine alone; repeatable. Default: all for this machine.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Share of good parts that may be rejected; default: as in force, or 0.01.", min=1e-6, max=0.5
        ),
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Write the whole model to this ONNX file instead, for TensorRT and others.")
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Find the fastest engine that judges as the reference does, and calibrate through it.

    Each engine scores good parts that did not train the model, and bad parts if there are any, beside the reference.
    One that changes verdicts, or the order of scores, beyond the limits is refused. Where a calibration is in force,
    the new one is a proposal that waits for `inspectd calibrations accept`. The daemon runs what its calibration was
    made with.
    """
    from daemon.build import export_engine, export_onnx
    from detectors.artifact import read_manifest
    from detectors.devices import choose
    from detectors.engines import store
    from detectors.engines.base import name_of
    from detectors.engines.start import candidates

    target = find(model, config, station, device, recipe)
    if onnx is not None:
        export_onnx(target.model, onnx)
        out.print(f"Written: {onnx}", markup=False, soft_wrap=True)
        return
    if good is None:
        raise typer.BadParameter("give a folder of good parts, or --onnx FILE", param_hint="--good")
    manifest = read_manifest(target.model)
    names = list(map(name_of, engine)) if engine else candidates(choose(target.device), manifest)
    pool = dataset.good_images(good)
    held = not_learned(target.model, pool, good)
    learned = [path for path in pool if path not in set(held)]
    parts = _Parts(target.lens(pool), held, dataset.good_images(bad) if bad else [])
    how = asked_of(target.in_force(), alpha)
    ranges = [parts.lens.read(path) for path in _some(learned or held)]
    if not learned:
        out.print("No image in --good has trained the model, so ranges are taken of those that calibrate it.")
    before = {*store.exports(target.model)}
    with progress() as bar:
        task = bar.add_task("comparing", total=(1 + len(names)) * (len(parts.good) + len(parts.bad)), note=REFERENCE)
        reference, ms = _score(target.detector_by(REFERENCE), parts, how, bar)
        tried = [_Tried(REFERENCE, REFERENCE, ms, None, "")]
        for name in names:
            bar.update(task, note=name.value)
            try:
                key = export_engine(target.model, name, ranges)
                scores, ms = _score(target.detector_by(key), parts, how, bar)
            except ArtifactError as error:  # it cannot run here, and others may
                tried.append(_Tried(name, "", math.inf, None, str(error)))
                continue
            parity = compare(reference, scores)
            tried.append(_Tried(name, key, ms, parity, "; ".join(parity.faults)))
    out.print(_table(tried))
    chosen = min((one for one in tried if not one.why), key=lambda one: one.ms)
    _prune(target, {*store.exports(target.model)} - before - {chosen.key})
    if chosen.parity is None:
        raise ArtifactError(f"{target.model}: no engine is both faster than the reference and like it; it stays")
    out.print(f"Taken: {chosen.key}, {chosen.parity}", markup=False, soft_wrap=True)
    calibrate_through(target, target.detector_by(chosen.key), held, alpha, str(chosen.parity))


def _some(paths: Sequence[Path]) -> list[Path]:
    """At most RANGES of them, evenly spread."""
    places = np.unique(np.linspace(0, len(paths) - 1, RANGES).round().astype(int))
    return [paths[place] for place in places]


def _score(detector: Detector, parts: _Parts, how: How, bar: Progress) -> tuple[Scores, float]:
    """Score all parts, and give the median of the milliseconds that an image took."""
    scores: list[float] = []
    took: list[float] = []
    for path in [*parts.good, *parts.bad]:
        image = parts.lens.read(path)
        began = time.perf_counter()
        scores.append(detector.predict([image])[0].anomaly_score)
        took.append(time.perf_counter() - began)
        bar.advance(bar.task_ids[0])
    good, bad = scores[: len(parts.good)], scores[len(parts.good) :]
    return Scores(good, bad, fit(good, **asdict(how), provenance=_NOWHERE).threshold), 1000 * float(np.median(took))


def _prune(target: Target, unused: set[str]) -> None:
    """Take away the exports that were only tried."""
    from detectors.engines import store

    for key in unused:
        store.discard(target.model, key)


def _table(tried: Sequence[_Tried]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("engine", "ms", "×", "moved", "rank", "flips", "AUROC", ""):
        table.add_column(heading, justify="left" if heading in {"engine", ""} else "right", no_wrap=heading != "")
    reference = tried[0]
    for one in tried:
        if not one.key:
            table.add_row(one.name, "", "", "", "", "", "", one.why)
            continue
        speed = [f"{one.ms:.1f}", f"{reference.ms / one.ms:.2f}"]
        if one.parity is None:
            known = next((t.parity.reference_auroc for t in tried if t.parity), None)
            table.add_row(one.name, *speed, "", "", "", _auroc(known), "the reference")
            continue
        found = one.parity
        figures = [f"{found.shift:.1%}", f"{found.rank:.4f}", f"{found.flips} of {found.parts}", _auroc(found.auroc)]
        table.add_row(one.name, *speed, *figures, f"refused: {one.why}" if one.why else "like it")
    return table


def _auroc(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
