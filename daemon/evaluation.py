"""How well a calibrated model does on images with known answers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calibration import metrics
from calibration.calibration import Calibration
from daemon import dataset
from daemon.dataset import Labelled
from detectors.base import AnomalyMap, Detector


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one test set.

    AUROC and AUPRO (to 30 % false positives, over the whole set) do not depend on the threshold; pixel figures are
    NaN without masks. `pro_per_image_rd` is the RD papers' per-image variant, not comparable with AUPRO. Rates are
    shares of 0…1 at the calibrated threshold. Latency is from pixels to prediction, one image at a time, without
    reading the file. `missed` and `present` count escapes and parts by defect.
    """

    image_auroc: float
    image_auroc_interval: tuple[float, float]
    pixel_auroc: float
    aupro: float
    pro_per_image_rd: float
    threshold: float
    alpha: float
    alpha_carried: float
    false_reject_rate: float
    false_reject_interval: tuple[float, float]
    escape_rate: float
    escape_interval: tuple[float, float]
    n_good: int
    n_defect: int
    latency_ms_p50: float
    latency_ms_p99: float
    missed: dict[str, int]
    present: dict[str, int]


def evaluate(
    detector: Detector, calibration: Calibration, items: Sequence[Labelled], advance: Callable[[], None]
) -> Evaluation:
    """Judge every image once, in order; `advance` is called after each."""
    scores: list[float] = []
    milliseconds: list[float] = []
    maps: list[AnomalyMap] = []
    for item in items:
        image = dataset.read_image(item.path)
        began = time.perf_counter()
        (prediction,) = detector.predict([image])
        milliseconds.append((time.perf_counter() - began) * 1000)
        scores.append(prediction.anomaly_score)
        maps.append(prediction.anomaly_map)
        advance()
    good = np.array([item.good for item in items])
    rejected = np.array([not calibration.passes(score) for score in scores])
    # A defect without a mask says nothing of pixels; good parts are all background.
    pictured = [i for i, item in enumerate(items) if item.good or item.mask]
    masks = [dataset.read_mask(items[i].mask, maps[i].shape) for i in pictured]
    pictured_maps = [maps[i] for i in pictured]
    has_masks = any(mask.any() for mask in masks)
    defects = sorted({item.defect for item in items if not item.good})
    n_good, n_defect = int(good.sum()), int((~good).sum())
    false_rejects, escapes = int(rejected[good].sum()), int((~rejected[~good]).sum())
    return Evaluation(
        image_auroc=metrics.image_auroc(scores, ~good),
        image_auroc_interval=metrics.bootstrap_interval(scores, ~good),
        pixel_auroc=metrics.pixel_auroc(pictured_maps, masks) if has_masks else float("nan"),
        aupro=metrics.aupro(pictured_maps, masks) if has_masks else float("nan"),
        pro_per_image_rd=metrics.pro_per_image_rd(pictured_maps, masks) if has_masks else float("nan"),
        threshold=calibration.threshold,
        alpha=calibration.alpha,
        alpha_carried=calibration.alpha_carried,
        false_reject_rate=false_rejects / n_good,
        false_reject_interval=metrics.binomial_interval(false_rejects, n_good),
        escape_rate=escapes / n_defect,
        escape_interval=metrics.binomial_interval(escapes, n_defect),
        n_good=n_good,
        n_defect=n_defect,
        latency_ms_p50=float(np.percentile(milliseconds, 50)),
        latency_ms_p99=float(np.percentile(milliseconds, 99)),
        missed={d: sum(1 for i, r in zip(items, rejected, strict=True) if i.defect == d and not r) for d in defects},
        present={d: sum(1 for i in items if i.defect == d) for d in defects},
    )
