"""A whole measurement: who takes part, in what, and what came of it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from calibration import store
from daemon.build import CALIBRATION, engine_of
from daemon.desk.bench import contest, path
from daemon.desk.bench.contest import Heat, Record
from daemon.desk.bench.flames import draw
from daemon.desk.bench.machine import Machine, look
from daemon.desk.bench.path import PathError, WholePath
from daemon.desk.bench.rival import FallenError, Rival
from detectors.artifact import Manifest, read_manifest
from detectors.engines.base import REFERENCE, name_of
from detectors.engines.store import exports

IMAGES = 8
"""Images come in turn, and no more than these, for they are held in memory."""
MEMORY, FILE = Heat("memory"), Heat("file")
BESIDE = Heat("memory")
BY = ("torch", "openvino")
"""How anomalib can run a model."""
NETWORKS = {
    **dict.fromkeys(("gsk_rd4ad", "sk_rd4ad", "rd4ad", "rdpp"), "ReverseDistillation"),
    **dict.fromkeys(("efficientad_s", "efficientad_m", "puad"), "EfficientAd"),
}
"""Which of anomalib's models is compared with which detector."""
BACKBONES = {"efficientnet_lite0": "resnet18", "resnet50_msra": "resnet50"}
"""What stands in for a backbone that anomalib's decoder does not know."""

Tell = Callable[[str, int, int, str], None]
"""Hears of progress: the stage, how much of how much is done, and who is at work."""

_COMPETITOR = """
import os
import numpy
matrix = numpy.ones((1024, 1024), numpy.float32)
while os.getppid() == {parent}:
    matrix @ matrix
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    `engines` are keys by what tables call them, the reference first; `images` are files, `images_note` says what they
    are; `peer` is a Python that has anomalib; `flames` is the file for a flame graph of the first engine.
    """

    model: Path
    engines: Mapping[str, str]
    images: tuple[Path, ...]
    images_note: str
    batches: tuple[int, ...] = (1,)
    device: str = "auto"
    rounds: int = 20
    peer: Path | None = None
    beside: bool = False
    whole_path: bool = False
    flames: Path | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a plan.

    `beside` are the turns that were measured beside a busy program; `faults` say what could not be measured, and why.
    """

    plan: Plan
    manifest: Manifest
    machine: Machine
    records: Mapping[str, Record]
    beside: Mapping[str, Record]
    whole_path: WholePath | None
    faults: tuple[str, ...]


def choose_engines(model: Path, names: Sequence[str]) -> dict[str, str]:
    """The keys of engines by name or key; without any name, the reference and the newest export of each engine.

    Raises:
        ArtifactError: there is no engine of such a name.
    """
    newest = {key.partition("/")[0]: key for key in exports(model)}
    for name in names:
        name_of(name)
    return {name: newest.get(name, name) for name in names or (REFERENCE, *newest)}


def draw_image(file: Path) -> None:
    """Draw an image to measure with: smooth, with some noise; a JPEG of 1280×960 pixels."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0:960, 0:1280] / 960
    smooth = (
        128 + 60 * np.sin(7 * rows[..., np.newaxis] + np.array([0.0, 0.5, 1.0])) * np.cos(5 * columns)[..., np.newaxis]
    )
    noisy = np.clip(smooth + random.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
    Pillow.fromarray(noisy).save(file, quality=90)


def perform(plan: Plan, folder: Path, tell: Tell) -> Report:
    """Measure it all.

    Args:
        plan: what.
        folder: an empty folder, for logs and the peer's model.
        tell: is told how far it is.

    Raises:
        ArtifactError: there is no such model.
        CalibrationError: the whole path is wanted, and the model is not calibrated.
        PathError: the whole path is wanted, and there is no broker.
    """
    manifest, machine = read_manifest(plan.model), look()
    judging = _judging(plan)
    orders = dict(_ours(plan)) | dict(_peers(plan, manifest, folder))
    records = {name: Record(name) for name in orders}
    beside = {name: Record(name) for name in orders if plan.beside}
    faults: list[str] = []
    with ExitStack() as stack:
        ready = []
        for number, (name, order) in enumerate(orders.items()):
            tell("starting", number, len(orders), name)
            try:
                ready.append(_start(name, order, records[name], plan, folder, stack))
            except FallenError as error:
                records[name].fault = str(error)
        tell("starting", len(orders), len(orders), "")
        heats = {name: [*_heats(plan, is_peer=name not in plan.engines)] for name in orders}
        _hold("rounds", ready, records, heats, plan.rounds, tell)
        if plan.beside:
            still = [rival for rival in ready if records[rival.name].fault is None]
            with _competitor():
                _hold("beside", still, beside, {name: [BESIDE] for name in orders}, plan.rounds, tell)
        if plan.flames is not None:
            faults += _flames(plan.flames, next(iter(plan.engines)), ready, tell)
    whole_path = None
    if judging is not None:
        try:
            whole_path = _walk(plan, judging, folder, tell)
        except (PathError, FallenError) as error:
            faults.append(f"the whole path could not be measured: {error}")
    for record in (*records.values(), *beside.values()):
        if record.fault is not None:
            faults.append(f"{record.name}: {record.fault}")
    return Report(plan, manifest, machine, records, beside, whole_path, tuple(faults))


def _judging(plan: Plan) -> str | None:
    """The key of the engine that the daemon would judge by, None if the whole path is not wanted."""
    if not plan.whole_path:
        return None
    if path.find_broker() is None:
        raise PathError(path.NO_BROKER)
    return engine_of(store.read(plan.model / CALIBRATION))


def _ours(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, key in plan.engines.items():
        yield name, {"kind": "inspectd", "model": str(plan.model.resolve()), "engine": key, "device": plan.device}


def _peers(plan: Plan, manifest: Manifest, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    network = NETWORKS.get(manifest.detector)
    if plan.peer is None or network is None:
        return
    if network == "EfficientAd":
        backbone = "medium" if manifest.settings.get("pdn") == "m" else "small"
    else:
        asked = manifest.settings["backbone"]
        backbone = BACKBONES.get(asked, asked)
    for by in BY:
        place = folder / f"anomalib-{by}"
        place.mkdir()
        yield (
            f"anomalib {by}",
            {
                "kind": "anomalib",
                "network": network,
                "backbone": backbone,
                "size": manifest.settings.get("size", 256),
                "device": plan.device,
                "by": by,
                "folder": str(place),
            },
        )


def _start(name: str, order: Mapping[str, Any], record: Record, plan: Plan, folder: Path, stack: ExitStack) -> Rival:
    log = folder / f"{name.replace('/', '-')}.log"
    python = None
    if order["kind"] == "anomalib":
        python = plan.peer
        with Rival(name, {**order, "kind": "anomalib-export"}, log, python) as exporter:
            exporter.finish()
    rival = stack.enter_context(Rival(name, order, log, python))
    record.start = rival.start(plan.images)
    return rival


def _heats(plan: Plan, *, is_peer: bool) -> Iterator[Heat]:
    yield MEMORY
    yield FILE
    if not is_peer:
        yield from (Heat("memory", batch) for batch in plan.batches if batch > 1)


def _hold(
    stage: str,
    ready: Sequence[Rival],
    records: Mapping[str, Record],
    heats: Mapping[str, Sequence[Heat]],
    rounds: int,
    tell: Tell,
) -> None:
    total = rounds * sum(len(heats[rival.name]) for rival in ready)
    done = count(1)
    tell(stage, 0, total, "")
    for name in contest.hold(ready, records, heats, rounds):
        tell(stage, next(done), total, name)


def _flames(file: Path, name: str, ready: Sequence[Rival], tell: Tell) -> Iterator[str]:
    """Draw a contender's flame graph; gives what went wrong."""
    tell("flames", 0, 1, name)
    try:
        for rival in ready:
            if rival.name == name:
                draw(rival, file)
    except (FallenError, OSError) as error:
        yield f"no flame graph: {error}"
    tell("flames", 1, 1, "")


def _walk(plan: Plan, engine: str, folder: Path, tell: Tell) -> WholePath:
    place = folder / "line"
    place.mkdir()
    order = {"kind": "inspectd", "model": str(plan.model.resolve()), "engine": engine, "device": plan.device}
    tell("whole path", 0, 100, engine)
    with Rival("bare engine", order, folder / "bare.log") as bare:
        bare.start(plan.images)
        steps = path.measure(plan.model, engine, plan.images, plan.device, bare, place, -(-plan.rounds // 4))
        for step in steps:
            if isinstance(step, WholePath):
                return step
            tell("whole path", step, 100, engine)
    raise AssertionError("unreachable: the last step is the result")


@contextmanager
def _competitor() -> Iterator[None]:
    """Another program that keeps two threads busy, and whose threads spin while they wait."""
    program = [sys.executable, "-c", _COMPETITOR.format(parent=os.getpid())]
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    process = subprocess.Popen(program, env=os.environ | threads, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()
