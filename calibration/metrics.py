"""How well scores and maps tell good from bad, given labels. Pure functions; raw scores, never clamped.

True means bad throughout: in `labels` for a part, in masks for a pixel. A map and its mask are H×W of one
size; sizes may differ between images. A measure that the data cannot define is NaN, not 0 or 0.5. A bad part
whose mask is empty says nothing about places: leave it out of the pixel measures and report how many.

scipy.stats and sklearn take a second to import, of which the daemon has no use: so functions do it.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import label

AnomalyMap = NDArray[np.float32]
Mask = NDArray[np.bool_]
_Floats = NDArray[np.floating[Any]]

_TOUCHING = np.ones((3, 3), dtype=np.int8)
"""Pixels that meet at a corner are one region: 8-connectivity, as MVTec AD counts."""

_RD_STEPS = 200
_RD_LIMIT = 0.3


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the probability that a bad part scores above a good one, ties counted half.

    NaN unless both kinds are present.

    Raises:
        ValueError: A score is not finite, a label is not 0 or 1, or their numbers differ.
    """
    good, bad = _by_label(scores, labels)
    return _area(np.sort(good), bad) if good.size and bad.size else math.nan


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean precision over the recalls that each distinct score reaches, without interpolation.

    It depends on the share of bad parts: compare it on one test set only. NaN unless both kinds are present.

    Raises:
        ValueError: As `image_auroc`.
    """
    from sklearn.metrics import average_precision_score

    good, bad = _by_label(scores, labels)
    return float(average_precision_score(*_ranked(good, bad))) if good.size and bad.size else math.nan


def f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the largest F1 of any threshold: an oracle that saw the answers, which no calibration reaches surely.

    It does not matter here whether a part at a threshold is rejected: a threshold between two scores splits the
    parts as one at the upper of the two does. NaN unless both kinds are present.

    Raises:
        ValueError: As `image_auroc`.
    """
    from sklearn.metrics import precision_recall_curve

    good, bad = _by_label(scores, labels)
    if not good.size or not bad.size:
        return math.nan
    precision, recall, _ = precision_recall_curve(*_ranked(good, bad))
    found = recall > 0  # where no bad part is found, F1 is 0 and its formula 0 / 0
    return float((2 / (1 / precision[found] + 1 / recall[found])).max())


def true_reject_rate(scores: ArrayLike, labels: ArrayLike, false_rejects: float) -> float:
    """Return the share of bad parts rejected while at most this share of the good ones is.

    The threshold is the lowest score of a good part that keeps to it, and parts strictly above are rejected:
    nothing is interpolated, and tied good parts pass together. Of 41 good parts, 0.01 allows none to be rejected.
    NaN unless both kinds are present.

    Raises:
        ValueError: As `image_auroc`, or `false_rejects` is not a share from 0 to below 1.
    """
    if not 0 <= false_rejects < 1:
        raise ValueError(f"false_rejects must lie from 0 to below 1, not {false_rejects}")
    good, bad = _by_label(scores, labels)
    if not good.size or not bad.size:
        return math.nan
    # As it was written: 0.29 is 29/100, which allows 29 of 100 parts, whatever binary floats say.
    last = good.size - 1 - math.floor(Fraction(str(false_rejects)) * good.size)
    return float(np.mean(bad > np.partition(good, last)[last]))


def bootstrap_interval(
    measure: Callable[[_Floats, Mask], float],
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a measure of scores and labels; good and bad parts drawn apart.

    NaN with fewer than two parts of either kind. Perfectly separated scores give (1, 1) however few they are:
    there, trust `binomial_interval` of the rejects and escapes. Drawing again never finds a good part above the
    worst one seen, so the interval of a `true_reject_rate` that hangs on the worst few leans upwards.

    Raises:
        ValueError: As `image_auroc`.
    """
    from scipy.stats import bootstrap

    good, bad = _by_label(scores, labels)
    if min(good.size, bad.size) < 2:  # noqa: PLR2004 -- one part has no spread
        return math.nan, math.nan
    truth, _ = _ranked(good, bad)
    drawn = bootstrap(
        (good, bad),
        lambda good, bad: measure(np.concatenate([good, bad]), truth),
        n_resamples=draws,
        vectorized=False,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def binomial_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a share after `k` of `n`, of Clopper and Pearson (1934).

    Raises:
        ValueError: `n` is 0, or `k` is not within 0 to `n`.
    """
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def pixel_auroc(maps: Sequence[AnomalyMap], masks: Sequence[Mask]) -> float:
    """Return the AUROC over the pixels of all images together, good images included.

    NaN unless there are both normal and bad pixels.
    """
    normal, bad, _ = _pool(maps, masks)
    return _area(normal, bad) if normal.size and bad.size else math.nan


def aupro(maps: Sequence[AnomalyMap], masks: Sequence[Mask], limit: float = 0.3) -> float:
    """Return the normalised area under the per-region overlap curve up to a false-positive rate.

    Exact, over all images at once, good images included, as the evaluation of MVTec AD (Bergmann et al.,
    IJCV 2021) defines it: the mean over bad regions of the share found, against the share of normal pixels
    falsely found, one point per distinct score, straight lines between, up to `limit`, divided by `limit`.
    A perfect map gives 1, a constant one limit / 2. NaN without a bad region or a normal pixel.
    """
    return _overlap_area(*_pool(maps, masks), limit)


def spro_area(
    maps: Sequence[AnomalyMap],
    regions: Sequence[Sequence[Mask]],
    saturations: Sequence[Sequence[float]],
    limit: float = 0.05,
) -> float:
    """Return `aupro` with regions that count as found once enough of them is: the AU-sPRO of MVTec LOCO.

    Of Bergmann et al., IJCV 2022: the overlap of a region is min(found / saturation, 1). The regions of an image are
    given one by one, may overlap, and may each be in pieces. A perfect map gives 1. NaN without a region or a normal
    pixel.

    Args:
        maps: One H×W map for each image.
        regions: For each image, one mask of the map's size for each region; none for a good image.
        saturations: For each region, how much of it has to be found, in pixels of the map; a larger value than its
            area stands for its area.
        limit: The largest false-positive rate, above 0 and up to 1.

    Raises:
        ValueError: The sizes do not fit together, a region is empty, or a saturation is not above 0.
    """
    masks, found = [], []
    for index, (anomaly_map, areas, enough) in enumerate(zip(maps, regions, saturations, strict=True)):
        mask = np.zeros(anomaly_map.shape, dtype=np.bool_)
        for area, saturation in zip(areas, enough, strict=True):
            if area.shape != mask.shape or area.dtype != np.bool_ or not area.any() or not saturation > 0:
                raise ValueError(
                    f"image {index}: a region is a boolean mask like its map {mask.shape}, not empty, with a saturation"
                    f" above 0; not {area.shape}, {area.dtype}, {np.count_nonzero(area)} pixels, {saturation}"
                )
            mask |= area
            found.append(_saturating(anomaly_map[area], saturation))
        masks.append(mask)
    normal, _, _ = _pool(maps, masks)
    if not found:
        return math.nan
    bad, weight = (np.concatenate(column) for column in zip(*found, strict=True))
    return _overlap_area(normal, bad, weight, limit)


def pro_per_image_rd(maps: Sequence[AnomalyMap], masks: Sequence[Mask]) -> float:
    """Return the per-image variant that the reverse-distillation papers print as AUPRO.

    For each bad image alone: 200 even steps over its own scores, the points below a false-positive rate of
    0.3, that rate divided by the largest one kept; then the mean over bad images. It forgives offsets between
    images and ignores good ones, so it must not be compared with `aupro` or with papers that report that.

    Where the kept points share one rate (a map of two values), there is no area and the best overlap
    counts; where none is kept or the map is constant, 0. NaN without a bad image.
    """
    areas = []
    for normal, bad, weight in (_split(*pair) for pair in _pairs(maps, masks)):
        if bad.size:
            areas.append(_rd_area(np.sort(normal), bad, weight))
    return float(np.mean(areas)) if areas else math.nan


def _overlap_area(normal: _Floats, bad: _Floats, weight: NDArray[np.float64], limit: float) -> float:
    """Return the area under the weight found against the rate of normal pixels, which are ascending, over `limit`."""
    if not 0 < limit <= 1:
        raise ValueError(f"limit must lie above 0 and up to 1, not {limit}")
    if not normal.size or not bad.size:
        return math.nan
    # Between two scores of bad pixels the curve runs level, so it bends only where it leaves and where it
    # reaches each of those scores. Nothing but the bad pixels, which are few, needs more than one sort.
    scores, group = np.unique(bad, return_inverse=True)
    found = np.cumsum(np.bincount(group, weight)[::-1])
    found = found / found[-1]
    scores = scores[::-1]
    leaving = normal.size - np.searchsorted(normal, scores, side="right")
    reaching = normal.size - np.searchsorted(normal, scores, side="left")
    rate = np.concatenate([np.column_stack([leaving, reaching]).ravel() / normal.size, [1.0]])
    overlap = np.concatenate([[0.0], np.repeat(found, 2)])
    within = rate <= limit
    end = np.interp(limit, rate, overlap)
    return float(np.trapezoid(np.append(overlap[within], end), np.append(rate[within], limit))) / limit


def _saturating(scores: AnomalyMap, saturation: float) -> tuple[AnomalyMap, NDArray[np.float64]]:
    """Return a region's pixels from the highest, the first ones weighing 1 / saturation up to 1 in all."""
    share = np.arange(scores.size + 1) / min(saturation, scores.size)
    return np.sort(scores)[::-1], np.diff(np.minimum(share, 1))


def _rd_area(normal: _Floats, bad: _Floats, weight: NDArray[np.float64]) -> float:
    lowest = float(min(bad.min(), normal.min(initial=np.inf)))
    highest = float(max(bad.max(), normal.max(initial=-np.inf)))
    if lowest == highest or not normal.size:
        return 0.0
    thresholds = np.arange(lowest, highest, (highest - lowest) / _RD_STEPS)
    rate = 1 - np.searchsorted(normal, thresholds, side="right") / normal.size
    order = np.argsort(bad)
    missed = np.concatenate([[0.0], np.cumsum(weight[order])])
    overlap = 1 - missed[np.searchsorted(bad[order], thresholds, side="right")] / missed[-1]
    kept = rate < _RD_LIMIT
    if not kept.any():
        return 0.0
    rate, overlap = rate[kept][::-1], overlap[kept][::-1]
    if rate[0] == rate[-1]:
        return float(overlap.max())
    return float(np.trapezoid(overlap, rate / rate[-1]))


def _ranked(good: _Floats, bad: _Floats) -> tuple[Mask, _Floats]:
    """Return labels and scores in the order that scikit-learn takes them."""
    return np.repeat([False, True], [good.size, bad.size]), np.concatenate([good, bad])


def _area(normal: _Floats, bad: _Floats) -> float:
    """Return the Mann-Whitney form of the AUROC; `normal` ascending. Needs no copy of the many normals."""
    below = np.searchsorted(normal, bad, side="left").astype(np.float64)
    not_above = np.searchsorted(normal, bad, side="right")
    return float((below + not_above).mean()) / (2 * normal.size)


def _by_label(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != truth.shape:
        raise ValueError(f"one score and one label per part, not shapes {values.shape} and {truth.shape}")
    if not np.isfinite(values).all():
        raise ValueError("a score is not a finite number")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("labels are 0 for good and 1 for bad parts")
    return values[truth == 0], values[truth == 1]


def _pool(maps: Sequence[AnomalyMap], masks: Sequence[Mask]) -> tuple[AnomalyMap, AnomalyMap, NDArray[np.float64]]:
    """Put the pixels of all images together: normal ones ascending, bad ones with their weights."""
    parts = [_split(*pair) for pair in _pairs(maps, masks)]
    if not parts:
        raise ValueError("there is no map to measure")
    normal, bad, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    normal.sort()
    return normal, bad, weight


def _split(anomaly_map: AnomalyMap, mask: Mask) -> tuple[AnomalyMap, AnomalyMap, NDArray[np.float64]]:
    """Part a map into normal and bad pixels; each bad one weighs 1 / area, so that every region weighs 1."""
    regions, _ = label(mask, _TOUCHING)
    inside = regions[mask]
    return anomaly_map[~mask], anomaly_map[mask], 1 / np.bincount(inside)[inside]


def _pairs(maps: Sequence[AnomalyMap], masks: Sequence[Mask]) -> list[tuple[AnomalyMap, Mask]]:
    if len(maps) != len(masks):
        raise ValueError(f"{len(maps)} maps but {len(masks)} masks")
    pairs = list(zip(maps, masks, strict=True))
    for index, (anomaly_map, mask) in enumerate(pairs):
        if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:  # noqa: PLR2004 -- height and width
            raise ValueError(f"image {index}: map {anomaly_map.shape} and mask {mask.shape} must be one H×W")
        if mask.dtype != np.bool_:
            raise ValueError(f"image {index}: the mask must be boolean, not {mask.dtype}")
        if not np.isfinite(anomaly_map).all():
            raise ValueError(f"image {index}: the map has a pixel that is not a finite number")
    return pairs
