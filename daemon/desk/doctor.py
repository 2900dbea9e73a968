"""`inspectd check` and `inspectd doctor`: whether all is there that `run` needs, and what to do about the rest.

`check` looks at files alone; `doctor` goes to the broker, the cameras and the devices too, as the daemon would, and
leaves everything as it was. A check that breaks or hangs is itself a finding.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Annotated

import structlog
import typer
from rich.console import Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from config.load import ConfigError, load
from config.schema import Settings
from daemon.desk.checks.finding import Finding, Mark, fail, ok
from daemon.terminal import EXIT_CONFIG, EXIT_FAILED, out

ConfigOption = Annotated[Path, typer.Option("--config", help="Configuration file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at.

    `look` yields findings, the next within `limit_s` seconds; `status` is the exit status where one of them fails.
    """

    name: str
    look: Callable[[Settings], Iterator[Finding]]
    status: int = EXIT_FAILED
    limit_s: float = 12.0


class UnsoundError(ConfigError):
    """Something must be mended; the message has each fault on a line. All of it was said already."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def check(config: ConfigOption, as_json: JsonOption = False) -> None:  # noqa: FBT002 -- a flag
    """Try everything `run` needs but the broker and the camera; exit status 78 if something is wrong."""
    examine(config, files(), as_json=as_json)


def doctor(config: ConfigOption, as_json: JsonOption = False) -> None:  # noqa: FBT002 -- a flag
    """Try everything `run` needs, broker, cameras, disk and clock too, and say how to mend what is wrong."""
    examine(config, [*files(), *surroundings()], as_json=as_json)


def files() -> list[Check]:
    """What is in the configuration and in the files and folders that it names."""
    from daemon.desk.checks import arrival, broker, disk, judging

    return [
        Check("mqtt", broker.access, EXIT_CONFIG),
        Check("folders of its own", disk.own_folders, EXIT_CONFIG),
        Check("models and calibrations", judging.stations, EXIT_CONFIG, limit_s=60.0),
        Check("groups", judging.groups, EXIT_CONFIG),
        Check("sources", arrival.sources, EXIT_CONFIG),
    ]


def surroundings() -> list[Check]:
    """What is outside of the configuration: devices, networks, the machine."""
    from daemon.desk.checks import arrival, broker, disk, machine

    return [
        Check("gpu", machine.accelerator, limit_s=30.0),
        Check("broker", broker.broker, limit_s=30.0),
        Check("folders", arrival.folders),
        Check("cameras", arrival.cameras, limit_s=30.0),
        Check("clock", machine.clock),
        Check("disk", disk.disks),
        Check("rights", machine.rights),
        Check("capacity", machine.capacity),
        Check("service", machine.service),
    ]


def examine(config: Path, checks: Sequence[Check], *, as_json: bool) -> None:
    """Go through the checks, and say what was found as it is found.

    Raises:
        UnsoundError: a check has failed.
    """
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))  # the findings have the other
    found: list[Finding] = []
    settings, status, width = None, 0, 0
    try:
        settings = load(config)
    except ConfigError as error:
        found += [fail("configuration", fault) for fault in str(error).splitlines()]
        status = EXIT_CONFIG
    else:
        names = [f"station {station.name}" for station in settings.stations]
        names += [f"group {group.name}" for group in settings.groups]
        width = max(len("configuration"), *map(len, names))
        found.append(ok("configuration", f"{config}: {len(settings.stations)} station(s)"))
    show = _silent if as_json else lambda finding: _show(finding, width)
    for finding in found:
        show(finding)
    for one in checks:
        if settings is None:
            break
        with out.status(f"{one.name} …") if out.is_terminal and not as_json else nullcontext():
            for finding in findings(one, settings):
                found.append(finding)
                show(finding)
                if finding.mark is Mark.fail:
                    status = max(status, one.status)
    counts = {mark: sum(finding.mark is mark for finding in found) for mark in Mark}
    if as_json:
        said = [asdict(finding) for finding in found]
        document = {"config": str(config), "status": status, **{mark.value: n for mark, n in counts.items()}}
        typer.echo(json.dumps({**document, "findings": said}, ensure_ascii=False, indent=1))
    else:
        out.print(f"{counts[Mark.ok]} ok, {counts[Mark.warn]} to be minded, {counts[Mark.fail]} to be mended")
    if status:
        raise UnsoundError("\n".join(_line(config, one) for one in found if one.mark is Mark.fail), status)


def findings(check: Check, settings: Settings) -> Iterator[Finding]:
    """What a check finds; also that it breaks, or that it hangs, which ends it for us."""
    told: Queue[Finding | None] = Queue()

    def look() -> None:
        try:
            for finding in check.look(settings):
                told.put(finding)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the others go on
            cure = "report it, with this line, as a fault of inspectd"
            told.put(fail(check.name, f"the check itself failed: {type(error).__name__}: {error}", cure))
        told.put(None)

    threading.Thread(target=look, name=check.name, daemon=True).start()  # a share that is away may hold it for ever
    while True:
        try:
            finding = told.get(timeout=check.limit_s)
        except Empty:
            cure = "something hangs, mostly a share, a disk or a driver: see what dmesg says"
            yield fail(check.name, f"not answered within {check.limit_s:g} s", cure)
            return
        if finding is None:
            return
        yield finding


def _silent(_: Finding) -> None:
    pass


def _show(finding: Finding, width: int) -> None:
    """One line, and the cure below; on a terminal long ones are broken between words, below their beginning."""
    colour = {Mark.ok: "green", Mark.warn: "yellow", Mark.fail: "red"}[finding.mark]
    mark, said = f"[{colour}]{finding.mark:4}[/]", escape(finding.found)
    cure = f"→ {escape(finding.cure)}"
    if out.is_terminal:
        line = Table.grid(padding=(0, 2))
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, width=width)
        line.add_column(overflow="fold")
        below = [Padding(f"[{colour}]{cure}[/]", (0, 0, 0, 2))] if finding.cure else []
        line.add_row(mark, escape(finding.subject), Group(said, *below))
        out.print(line)
        return
    out.print(f"{mark}  {escape(finding.subject):{width}}  {said}", soft_wrap=True)
    if finding.cure:
        out.print(f"{'':{4 + 2 + width + 2}}  {cure}", soft_wrap=True)


def _line(config: Path, finding: Finding) -> str:
    said = finding.found if str(config) in finding.found else f"{config}: {finding.subject}: {finding.found}"
    return f"{said}; {finding.cure}" if finding.cure else said
