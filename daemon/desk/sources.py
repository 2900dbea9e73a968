"""`inspectd sources`: which cameras there are, and what one sees."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import cv2
import typer
from rich.box import SIMPLE_HEAD
from rich.progress import track
from rich.table import Table

from config.load import load
from config.schema import FolderSource
from daemon.desk.target import StationOption
from daemon.messages import Frame, Unreadable
from daemon.sources.base import SourceUnavailableError
from daemon.stats import Drop
from daemon.terminal import err, out

DEVICES = Path("/dev")

app = typer.Typer(no_args_is_help=True, help="Find cameras, and save what one sees.")


@app.command(name="list")
def list_() -> None:
    """Say which cameras answer: GigE Vision and USB3 Vision cameras, and video devices."""
    from daemon.sources.camera import discover

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
    config: Annotated[Path, typer.Option("--config", help="Configuration file.")],
    to: Annotated[Path, typer.Option("--out", help="Folder for the images; it is made if need be.")],
    station: StationOption = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many.")] = 1,
    wait_s: Annotated[float, typer.Option("--wait", min=0.1, help="Seconds to wait for each.")] = 10.0,
) -> None:
    """Save as PNG what a station's camera sees: to set the camera up, or to learn from."""
    from daemon.build import build_camera, place_of

    settings = load(config)
    chosen = [one for one in settings.stations if station in {None, one.name}]
    if len(chosen) != 1:
        raise typer.BadParameter(f"--station must be one of: {', '.join(one.name for one in settings.stations)}")
    (one,) = chosen
    if isinstance(one.source, FolderSource):
        raise typer.BadParameter(f"station {one.name} has no camera: its images lie in {one.source.path}; copy them")
    losses: dict[Drop, int] = {}

    def lose(cause: Drop, number: int) -> None:
        losses[cause] = losses.get(cause, 0) + number

    stop = threading.Event()
    parts = build_camera(one.name, one.source, lose).frames(stop)
    to.mkdir(parents=True, exist_ok=True)
    saved = 0
    try:
        for _ in track(range(count), description=f"{one.name} {place_of(one.source)}", console=err, transient=True):
            saved += _save(parts, to, one.name, wait_s)
    finally:
        stop.set()
        for _ in parts:
            pass
    lost = ", ".join(f"{number} {cause}" for cause, number in losses.items())
    out.print(f"{saved} of {count} images in {to}" + (f"; lost: {lost}" if lost else ""))


def _save(parts: Iterator[Frame | Unreadable | None], folder: Path, station: str, wait_s: float) -> bool:
    """Save the next part that comes; False if its pixels cannot be had."""
    until = time.monotonic() + wait_s
    part = next((part for part in parts if part is not None or time.monotonic() > until), None)
    if part is None:
        raise SourceUnavailableError(f"no image within {wait_s:g} s; see to the camera's trigger")
    if isinstance(part, Unreadable):
        err.print(f"inspectd: left out: {part.reason}", markup=False, soft_wrap=True)
        return False
    cv2.imwrite(str(folder / f"{station}-{part.capture.id}.png"), part.image[..., ::-1])
    return True
