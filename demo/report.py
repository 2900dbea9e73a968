"""What people read: the table of verdicts as they arrive, and the balance at the end."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.panel import Panel
from rich.table import Table

from demo.plant import Part
from demo.subscriber import Status, Subscriber, Verdict

_ROWS = 15
_COLOURS = {"PASS": "green", "FAIL": "red", "UNCERTAIN": "yellow", "ERROR": "magenta"}


class Board:
    """The newest verdicts beside the truth, as rich draws it again and again; any thread may ask for it."""

    def __init__(self, subscriber: Subscriber, parts: Sequence[Part], dropped: Mapping[str, float]) -> None:
        self._subscriber = subscriber
        self._parts = {part.id: part for part in parts}
        self._dropped = dropped
        self._start = len(subscriber.news)

    def __rich__(self) -> Table:
        """Draw the table."""
        news = self._subscriber.news[self._start :]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=self._totals(), caption_justify="left")
        table.add_column("time", style="dim")
        table.add_column("part", min_width=16, max_width=24, no_wrap=True)
        table.add_column("verdict")
        for heading in ("score", "p-value", "latency"):
            table.add_column(heading, justify="right", min_width=6)
        table.add_column("truth", min_width=14)
        for entry in news[-_ROWS:]:
            if isinstance(entry, Verdict):
                table.add_row(*self._row(entry))
            else:
                table.add_row("", "[bold]daemon[/]", _presence(entry), "", "", "", f"[dim]{entry.reason}[/]")
        return table

    def _row(self, verdict: Verdict) -> tuple[str, ...]:
        part = self._parts[verdict.part_id]
        measured = verdict.score >= 0
        return (
            time.strftime("%H:%M:%S", time.localtime(time.time() - time.monotonic() + verdict.at)),
            verdict.part_id,
            f"[{_COLOURS[verdict.outcome]}]{verdict.outcome}[/]",
            f"{verdict.score:.2f} ×" if measured else "–",
            f"{verdict.p_value:.3f}" if measured else "–",
            _duration(verdict.at - self._dropped[verdict.part_id]),
            _truth(part, verdict),
        )

    def _totals(self) -> str:
        counted = Counter(verdict.outcome for verdict in _firsts(self._subscriber.verdicts).values())
        outcomes = "  ".join(f"[{_COLOURS[name]}]{counted[name]} {name}[/]" for name in _COLOURS if counted[name])
        seen = self._subscriber
        return (
            f"{len(self._dropped)} parts on the line  {outcomes or 'no verdict yet'}  "
            f"{seen.actuations} to the reject gate  {seen.pictures} overlays"
        )


@dataclass(frozen=True, slots=True)
class Balance:
    """What came of the parts.

    `redelivered` counts messages that came again with their id, as MQTT may after a crash; `duplicates` counts parts
    that were judged twice, which must not be. `latency_ms` is from the file in the folder to the verdict at the
    subscriber, one value for each part of the undisturbed run.
    """

    parts: int
    verdicts: int
    lost: int
    duplicates: int
    redelivered: int
    gapless: bool
    good: int
    false_rejects: int
    fpr_target: float | None
    """The share of good parts that the calibration lets be rejected, as the verdicts tell it; None without one."""
    escapes: Mapping[str, tuple[int, int]]
    """Passed and present, by defect."""
    latency_ms: Sequence[float]

    @classmethod
    def draw(
        cls,
        parts: Sequence[Part],
        received: Sequence[Verdict],
        dropped: Mapping[str, float],
        undisturbed: Sequence[Part],
    ) -> "Balance":
        """Compare what was dropped, and when, with what a subscriber has received."""
        by_id = _firsts(received)
        by_part = {verdict.part_id: verdict for verdict in by_id.values()}
        passed = {name for name, verdict in by_part.items() if not verdict.reject}
        good = [part.id for part in parts if part.good]
        bad = {part.defect: [p.id for p in parts if p.defect == part.defect] for part in parts if not part.good}
        return cls(
            parts=len(dropped),
            verdicts=len(by_id),
            lost=len(dropped.keys() - by_part.keys()),
            duplicates=len(by_id) - len(by_part),
            redelivered=len(received) - len(by_id),
            gapless={verdict.seq for verdict in by_id.values()} == set(range(1, len(by_id) + 1)),
            good=len(good),
            false_rejects=sum(name in by_part and name not in passed for name in good),
            fpr_target=received[-1].fpr_target if received else None,
            escapes={kind: (sum(name in passed for name in bad[kind]), len(bad[kind])) for kind in sorted(bad)},
            latency_ms=[1000 * (by_part[p.id].at - dropped[p.id]) for p in undisturbed if p.id in by_part],
        )

    @property
    def sound(self) -> bool:
        """Whether each part has exactly one verdict, and the record no gap."""
        return self.lost == 0 and self.verdicts == self.parts and self.gapless

    @property
    def escaped(self) -> int:
        """How many bad parts passed."""
        return sum(passed for passed, _ in self.escapes.values())

    @property
    def bad(self) -> int:
        """How many bad parts there were."""
        return sum(present for _, present in self.escapes.values())

    def latency(self, percent: float) -> float | None:
        """The latency in milliseconds that `percent` of the parts stay within; None without a verdict."""
        return round(float(np.percentile(self.latency_ms, percent)), 1) if self.latency_ms else None

    def headline(self) -> str:
        """Give the balance in one line."""
        p50 = self.latency(50)
        return (
            f"{self.parts} parts, {self.lost} lost · {self.false_rejects} of {self.good} good rejected · "
            f"{self.escaped} of {self.bad} bad passed" + ("" if p50 is None else f" · p50 {p50:.0f} ms")
        )

    def panel(self, overlays: int, files: Mapping[str, Path]) -> Panel:
        """Draw the balance with the number of overlays received, and the files by what is in them."""
        tone = "green" if self.sound else "red"
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        grid.add_row("parts", f"{self.parts} on the line, [{tone}]{self.verdicts} verdicts, {self.lost} lost[/]")
        sequence = "numbered without a gap" if self.gapless else "[red]numbered with a gap[/]"
        grid.add_row("record", f"{sequence}, {self.duplicates} judged twice, {self.redelivered} delivered again")
        target = "" if self.fpr_target is None else f"; the threshold is set for {100 * self.fpr_target:.2g} %"
        grid.add_row("false rejects", f"{self.false_rejects} of {self.good} good parts{target}")
        kinds = ", ".join(f"{kind} {passed} of {present}" for kind, (passed, present) in self.escapes.items())
        grid.add_row("escapes", f"{self.escaped} of {self.bad} bad parts: {kinds}")
        if self.latency_ms:
            grid.add_row(
                "latency",
                f"p50 {self.latency(50):.0f} ms, p99 {self.latency(99):.0f} ms from the file in the folder to the "
                f"verdict at the subscriber, over {len(self.latency_ms)} parts; those of the crash are not counted",
            )
        grid.add_row("overlays", f"{overlays} received; the daemon sends at most two a second")
        for what, path in files.items():
            grid.add_row(what, str(path))
        return Panel(grid, title="[bold]The balance[/]", title_align="left", border_style=tone, expand=False)

    def write(self, path: Path, provenance: Mapping[str, object]) -> None:
        """Write the figures as JSON, and what they are figures of."""
        figures = {
            "parts": self.parts,
            "verdicts": self.verdicts,
            "lost": self.lost,
            "duplicates": self.duplicates,
            "redelivered": self.redelivered,
            "gapless": self.gapless,
            "good": self.good,
            "bad": self.bad,
            "false_rejects": self.false_rejects,
            "escapes": self.escaped,
            "escapes_by_defect": {kind: passed for kind, (passed, _) in self.escapes.items()},
            "latency_ms_p50": self.latency(50),
            "latency_ms_p99": self.latency(99),
            "latency_parts": len(self.latency_ms),
        }
        path.write_text(json.dumps(figures | dict(provenance), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def selection(parts: Sequence[Part], verdicts: Sequence[Verdict], good: int, per_defect: int) -> list[Part]:
    """Choose parts to show: of the good ones and of each defect some from the highest to the lowest score."""
    scores = {verdict.part_id: verdict.score for verdict in verdicts if verdict.score >= 0}
    ranked = sorted((part for part in parts if part.id in scores), key=lambda part: scores[part.id], reverse=True)
    chosen = _spread([part for part in ranked if part.good], good)
    for defect in sorted({part.defect for part in ranked if not part.good}):
        chosen += _spread([part for part in ranked if part.defect == defect], per_defect)
    return chosen


def _spread(ranked: list[Part], number: int) -> list[Part]:
    """Take some evenly, the first and the last among them."""
    if len(ranked) <= number:
        return ranked
    return [ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, number)]


def _firsts(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    """The first delivery of each verdict, by id; the latest first, so that of two for one part the first stays."""
    return {verdict.id: verdict for verdict in reversed(verdicts)}


def _presence(status: Status) -> str:
    return "[green]online[/]" if status.online else "[red]offline[/]"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1000 * seconds:.0f} ms"


def _truth(part: Part, verdict: Verdict) -> str:
    if part.good is not verdict.reject:
        return "[green]✓[/]"
    return f"[bold red]✗ {'false reject' if part.good else 'escape'}[/]"
