"""The measures agree with closed forms, with brute force, and with what they must not depend on."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import label
from scipy.stats import beta
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from calibration.metrics import (
    AnomalyMap,
    Mask,
    aupro,
    average_precision,
    binomial_interval,
    bootstrap_interval,
    f1_max,
    image_auroc,
    pixel_auroc,
    pro_per_image_rd,
    spro_area,
    true_reject_rate,
)

Images = tuple[list[AnomalyMap], list[Mask]]
Measure = Callable[[ArrayLike, ArrayLike], float]

PART_MEASURES: list[Measure] = [
    image_auroc,
    average_precision,
    f1_max,
    partial(true_reject_rate, false_rejects=0.0),
    partial(true_reject_rate, false_rejects=0.3),
]
of_parts = pytest.mark.parametrize("measure", PART_MEASURES)
seeds = st.integers(0, 10**6)
some_parts = st.tuples(
    st.lists(st.integers(0, 6), min_size=1, max_size=12), st.lists(st.integers(2, 8), min_size=1, max_size=12)
)
unhurried = settings(deadline=None, max_examples=60)


def images(seed: int, *, levels: int | None = None, size: int = 12, strength: float = 1.5) -> Images:
    """Make two bad images and one good one, with corner-touching regions; `levels` makes ties."""
    random = np.random.default_rng(seed)
    maps, masks = [], []
    for _ in range(2):
        mask = random.random((size, size)) < 0.08
        mask[2:5, 2:4] = True
        mask[5, 4] = True
        maps.append((random.normal(size=(size, size)) + strength * mask).astype(np.float32))
        masks.append(mask)
    maps.append(random.normal(size=(size, size)).astype(np.float32))
    masks.append(np.zeros((size, size), dtype=bool))
    if levels:
        maps = [np.round(anomaly_map * levels / 4).astype(np.float32) for anomaly_map in maps]
    return maps, masks


def as_maps(masks: Sequence[Mask]) -> list[AnomalyMap]:
    return [mask.astype(np.float32) for mask in masks]


def brute_force_aupro(maps: list[AnomalyMap], masks: list[Mask], limit: float) -> float:
    """Do what the definition says, threshold by threshold and region by region."""
    regions = []
    for index, mask in enumerate(masks):
        numbered, count = label(mask, np.ones((3, 3)))
        regions += [(index, numbered == number) for number in range(1, count + 1)]
    normals = sum(int((~mask).sum()) for mask in masks)
    curve = [(0.0, 0.0)]
    for threshold in sorted({float(score) for m in maps for score in m.ravel()}, reverse=True):
        found = [m >= threshold for m in maps]
        false = sum(int((hit & ~mask).sum()) for hit, mask in zip(found, masks, strict=True))
        overlap = [float(found[index][region].mean()) for index, region in regions]
        curve.append((false / normals, sum(overlap) / len(overlap)))
    return area_up_to(curve, limit)


def area_up_to(curve: list[tuple[float, float]], limit: float) -> float:
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)  # noqa: PLW2901 -- cut at the limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


@unhurried
@given(seeds, st.sampled_from([None, 1, 2, 5, 20]), st.sampled_from([0.01, 0.05, 0.3, 1.0]))
def test_aupro_agrees_with_brute_force(seed: int, levels: int | None, limit: float) -> None:
    maps, masks = images(seed, levels=levels)
    assert aupro(maps, masks, limit) == pytest.approx(brute_force_aupro(maps, masks, limit), abs=1e-12)


def test_regions_weigh_alike_whatever_their_area() -> None:
    mask = np.zeros((10, 10), dtype=bool)
    mask[0, 0] = True
    mask[4:8, 4:8] = True
    only_the_small_one = np.zeros((10, 10), dtype=np.float32)
    only_the_small_one[0, 0] = 1
    # Half the regions are found at once; the rest of the curve is the straight line from 1/2 to 1.
    assert aupro([only_the_small_one], [mask], limit=1.0) == pytest.approx(0.75)


def test_pixels_that_meet_at_a_corner_are_one_region() -> None:
    mask = np.zeros((6, 6), dtype=bool)
    mask[0, 0] = mask[1, 1] = mask[1, 2] = True
    mask[4, 4] = True
    found = np.zeros((6, 6), dtype=np.float32)
    found[0, 0] = 1
    # One of three pixels of one of two regions: 1/6, from there straight to 1.
    assert aupro([found], [mask], limit=1.0) == pytest.approx((1 / 6 + 1) / 2)


def test_aupro_of_a_perfect_map_is_one() -> None:
    _, masks = images(1)
    assert aupro(as_maps(masks), masks) == 1.0


def test_aupro_of_an_inverted_perfect_map_is_zero() -> None:
    _, masks = images(1)
    assert aupro([1 - perfect for perfect in as_maps(masks)], masks) == 0.0


@pytest.mark.parametrize("height", [0.0, 1.0, -7.5])
def test_aupro_of_a_constant_map_is_half_the_limit(height: float) -> None:
    _, masks = images(1)
    maps = [np.full(mask.shape, height, dtype=np.float32) for mask in masks]
    assert aupro(maps, masks) == pytest.approx(0.15, rel=1e-15)
    assert aupro(maps, masks, limit=0.05) == pytest.approx(0.025, rel=1e-15)


def test_aupro_of_a_random_map_is_near_half_the_limit() -> None:
    maps, masks = images(3, size=200, strength=0)
    assert aupro(maps, masks) == pytest.approx(0.15, abs=0.02)


@unhurried
@given(seeds, st.sampled_from([None, 5]))
@pytest.mark.parametrize("measure", [aupro, pixel_auroc])
def test_pixel_measures_keep_under_any_increasing_transform(
    measure: Callable[[list[AnomalyMap], list[Mask]], float], seed: int, levels: int | None
) -> None:
    maps, masks = images(seed, levels=levels)
    ranks = np.unique(np.concatenate([m.ravel() for m in maps]))
    ranked = [(np.searchsorted(ranks, m) ** 2 - 50).astype(np.float32) for m in maps]
    assert measure(ranked, masks) == measure(maps, masks)


@pytest.mark.parametrize("measure", [aupro, pixel_auroc, pro_per_image_rd])
def test_the_order_of_the_images_does_not_matter(
    measure: Callable[[list[AnomalyMap], list[Mask]], float],
) -> None:
    maps, masks = images(4)
    assert measure(maps[::-1], masks[::-1]) == pytest.approx(measure(maps, masks), abs=1e-14)


def test_a_good_image_that_looks_bad_lowers_aupro() -> None:
    _, masks = images(5)
    maps = as_maps(masks)
    maps[-1] += 2
    # A third of the pixels, all normal, come first: nothing is found before the limit of 0.3.
    assert aupro(maps, masks) == 0.0
    assert pro_per_image_rd(maps, masks) == 1.0


def test_images_of_different_sizes_are_measured_together() -> None:
    maps, masks = images(6, size=12)
    more_maps, more_masks = images(7, size=17)
    maps, masks = maps + more_maps, masks + more_masks
    assert aupro(maps, masks) == pytest.approx(brute_force_aupro(maps, masks, 0.3), abs=1e-12)


def test_without_good_images_the_normal_pixels_of_bad_ones_count() -> None:
    maps, masks = images(8)
    assert aupro(maps[:2], masks[:2]) == pytest.approx(brute_force_aupro(maps[:2], masks[:2], 0.3), abs=1e-12)


@pytest.mark.parametrize("measure", [aupro, pixel_auroc, pro_per_image_rd])
def test_without_a_bad_pixel_there_is_nothing_to_measure(
    measure: Callable[[list[AnomalyMap], list[Mask]], float],
) -> None:
    maps, masks = images(9)
    assert math.isnan(measure(maps[2:], masks[2:]))


@pytest.mark.parametrize("measure", [aupro, pixel_auroc])
def test_without_a_normal_pixel_there_is_nothing_to_measure(
    measure: Callable[[list[AnomalyMap], list[Mask]], float],
) -> None:
    maps, masks = images(9)
    assert math.isnan(measure(maps[:1], [np.ones_like(masks[0])]))


@pytest.mark.parametrize("measure", [aupro, pixel_auroc, pro_per_image_rd])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_map_with_a_pixel_that_is_no_number_is_refused_with_its_place(
    measure: Callable[[list[AnomalyMap], list[Mask]], float], bad: float
) -> None:
    maps, masks = images(10)
    maps[1][3, 3] = bad
    with pytest.raises(ValueError, match="image 1: the map has a pixel"):
        measure(maps, masks)


@pytest.mark.parametrize("measure", [aupro, pixel_auroc, pro_per_image_rd])
def test_maps_and_masks_that_do_not_belong_together_are_refused(
    measure: Callable[[list[AnomalyMap], list[Mask]], float],
) -> None:
    maps, masks = images(11)
    with pytest.raises(ValueError, match="3 maps but 2 masks"):
        measure(maps, masks[:2])
    with pytest.raises(ValueError, match="must be one H×W"):
        measure([maps[0]], [masks[0][1:]])
    with pytest.raises(ValueError, match="must be boolean, not uint8"):
        measure(maps[:1], [masks[0].astype(np.uint8)])


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1])
def test_a_limit_that_is_no_share_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="limit must lie"):
        aupro(*images(11), limit)


def test_no_images_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="no map"):
        aupro([], [])


def one_by_one(masks: Sequence[Mask]) -> list[list[Mask]]:
    regions = []
    for mask in masks:
        numbered, count = label(mask, np.ones((3, 3)))
        regions.append([numbered == number for number in range(1, count + 1)])
    return regions


@unhurried
@given(seeds, st.sampled_from([None, 1, 5]), st.sampled_from([0.05, 0.3]))
def test_regions_that_saturate_at_their_area_give_aupro(seed: int, levels: int | None, limit: float) -> None:
    maps, masks = images(seed, levels=levels)
    regions = one_by_one(masks)
    areas = [[float(region.sum()) for region in of_image] for of_image in regions]
    beyond = [[2 * area for area in of_image] for of_image in areas]
    assert spro_area(maps, regions, areas, limit) == pytest.approx(aupro(maps, masks, limit), abs=1e-12)
    assert spro_area(maps, regions, beyond, limit) == pytest.approx(aupro(maps, masks, limit), abs=1e-12)


@unhurried
@given(seeds, st.sampled_from([None, 1, 5]), st.sampled_from([0.05, 0.3, 1.0]), st.floats(0.3, 9))
def test_saturating_overlap_agrees_with_brute_force(
    seed: int, levels: int | None, limit: float, saturation: float
) -> None:
    maps, masks = images(seed, levels=levels)
    regions = one_by_one(masks)
    # A further region that overlaps others and is in two pieces.
    regions[0].append(np.pad(np.ones((2, 6), bool), ((4, 6), (3, 3))))
    regions[0][-1][11, :3] = True
    outside = [~np.any([np.zeros_like(masks[0]), *of_image], axis=0) for of_image in regions]
    curve = [(0.0, 0.0)]
    for threshold in sorted({float(score) for m in maps for score in m.ravel()}, reverse=True):
        found = [m >= threshold for m in maps]
        overlap = [
            min(float((hit & region).sum()) / min(saturation, region.sum()), 1)
            for hit, of_image in zip(found, regions, strict=True)
            for region in of_image
        ]
        false = sum(int((hit & normal).sum()) for hit, normal in zip(found, outside, strict=True))
        curve.append((false / sum(int(normal.sum()) for normal in outside), float(np.mean(overlap))))
    saturations = [[saturation] * len(of_image) for of_image in regions]
    assert spro_area(maps, regions, saturations, limit) == pytest.approx(area_up_to(curve, limit), abs=1e-12)


def test_finding_enough_of_a_region_is_finding_it() -> None:
    region = np.zeros((10, 10), dtype=bool)
    region[2:6, 2:6] = True
    found = np.zeros((10, 10), dtype=np.float32)
    found[2:4, 2:6] = 1
    assert spro_area([found], [[region]], [[8]]) == 1.0
    # Half of 16 at once; the rest on the line to 1, of which 5 % is reached.
    assert spro_area([found], [[region]], [[16]]) == pytest.approx(0.5 + 0.05 * 0.5 / 2)


def test_saturating_overlap_without_a_region_or_a_normal_pixel_is_undefined() -> None:
    maps, _ = images(15)
    assert math.isnan(spro_area(maps, [[], [], []], [[], [], []]))
    assert math.isnan(spro_area(maps[:1], [[np.ones((12, 12), bool)]], [[3]]))


def test_regions_that_cannot_be_used_are_refused_with_their_image() -> None:
    maps, masks = images(16)
    numbers: Any = masks[0].astype(np.uint8)
    for region, saturation in ((masks[0][1:], 3), (numbers, 3), (np.zeros_like(masks[0]), 3), (masks[0], 0)):
        with pytest.raises(ValueError, match="image 1: a region is a boolean mask"):
            spro_area(maps[:2], [[], [region]], [[], [saturation]])
    with pytest.raises(ValueError, match="shorter than"):
        spro_area(maps[:2], [[], []], [[]])


@unhurried
@given(seeds, st.sampled_from([None, 1, 5]))
def test_pixel_auroc_agrees_with_scikit_learn(seed: int, levels: int | None) -> None:
    maps, masks = images(seed, levels=levels)
    expected = roc_auc_score(
        np.concatenate([mask.ravel() for mask in masks]), np.concatenate([m.ravel() for m in maps])
    )
    assert pixel_auroc(maps, masks) == pytest.approx(expected, abs=1e-12)


def test_pixel_auroc_of_perfect_constant_and_inverted_maps() -> None:
    _, masks = images(12)
    perfect = as_maps(masks)
    assert pixel_auroc(perfect, masks) == 1.0
    assert pixel_auroc([0 * m for m in perfect], masks) == 0.5
    assert pixel_auroc([1 - m for m in perfect], masks) == 0.0


def loop_pro_per_image(anomaly_map: AnomalyMap, mask: Mask) -> float:
    """Follow the published recipe for one image, step by step."""
    numbered, count = label(mask, np.ones((3, 3)))
    lowest, highest = float(anomaly_map.min()), float(anomaly_map.max())
    rates, overlaps = [], []
    for threshold in np.arange(lowest, highest, (highest - lowest) / 200):
        found = anomaly_map.astype(np.float64) > threshold
        overlaps.append(np.mean([found[numbered == number].mean() for number in range(1, count + 1)]))
        rates.append(found[~mask].mean())
    rate, overlap = np.array(rates), np.array(overlaps)
    rate, overlap = rate[rate < 0.3], overlap[rate < 0.3]
    return float(np.trapezoid(overlap[::-1], rate[::-1] / rate.max()))


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_the_per_image_variant_agrees_with_its_recipe(seed: int) -> None:
    maps, masks = images(seed)
    expected = np.mean([loop_pro_per_image(maps[index], masks[index]) for index in range(2)])
    assert pro_per_image_rd(maps, masks) == pytest.approx(expected, abs=1e-9)


def test_the_per_image_variant_forgives_offsets_between_images_and_aupro_does_not() -> None:
    maps, masks = images(13, size=40)
    shifted = [maps[0], maps[1] + 8, maps[2] + 4]
    assert pro_per_image_rd(shifted, masks) == pytest.approx(pro_per_image_rd(maps, masks), abs=0.01)
    assert aupro(shifted, masks) < aupro(maps, masks) - 0.1


def test_the_per_image_variant_is_a_number_on_binary_and_constant_maps() -> None:
    _, masks = images(14)
    perfect = as_maps(masks)
    assert pro_per_image_rd(perfect, masks) == 1.0
    assert pro_per_image_rd([1 - m for m in perfect], masks) == 0.0
    assert pro_per_image_rd([0 * m for m in perfect], masks) == 0.0
    half = np.zeros((4, 4), dtype=bool)
    half[0, :2] = True
    found = np.zeros((4, 4), dtype=np.float32)
    found[0, 0] = 1
    assert pro_per_image_rd([found], [half]) == 0.5
    assert pro_per_image_rd([found], [np.ones((4, 4), dtype=bool)]) == 0.0


def test_image_auroc_of_known_cases() -> None:
    labels = [0, 0, 1, 1]
    assert image_auroc([1.0, 2.0, 3.0, 4.0], labels) == 1.0
    assert image_auroc([4.0, 3.0, 2.0, 1.0], labels) == 0.0
    assert image_auroc([5.0, 5.0, 5.0, 5.0], labels) == 0.5
    assert image_auroc([1.0, 2.0, 2.0, 3.0], np.array(labels, dtype=bool)) == 0.875


def test_average_precision_of_known_cases() -> None:
    labels = [0, 0, 1, 1]
    assert average_precision([1.0, 2.0, 3.0, 4.0], labels) == 1.0
    # From above: bad at precision 1, good, bad at precision 2/3, good.
    assert average_precision([1.0, 3.0, 2.0, 4.0], labels) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([4.0, 3.0, 2.0, 1.0], labels) == pytest.approx((1 / 3 + 2 / 4) / 2)
    # Tied parts are found together, at the precision they have in common.
    assert average_precision([5.0, 5.0, 5.0, 5.0], labels) == 0.5


def test_f1_max_of_known_cases() -> None:
    labels = [0, 0, 1, 1]
    assert f1_max([1.0, 2.0, 3.0, 4.0], labels) == 1.0
    # Reject the upper three: both bad parts and one good one.
    assert f1_max([1.0, 3.0, 2.0, 4.0], labels) == pytest.approx(4 / 5)
    # Nothing better than to reject everything.
    assert f1_max([4.0, 3.0, 2.0, 1.0], labels) == pytest.approx(4 / 6)
    assert f1_max([5.0, 5.0, 5.0, 5.0], labels) == pytest.approx(4 / 6)
    # A good and a bad part tied on top come and go together.
    assert f1_max([1.0, 4.0, 3.0, 4.0], labels) == pytest.approx(4 / 5)
    assert f1_max([1.0, 4.0, 0.0, 4.0], labels) == pytest.approx(4 / 6)


def test_true_rejects_of_known_cases() -> None:
    scores, labels = [1.0, 2.0, 3.0, 4.0, 2.5, 3.5, 4.0, 4.5], [0, 0, 0, 0, 1, 1, 1, 1]
    # The bad part that ties with the worst good one passes with it.
    assert true_reject_rate(scores, labels, 0.0) == 1 / 4
    assert true_reject_rate(scores, labels, 0.24) == 1 / 4
    assert true_reject_rate(scores, labels, 0.25) == 3 / 4
    assert true_reject_rate(scores, labels, 0.5) == 1.0
    assert true_reject_rate(scores, labels, 0.99) == 1.0


def test_tied_good_parts_are_not_split_to_use_up_the_allowance() -> None:
    scores, labels = [1.0, 3.0, 3.0, 3.0, 2.0, 3.0, 4.0], [0, 0, 0, 0, 1, 1, 1]
    # Two of four may be rejected, but below 3.0 it would be three.
    assert true_reject_rate(scores, labels, 0.5) == 1 / 3
    assert true_reject_rate(scores, labels, 0.75) == 1.0


@pytest.mark.parametrize(
    ("good", "share", "allowed"),
    [(41, 0.01, 0), (99, 0.01, 0), (100, 0.01, 1), (19, 0.05, 0), (20, 0.05, 1), (41, 0.05, 2), (100, 0.29, 29)],
)
def test_the_allowed_false_rejects_are_whole_parts_rounded_down(good: int, share: float, allowed: int) -> None:
    scores = np.arange(good, dtype=float)
    # One bad part above each good one: rejected are those above the threshold, which is good part number n - allowed.
    both, labels = np.concatenate([scores, scores + 0.5]), np.repeat([False, True], good)
    assert true_reject_rate(both, labels, share) == (allowed + 1) / good


@pytest.mark.parametrize("share", [-0.01, 1.0, math.nan])
def test_false_rejects_that_are_no_share_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="false_rejects must lie"):
        true_reject_rate([1.0, 2.0], [0, 1], share)


@unhurried
@given(some_parts)
def test_measures_of_parts_agree_with_brute_force_and_scikit_learn(parts: tuple[list[int], list[int]]) -> None:
    good, bad = (np.array(scores, dtype=float) for scores in parts)
    scores, labels = np.concatenate(parts).astype(float), np.repeat([False, True], [good.size, bad.size])
    assert image_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    thresholds = np.concatenate([[-1.0], np.unique(scores)])
    assert f1_max(scores, labels) == pytest.approx(max(f1_score(labels, scores > t) for t in thresholds), abs=1e-12)
    for allowed in range(good.size):
        found = max(float(np.mean(bad > t)) for t in np.unique(good) if (good > t).sum() <= allowed)
        assert true_reject_rate(scores, labels, allowed / good.size + 1e-9) == found


@of_parts
@settings(deadline=None, max_examples=25)
@given(some_parts)
def test_measures_of_parts_keep_under_any_increasing_transform(
    measure: Measure, parts: tuple[list[int], list[int]]
) -> None:
    scores, labels = np.concatenate(parts).astype(float), np.repeat([False, True], [len(p) for p in parts])
    assert measure(np.exp(scores) - 40, labels) == measure(scores, labels)


@of_parts
@settings(deadline=None, max_examples=25)
@given(some_parts, seeds)
def test_the_order_of_the_parts_does_not_matter(
    measure: Measure, parts: tuple[list[int], list[int]], seed: int
) -> None:
    scores, labels = np.concatenate(parts).astype(float), np.repeat([False, True], [len(p) for p in parts])
    order = np.random.default_rng(seed).permutation(scores.size)
    assert measure(scores[order], labels[order]) == measure(scores, labels)


@of_parts
@pytest.mark.parametrize("labels", [[0, 0], [True, True]])
def test_measures_of_one_kind_of_part_alone_are_undefined(measure: Measure, labels: list[int]) -> None:
    assert math.isnan(measure([1.0, 2.0], labels))
    assert all(math.isnan(bound) for bound in bootstrap_interval(measure, [1.0, 2.0], labels))


@of_parts
def test_measures_of_no_parts_are_undefined(measure: Measure) -> None:
    assert math.isnan(measure([], []))


@pytest.mark.parametrize("measure", [*PART_MEASURES, partial(bootstrap_interval, image_auroc)])
def test_scores_and_labels_that_cannot_be_used_are_refused(measure: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        measure([1.0, math.nan], [0, 1])
    with pytest.raises(ValueError, match="one score and one label per part"):
        measure([1.0, 2.0], [0, 1, 1])
    with pytest.raises(ValueError, match="0 for good and 1 for bad"):
        measure([1.0, 2.0], [-1, 1])


def two_normals(seed: int, good: int, bad: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    random = np.random.default_rng(seed)
    scores = np.concatenate([random.normal(size=good), random.normal(1.5, size=bad)])
    return scores, np.repeat([False, True], [good, bad])


@of_parts
def test_the_bootstrap_interval_is_repeatable_and_holds_the_estimate(measure: Measure) -> None:
    scores, labels = two_normals(1, 30, 60)
    low, high = bootstrap_interval(measure, scores, labels, draws=100)
    assert (low, high) == bootstrap_interval(measure, scores, labels, draws=100)
    assert (low, high) != bootstrap_interval(measure, scores, labels, draws=100, seed=1)
    assert low <= measure(scores, labels) <= high
    assert low < high


def test_the_bootstrap_draws_good_and_bad_parts_apart() -> None:
    scores, labels = two_normals(3, 5, 7)
    seen = set()

    def share_of_bad(drawn: NDArray[np.floating[Any]], truth: Mask) -> float:
        seen.add((truth.sum(), truth.size, set(drawn[truth]) <= set(scores[labels])))
        return float(truth.mean())

    order = np.random.default_rng(0).permutation(12)
    assert bootstrap_interval(share_of_bad, scores[order], labels[order], draws=50) == pytest.approx((7 / 12, 7 / 12))
    assert seen == {(7, 12, True)}


def test_more_parts_and_less_confidence_narrow_the_bootstrap_interval() -> None:
    def width(good: int, bad: int, confidence: float) -> float:
        scores, labels = two_normals(2, good, bad)
        low, high = bootstrap_interval(image_auroc, scores, labels, draws=500, confidence=confidence)
        return high - low

    assert width(300, 600, 0.95) < width(30, 60, 0.95) / 2
    assert width(30, 60, 0.5) < width(30, 60, 0.95)


@pytest.mark.parametrize(
    ("measure", "truth"),
    [(image_auroc, 0.8556), (partial(true_reject_rate, false_rejects=0.2), 0.7446)],  # Φ(1.5 / √2), Φ(1.5 - z of 0.8)
)
def test_the_bootstrap_interval_holds_the_truth_about_as_often_as_it_says(measure: Measure, truth: float) -> None:
    held = 0
    for seed in range(100):
        low, high = bootstrap_interval(measure, *two_normals(seed, 60, 60), draws=100)
        held += low <= truth <= high
    assert 85 <= held <= 100


def test_the_binomial_interval_is_that_of_clopper_and_pearson() -> None:
    assert binomial_interval(0, 12)[0] == 0.0
    assert binomial_interval(0, 12)[1] == pytest.approx(1 - 0.025 ** (1 / 12))
    assert binomial_interval(12, 12)[1] == 1.0
    low, high = binomial_interval(3, 40, 0.9)
    assert low == pytest.approx(beta.ppf(0.05, 3, 38))
    assert high == pytest.approx(beta.ppf(0.95, 4, 37))


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_a_share_of_nothing_has_no_interval(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="must"):
        binomial_interval(k, n)
