"""The commands of the desk: learn, calibrate, measure, judge, compare. Thin: they read options, call, and print."""

import json
import math
import signal
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from daemon import judgement, schemas
from daemon.desk import dataset
from daemon.desk.calibrating import AlphaOption, calibrate_new, not_learned
from daemon.desk.dataset import DatasetError
from daemon.desk.lens import of_all
from daemon.desk.target import ConfigOption, ModelOption, RecipeOption, StationOption, find
from daemon.messages import Outcome
from daemon.terminal import EXIT_FAILED, Device, DeviceOption, err, out, progress
from detectors.base import DetectorName
from detectors.tiling import Tiling

if TYPE_CHECKING:
    from daemon.desk.evaluation import Evaluation


class PuadFeature(StrEnum):
    """The networks whose mean feature PUAD may judge."""

    student = "student"
    teacher = "teacher"


class PdnSize(StrEnum):
    """The sizes of EfficientAD."""

    s = "s"
    m = "m"


DEFAULT_BACKBONE = "efficientnet_lite0"
_RD = (DetectorName.gsk_rd4ad, DetectorName.sk_rd4ad, DetectorName.rd4ad, DetectorName.rdpp)
_EFFICIENTAD = (DetectorName.efficientad_s, DetectorName.efficientad_m, DetectorName.puad)
_SERVES: dict[str, tuple[DetectorName, ...]] = {
    "--backbone": (*_RD, DetectorName.patchcore),
    "--weights": (*_RD, DetectorName.patchcore),
    "--skips": (DetectorName.sk_rd4ad, DetectorName.gsk_rd4ad),
    "--transport": (DetectorName.rdpp,),
    "--pdn": _EFFICIENTAD,
    "--penalty": _EFFICIENTAD,
    "--weight-unpicturable": (DetectorName.puad,),
    "--feature": (DetectorName.puad,),
    "--trained": (DetectorName.rd4ad, DetectorName.sk_rd4ad, DetectorName.puad),
    "--epochs": (*_RD, *_EFFICIENTAD),
    "--steps": (*_RD, *_EFFICIENTAD),
}
"""Which detectors look at an option of `train`; those that are not named here serve all."""

WeightsOption = Annotated[Path | None, typer.Option(help="That network's weights from a file instead of a download.")]
SeedOption = Annotated[int, typer.Option(help="Makes a run repeatable; 0 is a seed like any other.", min=0)]


def train(
    good: Annotated[Path, typer.Option(help="Folder of images of good parts.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Model folder to write.")],
    detector: Annotated[DetectorName, typer.Option(help="What to train.")] = DetectorName.gsk_rd4ad,
    backbone: Annotated[
        str | None,
        typer.Option(help=f"Teacher network of reverse distillation and PatchCore; default: {DEFAULT_BACKBONE}."),
    ] = None,
    weights: WeightsOption = None,
    pdn: Annotated[
        Path | None, typer.Option(help="EfficientAD's and PUAD's teacher, from distill-teacher or published.")
    ] = None,
    penalty: Annotated[
        Path | None,
        typer.Option(help="Folder, with subfolders, of pictures of anything else, for EfficientAD and PUAD."),
    ] = None,
    trained: Annotated[
        Path | None,
        typer.Option(
            help="Networks to take instead of training: for rd4ad and sk_rd4ad a checkpoint of the public code, "
            "for puad the model folder of an EfficientAD."
        ),
    ] = None,
    skips: Annotated[
        str | None, typer.Option(help='Skip connections as "source:target" levels; as published: "3:2,2:1".')
    ] = None,
    transport: Annotated[  # noqa: FBT002 -- a flag
        bool, typer.Option("--transport", help="rdpp: the published transport loss too; slow and without effect.")
    ] = False,
    weight_unpicturable: Annotated[
        float | None, typer.Option(help="puad: weight of the unpicturable part; default and published: 1.", min=0)
    ] = None,
    feature: Annotated[
        PuadFeature | None, typer.Option(help="puad: whose mean feature is judged; default and published: student.")
    ] = None,
    calibration_good: Annotated[
        Path | None, typer.Option(help="Good parts to calibrate on; default: hold out part of --good.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images; default: by detector.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser, instead of --epochs.", min=1)] = None,
    size: Annotated[int, typer.Option(help="Side of the square network input, a multiple of 32.", min=64)] = 256,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Cut images into tiles with this side in pixels, each squeezed to --size; default: whole images."
        ),
    ] = None,
    tile_overlap: Annotated[
        int | None, typer.Option(help="Pixels that tiles share, up to half of --tile; default: an eighth of it.")
    ] = None,
    alpha: AlphaOption = 0.01,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished model.")] = False,  # noqa: FBT002
) -> None:
    """Learn good parts, calibrate on held-out ones, and write a model folder that `run` can use.

    An interrupted training goes on when the same command is given again.
    """
    from daemon.desk.training import Order, prepare, write_split
    from detectors.artifact import MANIFEST
    from detectors.devices import choose

    if size % 32:
        raise typer.BadParameter(f"--size must be a multiple of 32, not {size}")
    tiling = _tiling(tile, tile_overlap)
    _refuse_misfits(
        detector,
        trained is not None,
        {
            "--backbone": backbone,
            "--weights": weights,
            "--skips": skips,
            "--transport": transport or None,
            "--pdn": pdn,
            "--penalty": penalty,
            "--weight-unpicturable": weight_unpicturable,
            "--feature": feature,
            "--trained": trained,
            "--calibration-good": calibration_good,
            "--epochs": epochs,
            "--steps": steps,
        },
    )
    if trained is not None and trained.resolve() == out_folder.resolve():
        raise typer.BadParameter("--trained and --out are the same folder; choose another --out")
    if epochs and steps:
        raise typer.BadParameter("give --epochs or --steps, not both")
    if (out_folder / MANIFEST).exists() and not overwrite:
        raise DatasetError(f"{out_folder} already holds a finished model; choose another --out, or give --overwrite")
    pool = dataset.good_images(good)
    if trained and detector is not DetectorName.puad:
        learned, held = [], pool  # others have trained the networks, on parts that nobody names
    elif calibration_good:
        learned, held = pool, dataset.good_images(calibration_good)
    else:
        learned, held = dataset.split(pool, alpha, seed)
    framing = of_all([*learned, *held]).fingerprint
    order = Order(
        detector,
        size,
        seed,
        choose(device.value),
        epochs=epochs,
        steps=steps,
        trained=trained,
        backbone=backbone or DEFAULT_BACKBONE,
        weights=weights,
        skips=None if skips is None else _skips(skips),
        transport=transport,
        pdn=pdn,
        penalty=penalty,
        feature="student" if feature is None else feature.value,
        weight_unpicturable=1.0 if weight_unpicturable is None else weight_unpicturable,
        tiling=tiling,
    )
    training = prepare(order, learned)
    out.print(
        f"{training.description}: {len(learned)} good parts to learn from, {len(held)} to calibrate on, "
        f"{training.steps} steps",
        soft_wrap=True,
    )
    (out_folder / MANIFEST).unlink(missing_ok=True)  # from here on there is no finished model with another split
    write_split(out_folder, learned, held, seed, framing)
    held = not_learned(out_folder, held, calibration_good or good)
    with progress() as bar:
        task = bar.add_task("training", total=training.steps, note="")
        training.run(out_folder, held, lambda step: bar.update(task, completed=step.step, note=f"loss {step.loss:.4f}"))
    calibrate_new(out_folder, held, alpha, device)


def distill_teacher(
    pictures: Annotated[
        Path, typer.Option("--images", help="Folder of pictures to learn from, with its subfolders: many, of anything.")
    ],
    out_file: Annotated[Path, typer.Option("--out", help="File to write, NAME.safetensors.")],
    pdn_size: Annotated[PdnSize, typer.Option("--size", help="Which EfficientAD it is for.")] = PdnSize.s,
    backbone: Annotated[
        str, typer.Option(help="Network to learn from; published: wide_resnet101_2.")
    ] = "wide_resnet101_2",
    weights: WeightsOption = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.", min=1)] = 60_000,
    batch: Annotated[int, typer.Option(help="Pictures a step.", min=1)] = 16,
    seed: SeedOption = 0,
    device: DeviceOption = Device.auto,
) -> None:
    """Make EfficientAD's teacher: a small network that describes pictures as a large one does.

    Needed once for all parts. An interrupted run goes on when the same command is given again.
    """
    import shutil

    from detectors.devices import choose
    from detectors.efficientad.distillation import DistillationRecipe, distil
    from detectors.teacher import load_teacher

    if out_file.suffix != ".safetensors":
        raise typer.BadParameter(f"--out must end in .safetensors, not {out_file.name}")
    if out_file.exists():
        raise DatasetError(f"{out_file} exists already; choose another --out")
    paths = dataset.pictures(pictures)
    teacher = load_teacher(backbone, weights)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task("distilling", total=steps, note="")
        distil(
            map(dataset.read_image, paths),
            teacher,
            DistillationRecipe(size=pdn_size.value, steps=steps, batch=batch, seed=seed),
            out=out_file,
            device=choose(device.value),
            report=lambda step: bar.update(task, completed=step.step, note=f"loss {step.loss:.4f}"),
        )
    shutil.rmtree(out_file.with_name(out_file.name + ".training"))
    said = f"{out_file}: EfficientAD-{pdn_size.value.upper()}'s teacher from {len(paths)} pictures"
    out.print(said, markup=False, soft_wrap=True)


def evaluate(
    data: Annotated[
        Path,
        typer.Option(help="Folder with answers, as MVTec AD, LOCO, 3D-AD, VisA, VAD and BTAD have it, or a plain one."),
    ],
    model: ModelOption = None,
    config: ConfigOption = None,
    station: StationOption = None,
    recipe: RecipeOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Measure a calibrated model on images with known answers."""
    from daemon.desk.evaluation import evaluate as measure
    from daemon.desk.training import unseen

    items = dataset.labelled_images(data)
    target = find(model, config, station, device, recipe)
    lens = target.lens([item.path for item in items])
    detector, calibration = target.load(lens.fingerprint)
    known = len(items) - len(unseen(target.model, [item.path for item in items]))
    if known:
        out.print(
            f"{known} of {len(items)} test images trained or calibrated this model too: these figures flatter",
            soft_wrap=True,
        )
    with progress() as bar:
        task = bar.add_task("evaluating", total=len(items), note="")
        found = measure(detector, calibration, items, lambda: bar.advance(task), lens)
    if json_file is not None:
        provenance = {
            "model": detector.fingerprint,
            "calibration": calibration.id,
            "inspectd": version("inspectd"),
            "data": str(data),
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(_plain(asdict(found)) | provenance, indent=2, allow_nan=False) + "\n")
    out.print(_evaluation_table(found, f"{target.model} on {data}"))


def predict(
    image_files: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images to judge.")],
    model: ModelOption = None,
    config: ConfigOption = None,
    station: StationOption = None,
    recipe: RecipeOption = None,
    overlays: Annotated[Path | None, typer.Option(help="Write an overlay of each image into this folder.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Judge single images as the daemon would; exit status 1 if one cannot be read."""
    from daemon import overlay
    from daemon.regions import shown
    from daemon.sources.names import free_path

    target = find(model, config, station, device, recipe)
    lens = target.lens([path for path in image_files if path.is_file()])
    detector, calibration = target.load(lens.fingerprint)
    if overlays is not None:
        overlays.mkdir(parents=True, exist_ok=True)
    table = Table("image", "verdict", "score / threshold", "p-value")
    table.columns[0].overflow = "fold"
    table.columns[2].justify = table.columns[3].justify = "right"
    unreadable = 0
    for path in image_files:
        try:
            image = lens.read(path)
        except (DatasetError, OSError) as error:
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
            picture = overlay.render(image, shown(prediction), decision.threshold, caption, kept=target.rule.kept)
            file = free_path(overlays, f"{path.stem}.jpg")
            file.write_bytes(overlay.encode_jpeg(picture, b"", quality=92))
    out.print(table)
    if unreadable:
        raise typer.Exit(EXIT_FAILED)


def compare(
    data: Annotated[Path, typer.Option(help="Folder of categories, or one category, in any layout that is known.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for models, figures and pages; used again.")],
    detectors: Annotated[
        str, typer.Option(help='What to compare, "rd4ad,r50=rd4ad"; a label tells two of one kind apart.')
    ] = "gsk_rd4ad,sk_rd4ad,rd4ad,rdpp",
    seeds: Annotated[int, typer.Option(help="Trainings of each detector on each category.", min=1)] = 3,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help='Training option of one label or all, "r50:--backbone=resnet50_msra"; repeatable.'),
    ] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Train, calibrate and evaluate detectors on categories with known answers, and write the pages to choose by.

    What is finished is not done again, so an interrupted comparison goes on with the same command. Exit status 1 if
    a run failed.
    """
    from daemon.desk import comparison, report

    try:
        listed = comparison.entries(detectors, settings or (), list(DetectorName))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # takes its child along, as Ctrl-C does
    out_folder = out_folder.resolve()
    machine = comparison.describe_machine(device.value)
    plans = [
        (category, comparison.plan(category, folder, listed, seeds, device.value, out_folder))
        for folder, category in comparison.read(data)
    ]
    results = {run: found for _, runs in plans for run in runs if (found := comparison.finished(run))}
    waiting = [run for _, runs in plans for run in runs if run not in results]
    if results:
        out.print(f"{len(results)} of {len(results) + len(waiting)} runs were finished before", soft_wrap=True)
    with progress() as bar:
        task = bar.add_task("runs", total=len(waiting), note="", visible=bool(waiting))
        for run in waiting:
            bar.update(task, note=escape(run.name))
            results[run] = comparison.perform(run, machine)
            bar.advance(task)
        bar.update(task, note="")
    with progress() as bar:
        task = bar.add_task("pages", total=len(plans), note="")
        sheets = []
        for category, runs in plans:
            bar.update(task, note=escape(category.name))
            sheets.append(comparison.collect(category, runs, results))
            bar.advance(task)
        index = report.write(sheets, machine, out_folder)
        bar.update(task, note="")
    for sheet in sheets:
        heading, *rows = report.summary(sheet)
        title = escape(sheet.category)
        table = Table(*heading, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.columns[0].no_wrap = table.columns[1].no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*row)
        out.print(table)
    failed = [(run, result) for run, result in results.items() if result.figures is None]
    for run, result in failed:
        err.print(f"inspectd: {run.name} failed: {result.error}; see {run.log}", markup=False, soft_wrap=True)
    out.print(f"pages: {index}", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def schema(
    name: Annotated[str | None, typer.Argument(help="Which one; default: list all.", show_default=False)] = None,
) -> None:
    """Print the JSON Schema of an MQTT payload."""
    if name is not None and name not in schemas.names():
        raise typer.BadParameter(f"there is no schema {name}; there are {', '.join(schemas.names())}")
    typer.echo("\n".join(schemas.names()) if name is None else schemas.read(name).rstrip())


def _refuse_misfits(detector: DetectorName, trained: bool, options: Mapping[str, object]) -> None:  # noqa: FBT001
    """Refuse options that are given (not None) and would be ignored."""
    for option in (name for name, value in options.items() if value is not None):
        serves = _SERVES.get(option, tuple(DetectorName))
        if detector not in serves:
            raise typer.BadParameter(f"{option} serves {', '.join(serves)}, not {detector}")
        if trained and option in ("--pdn", "--penalty", "--epochs", "--steps"):
            raise typer.BadParameter(f"{option} is for a training, and --trained takes networks that have had theirs")
        if trained and option == "--calibration-good" and detector is not DetectorName.puad:
            raise typer.BadParameter(
                "with --trained all of --good serves the calibration; leave --calibration-good out"
            )


def _tiling(side: int | None, overlap: int | None) -> Tiling | None:
    if side is None:
        if overlap is not None:
            raise typer.BadParameter("--tile-overlap is how much tiles share: give --tile, their side, too")
        return None
    try:
        return Tiling(side, side // 8 if overlap is None else overlap)
    except ValueError as error:
        raise typer.BadParameter(f"--tile, --tile-overlap: {error}") from None


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


def _evaluation_table(found: "Evaluation", title: str) -> Table:
    table = Table("", "value", "95 % interval", title=escape(title), title_justify="left")
    table.add_row("image AUROC", f"{found.image_auroc:.4f}", _interval(found.image_auroc_interval, ".4f"))
    if len(found.image_auroc_by_defect) > 1:
        for defect, area in found.image_auroc_by_defect.items():
            table.add_row(f"  {escape(defect)}", f"{area:.4f}", "")
        table.add_row("  mean over defects", f"{found.image_auroc_mean:.4f}", "")
    table.add_row("average precision", f"{found.average_precision:.4f}", "")
    table.add_row("F1, best threshold", f"{found.f1_max:.4f}", "an oracle: it saw the answers")
    for share, rate, interval in (
        ("1 %", found.true_reject_at_1, found.true_reject_at_1_interval),
        ("5 %", found.true_reject_at_5, found.true_reject_at_5_interval),
    ):
        table.add_row(f"true rejects at {share} false", f"{rate:7.2%}", _interval(interval, ".1%"))
    table.add_section()
    of = f"of {found.n_masked} bad parts" if found.n_masked else ""
    table.add_row("pixel AUROC", _figure(found.pixel_auroc), of)
    table.add_row("AUPRO (to 30 %)", _figure(found.aupro), of)
    if not math.isnan(found.au_spro):
        table.add_row("AU-sPRO (to 5 %)", f"{found.au_spro:.4f}", "mean over defects")
    table.add_section()
    for name, rate, interval, count in (
        ("false rejects", found.false_reject_rate, found.false_reject_interval, found.n_good),
        ("escapes", found.escape_rate, found.escape_interval, found.n_defect),
    ):
        table.add_row(name, f"{rate:7.2%}  ({round(rate * count)} of {count})", _interval(interval, ".1%"))
    for defect, missed in found.missed.items():
        table.add_row(f"  escaped {escape(defect)}", f"{missed} of {found.present[defect]}", "")
    table.add_section()
    asked = f"α {found.alpha:.2%} asked, {found.alpha_carried:.2%} carried"
    table.add_row("threshold", f"{found.threshold:.5g}", asked)
    table.add_row("latency p50, p99", f"{found.latency_ms_p50:.1f} ms, {found.latency_ms_p99:.1f} ms", "one at a time")
    table.add_row("peak memory", f"{found.peak_memory_mb:.0f} MB", "")
    return table


def _interval(interval: tuple[float, float], form: str) -> str:
    low, high = interval
    return "" if math.isnan(low) else f"{low:{form}} … {high:{form}}"


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: what is no number becomes null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _figure(value: float) -> str:
    return "no masks" if math.isnan(value) else f"{value:.4f}"


def _badge(outcome: Outcome) -> str:
    colour = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.UNCERTAIN: "yellow", Outcome.ERROR: "magenta"}
    return f"[{colour[outcome]}]{outcome.name}[/]"
