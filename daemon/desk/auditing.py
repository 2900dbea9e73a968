"""`inspectd audit`: whether the audit trail is whole, and what it tells."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from config.load import load
from daemon.audit import FILE, examine, witness
from daemon.terminal import EXIT_FAILED, err, out

app = typer.Typer(no_args_is_help=True, help="See whether the audit trail is whole, and what it tells.")

ConfigOption = Annotated[Path | None, typer.Option("--config", help="Configuration file, for the trail it names.")]
FileOption = Annotated[Path | None, typer.Option("--file", help="The trail itself, a copy say, instead of --config.")]


@app.command()
def verify(
    config: ConfigOption = None,
    file: FileOption = None,
    expect: Annotated[
        str | None, typer.Option("--expect", help="A hash that somebody else kept: key chain of an event.")
    ] = None,
) -> None:
    """Check the chain; exit status 1, and the first line that is wrong, if it is not whole."""
    path = _path(config, file)
    trail = examine(path.read_bytes())
    fault = trail.fault if expect is None else witness(trail, expect.lower())
    if fault is not None:
        err.print(f"inspectd: {path}: {fault}", markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILED)
    entries = trail.entries
    span = f", {entries[0].ts} to {entries[-1].ts}" if entries else ""
    out.print(f"[green]ok[/]  {escape(str(path))}: {len(entries)} entries{span}", soft_wrap=True)
    out.print(f"last hash {trail.head}", soft_wrap=True)


@app.command()
def show(
    config: ConfigOption = None,
    file: FileOption = None,
    since: Annotated[
        datetime | None, typer.Option("--since", help="Only what happened from this local time on.")
    ] = None,
    station: Annotated[str | None, typer.Option("--station", help="Only what happened there.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only events of this kind.")] = None,
) -> None:
    """Print the entries as a table, times in UTC; whether they are whole is for `verify` to say."""
    path = _path(config, file)
    trail = examine(path.read_bytes())
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("number", justify="right", no_wrap=True)
    for name in ("time", "station", "kind", "subject", "user"):
        table.add_column(name, no_wrap=True)
    table.add_column("detail", overflow="fold")
    for entry in trail.entries:
        early = since is not None and datetime.fromisoformat(entry.ts) < since.astimezone(UTC)
        if not early and station in {None, entry.station} and kind in {None, entry.kind}:
            said = (entry.station, entry.kind, entry.subject, entry.user, entry.detail)
            table.add_row(str(entry.number), entry.ts.replace("T", " ")[:19], *map(escape, said))
    out.print(table)
    if trail.fault is not None:
        err.print(f"inspectd: {path}: the chain is not whole: {trail.fault}", markup=False, soft_wrap=True)


def _path(config: Path | None, file: Path | None) -> Path:
    if file is not None and config is None:
        return file
    if config is not None and file is None:
        return load(config).state_dir / FILE
    raise typer.BadParameter("give either --config or --file")
