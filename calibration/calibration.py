"""A threshold, and the good parts it was made from."""

import hashlib
import json
import math
from bisect import bisect_left
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from calibration.quantile import conformal_rank, false_reject_interval, smallest_sample, upper_quantile

_ROWS = 16
_BAR = 40


class CalibrationError(Exception):
    """A calibration that cannot be made, or must not be used. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one model says of good parts, and the limit that follows. Made by `fit`, never by hand.

    `id` is 12 hex digits that change with any other field. `threshold` and `scores` (ascending) are in the
    detector's units. `alpha` is the share of good parts that may be rejected, as asked; `alpha_carried` is
    what this many parts can promise. `data_sha256` stands for the images, `made_at` is UTC.
    """

    id: str
    threshold: float
    alpha: float
    alpha_carried: float
    scores: tuple[float, ...] = field(repr=False)
    detector_fingerprint: str
    made_at: datetime
    data_sha256: str
    method: Literal["conformal"] = "conformal"

    def passes(self, score: float) -> bool:
        """Say whether a part passes: up to and including the threshold, never for NaN."""
        return score <= self.threshold

    def p_value(self, score: float) -> float:
        """Return the conformal p-value (1 + #{scores ≥ score}) / (n + 1); NaN for NaN.

        Where the parts carry alpha, a part passes exactly if its p-value exceeds alpha.
        """
        if math.isnan(score):
            return math.nan
        return (1 + self.good_parts - bisect_left(self.scores, score)) / (self.good_parts + 1)

    @property
    def good_parts(self) -> int:
        """How many good parts were scored."""
        return len(self.scores)

    @property
    def carries(self) -> bool:
        """Whether the good parts are enough for the alpha that was asked."""
        return conformal_rank(self.good_parts, self.alpha) is not None

    @property
    def rank(self) -> int:
        """Which of the ascending scores the threshold is, counted from 1."""
        return conformal_rank(self.good_parts, self.alpha) or self.good_parts

    @property
    def expected_false_rejects(self) -> float:
        """The share of good parts that is rejected, on average over calibrations like this one."""
        return (self.good_parts + 1 - self.rank) / (self.good_parts + 1)

    @property
    def false_reject_interval(self) -> tuple[float, float]:
        """The shares between which the true false-reject rate lies for 90 % of such calibrations."""
        return false_reject_interval(self.good_parts, self.rank)


def fit(
    scores: ArrayLike, *, alpha: float, detector_fingerprint: str, data_sha256: str, made_at: datetime
) -> Calibration:
    """Choose a threshold from the scores of good parts, none of which may have trained the model.

    Raises:
        CalibrationError: A score is not finite, there is none, `alpha` is out of range, `made_at` has no time
            zone, or the threshold is not above zero.
    """
    try:
        quantile = upper_quantile(scores, alpha)
    except ValueError as error:
        raise CalibrationError(f"no threshold can be chosen: {error}") from error
    if quantile.threshold <= 0:
        raise CalibrationError(
            f"the threshold would be {quantile.threshold:g}, but scores are reported as multiples of it, so it"
            " must be above zero: choose a smaller α or give more good parts; if that does not help, the model cannot"
            " tell these parts apart"
        )
    if made_at.tzinfo is None:
        raise CalibrationError(f"made_at is {made_at}, without a time zone: give UTC")
    unnamed = Calibration(
        id="",
        threshold=quantile.threshold,
        alpha=alpha,
        alpha_carried=quantile.alpha_carried,
        scores=tuple(np.sort(np.asarray(scores, dtype=np.float64)).tolist()),
        detector_fingerprint=detector_fingerprint,
        made_at=made_at.astimezone(UTC),
        data_sha256=data_sha256,
    )
    text = json.dumps(content(unnamed), sort_keys=True)
    return replace(unnamed, id=hashlib.sha256(text.encode()).hexdigest()[:12])


def content(calibration: Calibration) -> dict[str, Any]:
    """Return every field but the id, as values that JSON can hold without loss."""
    fields = asdict(calibration)
    del fields["id"]
    return fields | {"made_at": calibration.made_at.isoformat(), "scores": list(calibration.scores)}


def describe(calibration: Calibration) -> str:
    """Write what an engineer should read before signing: the promise, how sure it is, and the scores."""
    expected = calibration.expected_false_rejects
    low, high = calibration.false_reject_interval
    parts = 10 ** max(3, math.ceil(-math.log10(expected)))
    asked = f"{100 * calibration.alpha:g} %"
    carried = asked if calibration.carries else f"{100 * calibration.alpha_carried:.2g} %"
    promise = (
        f"of {parts} good parts expect {expected * parts:.0f} rejected"
        f" (90 % of such calibrations: {low * parts:.0f} to {high * parts:.0f})"
    )
    lines = [
        f"Calibration    {calibration.id}, {calibration.made_at:%Y-%m-%d %H:%M} UTC, {calibration.method}",
        f"Model          {calibration.detector_fingerprint}",
        f"Images         sha256 {calibration.data_sha256}",
        f"Good parts     {calibration.good_parts}",
        f"α              {asked} asked, {carried} carried",
        f"Threshold      {calibration.threshold:.6g}, score {calibration.rank} of {calibration.good_parts}",
        f"False rejects  {promise}",
        "               while parts, light and camera stay as they were",
    ]
    if not calibration.carries:
        needed = smallest_sample(calibration.alpha)
        shortage = f"{calibration.good_parts} good parts carry no less than α = {carried}; {asked} needs {needed}"
        missing = needed - calibration.good_parts
        lines += ["", f"!!! TOO FEW GOOD PARTS !!! {shortage}: add {missing} and calibrate again"]
    return "\n".join([*lines, "", "Scores of the good parts, from; how many", *_histogram(calibration), ""])


def _histogram(calibration: Calibration) -> list[str]:
    """Draw one row per interval of scores, of equal width, the threshold marked on its own."""
    lowest, highest = calibration.scores[0], calibration.scores[-1]
    width = (highest - lowest) / _ROWS

    def row(score: float) -> int:
        return min(int((score - lowest) / width), _ROWS - 1) if width else 0

    counts = Counter(row(score) for score in calibration.scores)
    fullest = max(counts.values())
    lines = []
    for index in range(_ROWS if width else 1):
        bar = "#" * math.ceil(_BAR * counts[index] / fullest)
        mark = "  <-- threshold" if index == row(calibration.threshold) else ""
        lines.append(f"{lowest + index * width:>12.6g} {counts[index]:>7} {bar}{mark}".rstrip())
    return lines
