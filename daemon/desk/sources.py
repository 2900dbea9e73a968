"""`inspectd sources`: which cameras there are, what one sees, and how a station frames it."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table

from config.load import load
from config.schema import FolderSource, MqttSource, Station
from daemon.desk import dataset, lens
from daemon.desk.dataset import DatasetError
from daemon.desk.target import StationOption
from daemon.messages import Frame, Unreadable
from daemon.sources.base import SourceUnavailableError
from daemon.sources.framed import framed
from daemon.stats import Drop
from daemon.terminal import err, out

DEVICES = Path("/dev")
_MASKS = {"ground_truth", "gt", "masks", "Masks"}

ConfigOption = Annotated[Path, typer.Option("--config", help="Configuration file.")]

app = typer.Typer(no_args_is_help=True, help="Find cameras, and save what a station sees.")


@app.command(name="list")
def list_() -> None:
    """Say which cameras answer: GigE Vision and USB3 Vision cameras, and video devices."""
    from daemon.sources.genicam.camera import discover

    table = Table("type", "camera or place", "name", "vendor", "model", "address", box=SIMPLE_HEAD)
    try:
        for found in discover():
            table.add_row("genicam", found.serial or found.ip, found.name, found.vendor, found.model, found.ip or "USB")
    except SourceUnavailableError as error:
        err.print(f"inspectd: {error}", markup=False, soft_wrap=True)
    for device in sorted(DEVICES.glob("video[0-9]*")):
        name = Path("/sys/class/video4linux", device.name, "name")
        table.add_row("video", str(device), name.read_text().strip() if name.exists() else "", "", "", "")
    if table.row_count:
        out.print(table)
    else:
        out.print("no camera answers; see to power, cables, the network's mask and the rights to /dev/video*")


@app.command()
def grab(
    config: ConfigOption,
    to: Annotated[Path, typer.Option("--out", help="Folder for the images; it is made if need be.")],
    station: StationOption = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many.")] = 1,
    wait_s: Annotated[float, typer.Option("--wait", min=0.1, help="Seconds to wait for each.")] = 10.0,
) -> None:
    """Save as PNG what a station's camera sees, framed: to set the camera up, or to learn from."""
    from daemon.build import build_camera, build_framing, place_of

    one = _chosen(config, station)
    if isinstance(one.source, FolderSource):
        raise typer.BadParameter(f"station {one.name} has no camera: its images lie in {one.source.path}; copy them")
    if isinstance(one.source, MqttSource):
        raise typer.BadParameter(f"station {one.name} has no camera: its images come on {one.source.topic}")
    losses: dict[Drop, int] = {}

    def lose(cause: Drop, number: int) -> None:
        losses[cause] = losses.get(cause, 0) + number

    stop = threading.Event()
    framing = build_framing(one.framing)
    parts = framed(build_camera(one.name, one.source, lose), framing).frames(stop)
    fingerprint = framing.fingerprint
    to.mkdir(parents=True, exist_ok=True)
    saved = 0
    try:
        for _ in track(range(count), description=f"{one.name} {place_of(one.source)}", console=err, transient=True):
            saved += _save(parts, to, one.name, wait_s, fingerprint)
    finally:
        stop.set()
        for _ in parts:
            pass
    lost = ", ".join(f"{number} {cause}" for cause, number in losses.items())
    out.print(f"{saved} of {count} images in {to}" + (f"; lost: {lost}" if lost else ""))


@app.command()
def frame(
    config: ConfigOption,
    images: Annotated[Path, typer.Argument(metavar="IN", help="Folder of images as the camera took them.")],
    to: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the framed ones, in the same subfolders.")],
    station: StationOption = None,
) -> None:
    """Save images as PNG as a station frames them, to learn from; what trains must look like what is judged."""
    from daemon.build import build_framing

    one = _chosen(config, station)
    framing = build_framing(one.framing)
    if framing.is_plain:
        raise typer.BadParameter(f"station {one.name} has no [station.framing]: its images stay as they are")
    if to.resolve().is_relative_to(images.resolve()):
        raise typer.BadParameter(f"OUT, {to}, lies in IN: choose a folder outside {images}")
    files = dataset.pictures(images)
    copies: dict[Path, Path] = {}
    for file in files:
        inside = file.relative_to(images)
        if _MASKS & set(inside.parts[:-1]):
            raise DatasetError(
                f"{file} is a mask; give the folders of images alone. `inspectd evaluate` with --config frames images "
                "and their masks by itself"
            )
        other = copies.setdefault(to / inside.with_suffix(".png"), file)
        if other != file:
            raise DatasetError(f"{file} and {other} would both become {inside.with_suffix('.png')}; rename one")
    for copy, file in track(copies.items(), description="framing", console=err, transient=True):
        copy.parent.mkdir(parents=True, exist_ok=True)
        lens.frame(file, framing, copy)
    out.print(f"{len(copies)} images framed as station {one.name} does, in {to}", markup=False, soft_wrap=True)


def _chosen(config: Path, station: str | None) -> Station:
    stations = load(config).stations
    chosen = [one for one in stations if station in {None, one.name}]
    if len(chosen) != 1:
        raise typer.BadParameter(f"--station must be one of: {', '.join(one.name for one in stations)}")
    return chosen[0]


def _save(parts: Iterator[Frame | Unreadable | None], folder: Path, station: str, wait_s: float, framing: str) -> bool:
    """Save the next part that comes; False if its pixels cannot be had."""
    until = time.monotonic() + wait_s
    part = next((part for part in parts if part is not None or time.monotonic() > until), None)
    if part is None:
        raise SourceUnavailableError(f"no image within {wait_s:g} s; see to the camera's trigger")
    if isinstance(part, Unreadable):
        err.print(f"inspectd: left out: {part.reason}", markup=False, soft_wrap=True)
        return False
    lens.save(part.image, framing, folder / f"{station}-{part.capture.id}.png")
    return True
