"""Do thresholds keep their promise? Simulated where the true false-reject rate of every threshold is known exactly.

A draw is a calibration: n scores of one of five families, a threshold by each method, and the share of good parts above
it by the family's own distribution function, so that nothing but the draw of the calibration is left to chance.

    python -m tests.bench.thresholds [--draws 1000] [--seed 0] [--out FILE.svg] [--json FILE]

Prints mean and 95th percentile over draws; exit status 1 where a promise is broken by more than three standard errors
of the simulation, which some seeds in a hundred will do by chance. Half a minute.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.special import gamma
from scipy.stats import genextreme, gumbel_r, lognorm

from calibration.threshold import Choice, Method, choose
from daemon.desk.charts import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draws = NDArray[np.float64]
"""Draws × n, ascending in each row."""

SIZES = (20, 40, 60, 100, 200, 300, 600, 1000)
ALPHAS = (0.005, 0.01, 0.05)
CONFIDENCE = 0.95
FAMILIES: dict[str, Any] = {
    "Gumbel": gumbel_r(),
    "lognormal, σ 0.5": lognorm(0.5),
    "heavy, GEV ξ 0.2": genextreme(-0.2),
    "bounded, GEV ξ -0.2": genextreme(0.2),
    "Gumbel, 3 % dirty": gumbel_r(),
}
"""Each has location 0 and scale 1, but the lognormal one, whose logarithm has mean 0."""
DIRTY = "Gumbel, 3 % dirty"
"""3 % of the calibration's parts are bad ones, 3 scale units too high; the rate is that of good parts."""

_INK, _MUTED, _RAW, _AUTO, _LARGEST, _ABOVE = "#1c2024", "#6b727b", "#D55E00", "#0072B2", "#8b929a", "#fdf4ee"
_LINES = {"quantile": (_RAW, 1.3), "largest": (_LARGEST, 1.1), "auto": (_AUTO, 1.9)}
_ROWS = {
    "mean": ("Mean over calibrations", {Method.conformal, Method.tolerance}),
    "p95": ("95th percentile: one calibration in twenty is worse", {Method.tolerance}),
}
"""What the rows of the chart show, and which methods promise that it is alpha at most."""
_LOWEST, _HIGHEST, _STRIP = 0.035, 45, 0.068
_CHECKED = 5
"""Draws of each cell that go through `choose`, whose thresholds must be those of `limits`, which does many at once."""
_SIGMAS = 3


@dataclass(frozen=True, slots=True)
class Cell:
    """What one method made of one family: realised false-reject rates over the draws, 0…1.

    `method` is as asked, "auto" for none; `chosen` is what it came to. `within` is the share of draws that reject
    alpha at most. `kept` says whether the promise was kept, and is None where nothing is promised.
    """

    family: str
    n: int
    alpha: float
    method: str
    chosen: Method
    mean: float
    p95: float
    within: float
    kept: bool | None


def draw(family: str, n: int, draws: int, seed: int) -> Draws:
    """Draw calibrations of n good parts each."""
    random = np.random.default_rng((seed, list(FAMILIES).index(family), n))
    scores = FAMILIES[family].rvs((draws, n), random_state=random)
    if family == DIRTY:
        scores += 3 * (random.random((draws, n)) < 0.03)
    return np.sort(scores, axis=1)


def measure(family: str, n: int, draws: int, seed: int) -> Iterator[Cell]:
    """Give a cell for each alpha and each method that n scores are enough for."""
    scores = draw(family, n, draws, seed)
    tails = bootstrap(scores)
    for alpha in ALPHAS:
        for method in (None, *Method):
            try:
                choices = [choose(row, alpha, confidence=CONFIDENCE, method=method) for row in scores[:_CHECKED]]
            except ValueError:
                continue  # too few for this method
            thresholds = limits(scores, tails, alpha, choices[0])
            np.testing.assert_allclose(thresholds[:_CHECKED], [choice.threshold for choice in choices], rtol=1e-9)
            rates = FAMILIES[family].sf(thresholds)
            chosen = choices[0].method
            within = float((rates <= alpha).mean())
            yield Cell(
                family,
                n,
                alpha,
                "auto" if method is None else method.value,
                chosen,
                float(rates.mean()),
                float(np.quantile(rates, 0.95)),
                within,
                _kept(chosen, rates, within, alpha),
            )


def limits(scores: Draws, tails: "Tails", alpha: float, choice: Choice) -> Draws:
    """Return the thresholds that `choose` finds, one a row."""
    at_rank = scores[:, choice.rank - 1]
    if choice.method is Method.quantile:
        return np.asarray(np.quantile(scores, 1 - alpha, axis=1))
    return np.maximum(at_rank, tails.cautious_quantile(alpha)) if choice.method is Method.tail else at_rank


@dataclass(frozen=True, slots=True)
class Tails:
    """Fitted tails of draws × 200 bootstrap draws: `calibration.tail` for many rows at once."""

    location: Draws
    scale: Draws
    shape: Draws

    def cautious_quantile(self, alpha: float) -> Draws:
        """Return the 75 % bootstrap quantile of each row."""
        reduced = (1 - (-np.log1p(-alpha)) ** self.shape) / self.shape
        return np.asarray(np.quantile(self.location + self.scale * reduced, 0.75, axis=1))


def bootstrap(scores: Draws) -> Tails:
    """Fit 200 bootstrap draws of each row; these are the same for all rows of one length."""
    n = scores.shape[1]
    random = np.random.RandomState(0)
    weight = random.multinomial(n, np.full(n, 1 / n), 200).astype(np.float64)
    before = np.cumsum(weight, axis=1) - weight
    first = weight * (before + (weight - 1) / 2)
    second = weight * (before * (before - 1) + before * (weight - 1) + (weight - 1) * (weight - 2) / 3)
    b0 = scores @ weight.T / n
    b1 = scores @ first.T / (n * (n - 1))
    b2 = scores @ second.T / (n * (n - 1) * (n - 2))
    spread = 2 * b1 - b0
    trust = n / (n + 50)
    skewness = trust * (6 * b2 - 6 * b1 + b0) / spread + (1 - trust) * 0.1699
    c = 2 / (3 + skewness) - np.log(2) / np.log(3)
    shape = 7.859 * c + 2.9554 * c * c
    scale = spread * shape / ((1 - 2**-shape) * gamma(1 + shape))
    return Tails(b0 - scale * (1 - gamma(1 + shape)) / shape, scale, shape)


def _kept(chosen: Method, rates: Draws, within: float, alpha: float) -> bool | None:
    if chosen is Method.conformal:
        return bool(rates.mean() - _SIGMAS * rates.std() / math.sqrt(rates.size) <= alpha)
    if chosen is Method.tolerance:
        return within >= CONFIDENCE - _SIGMAS * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / rates.size)
    return None


def tables(cells: Sequence[Cell]) -> Iterator[Table]:
    """A table for each alpha: mean and 95th percentile, in per cent."""
    columns = ["quantile", "largest", "tail", "conformal", "tolerance", "auto"]
    for alpha in ALPHAS:
        title = f"α = {100 * alpha:g} %: good parts rejected, %, mean / 95th percentile over calibrations"
        table = Table("family", "n", *columns, "auto is", "promise", title=title, title_justify="left", box=SIMPLE_HEAD)
        for column in table.columns[1:-2]:
            column.justify = "right"
        for family in FAMILIES:
            for n in SIZES:
                row = {c.method: c for c in cells if (c.family, c.n, c.alpha) == (family, n, alpha)}
                said = [f"{100 * row[m].mean:.2f} / {100 * row[m].p95:5.2f}" if m in row else "–" for m in columns]
                kept = {True: "kept", False: "BROKEN", None: "estimate"}[row["auto"].kept]
                name = family if n == SIZES[0] else ""
                table.add_row(name, str(n), *said, row["auto"].chosen, kept, end_section=n == SIZES[-1])
        yield table


def chart(cells: Sequence[Cell]) -> "Figure":
    """Realised over asked, by the number of good parts, a column an alpha.

    Lines are the worst family of the five, bands reach to the best. A full mark is a promise, a hollow one is none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.4, 7.2), facecolor="white")
    figure.text(0.055, 0.955, "Good parts rejected, as a multiple of the α that was asked", fontsize=13)
    for x, text, colour in (
        (0.055, "— raw quantile", _RAW),
        (0.180, "— largest score", _LARGEST),
        (0.310, "— inspectd's choice", _AUTO),
        (0.465, "● promised for any distribution", _AUTO),
        (0.700, "○ not promised", _AUTO),
    ):
        figure.text(x, 0.915, text, color=colour)
    figure.text(0.055, 0.880, "The worst of five families of scores; bands reach to the best.", color=_MUTED)
    for row, (key, (heading, firm)) in enumerate(_ROWS.items()):
        figure.text(0.055, 0.825 - row * 0.418, heading, fontsize=11)
        for column, alpha in enumerate(ALPHAS):
            axes = figure.add_axes((0.055 + column * 0.318, 0.486 - row * 0.418, 0.295, 0.32))
            _panel(axes, [cell for cell in cells if cell.alpha == alpha], key, firm)
            axes.text(
                0.985, 0.95, f"α = {100 * alpha:g} %", transform=axes.transAxes, ha="right", va="top", fontsize=11
            )
            if row:
                axes.set_xlabel("good parts calibrated on")
            if column:
                axes.set_yticklabels([])
    return figure


def _panel(axes: "Axes", cells: Sequence[Cell], key: str, firm: set[Method]) -> None:
    axes.set(xscale="log", yscale="log", xlim=(16.5, 1210), ylim=(_LOWEST, _HIGHEST))
    axes.axhspan(1, _HIGHEST, color=_ABOVE, linewidth=0, zorder=0)
    axes.axhline(1, color=_INK, linewidth=0.8, zorder=1)
    for method, (colour, width) in _LINES.items():
        rates = [[getattr(c, key) / c.alpha for c in cells if (c.method, c.n) == (method, n)] for n in SIZES]
        worst = np.array([max(some) for some in rates])
        shown = worst > 1.6 * _STRIP
        axes.plot(np.array(SIZES)[shown], worst[shown], color=colour, linewidth=width)
        if method != "largest":
            axes.fill_between(SIZES, [min(some) for some in rates], worst, color=colour, alpha=0.14, linewidth=0)
        if method == "auto":
            _say_method(axes, {c.n: c.chosen for c in cells if c.method == method}, worst, firm)
    axes.set_xticks(SIZES, [str(n) if n not in {60, 300} else "" for n in SIZES])
    axes.set_yticks([0.1, 1, 10], ["0.1 ×", "1 ×", "10 ×"])
    axes.minorticks_off()
    axes.grid(axis="y")


def _say_method(axes: "Axes", chosen: Mapping[int, Method], worst: Draws, firm: set[Method]) -> None:
    """Mark what is promised, and name the methods below."""
    for (n, method), rate in zip(chosen.items(), worst, strict=True):
        inside = _AUTO if method in firm else "white"
        axes.plot(n, rate, "o", color=_AUTO, markerfacecolor=inside, markersize=5.5, zorder=4)
    for method in dict.fromkeys(chosen.values()):
        sizes = [n for n, other in chosen.items() if other is method]
        ends = (sizes[0] / 1.13, sizes[-1] * 1.13)
        axes.plot(ends, (_STRIP, _STRIP), color=_AUTO, linewidth=2, solid_capstyle="butt")
        middle = (ends[0] * ends[1]) ** 0.5
        axes.text(middle, _STRIP * 0.88, method.value, color=_AUTO, ha="center", va="top", fontsize=8.5)


def main(
    out_file: Annotated[Path | None, typer.Option("--out", help="Draw the chart into this SVG file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures into this file.")] = None,
    draws: Annotated[int, typer.Option(help="Calibrations of each family and size.", min=100)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
) -> None:
    """Print the tables; exit status 1 if a stated promise is broken."""
    console = Console(width=160)
    cells = [
        cell
        for family in track(FAMILIES, "simulating", console=Console(stderr=True), transient=True)
        for n in SIZES
        for cell in measure(family, n, draws, seed)
    ]
    for table in tables(cells):
        console.print(table)
    promised = [cell for cell in cells if cell.kept is not None]
    broken = [cell for cell in promised if not cell.kept]
    for cell in broken:
        console.print(f"BROKEN: {cell}")
    console.print(f"{draws} calibrations a cell; {len(promised) - len(broken)} of {len(promised)} promises kept")
    if json_file is not None:
        found = {"draws": draws, "seed": seed, "confidence": CONFIDENCE, "cells": [asdict(cell) for cell in cells]}
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if out_file is not None:
        with drawing():
            chart(cells).savefig(out_file, format="svg", metadata={"Date": None})
    if broken:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
