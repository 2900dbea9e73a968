"""`inspectd bench`. Thin: it reads options, has it measured, and prints."""

import json
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import TaskID

from daemon.desk import dataset
from daemon.terminal import EXIT_FAILED, Device, DeviceOption, out, progress

if TYPE_CHECKING:
    from daemon.desk.bench.event import Report


def bench(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    image_files: Annotated[
        list[Path] | None, typer.Option("--image", help="Image to judge; repeatable. Default: one that is drawn.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images to judge, instead of --image.")] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine", help="Engine to measure, the first is the reference; repeatable. Default: all there are."
        ),
    ] = None,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", help="Images in a call, from memory; repeatable.", min=1)
    ] = None,
    peer: Annotated[
        Path | None, typer.Option(help="A Python that has anomalib, to measure beside: build/peers/bin/python.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Turns that each contender has.", min=1)] = 20,
    beside: Annotated[  # noqa: FBT002 -- a flag
        bool, typer.Option("--beside", help="Measure again beside a program that keeps 2 threads busy.")
    ] = False,
    whole_path: Annotated[  # noqa: FBT002 -- a flag
        bool, typer.Option("--whole-path", help="Measure the daemon too, from a file to the gate's message.")
    ] = False,
    flames: Annotated[
        Path | None,
        typer.Option("--profile", help="Write a flame graph of the first engine there, an SVG; needs py-spy."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Measure how fast a model is on this machine, by each of its engines, side by side.

    Contenders take turns, a few images at a time, while the others sleep; compare ratios rather than milliseconds. Exit
    status 1 if something could not be measured.
    """
    from daemon.desk.bench import event, sheet
    from daemon.desk.bench.path import PathError

    if peer is not None and not peer.is_file():
        raise typer.BadParameter(f"--peer {peer} is no Python; `make bench-peers` makes build/peers/bin/python")
    if image_files and images:
        raise typer.BadParameter("give --image or --images, not both")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # takes its children along, as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="inspectd-bench-") as name, progress() as bar:
        folder = Path(name)
        drawn = folder / "drawn.jpg"
        event.draw_image(drawn)
        given = image_files or (dataset.pictures(images) if images else [drawn])
        plan = event.Plan(
            model=model,
            engines=event.choose_engines(model, engines or ()),
            images=tuple(given[: event.IMAGES]),
            images_note="An image that is drawn, 1280×960, JPEG" if given == [drawn] else f"{given[0]} and its like",
            batches=tuple(dict.fromkeys(batches or (1,))),
            device=device.value,
            rounds=rounds,
            peer=peer,
            beside=beside,
            whole_path=whole_path,
            flames=flames,
        )
        tasks: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int, who: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note="")
            bar.update(tasks[stage], completed=done, note=who)

        try:
            report = event.perform(plan, folder, tell)
        except PathError as error:
            raise typer.BadParameter(str(error)) from None
    _show(report)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(sheet.document(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if report.faults:
        raise typer.Exit(EXIT_FAILED)


def _show(report: "Report") -> None:
    from daemon.desk.bench import sheet

    wide = out if out.is_terminal else Console(highlight=False, width=sheet.WIDTH)
    for line in sheet.lines(report.machine):
        out.print(line, soft_wrap=True)
    for table in sheet.tables(report):
        wide.print(table)
    for line in sheet.notes(report):
        out.print(line, markup=False, soft_wrap=True)
