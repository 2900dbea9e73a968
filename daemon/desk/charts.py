"""The charts of a comparison and of the calibration card: figures come in, matplotlib figures go out.

The palette is Okabe and Ito's (2008), which colour-blind readers can tell apart; curves are named directly.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.calibration import Calibration
from daemon.desk.comparison import Entry, Row, Sheet, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#D55E00", "#8c8c00")
_WRONG, _GOOD, _BAD, _CALIBRATION = "#D55E00", "#0072B2", "#4d5560", "#b4bac2"
_INK, _MUTED, _RULE = "#1c2024", "#6b727b", "#dfe3e8"
_BINS = 56
_NEAR = 10  # per cent of good parts: nobody's line affords more
_ROUND = [base * 10.0**power for power in range(-4, 8) for base in (1, 2, 5)]


def colour_of(entry: Entry, entries: Sequence[Entry]) -> str:
    """The colour of a detector in all charts and tables of one comparison."""
    return PALETTE[entries.index(entry) % len(PALETTE)]


@contextmanager
def drawing() -> Iterator[None]:
    """Light axes and text that stays text, for everything drawn inside."""
    import matplotlib as mpl

    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "inspectd",
            "text.parse_math": False,
            "text.color": _INK,
            "font.size": 10,
            "axes.edgecolor": "#aab1ba",
            "axes.labelcolor": _MUTED,
            "axes.linewidth": 0.7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.titlepad": 12,
            "xtick.color": "#aab1ba",
            "ytick.color": "#aab1ba",
            "xtick.labelcolor": _MUTED,
            "ytick.labelcolor": _MUTED,
            "xtick.major.size": 3,
            "ytick.major.size": 3,
            "grid.color": "#edf0f2",
            "grid.linewidth": 0.7,
            "axes.axisbelow": True,
        }
    ):
        yield


def _blank(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def overview(sheets: Sequence[Sheet]) -> "Figure":
    """Image AUROC and true rejects of every detector, a row a category."""
    entries = [row.entry for row in sheets[0].rows]
    lane = 0.17  # inches a detector
    row_height = lane * (len(entries) + 1.6)
    head, foot = 0.4, 0.4
    height = head + foot + row_height * len(sheets)
    figure = _blank(11.4, height)
    body = (foot / height, row_height * len(sheets) / height)
    panels = [figure.add_axes((left, body[0], 0.40, body[1])) for left in (0.14, 0.585)]
    keys = (
        ("image_auroc", "image AUROC"),
        ("true_reject_at_1", "bad parts rejected, % (at most 1 % of the good ones lost)"),
    )
    for axes, (key, title) in zip(panels, keys, strict=True):
        scale = 1 if key == "image_auroc" else 100
        for place, sheet in enumerate(sheets):
            for row in sheet.rows:
                found = row.spread(key)
                if found is None:
                    continue
                y = place + (entries.index(row.entry) - (len(entries) - 1) / 2) / (len(entries) + 1.6)
                colour = colour_of(row.entry, entries)
                each = [scale * figures[key] for figures in row.done if figures[key] is not None]
                if found.sd is not None:
                    axes.plot([min(each), max(each)], [y, y], color=colour, linewidth=1.2, alpha=0.55)
                    axes.plot(each, [y] * len(each), "|", color=colour, markersize=5, alpha=0.7)
                axes.plot(scale * found.mean, y, "o", color=colour, markersize=6, markeredgewidth=0)
        axes.set_xlim(min(axes.get_xlim()[0], 0.9 * scale), 1.012 * scale)
        axes.set_ylim(len(sheets) - 0.5, -0.5)
        axes.set_yticks(range(len(sheets)), [sheet.category for sheet in sheets] if axes is panels[0] else [])
        axes.tick_params(axis="y", length=0, labelsize=11, labelcolor=_INK)
        for line in np.arange(0.5, len(sheets) - 1):
            axes.axhline(float(line), color=_RULE, linewidth=0.7)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_title(title, color=_MUTED)
    return figure


def cost(sheets: Sequence[Sheet]) -> "Figure":
    """True rejects over latency, a dot a detector: the mean of the categories that every detector finished."""
    entries = [row.entry for row in sheets[0].rows]
    whole = [sheet for sheet in sheets if all(row.done for row in sheet.rows)] or list(sheets)
    figure = _blank(11.4, 3.8)
    axes = figure.add_axes((0.14, 0.15, 0.7, 0.74))
    dots = []
    for place, entry in enumerate(entries):
        rows = [sheet.rows[place] for sheet in whole if sheet.rows[place].done]
        rejects = spread(found.mean for row in rows if (found := row.spread("true_reject_at_1")))
        latency = spread(found.mean for row in rows if (found := row.spread("latency_ms_p50")))
        if rejects and latency:
            dots.append((latency.mean, 100 * rejects.mean, entry))
    low, high = _round_range([x for x, _, _ in dots])
    heights = _apart([y for _, y, _ in dots], 7)
    for (x, y, entry), text_y in zip(dots, heights, strict=True):
        axes.plot(x, y, "o", color=colour_of(entry, entries), markersize=8, markeredgewidth=0)
        beside = x * (high / low) ** 0.012
        axes.annotate(entry.label, (x, y), (beside, text_y), va="center", annotation_clip=False)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks([mark for mark in _ROUND if low <= mark <= high])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 104)
    axes.grid()
    axes.set_xlabel("latency p50, ms an image (logarithmic)")
    across = "" if len(whole) == 1 else f", mean of {len(whole)} categories"
    axes.set_title(f"bad parts rejected, % (at most 1 % of the good ones lost){across}", color=_MUTED)
    return figure


def roc(measured: Sequence[Row], entries: Sequence[Entry]) -> "Figure":
    """The first tenth of the ROC curves large, the whole small; labels stand where the large ones end."""
    figure = _blank(11.4, 4.9)
    near = figure.add_axes((0.055, 0.13, 0.5, 0.77))
    whole = figure.add_axes((0.755, 0.13, 0.225, 0.77))
    ends = []
    for row in measured:
        colour, found = colour_of(row.entry, entries), row.done[0]
        x, y = _curve(found["parts"])
        for axes in (near, whole):
            axes.plot(x, y, color=colour, linewidth=1.5 if axes is near else 1.0, solid_joinstyle="miter")
            rate = (100 * found["false_reject_rate"], 100 * (1 - found["escape_rate"]))
            if axes is whole or rate[0] <= _NEAR:
                axes.plot(
                    *rate,
                    "o",
                    color=colour,
                    markersize=8 if axes is near else 5,
                    markeredgecolor="white",
                    clip_on=False,
                    zorder=5,
                )
        ends.append(float(np.interp(_NEAR, x, y)))
    for row, end, text_y in zip(measured, ends, _apart(ends, 5), strict=True):
        colour = colour_of(row.entry, entries)
        near.plot([_NEAR * 1.005, _NEAR * 1.025], [end, text_y], color=colour, linewidth=0.8, clip_on=False)
        near.text(_NEAR * 1.032, text_y, row.entry.label, va="center", fontsize=11, color=_INK)
    for share in (1, 5):
        near.axvline(share, color="#c3c9d0", linewidth=0.8, linestyle=(0, (2, 3)))
    near.set(xlim=(0, _NEAR), ylim=(0, 101), xticks=[0, 1, 2, 5, _NEAR])
    whole.set(xlim=(0, 100), ylim=(0, 101), xticks=[0, 50, 100], yticks=[0, 50, 100])
    near.set_title("bad parts rejected, %", color=_MUTED)
    whole.set_title("the whole curve", color=_MUTED)
    near.set_xlabel("good parts rejected, %")
    for axes in (near, whole):
        axes.grid()
    return figure


def _curve(parts: Sequence[Mapping[str, Any]]) -> tuple[Sequence[float], Sequence[float]]:
    """Shares of good and of bad parts, in per cent, strictly above each threshold, from the highest one down."""
    good = np.sort([part["score"] for part in parts if part["defect"] == "good"])
    bad = np.sort([part["score"] for part in parts if part["defect"] != "good"])
    limits = np.append(np.unique(np.concatenate([good, bad]))[::-1], -np.inf)
    x, y = (100 * (1 - np.searchsorted(some, limits, side="right") / some.size) for some in (good, bad))
    return x.tolist(), y.tolist()


def scores(figures: Mapping[str, Any]) -> "Figure":
    """A histogram a kind of part over score / threshold; wrong verdicts in the colour of wrong verdicts."""
    parts, threshold = figures["parts"], figures["threshold"]
    kinds = {kind: [part["score"] for part in parts if part["defect"] == kind] for kind in figures["present"]}
    order = sorted(kinds, key=lambda kind: -figures["missed"][kind] / figures["present"][kind])
    lanes = [("held-out good", figures["run"]["calibration_scores"], _CALIBRATION)]
    lanes += [("good", [part["score"] for part in parts if part["defect"] == "good"], _GOOD)]
    lanes += [(kind, kinds[kind], _BAD) for kind in order]
    everything = np.concatenate([scores for _, scores, _ in lanes])
    by_ratio = threshold > 0 and everything.min() > 0
    places = [np.log2(np.array(s) / threshold) if by_ratio else np.array(s) - threshold for _, s, _ in lanes]
    low, high = min(p.min() for p in places), max(p.max() for p in places)
    step = max(high - low, 1e-9) / _BINS
    height = 0.75 + 0.47 * len(lanes)
    figure = _blank(11.4, height)
    axes = figure.add_axes((0.15, 0.45 / height, 0.66, 1 - 0.72 / height))
    for lane, ((name, scores, colour), at) in enumerate(zip(lanes, places, strict=True)):
        # A score on the threshold passes, so a bin owns its right end; one end of a bin is the threshold.
        bins, counts = np.unique(np.ceil(at / step - 1e-9).astype(int) - 1, return_counts=True)
        above = bins >= 0
        wrong = above if lane < 2 else ~above  # noqa: PLR2004 -- two kinds of good parts, then the bad ones
        colours = np.where(wrong, _WRONG, colour)
        base = len(lanes) - 1 - lane
        axes.bar(bins * step, 0.74 * counts / counts.max(), step * 0.92, base, align="edge", color=colours.tolist())
        axes.axhline(base, color=_RULE, linewidth=0.7, zorder=0)
        rejected = int((np.array(scores) > threshold).sum())
        failed = rejected if lane < 2 else len(scores) - rejected  # noqa: PLR2004
        words = f"{failed} of {len(scores)} {'rejected' if lane < 2 else 'escaped'}"  # noqa: PLR2004
        said = words if lane else f"{len(scores)} parts, α {100 * figures['alpha_carried']:.1f} % carried"
        beside = axes.get_yaxis_transform()
        axes.text(-0.015, base + 0.28, name, transform=beside, ha="right", va="center", fontsize=11)
        tone = "#b34700" if failed and lane else _MUTED
        axes.text(1.015, base + 0.28, said, transform=beside, va="center", color=tone)
    axes.axvline(0, color=_INK, linewidth=1)
    axes.text(0, len(lanes) - 0.05, "threshold", ha="center", va="bottom", fontsize=10)
    axes.set(xlim=(low - 2 * step, high + 2 * step), ylim=(0, len(lanes) - 0.1), yticks=[])
    axes.spines["left"].set_visible(False)
    if by_ratio:
        marks = _multiples(2**low, 2**high)
        axes.set_xticks([math.log2(m) for m in marks], [f"{m:.3g} ×" for m in marks])
    else:
        axes.set_xlabel("score above the threshold, in the detector's units")
    return figure


def good_scores(calibration: Calibration) -> "Figure":
    """The good parts' scores, those above the threshold in the colour of wrong verdicts, and the fitted tail."""
    lowest, highest = calibration.scores[0], calibration.scores[-1]
    threshold, fails = calibration.threshold, calibration.fail_threshold
    # The threshold is one end of a bin, and a bin owns its right end, as a score on the threshold passes.
    step = (highest - lowest) / min(max(round(2 * math.sqrt(calibration.good_parts)), 12), 48) or abs(threshold) / 24
    bins = np.ceil((np.array(calibration.scores) - threshold) / step - 1e-9).astype(int) - 1
    places, counts = np.unique(bins, return_counts=True)
    figure = _blank(7.1, 1.9)
    axes = figure.add_axes((0.052, 0.22, 0.936, 0.6))
    colours = np.where(places >= 0, _WRONG, "#8fb8d6")
    axes.bar(threshold + places * step, counts, step * 0.92, align="edge", color=colours.tolist())
    left, right = min(lowest, threshold + bins[0] * step), max(highest, fails)
    left, right = left - 0.03 * (right - left), right + max(0.12 * (right - left), 2 * step)
    if calibration.tail:
        x = np.linspace(left, right, 240)
        exceeded = np.array([calibration.tail.exceeded(score) for score in (x[:, None] + [-step / 2, step / 2]).flat])
        expected = calibration.good_parts * -np.diff(exceeded.reshape(-1, 2)).ravel()
        axes.plot(x, expected, color=_INK, linewidth=1.1)
    axes.set(xlim=(left, right), ylim=(0, 1.06 * axes.get_ylim()[1]))
    axes.locator_params(axis="y", nbins=4, integer=True)
    beside = axes.get_xaxis_transform()
    axes.axvline(threshold, color=_INK, linewidth=1.2)
    side = "left" if threshold - left < (right - left) / 3 else "right"
    axes.text(threshold, 1.03, f" threshold {threshold:.6g} ", transform=beside, ha=side, va="bottom", fontsize=9)
    if fails > threshold:
        axes.axvspan(threshold, fails, color="#E69F00", alpha=0.16, linewidth=0)
        axes.axvline(fails, color=_WRONG, linewidth=1.2)
        said = f" fail above {fails:.6g} "
        axes.text(fails, 1.15, said, transform=beside, ha="right", va="bottom", fontsize=9, color="#b34700")
    axes.set_xlabel("anomaly score", fontsize=9)
    axes.tick_params(labelsize=9)
    return figure


def _multiples(low: float, high: float) -> list[float]:
    """Round multiples of the threshold between two: of the coarsest steps that give at least three."""
    powers = [2.0**i for i in range(-10, 11)]
    tenths = [i / 10 for i in range(1, 40)]
    fine = [i / 50 for i in range(1, 200)]
    found: list[float] = []
    for marks in (powers, sorted({*powers, 0.7, 1.4}), tenths, fine):
        found = [mark for mark in marks if low <= mark <= high]
        if len(found) > 2:  # noqa: PLR2004 -- at least three
            break
    return found


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Heights for labels of these values, at least `gap` from one another, the highest at most at 100."""
    placed = [0.0] * len(values)
    above = 100 + gap
    for i in sorted(range(len(values)), key=lambda i: -values[i]):
        placed[i] = above = min(values[i], above - gap)
    return placed


def _round_range(values: Sequence[float]) -> tuple[float, float]:
    """The closest two of 1, 2, 5, 10 and so on with all values between them, and some room above for a label."""
    return max(mark for mark in _ROUND if mark < min(values)), min(mark for mark in _ROUND if mark > 1.1 * max(values))
