"""The command line. Thin: it reads options, calls, and turns known errors into a message and an exit status.

Exit statuses: 0 done; 1 failed; 2 wrong options; 78 a configuration, a model or a calibration that a person must
correct (systemd does not restart on it).
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from calibration import store
from calibration.calibration import Calibration, CalibrationError, describe, fit
from calibration.quantile import smallest_sample
from config.load import ConfigError, load, read_password
from daemon import dataset, images, judgement, logs
from daemon.dataset import DatasetError
from daemon.images import UndecodableError
from daemon.messages import Outcome
from daemon.outbox import OutboxError
from detectors.base import ArtifactError, Detector, Image

EXIT_FAILED, EXIT_CONFIG = 1, 78

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Visual inspection for production lines: learn good parts, calibrate a threshold, publish verdicts over MQTT.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Device(StrEnum):
    """Where networks run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DetectorName(StrEnum):
    """The detectors that can be trained."""

    sk_rd4ad = "sk_rd4ad"
    rd4ad = "rd4ad"


ModelOption = Annotated[Path, typer.Option("--model", help="Model folder.")]
AlphaOption = Annotated[
    float, typer.Option(help="Share of good parts that may be rejected.", min=1e-6, max=0.5, show_default=True)
]
DeviceOption = Annotated[Device, typer.Option(help="Where the networks run.")]
ConfigOption = Annotated[Path, typer.Option("--config", help="Configuration file.")]


def main() -> NoReturn:
    """Run `inspectd`."""
    logging.captureWarnings(capture=True)
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        _leave("interrupted", 130)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except (ConfigError, ArtifactError, CalibrationError) as error:
        _leave(str(error), EXIT_CONFIG)
    except (DatasetError, UndecodableError, OutboxError, OSError) as error:
        _leave(str(error), EXIT_FAILED)
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise  # a bug: its traceback is the best message
        if hasattr(error, "format_message"):
            _leave(f"{error.format_message()}\nTry 'inspectd --help'.", error.exit_code)
        sys.exit(error.exit_code)
    sys.exit(status if isinstance(status, int) else 0)


@app.command()
def train(
    good: Annotated[Path, typer.Option(help="Folder of images of good parts.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    detector: Annotated[DetectorName, typer.Option(help="What to train.")] = DetectorName.sk_rd4ad,
    backbone: Annotated[str, typer.Option(help="Teacher network.")] = "efficientnet_lite0",
    weights: Annotated[Path | None, typer.Option(help="Teacher's weights from a file instead of a download.")] = None,
    skips: Annotated[
        str, typer.Option(help='Skip connections of sk_rd4ad as "source:target" levels; the default is as published.')
    ] = "3:2,2:1",
    calibration_good: Annotated[
        Path | None, typer.Option(help="Good parts to calibrate on; default: hold out part of --good.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images; default: by their number.", min=1)] = None,
    size: Annotated[int, typer.Option(help="Side of the square network input, a multiple of 32.", min=64)] = 256,
    alpha: AlphaOption = 0.01,
    seed: Annotated[int, typer.Option(help="Makes a run repeatable; 0 is a seed like any other.", min=0)] = 0,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished model.")] = False,  # noqa: FBT002
) -> None:
    """Learn good parts, calibrate on held-out ones, and write a model folder that `run` can use.

    An interrupted training goes on when the same command is given again.
    """
    from daemon.training import Order, Training, write_split
    from detectors.artifact import MANIFEST
    from detectors.devices import choose

    if size % 32:
        raise typer.BadParameter(f"--size must be a multiple of 32, not {size}")
    if (out_folder / MANIFEST).exists() and not overwrite:
        raise DatasetError(f"{out_folder} already holds a finished model; choose another --out, or give --overwrite")
    pool = dataset.good_images(good)
    learned, held = (
        dataset.split(pool, alpha, seed) if calibration_good is None else (pool, dataset.good_images(calibration_good))
    )
    chosen_skips = _skips(skips) if detector is DetectorName.sk_rd4ad else ()
    training = Training(Order(backbone, weights, chosen_skips, size, epochs, seed, choose(device.value)), learned)
    out.print(
        f"{detector.value} with {backbone} at {size} px: {len(learned)} good parts to learn from, {len(held)} to "
        f"calibrate on, {training.recipe.epochs} epochs",
        soft_wrap=True,
    )
    write_split(out_folder, learned, held, seed)
    held = _not_learned(out_folder, held, calibration_good or good)
    with _progress() as bar:
        task = bar.add_task("training", total=training.steps, note="")
        training.run(out_folder, lambda step: bar.update(task, completed=step.step, note=f"loss {step.loss:.4f}"))
    _calibrate(out_folder, held, alpha, device)


@app.command()
def calibrate(
    model: ModelOption,
    good: Annotated[Path, typer.Option(help="Folder of images of good parts that did not train the model.")],
    alpha: AlphaOption = 0.01,
    device: DeviceOption = Device.auto,
) -> None:
    """Choose the threshold from good parts, and say what it promises."""
    _calibrate(model, _not_learned(model, dataset.good_images(good), good), alpha, device)


@app.command()
def evaluate(
    model: ModelOption,
    data: Annotated[Path, typer.Option(help="Folder in MVTec layout: test/good, test/DEFECT, ground_truth/DEFECT.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Measure a calibrated model on images with known answers."""
    from daemon.evaluation import evaluate as measure

    items = dataset.labelled_images(data)
    detector, calibration = _load(model, device)
    with _progress() as bar:
        task = bar.add_task("evaluating", total=len(items), note="")
        found = measure(detector, calibration, items, lambda: bar.advance(task))
    if json_file is not None:
        figures = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(found).items()}
        provenance = {
            "model": detector.fingerprint,
            "calibration": calibration.id,
            "inspectd": version("inspectd"),
            "data": str(data),
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures | provenance, indent=2) + "\n")
    table = Table("", "value", "95 % interval", title=f"{model} on {data}", title_justify="left")
    low, high = found.image_auroc_interval
    table.add_row("image AUROC", f"{found.image_auroc:.4f}", f"{low:.4f} … {high:.4f}")
    table.add_row("pixel AUROC", _figure(found.pixel_auroc), "")
    table.add_row("AUPRO (to 30 %)", _figure(found.aupro), "")
    table.add_section()
    for name, rate, interval, count in (
        ("false rejects", found.false_reject_rate, found.false_reject_interval, found.n_good),
        ("escapes", found.escape_rate, found.escape_interval, found.n_defect),
    ):
        text = f"{rate:7.2%}  ({round(rate * count)} of {count})"
        table.add_row(name, text, f"{interval[0]:.1%} … {interval[1]:.1%}")
    for defect, missed in found.missed.items():
        table.add_row(f"  escaped {defect}", f"{missed} of {found.present[defect]}", "")
    table.add_section()
    asked = f"α {found.alpha:.2%} asked, {found.alpha_carried:.2%} carried"
    table.add_row("threshold", f"{found.threshold:.5g}", asked)
    table.add_row("latency p50, p99", f"{found.latency_ms_p50:.1f} ms, {found.latency_ms_p99:.1f} ms", "one at a time")
    out.print(table)


@app.command()
def predict(
    model: ModelOption,
    image_files: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images to judge.")],
    overlays: Annotated[Path | None, typer.Option(help="Write an overlay of each image into this folder.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Judge single images as the daemon would; exit status 1 if one cannot be read."""
    from daemon import overlay
    from daemon.sources.names import free_path

    detector, calibration = _load(model, device)
    if overlays is not None:
        overlays.mkdir(parents=True, exist_ok=True)
    table = Table("image", "verdict", "score / threshold", "p-value")
    table.columns[0].overflow = "fold"
    table.columns[2].justify = table.columns[3].justify = "right"
    unreadable = 0
    for path in image_files:
        try:
            image = images.read(path)
        except (UndecodableError, OSError) as error:
            unreadable += 1
            table.add_row(escape(str(path)), _badge(Outcome.ERROR), escape(str(error)), "")
            continue
        (prediction,) = detector.predict([image])
        decision = judgement.judge(prediction, calibration)
        if decision.ratio is None or decision.p_value is None:
            table.add_row(escape(str(path)), _badge(decision.outcome), escape(decision.detail), "")
            continue
        table.add_row(escape(str(path)), _badge(decision.outcome), f"{decision.ratio:.3f}", f"{decision.p_value:.4f}")
        if overlays is not None:
            caption = overlay.Caption(decision.outcome, path.name, judgement.explain(decision))
            picture = overlay.render(image, prediction.anomaly_map, decision.threshold, caption)
            target = free_path(overlays, f"{path.stem}.jpg")
            target.write_bytes(overlay.encode_jpeg(picture, b"", quality=92))
    out.print(table)
    if unreadable:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def run(config: ConfigOption) -> None:
    """Inspect what arrives, until SIGTERM or Ctrl-C."""
    from daemon import service

    logs.configure()
    stop = service.stop_on_signals()
    service.run(load(config), stop)


@app.command()
def check(config: ConfigOption) -> None:
    """Try everything `run` needs but the broker and the camera; exit status 78 if something is wrong."""
    from daemon.build import build_detector, load_calibration
    from daemon.sources.base import SourceUnavailableError
    from daemon.sources.folder import examine

    settings = load(config)
    faults: list[str] = []
    try:
        read_password(settings.mqtt)
    except ConfigError as error:
        faults.append(str(error))
    state = next(p for p in (settings.state_dir, *settings.state_dir.parents) if p.exists())
    if not state.is_dir() or not os.access(state, os.W_OK | os.X_OK):
        faults.append(f"state_dir: {settings.state_dir} cannot be written by this user; give it to the daemon's")
    _tell("[green]ok[/]  ", f"{config}: {len(settings.stations)} station(s), broker {settings.mqtt.host}")
    for station in settings.stations:
        try:
            detector = build_detector(station.model, settings.device, settings.threads)
            calibration = load_calibration(station.model, detector)
        except (ArtifactError, CalibrationError) as error:
            faults.append(f"station {station.name}: {error}")
        else:
            asked, carried = calibration.alpha, calibration.alpha_carried
            need = "" if calibration.carries else f"; {asked:.2%} needs {smallest_sample(asked)}"
            _tell(
                "[green]ok[/]  " if calibration.carries else "[yellow]weak[/]",
                f"station {station.name}: model {station.model}, {calibration.good_parts} good parts carry "
                f"α = {carried:.2%}{need}",
            )
        try:
            examine(station.source.path)
        except SourceUnavailableError as error:
            faults.append(f"station {station.name}: {error}")
        else:
            _tell("[green]ok[/]  ", f"station {station.name}: folder {station.source.path}")
    if faults:
        raise ConfigError("\n".join(f"{config}: {fault}" for fault in faults))


def _calibrate(model: Path, held: list[Path], alpha: float, device: Device) -> None:
    from daemon.build import CALIBRATION, build_detector

    detector = build_detector(model, device.value)
    scores = [detector.predict([image])[0].anomaly_score for image in _read(held, "calibrating")]
    calibration = fit(
        scores,
        alpha=alpha,
        detector_fingerprint=detector.fingerprint,
        data_sha256=dataset.digest(held),
        made_at=datetime.now(UTC),
    )
    store.save(calibration, model / CALIBRATION)
    out.print(describe(calibration), markup=False, soft_wrap=True)


def _not_learned(model: Path, pool: list[Path], good: Path) -> list[Path]:
    from daemon.training import unlearned

    held = unlearned(model, pool)
    if not held:
        raise DatasetError(f"every image in {good} was used to train {model}; calibrate on other good parts")
    if len(held) < len(pool):
        out.print(f"{len(pool) - len(held)} of {len(pool)} images trained this model and are left out.", soft_wrap=True)
    return held


def _load(model: Path, device: Device) -> tuple[Detector, Calibration]:
    from daemon.build import build_detector, load_calibration

    detector = build_detector(model, device.value)
    return detector, load_calibration(model, detector)


def _read(paths: Sequence[Path], doing: str) -> Iterator[Image]:
    with _progress() as bar:
        task = bar.add_task(doing, total=len(paths), note="")
        for path in paths:
            yield dataset.read_image(path)
            bar.advance(task)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
    )


def _skips(text: str) -> tuple[tuple[int, int], ...]:
    from detectors.reverse_distillation.network import PUBLISHED_SKIPS

    try:
        pairs = [part.split(":") for part in text.split(",") if part]
        skips = tuple((int(source), int(target)) for source, target in pairs)
    except ValueError:
        raise typer.BadParameter(f'--skips is written like "3:2,2:1", not {text!r}') from None
    if not set(skips) <= set(PUBLISHED_SKIPS) or len(set(skips)) < len(skips):
        raise typer.BadParameter(f"--skips may name 3:2 and 2:1, each once, not {text!r}")
    return skips


def _figure(value: float) -> str:
    return "no masks" if math.isnan(value) else f"{value:.4f}"


def _tell(mark: str, text: str) -> None:
    out.print(f"{mark}  {escape(text)}", soft_wrap=True)


def _badge(outcome: Outcome) -> str:
    colour = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.UNCERTAIN: "yellow", Outcome.ERROR: "magenta"}
    return f"[{colour[outcome]}]{outcome.name}[/]"


def _leave(message: str, status: int) -> NoReturn:
    err.print(f"inspectd: {message}", markup=False, soft_wrap=True)
    sys.exit(status)
