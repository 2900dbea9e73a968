"""Do thresholds keep their promise on real images? Good parts are split again and again.

Scores all images of good parts that the model has not learned from, then splits the scores at random: one part
calibrates, the other counts false rejects. At least a third is left for counting.

    python -m tests.bench.splits MODEL FOLDER... [--splits 200] [--seed 0] [--n 60]

Random splits of one lot are exchangeable by construction, so for order statistics the law of the count is known and
this proves the arithmetic; for a fitted tail it measures. Whether parts are alike from one recording to another, which
every promise rests on, a second table shows: the first folder calibrates, the others count. Last comes what
`inspectd calibrate` would say of the first folder's parts.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import betabinom

from calibration.calibration import Provenance, describe, fit
from calibration.threshold import Method, choose
from daemon.build import build_detector
from daemon.desk import dataset
from daemon.desk.training import unlearned

ALPHAS = (0.01, 0.02, 0.05, 0.1)


def realised(scores: NDArray[np.float64], n: int, alpha: float, splits: int, seed: int) -> list[float]:
    """Return the false-reject rate of the other parts for each choice of n to calibrate on."""
    random = np.random.default_rng(seed)
    rates = []
    for _ in range(splits):
        shuffled = random.permutation(scores)
        threshold = choose(np.sort(shuffled[:n]), alpha).threshold
        rates.append(float((shuffled[n:] > threshold).mean()))
    return rates


def expected(n: int, others: int, alpha: float) -> tuple[str, str, str]:
    """Give the method for n parts, and the mean and 95th percentile of the rate among `others` further ones, per cent.

    The count above the k-th smallest of n is beta-binomial, with n + 1 - k and k, if all parts are exchangeable.
    """
    choice = choose(np.arange(1.0, n + 1), alpha)
    law = betabinom(others, n + 1 - choice.rank_effective, choice.rank_effective)
    most = "≤ " if choice.method is Method.tail else ""  # it lies on the k-th smallest or above
    return choice.method, f"{most}{100 * law.mean() / others:.2f}", f"{most}{100 * law.ppf(0.95) / others:.1f}"


def main(
    model: Path,
    folders: list[Path],
    splits: Annotated[int, typer.Option(min=1)] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    calibrate_on: Annotated[int | None, typer.Option("--n", help="Parts to calibrate on; default: two thirds.")] = None,
) -> None:
    """Print a row for each alpha, and the calibration of the first folder."""
    detector = build_detector(model)
    console = Console(width=140)
    known: set[str] = set()
    scored = []
    for folder in folders:
        paths = {dataset.digest([path]): path for path in unlearned(model, dataset.good_images(folder))}
        new = [path for digest, path in paths.items() if digest not in known]
        known |= paths.keys()
        bar = track(new, "scoring", console=Console(stderr=True), transient=True)
        scored.append(np.array([detector.predict([dataset.read_image(path)])[0].anomaly_score for path in bar]))
        console.print(f"{folder}: {len(new)} images that the model has not learned", soft_wrap=True)
    first, rest = scored[0], np.concatenate([np.empty(0), *scored[1:]])
    everything = np.concatenate(scored)
    n = calibrate_on or everything.size * 2 // 3
    if not 0 < n < everything.size:
        raise typer.BadParameter(f"--n must leave some of the {everything.size} parts, not {n}")
    others = everything.size - n
    columns = ("α, %", "method", "mean, %", "95th percentile, %", "mean expected, %", "95th percentile expected, %")
    title = f"{splits} random splits: {n} parts calibrate, {others} count"
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)
    for alpha in ALPHAS:
        rates = realised(everything, n, alpha, splits, seed)
        method, mean, most = expected(n, others, alpha)
        p95 = float(np.quantile(rates, 0.95))
        table.add_row(f"{100 * alpha:g}", method, f"{100 * np.mean(rates):.2f}", f"{100 * p95:.1f}", mean, most)
    console.print(table)
    if first.size and rest.size:
        title = f"as recorded: {first.size} parts of the first folder calibrate, {rest.size} of the others count"
        headings = ("α, %", "method", "rejected", "mean expected, %", "95th percentile expected, %")
        table = Table(*headings, title=title, title_justify="left", box=SIMPLE_HEAD)
        for alpha in ALPHAS:
            rejected = int((rest > choose(np.sort(first), alpha).threshold).sum())
            method, mean, most = expected(first.size, rest.size, alpha)
            said = f"{rejected} of {rest.size}, {100 * rejected / rest.size:.1f} %"
            table.add_row(f"{100 * alpha:g}", method, said, mean, most)
        console.print(table)
    if first.size:
        made = Provenance(detector.fingerprint, dataset.digest(dataset.good_images(folders[0])), datetime.now(UTC))
        console.print(describe(fit(first, alpha=0.01, provenance=made)), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
