"""What was measured, as tables for people and as JSON for programs. Pure."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from daemon.desk.bench.contest import Figures, Heat, Ratio, Record, figures, ratio
from daemon.desk.bench.event import BESIDE, Report
from daemon.desk.bench.machine import Machine
from daemon.desk.bench.path import GOAL_P50_MS, GOAL_P99_MS, GOAL_SHARE, WholePath

SCHEMA = "inspectd.bench/1"
WIDTH = 100
"""Characters of a table that nobody's window bounds."""
_ROUND_FROM = 1000


def lines(machine: Machine) -> list[str]:
    """The machine in words."""
    cores = f"{machine.cores} cores"
    if machine.usable_cores != machine.cores:
        cores += f", {machine.usable_cores} usable"
    instructions = " ".join(machine.instructions) or "no special instructions"
    clock = "" if machine.governor is None else f", clock by {machine.governor}"
    words = [
        f"{machine.cpu}, {cores} ({instructions}), {machine.ram_gb:.0f} GB{clock}",
        *machine.gpus,
        f"Linux {machine.kernel}, Python {machine.python}, load {machine.load:.2f}",
    ]
    return words if machine.warning is None else [*words, f"[yellow]{machine.warning}[/]"]


def tables(report: Report) -> Iterator[Table]:
    """All tables, the reference first in each."""
    yield _speeds(report)
    yield _starts(report)
    if report.beside:
        yield _contention(report)
    if report.whole_path is not None:
        yield _path(report.whole_path)


def notes(report: Report) -> Iterator[str]:
    """What must be known to read the tables."""
    reference = next(iter(report.records))
    yield (
        f"{report.plan.images_note}. Milliseconds p50 to p99 are of a call, frames/s and CPU of a frame. × as fast: "
        f"{reference}'s time of a frame by this row's in the same round; the median over the rounds (10…90 %)."
    )
    if any(name not in report.plan.engines for name in report.records):
        yield "anomalib's weights are untrained: speed does not depend on them, and its scores mean nothing here."
    elif report.plan.peer is not None:
        yield f"anomalib is not measured: nothing is compared with {report.manifest.detector}."
    yield from (f"failed: {fault}" for fault in report.faults)


def document(report: Report) -> dict[str, Any]:
    """Everything, with every call's milliseconds."""
    first = next(iter(report.records.values()))
    machine = asdict(report.machine) | {"warning": report.machine.warning}
    return {
        "schema": SCHEMA,
        "machine": machine,
        "model": {
            "folder": str(report.plan.model),
            "fingerprint": report.manifest.fingerprint,
            "detector": report.manifest.detector,
            "settings": report.manifest.settings,
        },
        "images": {"note": report.plan.images_note, "files": [str(file) for file in report.plan.images]},
        "rounds": report.plan.rounds,
        "device": report.plan.device,
        "reference": first.name,
        "contenders": [_contender(record, first, report) for record in report.records.values()],
        "whole_path": None if report.whole_path is None else asdict(report.whole_path),
        "faults": list(report.faults),
    }


def _contender(record: Record, first: Record, report: Report) -> dict[str, Any]:
    def heat_of(heat: Heat, turns: Any) -> dict[str, Any]:
        versus = _versus(first, record, heat)
        return {
            "from": heat.what,
            "batch": heat.batch,
            **asdict(figures(turns.values())),
            "times_as_fast": None if versus is None else asdict(versus),
            "turns_ms": {number: list(turn.ms) for number, turn in turns.items()},
        }

    beside = report.beside.get(record.name)
    return {
        "name": record.name,
        "peer": record.name not in report.plan.engines,
        "fault": record.fault,
        "start": None if record.start is None else asdict(record.start),
        "peak_mb": _peak(record),
        "heats": [heat_of(heat, turns) for heat, turns in record.turns.items()],
        "beside": None
        if beside is None or not beside.turns
        else asdict(figures(beside.turns[BESIDE].values()))
        | {"turns_ms": {number: list(turn.ms) for number, turn in beside.turns[BESIDE].items()}},
    }


def _speeds(report: Report) -> Table:
    settings = report.manifest.settings
    title = f"{report.plan.model}: {report.manifest.detector} {settings.get('backbone', '')} {settings.get('size', '')}"
    table = _table(title, ("", "p50 ms", "p95", "p99", "frames/s", "CPU ms", "× as fast"))
    first = next(iter(report.records.values()))
    for record in report.records.values():
        table.add_row(f"[bold]{escape(record.name)}[/]")
        for heat, turns in record.turns.items():
            found = figures(turns.values())
            label = f"  from {heat.what}" if heat.batch == 1 else f"  {heat.batch} from {heat.what}"
            table.add_row(label, *_numbers(found), _spread(_versus(first, record, heat)))
        if record.fault is not None:
            table.add_row("  [red]failed[/]")
    return table


def _starts(report: Report) -> Table:
    table = _table(None, ("", "start s", "loading s", "RSS MB", "peak MB", "computes"))
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for record in report.records.values():
        if record.start is None:
            continue
        start, peak = record.start, _peak(record)
        table.add_row(
            escape(record.name),
            f"{start.ready_s:.1f}",
            f"{start.load_s:.1f}",
            f"{start.rss_mb:.0f}",
            "" if peak is None else f"{peak:.0f}",
            escape(start.engine),
        )
    return table


def _contention(report: Report) -> Table:
    table = _table(None, ("beside 2 busy threads", "p50 ms", "p95", "p99", "slowed by ×", "× as fast"))
    first = next(iter(report.beside.values())).turns.get(BESIDE, {})
    for name, record in report.beside.items():
        turns = record.turns.get(BESIDE, {})
        if not turns:
            table.add_row(escape(name), "[red]failed[/]")
            continue
        p50, p95, p99, *_ = _numbers(figures(turns.values()))
        slowed = ratio(turns, report.records[name].turns[BESIDE])
        table.add_row(escape(name), p50, p95, p99, _spread(slowed), _spread(ratio(first, turns)))
    return table


def _path(found: WholePath) -> Table:
    title = f"whole path: file closed → {found.broker} → gate's message; {found.engine}"
    table = _table(title, ("", "p50 ms", "p95", "p99", "goal"))
    for label, values, goal in (
        (f"at half load, {found.parts} parts", found.gate, ""),
        ("added to the engine", found.added, f"p50 ≤ {GOAL_P50_MS:g}, p99 ≤ {GOAL_P99_MS:g}"),
    ):
        table.add_row(label, f"{values.p50:.1f}", f"{values.p95:.1f}", f"{values.p99:.1f}", goal)
    table.add_row("to read a file, alone", f"{found.read_ms:.1f}")
    table.add_row("engine, alone", f"{found.alone_ms:.1f}")
    table.add_row("engine, in the daemon", f"{found.infer_ms:.1f}")
    table.add_section()
    table.add_row("full load, parts/s", f"{found.per_second:.1f}")
    table.add_row(
        "by the bare engine's", *(["", "", ""] if found.share is None else _share(found.share)), f"≥ {GOAL_SHARE:.0%}"
    )
    return table


def _share(value: Ratio) -> list[str]:
    return [f"{value.median:.0%}", f"{value.low:.0%}", f"{value.high:.0%}"]


def _table(title: str | None, heading: tuple[str, ...]) -> Table:
    """A table whose first column holds names and the others figures."""
    said = None if title is None else escape(title)
    table = Table(title=said, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, name in enumerate(heading):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    return table


def _versus(first: Record, record: Record, heat: Heat) -> Ratio | None:
    """How many times as fast as the first contender one by one."""
    return ratio(first.turns.get(Heat(heat.what), {}), record.turns[heat])


def _numbers(found: Figures) -> tuple[str, ...]:
    values = (found.p50_ms, found.p95_ms, found.p99_ms, found.per_second, found.cpu_ms)
    return tuple(f"{value:.3g}" if value < _ROUND_FROM else f"{value:,.0f}" for value in values)


def _spread(value: Ratio | None) -> str:
    return "" if value is None else f"{value.median:.2f} ({value.low:.2f}…{value.high:.2f})"


def _peak(record: Record) -> float | None:
    peaks = [turn.peak_mb for turns in record.turns.values() for turn in turns.values()]
    return max(peaks) if peaks else None
