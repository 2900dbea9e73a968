"""Whether a faster engine sees the same as the reference: scores of both on the same parts → what differs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_RANK = 0.95
"""Spearman's correlation of both engines' scores over all parts."""
LEAST_RANK_OF_GOOD = 0.9
"""The same where there are good parts alone, which are much alike."""
MOST_FLIPS = 0.02
"""Share of the parts whose verdict may be another; one part always may."""
MOST_LOST_AUROC = 0.003
"""How much worse good and bad parts may be told apart."""
MOST_SHIFT = 0.25
"""Median change of a score, as a share of the way from the median good part to the threshold.

A change that all parts have in common is no harm, since the threshold is chosen anew through the engine; a large one
says that something else than rounding is at work.
"""
LEAST_KEPT = 0.75
"""How far spoiled parts must still rise above the same parts unspoiled, as a share of what they do by the reference.

The ranges of 8-bit integers are taken of good parts, and what exceeds them is clipped: that good parts are judged alike
says nothing of what is seen of a defect.
"""


@dataclass(frozen=True, slots=True)
class Scores:
    """What one engine says of good parts and of bad ones, if there are any, and the threshold that follows.

    `spoiled` are those of the good parts, in their order, with a made-up defect each; nothing beside bad parts.
    """

    good: Sequence[float]
    bad: Sequence[float]
    threshold: float
    spoiled: Sequence[float] = ()

    @property
    def auroc(self) -> float | None:
        """How well the scores tell bad parts from good ones, 0.5 … 1; None without bad parts."""
        if not self.bad:
            return None
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score([0] * len(self.good) + [1] * len(self.bad), [*self.good, *self.bad]))


@dataclass(frozen=True, slots=True)
class Parity:
    """How an engine differs from the reference over `parts` parts.

    `shift` and `largest_shift` are the median and the largest change of a score, as shares of the way from the median
    good part to the threshold; `rank` is Spearman's correlation; `flips` counts the parts whose verdict is another,
    each engine with its own threshold; `auroc` and `reference_auroc` are None without bad parts. `kept` is how far
    spoiled parts rise in the median, by how far they do by the reference; None where they do not rise there, or there
    are none.
    """

    parts: int
    shift: float
    largest_shift: float
    rank: float
    flips: int
    auroc: float | None
    reference_auroc: float | None
    kept: float | None = None

    @property
    def faults(self) -> list[str]:
        """Why the engine must not be used; empty if it may."""
        least = LEAST_RANK_OF_GOOD if self.auroc is None else LEAST_RANK
        lost = 0.0 if self.auroc is None or self.reference_auroc is None else self.reference_auroc - self.auroc
        kept = 1.0 if self.kept is None else self.kept
        faults = {
            f"{self.flips} verdicts are others, {self.most_flips} may": self.flips > self.most_flips,
            f"the order of scores is another: correlation {self.rank:.3f}, at least {least}": not self.rank >= least,
            f"AUROC is {lost:.4f} lower, {MOST_LOST_AUROC} may": lost > MOST_LOST_AUROC,
            f"scores moved by {self.shift:.0%} of the way to the threshold, {MOST_SHIFT:.0%} may": (
                not self.shift <= MOST_SHIFT
            ),
            f"spoiled parts rise {kept:.0%} as far, at least {LEAST_KEPT:.0%} are due": not kept >= LEAST_KEPT,
        }
        return [fault for fault, found in faults.items() if found]

    @property
    def most_flips(self) -> int:
        """How many verdicts may be others."""
        return max(1, int(MOST_FLIPS * self.parts))

    def __str__(self) -> str:
        """One sentence for the calibration card."""
        told = "" if self.kept is None else f", spoiled parts rise {self.kept:.0%} as far"
        told += "" if self.auroc is None else f", image AUROC {self.auroc:.4f} against {self.reference_auroc:.4f}"
        return (
            f"of {self.parts} parts {self.flips} other verdict{'' if self.flips == 1 else 's'} than by the reference, "
            f"rank correlation {self.rank:.4f}, scores moved by {self.shift:.1%} of the way to the threshold (median)"
            f"{told}"
        )


def compare(reference: Scores, engine: Scores) -> Parity:
    """Compare an engine's scores with the reference's, part by part; both in the same order.

    A score that is no number, and scores that are all alike, make every figure that depends on them fail its limit.
    """
    from scipy.stats import spearmanr

    before, after = (np.array([*one.good, *one.bad]) for one in (reference, engine))
    way = max(reference.threshold - float(np.median(reference.good)), 1e-9)
    shifts = np.abs(after - before) / way
    verdicts = [np.array([*one.good, *one.bad]) <= one.threshold for one in (reference, engine)]
    sound = bool(np.isfinite(after).all()) and len(set(after.tolist())) > 1
    return Parity(
        parts=len(before),
        shift=float(np.median(shifts)),
        largest_shift=float(shifts.max()),
        rank=float(spearmanr(before, after).statistic) if sound else float("nan"),
        flips=int((verdicts[0] != verdicts[1]).sum()),
        auroc=engine.auroc if sound else (0.0 if engine.bad else None),
        reference_auroc=reference.auroc,
        kept=_kept(reference, engine),
    )


def _kept(reference: Scores, engine: Scores) -> float | None:
    if not reference.spoiled:
        return None
    seen, found = (float(np.median(np.subtract(one.spoiled, one.good))) for one in (reference, engine))
    return found / seen if seen > 0 else None
