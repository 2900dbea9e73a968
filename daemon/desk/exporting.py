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
from daemon.desk.spoiling import spotted
from daemon.desk.target import REFERENCE, ConfigOption, ModelOption, RecipeOption, StationOption, Target, find
from daemon.terminal import Device, DeviceOption, out, progress
from detectors.base import ArtifactError, Detector, Image

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

    @property
    def images(self) -> int:
        """How many each engine scores: where no bad part is known, the good ones spoiled stand in."""
        return len(self.good) + len(self.bad or self.good)


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

    Each engine scores good parts that did not train the model, and bad parts, beside the reference; where there are no
    bad ones, the good ones with a spot painted on them. One that changes verdicts, or the order of scores, or sees less
    of what is bad, beyond the limits is refused. Where a calibration is in force, the new one is a proposal that waits
    for `inspectd calibrations accept`. The daemon runs what its calibration was made with.
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
        task = bar.add_task("comparing", total=(1 + len(names)) * parts.images, note=REFERENCE)
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
    for one in tried:
        if one.why:
            out.print(f"{one.name}: {one.why}", markup=False, soft_wrap=True)
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
    """Score all parts, and without bad ones the good ones spoiled; the median milliseconds that an image took, too."""
    took: list[float] = []

    def judged(image: Image) -> float:
        began = time.perf_counter()
        score = detector.predict([image])[0].anomaly_score
        took.append(time.perf_counter() - began)
        bar.advance(bar.task_ids[0])
        return score

    good: list[float] = []
    spoiled: list[float] = []
    for seed, path in enumerate(parts.good):
        image = parts.lens.read(path)
        good.append(judged(image))
        if not parts.bad:
            spoiled.append(judged(spotted(image, seed)))
    bad = [judged(parts.lens.read(path)) for path in parts.bad]
    threshold = fit(good, **asdict(how), provenance=_NOWHERE).threshold
    return Scores(good, bad, threshold, spoiled), 1000 * float(np.median(took))


def _prune(target: Target, unused: set[str]) -> None:
    """Take away the exports that were only tried."""
    from detectors.engines import store

    for key in unused:
        store.discard(target.model, key)


def _table(tried: Sequence[_Tried]) -> Table:
    compared = [one.parity for one in tried if one.parity is not None]
    by = "AUROC" if any(parity.auroc is not None for parity in compared) else "spoiled"
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("engine", "ms", "×", "moved", "rank", "flips", by, ""):
        table.add_column(heading, justify="left" if heading in {"engine", ""} else "right", no_wrap=True)
    reference = tried[0]
    for one in tried:
        if not one.key:
            table.add_row(one.name, *[""] * 6, "cannot run")
            continue
        speed = [f"{one.ms:.1f}", f"{reference.ms / one.ms:.2f}"]
        if (found := one.parity) is None:
            known = next((parity.reference_auroc for parity in compared), None)
            table.add_row(one.name, *speed, "", "", "", _figure(known, "{:.4f}"), "reference")
            continue
        figures = [f"{found.shift:.1%}", f"{found.rank:.4f}", f"{found.flips} of {found.parts}"]
        figures.append(_figure(found.auroc, "{:.4f}") or _figure(found.kept, "{:.0%}"))
        table.add_row(one.name, *speed, *figures, "refused" if one.why else "like it")
    return table


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
