"""How well scores and maps tell good from bad, given labels. Pure functions; raw scores, never clamped.

True means bad throughout: in `labels` for a part, in masks for a pixel. A map and its mask are H×W of one
size; sizes may differ between images. A measure that the data cannot define is NaN, not 0 or 0.5. A bad part
whose mask is empty says nothing about places: leave it out of the pixel measures and report how many.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import label
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import roc_auc_score

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
    if not good.size or not bad.size:
        return math.nan
    truth = np.repeat([False, True], [good.size, bad.size])
    return float(roc_auc_score(truth, np.concatenate([good, bad])))


def bootstrap_interval(
    scores: ArrayLike, labels: ArrayLike, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `image_auroc`, good and bad parts drawn apart.

    NaN with fewer than two parts of either kind. Perfectly separated scores give (1, 1) however few they are:
    there, trust `binomial_interval` of the rejects and escapes.
    """
    good, bad = _by_label(scores, labels)
    if min(good.size, bad.size) < 2:  # noqa: PLR2004 -- one part has no spread
        return math.nan, math.nan
    drawn = bootstrap(
        (good, bad),
        lambda good, bad: _area(np.sort(good), bad),
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
    if not 0 < limit <= 1:
        raise ValueError(f"limit must lie above 0 and up to 1, not {limit}")
    normal, bad, weight = _pool(maps, masks)
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
