"""A threshold, and the good parts it was made from."""

import hashlib
import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibration.quantile import false_reject_interval, smallest_sample, smallest_tolerance_sample
from calibration.tail import Tail, fit_tail
from calibration.threshold import FEWEST_FOR_TAIL, Method, choose, effective_number

CONFIDENCE = 0.95
"""Of the tolerance method, unless another is asked for."""
LEAST_P = 1e-6
"""No p-value is below this: further out, the fitted tail is a mere guess."""

_ROWS = 16
_BAR = 40


class CalibrationError(Exception):
    """A calibration that cannot be made, or must not be used. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where scores come from, and who answers for them.

    `model` is the fingerprint of weights, preprocessing and scoring; `engine` is what computed; `regions` is the
    fingerprint of masks and region rules, empty without any; `data_sha256` stands for the images; `made_at` becomes
    UTC; `framing` is the fingerprint of what was done to the images first, empty where nothing was; `parity` says how
    the engine compares with the reference, empty where it is the reference.
    """

    model: str
    data_sha256: str
    made_at: datetime
    engine: str = ""
    regions: str = ""
    made_by: str = ""
    framing: str = ""
    parity: str = ""


@dataclass(frozen=True, slots=True)
class Appearance:
    """How the good parts' images looked: for each canary one value an image, and their mean as a base64 thumbnail."""

    canaries: dict[str, tuple[float, ...]]
    thumbnail: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one model says of good parts, and the limit that follows. Made by `fit`, never by hand.

    `id` is 12 hex digits that change with any other field. Scores (ascending) and thresholds are in the detector's
    units. `alpha` is the share of good parts that may be rejected; parts above `fail_threshold`, as `fail_method` has
    it for a share `fail_alpha`, are failed, and those between both thresholds are uncertain; without that band the two
    are equal. `asked` is the method that was asked for, None for the firmest. `groups` names the group of each score by
    its number, and is empty where every part stands for itself; `images` has the SHA-256 of each score's image, and is
    empty where nobody knows.
    """

    id: str
    threshold: float
    alpha: float
    confidence: float
    asked: Method | None
    method: Method
    why: str
    n_effective: int
    rank: int
    rank_effective: int
    fail_alpha: float | None
    fail_method: Method | None
    fail_threshold: float
    tail: Tail | None
    provenance: Provenance
    scores: tuple[float, ...] = field(repr=False)
    groups: tuple[int, ...] = field(repr=False)
    images: tuple[str, ...] = field(repr=False)
    appearance: Appearance | None = field(repr=False)

    def passes(self, score: float) -> bool:
        """Say whether a part passes: up to and including the threshold, never for NaN."""
        return score <= self.threshold

    def p_value(self, score: float) -> float:
        """Return the share of good parts that look at least this unusual; NaN for NaN.

        Conformal, (1 + #{scores ≥ score}) / (n + 1), down to the largest score; above that the fitted tail goes on
        from 1 / (n + 1), never below 1e-6, which ranks parts and is no share. n is the effective number. Never rises
        with the score.
        """
        if math.isnan(score):
            return math.nan
        above = len(self.scores) - bisect_left(self.scores, score)
        n = self.n_effective
        if above:
            return (1 + above * n / len(self.scores)) / (n + 1)
        least = 1 / (n + 1)
        at_largest = self.tail.exceeded(self.scores[-1]) if self.tail else 0.0
        if self.tail is None or at_largest == 0:
            return least
        return max(LEAST_P, least * self.tail.exceeded(score) / at_largest)

    @property
    def good_parts(self) -> int:
        """How many good parts were scored."""
        return len(self.scores)

    @property
    def carries(self) -> bool:
        """Whether the good parts are enough for a promise of the alpha that was asked."""
        return self.method in {Method.tolerance, Method.conformal}

    @property
    def alpha_carried(self) -> float:
        """The share of good parts of which it is promised, whatever the scores' distribution, that no more is rejected.

        By `tolerance` with the confidence; otherwise on average over calibrations like this one.
        """
        return self.alpha if self.carries else self.expected_false_rejects

    @property
    def expected_false_rejects(self) -> float:
        """The largest share of good parts that is rejected on average over calibrations like this one."""
        return (self.n_effective + 1 - self.rank_effective) / (self.n_effective + 1)

    @property
    def false_reject_interval(self) -> tuple[float, float]:
        """The shares between which the true false-reject rate lies for 90 % of such calibrations."""
        low, high = false_reject_interval(self.n_effective, self.rank_effective)
        # A fitted tail and an interpolated quantile lie above their rank's score: only the upper bound holds.
        return (low if self.method not in {Method.tail, Method.quantile} else 0.0, high)


def fit(
    scores: ArrayLike,
    *,
    alpha: float,
    provenance: Provenance,
    confidence: float = CONFIDENCE,
    method: Method | None = None,
    groups: Sequence[str] = (),
    images: Sequence[str] = (),
    fail_alpha: float | None = None,
    appearance: Appearance | None = None,
) -> Calibration:
    """Choose a threshold from the scores of good parts, none of which may have trained the model.

    Args:
        scores: One number for each good part, in any order.
        alpha: The share of good parts that may be rejected, between 0 and 1.
        provenance: Where the scores come from.
        confidence: Of the tolerance method.
        method: This one instead of the firmest.
        groups: For each score the part, lot or burst it belongs to; empty where every part stands for itself.
        images: For each score the SHA-256 of its image; empty where nobody knows.
        fail_alpha: A share below alpha: only above its threshold a part fails, between the two it is uncertain.
        appearance: How the images looked.

    Raises:
        CalibrationError: A score is not finite, there is none, an image is there twice, a share is out of range, the
            parts are too few for the method, `made_at` has no time zone, or the threshold is not above zero.
    """
    try:
        values, numbers, digests = _in_order(scores, groups, images)
        n = effective_number([str(number) for number in numbers]) if numbers else values.size
        choice = choose(values, alpha, confidence=confidence, n_effective=n, method=method)
        fails = choice
        if fail_alpha is not None:
            if not fail_alpha < alpha:
                raise ValueError(f"the share that fails, {fail_alpha:g}, must be below α, {alpha:g}")  # noqa: TRY301
            fails = choose(values, fail_alpha, confidence=confidence, n_effective=n, method=method)
            if fails.threshold <= choice.threshold and method is None and n >= FEWEST_FOR_TAIL:
                # A weaker promise of the smaller share may come to the same score; an estimate tells them apart.
                fails = choose(values, fail_alpha, confidence=confidence, n_effective=n, method=Method.tail)
    except ValueError as error:
        raise CalibrationError(f"no threshold can be chosen: {error}") from error
    if choice.threshold <= 0:
        raise CalibrationError(
            f"the threshold would be {choice.threshold:g}, but scores are reported as multiples of it, so it"
            " must be above zero: choose a smaller α or give more good parts; if that does not help, the model cannot"
            " tell these parts apart"
        )
    if provenance.made_at.tzinfo is None:
        raise CalibrationError(f"made_at is {provenance.made_at}, without a time zone: give UTC")
    return named(
        Calibration(
            id="",
            threshold=choice.threshold,
            alpha=alpha,
            confidence=confidence,
            asked=method,
            method=choice.method,
            why=choice.why,
            n_effective=n,
            rank=choice.rank,
            rank_effective=choice.rank_effective,
            fail_alpha=fail_alpha,
            fail_method=None if fail_alpha is None else fails.method,
            fail_threshold=max(choice.threshold, fails.threshold),
            tail=fit_tail(values, n) if n >= FEWEST_FOR_TAIL else None,
            provenance=replace(provenance, made_at=provenance.made_at.astimezone(UTC)),
            scores=tuple(values.tolist()),
            groups=tuple(numbers),
            images=tuple(digests),
            appearance=appearance,
        )
    )


def asked_again(
    calibration: Calibration,
    *,
    alpha: float,
    confidence: float,
    method: Method | None,
    fail_alpha: float | None = None,
) -> Calibration:
    """Return what the same scores give for another question.

    Raises:
        CalibrationError: As `fit`.
    """
    return fit(
        calibration.scores,
        alpha=alpha,
        confidence=confidence,
        method=method,
        fail_alpha=fail_alpha,
        provenance=calibration.provenance,
        groups=[f"{group:09}" for group in calibration.groups],
    )


def with_alpha(calibration: Calibration, alpha: float) -> Calibration | None:
    """Return what the same scores give for another alpha; None where the method that was asked for cannot."""
    try:
        return asked_again(calibration, alpha=alpha, confidence=calibration.confidence, method=calibration.asked)
    except CalibrationError:
        return None


def named(calibration: Calibration) -> Calibration:
    """Return the calibration with the id that follows from its content."""
    text = json.dumps(content(calibration), sort_keys=True)
    return replace(calibration, id=hashlib.sha256(text.encode()).hexdigest()[:12])


def content(calibration: Calibration) -> dict[str, Any]:
    """Return every field but the id, as values that JSON can hold without loss."""
    fields = asdict(calibration)
    del fields["id"]
    fields["provenance"]["made_at"] = calibration.provenance.made_at.isoformat()
    for later in ("framing", "parity"):  # ids of calibrations from before there was any stay as they are
        if not fields["provenance"][later]:
            del fields["provenance"][later]
    if calibration.appearance:
        fields["appearance"]["canaries"] = {k: list(v) for k, v in calibration.appearance.canaries.items()}
    return fields | {name: list(getattr(calibration, name)) for name in ("scores", "groups", "images")}


def promise(calibration: Calibration) -> str:
    """Say in a sentence what is promised, and how firmly."""
    asked, carried = stated(calibration.alpha), _carried(calibration)
    average = "on average over calibrations like this one"
    match calibration.method:
        case Method.tolerance:
            what = f"at most {asked} are rejected, with {stated(calibration.confidence)} confidence"
        case Method.conformal:
            what = f"at most {asked} are rejected, {average}"
        case Method.tail:
            what = f"about {asked} are rejected if the fitted tail is right, and at most {carried} {average} if not"
        case _:
            what = f"at most {carried} are rejected, {average}; nothing is promised of {asked}"
    roughly = ", approximately, since they come in groups" if calibration.groups else ""
    return f"of good parts like these {what}{roughly}"


def shortage(calibration: Calibration) -> str:
    """Say what is missing for a promise of the alpha that was asked; empty where nothing is."""
    if calibration.carries:
        return ""
    asked, n = stated(calibration.alpha), calibration.n_effective
    needed = smallest_sample(calibration.alpha)
    if n >= needed:
        return f"the method {calibration.method} promises nothing of α = {asked}; leave the method open"
    parts = (
        f"{n} good parts" if n == calibration.good_parts else f"{calibration.good_parts} good parts count as {n}, and"
    )
    return f"{parts} carry no less than α = {100 / (n + 1):.3g} %; {asked} needs {needed}"


def describe(calibration: Calibration) -> str:
    """Write what an engineer should read before signing: the promise, how sure it is, and the scores."""
    made = calibration.provenance
    n = f"{calibration.good_parts}"
    if calibration.groups:
        n += f" in {len(set(calibration.groups))} groups, which count as {calibration.n_effective}"
    beyond = "" if calibration.threshold == calibration.scores[calibration.rank - 1] else "above "
    lines = [
        f"Calibration    {calibration.id}, {made.made_at:%Y-%m-%d %H:%M} UTC"
        + (f", {made.made_by}" * bool(made.made_by)),
        f"Model          {made.model}" + f", {made.engine}" * bool(made.engine),
        f"Images         sha256 {made.data_sha256}",
        *([f"Regions        {made.regions}"] if made.regions else []),
        *([f"Engine         {made.parity}"] if made.parity else []),
        *([f"Framing        {made.framing}"] if made.framing else []),
        f"Good parts     {n}",
        f"α              {stated(calibration.alpha)} asked, {_carried(calibration)} carried",
        f"Method         {calibration.method}: {calibration.why}",
        f"Threshold      {calibration.threshold:.6g}, {beyond}score {calibration.rank} of {calibration.good_parts}",
        *_band(calibration),
        f"Promise        {promise(calibration)},",
        "               while parts, light and camera stay as they were",
        f"False rejects  {expectation(calibration)}",
    ]
    if missing := shortage(calibration):
        more = smallest_sample(calibration.alpha) - calibration.n_effective
        cure = f": add {more} and calibrate again" if more > 0 else ""
        lines += ["", f"!!! NO PROMISE OF α = {stated(calibration.alpha)} !!! {missing}{cure}"]
    elif calibration.method is Method.conformal:
        firm = smallest_tolerance_sample(calibration.alpha, calibration.confidence)
        lines += [
            "",
            f"With {firm} good parts the promise would hold with {stated(calibration.confidence)} confidence.",
        ]
    return "\n".join([*lines, "", "Scores of the good parts, from; how many", *_histogram(calibration), ""])


def expectation(calibration: Calibration) -> str:
    """Say how many good parts of a round number are expected to be rejected, and between what bounds."""
    expected = calibration.expected_false_rejects
    low, high = calibration.false_reject_interval
    parts = 10 ** max(3, math.ceil(-math.log10(expected)))
    most = "at most " if calibration.method in {Method.tail, Method.quantile} else ""
    return (
        f"of {parts} good parts expect {most}{expected * parts:.0f} rejected"
        f" (90 % of such calibrations: {low * parts:.0f} to {high * parts:.0f})"
    )


def _band(calibration: Calibration) -> list[str]:
    if calibration.fail_alpha is None:
        return []
    kind = "an estimate: " if calibration.fail_method is Method.tail else ""
    fails = (
        f"above {calibration.fail_threshold:.6g} ({kind}α = {share(calibration.fail_alpha)}, {calibration.fail_method})"
    )
    if calibration.fail_threshold == calibration.threshold:
        return [f"Uncertain      none: a part fails {fails} too"]
    return [f"Uncertain      above the threshold; a part fails {fails}"]


def _in_order(
    scores: ArrayLike, groups: Sequence[str], images: Sequence[str]
) -> tuple[NDArray[np.float64], list[int], list[str]]:
    """Return the scores ascending, with the number of each one's group and its image, whatever order they came in."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"scores must be a list of at least one number, not an array of shape {values.shape}")
    if not np.isfinite(values).all():
        position = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"score {position + 1} of {values.size} is {values[position]}, not a finite number")
    for what, given in (("groups", groups), ("images", images)):
        if given and len(given) != values.size:
            raise ValueError(f"{len(given)} {what} for {values.size} scores")
    if len(set(images)) < len(images):
        raise ValueError("an image is there twice: a copy is no further part")
    _, numbers = np.unique(np.asarray(groups or [""] * values.size), return_inverse=True)
    order = np.lexsort((np.asarray(images or [""] * values.size), numbers, values))
    return (
        values[order],
        numbers[order].tolist() if groups else [],
        [images[place] for place in order.tolist()] if images else [],
    )


def _carried(calibration: Calibration) -> str:
    return stated(calibration.alpha) if calibration.carries else share(calibration.alpha_carried)


def stated(share: float) -> str:
    """Write a share as it was asked, to the last digit."""
    return f"{100 * share:g} %"


def share(value: float) -> str:
    """Write a share that was reckoned: to two digits, or as far as it differs from all."""
    return f"{100 * value:.4g} %" if value > 0.9 else f"{100 * value:.2g} %"  # noqa: PLR2004 -- 2g gives 1e+02


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
        inside = calibration.threshold <= highest and index == row(calibration.threshold)
        mark = "  <-- threshold" if inside else ""
        lines.append(f"{lowest + index * width:>12.6g} {counts[index]:>7} {bar}{mark}".rstrip())
    if calibration.threshold > highest:
        lines.append(f"{calibration.threshold:>12.6g} {0:>7}   <-- threshold")
    return lines
