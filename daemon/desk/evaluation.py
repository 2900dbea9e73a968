"""How well a calibrated model does on images with known answers."""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from calibration import metrics
from calibration.calibration import Calibration
from daemon.desk import dataset
from daemon.desk.dataset import Labelled
from daemon.desk.lens import Lens
from detectors.base import AnomalyMap, Detector


@dataclass(frozen=True, slots=True)
class Judged:
    """One part of the test set: its image file, its true defect ("good" for none), and what was made of it."""

    path: str
    defect: str
    score: float
    rejected: bool


@dataclass(frozen=True, slots=True)
class Observed:
    """What judging a test set gave, an entry a part in each list.

    A mask is None where nothing is known of places: for a bad part without a mask, or with an empty one.
    Regions come with their saturations.
    """

    parts: tuple[Judged, ...]
    maps: list[AnomalyMap]
    masks: list[metrics.Mask | None]
    regions: list[list[tuple[metrics.Mask, float]]]
    milliseconds: list[float]
    peak_memory_mb: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one test set.

    AUROC, average precision and AUPRO (to 30 % false positives, over the whole set) do not depend on the threshold,
    nor does `f1_max`, the oracle: the best F1 of any threshold chosen with the answers known. `image_auroc_by_defect`
    sets each defect against the good parts, and `image_auroc_mean` is the mean over defects, each weighing alike
    (the headline of MVTec LOCO). `true_reject_at_1` is the share of bad parts rejected by a threshold that rejects
    at most 1 % of the good test parts, `true_reject_at_5` at most 5 %. Pixel figures are NaN without masks, and are
    of `n_masked` bad parts with one. `au_spro` is MVTec LOCO's AU-sPRO (to 5 % false positives), as published the
    mean over defects, each with the good parts; NaN where the data set defines no saturations. `pro_per_image_rd` is
    the RD papers' per-image variant, not comparable with AUPRO. Rates are shares of 0…1 at the calibrated threshold;
    intervals are of 95 %, NaN where a single part leaves them undefined. Latency is from pixels to prediction, one
    image at a time, without reading the file. `peak_memory_mb` is the most main memory the process has held until the
    last part was judged, in 10^6 bytes: libraries, model, and the maps of all images; a GPU's own memory is not in
    it. `missed` and `present` count escapes and parts by defect; `parts` are in the order judged.
    """

    image_auroc: float
    image_auroc_interval: tuple[float, float]
    image_auroc_by_defect: dict[str, float]
    image_auroc_mean: float
    average_precision: float
    f1_max: float
    true_reject_at_1: float
    true_reject_at_1_interval: tuple[float, float]
    true_reject_at_5: float
    true_reject_at_5_interval: tuple[float, float]
    pixel_auroc: float
    aupro: float
    au_spro: float
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
    n_masked: int
    latency_ms_p50: float
    latency_ms_p99: float
    peak_memory_mb: float
    missed: dict[str, int]
    present: dict[str, int]
    parts: tuple[Judged, ...]


def evaluate(
    detector: Detector,
    calibration: Calibration,
    items: Sequence[Labelled],
    advance: Callable[[], None],
    lens: Lens = Lens(),  # noqa: B008 -- frozen
) -> Evaluation:
    """Judge every image once, in order, and measure; `advance` is called after each.

    `items` hold at least one good and one bad part; `lens` shows them, and their masks.
    """
    return figures(observe(detector, calibration, items, advance, lens), calibration)


def observe(
    detector: Detector,
    calibration: Calibration,
    items: Sequence[Labelled],
    advance: Callable[[], None],
    lens: Lens = Lens(),  # noqa: B008 -- frozen
) -> Observed:
    """Judge every image once, in order; `advance` is called after each."""
    parts: list[Judged] = []
    maps: list[AnomalyMap] = []
    masks: list[metrics.Mask | None] = []
    regions: list[list[tuple[metrics.Mask, float]]] = []
    milliseconds: list[float] = []
    for item in items:
        image, framing = lens.read(item.path), lens.lacking(item.path)
        began = time.perf_counter()
        (prediction,) = detector.predict([image])
        milliseconds.append((time.perf_counter() - began) * 1000)
        score = prediction.anomaly_score
        parts.append(Judged(str(item.path), item.defect, score, not calibration.passes(score)))
        maps.append(prediction.anomaly_map)
        mask = dataset.read_mask(item.mask, prediction.anomaly_map.shape, framing)
        masks.append(mask if item.good or mask.any() else None)
        regions.append(dataset.read_regions(item, prediction.anomaly_map.shape, framing))
        advance()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Observed(tuple(parts), maps, masks, regions, milliseconds, peak_kib * 1024 / 1e6)


def figures(observed: Observed, calibration: Calibration) -> Evaluation:
    """Measure what was observed. Pure; at least one good and one bad part."""
    parts = observed.parts
    scores = np.array([part.score for part in parts])
    rejected = np.array([part.rejected for part in parts])
    defect = np.array([part.defect for part in parts])
    good, kinds = defect == "good", sorted({part.defect for part in parts} - {"good"})
    bad = ~good
    n_good, n_defect = int(good.sum()), int(bad.sum())
    false_rejects, escapes = int(rejected[good].sum()), int((~rejected[bad]).sum())
    by_defect = {
        kind: metrics.image_auroc(scores[against], bad[against])
        for kind, against in ((kind, good | (defect == kind)) for kind in kinds)
    }
    at_1, at_5 = (partial(metrics.true_reject_rate, false_rejects=share) for share in (0.01, 0.05))
    pictured = [(m, mask) for m, mask in zip(observed.maps, observed.masks, strict=True) if mask is not None]
    maps, masks = [anomaly_map for anomaly_map, _ in pictured], [mask for _, mask in pictured]
    n_masked = len(pictured) - n_good
    return Evaluation(
        image_auroc=metrics.image_auroc(scores, bad),
        image_auroc_interval=metrics.bootstrap_interval(metrics.image_auroc, scores, bad),
        image_auroc_by_defect=by_defect,
        image_auroc_mean=float(np.mean(list(by_defect.values()))),
        average_precision=metrics.average_precision(scores, bad),
        f1_max=metrics.f1_max(scores, bad),
        true_reject_at_1=at_1(scores, bad),
        true_reject_at_1_interval=metrics.bootstrap_interval(at_1, scores, bad),
        true_reject_at_5=at_5(scores, bad),
        true_reject_at_5_interval=metrics.bootstrap_interval(at_5, scores, bad),
        pixel_auroc=metrics.pixel_auroc(maps, masks) if n_masked else math.nan,
        aupro=metrics.aupro(maps, masks) if n_masked else math.nan,
        au_spro=_au_spro(observed, kinds),
        pro_per_image_rd=metrics.pro_per_image_rd(maps, masks) if n_masked else math.nan,
        threshold=calibration.threshold,
        alpha=calibration.alpha,
        alpha_carried=calibration.alpha_carried,
        false_reject_rate=false_rejects / n_good,
        false_reject_interval=metrics.binomial_interval(false_rejects, n_good),
        escape_rate=escapes / n_defect,
        escape_interval=metrics.binomial_interval(escapes, n_defect),
        n_good=n_good,
        n_defect=n_defect,
        n_masked=n_masked,
        latency_ms_p50=float(np.percentile(observed.milliseconds, 50)),
        latency_ms_p99=float(np.percentile(observed.milliseconds, 99)),
        peak_memory_mb=observed.peak_memory_mb,
        missed={kind: int((~rejected[defect == kind]).sum()) for kind in kinds},
        present={kind: int((defect == kind).sum()) for kind in kinds},
        parts=parts,
    )


def _au_spro(observed: Observed, kinds: Sequence[str]) -> float:
    judged = list(zip(observed.parts, observed.maps, observed.regions, strict=True))
    good = [(seen, regions) for part, seen, regions in judged if part.defect == "good"]
    areas: list[float] = []
    for kind in kinds:
        bad = [(seen, regions) for part, seen, regions in judged if part.defect == kind and regions]
        if bad:
            maps, found = zip(*good, *bad, strict=True)
            masks, saturations = ([[pair[i] for pair in regions] for regions in found] for i in (0, 1))
            areas.append(metrics.spro_area(maps, masks, saturations))
    return float(np.mean(areas)) if areas else math.nan
