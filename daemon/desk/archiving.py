"""`inspectd archive`: what images are kept, what people say of them, and data sets made of both."""

import csv
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from getpass import getuser
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image as Pillow
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from calibration.store import write_whole
from config.load import load
from config.schema import Archive
from daemon import images
from daemon.archive import REVIEW, SIDECAR, beside, note_review, survey
from daemon.desk import lens
from daemon.desk.dataset import DatasetError
from daemon.desk.target import StationOption
from daemon.framing import FRAMING
from daemon.messages import Outcome
from daemon.retention import Kept
from daemon.terminal import err, out, progress
from daemon.wire import encode, epoch_ms, iso

MANIFEST = "manifest.csv"
_WIDEST = 400
TESTED = 5
"""One in so many good parts is for the test, and always the same ones."""

app = typer.Typer(no_args_is_help=True, help="Look at the images that are kept, review them, and learn from them.")

ConfigOption = Annotated[Path, typer.Option("--config", help="Configuration file.")]


class Said(StrEnum):
    """What a person sees."""

    good = "good"
    bad = "bad"
    unsure = "unsure"


class Kind(StrEnum):
    """The outcomes, as an option has them."""

    fail = "FAIL"
    uncertain = "UNCERTAIN"
    error = "ERROR"
    passed = "PASS"


@dataclass(frozen=True, slots=True)
class _Part:
    """An archived image with what is said beside it; what cannot be read is empty."""

    kept: Kept
    verdict: dict[str, Any]
    review: dict[str, Any]

    @property
    def truth(self) -> str:
        """What a person said; empty where nobody did."""
        return str(self.review.get("as", ""))


@app.command(name="list")
def list_(
    config: ConfigOption,
    station: StationOption = None,
    outcome: Annotated[list[Kind] | None, typer.Option(help="Only these; default: all but PASS.")] = None,
    todo: Annotated[bool, typer.Option("--todo", help="Only those that nobody has reviewed.")] = False,  # noqa: FBT002 -- a flag
    count: Annotated[int, typer.Option("--count", min=1, help="How many at most.")] = 20,
) -> None:
    """Show the newest rejects, the newest first."""
    root = _archive(config).path
    wanted = {Outcome[kind.value] for kind in outcome or (Kind.fail, Kind.uncertain, Kind.error)}
    found = [
        kept
        for kept in _survey(root)
        if kept.outcome in wanted and station in {None, _station(kept)} and not (todo and kept.reviewed)
    ]
    table = Table("time (UTC)", "station", "part", "outcome", "score", "review", "id", box=SIMPLE_HEAD)
    table.columns[4].justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for part in _read(root, sorted(found, reverse=True)[:count]):
        score = part.verdict.get("score", -1.0)
        table.add_row(
            str(part.verdict.get("ts", part.kept.day))[:19].replace("T", " "),
            _station(part.kept),
            Text(str(part.verdict.get("part_id", "?"))),
            part.kept.outcome.name,
            "" if score < 0 else f"{score:.3f}",
            Text(f"{part.truth} ({part.review['by']})" if part.review.get("by") else part.truth),
            part.kept.id,
        )
    if found:
        natural = Measurement.get(out, out.options.update(max_width=_WIDEST), table).maximum
        # As wide as it is, whatever the terminal: an id that is cut is of no use.
        Console(file=out.file, width=max(out.width, natural), highlight=False).print(table)
    out.print(f"{min(count, len(found))} of {len(found)}, in {root}", markup=False, soft_wrap=True)


@app.command()
def review(
    config: ConfigOption,
    parts: Annotated[list[str], typer.Argument(metavar="REF|ID…", help="Which: their image_ref, or their id.")],
    said: Annotated[Said, typer.Option("--as", help="What the part is.")],
    by: Annotated[str, typer.Option("--by", help="Who says so; default: the name of this account.")] = "",
    note: Annotated[str, typer.Option("--note", help="Anything else.")] = "",
) -> None:
    """Say what parts are, beside their verdicts, which stay. A later review takes the place of an earlier one."""
    root = _archive(config).path
    kept = _survey(root)
    named = {name: one for one in kept for name in (one.id, one.ref)}
    if unknown := [part for part in parts if part not in named]:
        raise DatasetError(f"no image of {unknown[0]} in {root}; `inspectd archive list` shows ids")
    at = datetime.now(UTC)
    for one in [named[part] for part in dict.fromkeys(parts)]:
        content = {
            "schema": "inspectd.review/1",
            "id": one.id,
            "image_ref": one.ref,
            "verdict": one.outcome.name,
            "as": said.value,
            "by": by or getuser(),
            "note": note,
            "ts": iso(at),
            "ts_ms": epoch_ms(at),
        }
        write_whole(beside(root / one.ref, REVIEW), encode(content))
        note_review(root, one.id)
    out.print(f"{len(set(parts))} reviewed as {said.value}")


@app.command()
def export(
    config: ConfigOption,
    to: Annotated[Path, typer.Option("--out", help="Folder to make, in the layout of MVTec AD.")],
    station: StationOption = None,
    recipe: Annotated[str | None, typer.Option(help="Only parts that were judged by this recipe.")] = None,
    since: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Only from this day on, UTC.")] = None,
    passed: Annotated[  # noqa: FBT002 -- a flag
        bool, typer.Option("--passed", help="Take parts that passed and that nobody reviewed for good ones.")
    ] = False,
) -> None:
    """Make a data set of what people reviewed, for calibrate, evaluate and train.

    Parts of the challenge test are left out, and those of which a person is unsure. One good part in five is for the
    test, the same ones in every export.
    """
    root = _archive(config).path
    if to.exists() and any(to.iterdir()):
        raise DatasetError(f"{to} is not empty; choose another --out")
    first = f"{since:%Y-%m-%d}" if since else ""
    found = [kept for kept in _survey(root) if kept.day >= first and station in {None, _station(kept)}]
    found = sorted(kept for kept in found if kept.reviewed or (passed and kept.outcome is Outcome.PASS))
    chosen = [
        part
        for part in _read(root, found)
        if part.truth in ("", Said.good, Said.bad)
        and not part.verdict.get("challenge")
        and recipe in {None, part.verdict.get("recipe")}
    ]
    if not chosen:
        raise DatasetError(
            f"nothing in {root} to export; review parts with `inspectd archive review`, or take those that passed for "
            "good ones with --passed"
        )
    kinds = {(_station(part.kept), str(part.verdict.get("recipe", "?"))) for part in chosen}
    if len(kinds) > 1:
        said = ", ".join(f"{where} {what}" for where, what in sorted(kinds))
        raise DatasetError(f"these are parts of several kinds ({said}); name one with --station and --recipe")
    places = _places(chosen)
    for folder in ("train/good", "test/good", "test/bad"):
        (to / folder).mkdir(parents=True, exist_ok=True)
    with progress() as bar, (to / MANIFEST).open("w", newline="", encoding="utf-8") as file:
        task = bar.add_task("exporting", total=len(chosen), note="")
        rows = csv.writer(file)
        rows.writerow(["file", "image_ref", "id", "part_id", "verdict", "score", "review", "by", "note", "review_ts"])
        for part, place in zip(chosen, places, strict=True):
            target = _take(root / part.kept.ref, to / place / Path(part.kept.ref).name)
            own = [part.verdict.get(key, "") for key in ("part_id", "verdict", "score")]
            said_of_it = [part.review.get(key, "") for key in ("as", "by", "note", "ts")]
            rows.writerow([target.relative_to(to), part.kept.ref, part.kept.id, *own, *said_of_it])
            bar.advance(task)
    counts = ", ".join(f"{places.count(place)} in {place}" for place in ("train/good", "test/good", "test/bad"))
    out.print(f"{to}: {counts}; {MANIFEST} says where each came from", markup=False, soft_wrap=True)


@app.command()
def status(config: ConfigOption) -> None:
    """Show how much is kept of each station and outcome, and what room there is."""
    archive = _archive(config)
    kept = _survey(archive.path)
    stations = sorted({_station(one) for one in kept})
    table = Table("station", "outcome", "images", "reviewed", "GB", "of GB", "oldest", box=SIMPLE_HEAD)
    for column in table.columns[2:6]:
        column.justify = "right"
    quotas = _quotas(archive)
    for station in stations:
        for outcome in quotas:
            mine = [one for one in kept if one.outcome is outcome and _station(one) == station]
            if mine:
                table.add_row(station, *_row(outcome, mine), "", min(mine).day)
        table.add_section()
    for outcome, quota in quotas.items():
        mine = [one for one in kept if one.outcome is outcome]
        table.add_row("all", *_row(outcome, mine), f"{quota:g}", min(mine).day if mine else "")
    out.print(table)
    free = shutil.disk_usage(archive.path).free / 1e9
    kept_for = f"{archive.days} days" if archive.days else "as long as there is room"
    room = f"{free:.1f} GB are free on the disk, {archive.free_gb:g} stay so; images are kept {kept_for}"
    out.print(f"{archive.path}: {room}", markup=False, soft_wrap=True)


def _archive(config: Path) -> Archive:
    archive = load(config).archive
    if archive is None:
        raise DatasetError(f"{config} has no section [archive]: no images are kept")
    if not archive.path.is_dir():
        raise DatasetError(f"{archive.path} is not there; the daemon makes it with the first image")
    return archive


def _survey(root: Path) -> list[Kept]:
    with err.status("looking through the archive"):
        return survey(root).kept


def _quotas(archive: Archive) -> dict[Outcome, float]:
    return {
        Outcome.FAIL: archive.fail_gb,
        Outcome.UNCERTAIN: archive.uncertain_gb,
        Outcome.ERROR: archive.error_gb,
        Outcome.PASS: archive.pass_gb,
    }


def _row(outcome: Outcome, kept: Sequence[Kept]) -> list[str]:
    used = sum(one.bytes for one in kept) / 1e9
    return [outcome.name, str(len(kept)), str(sum(one.reviewed for one in kept)), f"{used:.3f}"]


def _station(kept: Kept) -> str:
    return kept.ref.split("/", 1)[0]


def _read(root: Path, found: Sequence[Kept]) -> Iterator[_Part]:
    """What lies beside images; those that the daemon has removed meanwhile are left out."""
    for kept in found:
        image = root / kept.ref
        verdict, said = _content(beside(image, SIDECAR)), _content(beside(image, REVIEW))
        if image.exists():
            yield _Part(kept, verdict, said)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _places(parts: Sequence[_Part]) -> list[str]:
    """Which folder of the data set each part goes to; of several good ones at least one is for the test."""
    marks = {part.kept.id: zlib.crc32(part.kept.id.encode()) for part in parts if part.truth != Said.bad}
    tested = {id_ for id_, mark in marks.items() if mark % TESTED == 0}
    if not tested and len(marks) > 1:
        tested = {min(marks, key=marks.__getitem__)}
    return [
        "test/bad" if part.truth == Said.bad else "test/good" if part.kept.id in tested else "train/good"
        for part in parts
    ]


def _take(image: Path, target: Path) -> Path:
    """Have an image in the data set too, without a second copy where the disk is the same; give where it is.

    A JPEG cannot say to the other commands how it was framed, so a framed one becomes a PNG.
    """
    if image.suffix == ".jpg" and (framing := _framing(image)):
        target = target.with_suffix(".png")
        lens.save(images.read(image), framing, target)
        return target
    try:
        os.link(image, target)
    except OSError:
        shutil.copy2(image, target)
    return target


def _framing(image: Path) -> str:
    with Pillow.open(image) as picture:
        key, _, framing = bytes(picture.info.get("comment", b"")).decode(errors="replace").partition("=")
    return framing if key == FRAMING else ""
