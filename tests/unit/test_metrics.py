"""The measures agree with closed forms, with brute force, and with what they must not depend on."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import label
from scipy.stats import beta
from sklearn.metrics import roc_auc_score

from calibration.metrics import (
    AnomalyMap,
    Mask,
    aupro,
    binomial_interval,
    bootstrap_interval,
    image_auroc,
    pixel_auroc,
    pro_per_image_rd,
)

Images = tuple[list[AnomalyMap], list[Mask]]
seeds = st.integers(0, 10**6)
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


@pytest.mark.parametrize("labels", [[0, 0], [True, True]])
def test_image_auroc_of_one_kind_alone_is_undefined(labels: list[int]) -> None:
    assert math.isnan(image_auroc([1.0, 2.0], labels))
    assert all(math.isnan(bound) for bound in bootstrap_interval([1.0, 2.0], labels))


@pytest.mark.parametrize("measure", [image_auroc, bootstrap_interval])
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


def test_the_bootstrap_interval_is_repeatable_and_holds_the_estimate() -> None:
    scores, labels = two_normals(1, 30, 60)
    low, high = bootstrap_interval(scores, labels, draws=500)
    assert (low, high) == bootstrap_interval(scores, labels, draws=500)
    assert (low, high) != bootstrap_interval(scores, labels, draws=500, seed=1)
    assert low < image_auroc(scores, labels) < high


def test_more_parts_and_less_confidence_narrow_the_bootstrap_interval() -> None:
    def width(good: int, bad: int, confidence: float) -> float:
        scores, labels = two_normals(2, good, bad)
        low, high = bootstrap_interval(scores, labels, draws=500, confidence=confidence)
        return high - low

    assert width(300, 600, 0.95) < width(30, 60, 0.95) / 2
    assert width(30, 60, 0.5) < width(30, 60, 0.95)


def test_the_bootstrap_interval_holds_the_true_auroc_about_as_often_as_it_says() -> None:
    true_auroc = 0.8556  # Φ(1.5 / √2)
    held = 0
    for seed in range(100):
        low, high = bootstrap_interval(*two_normals(seed, 60, 60), draws=200)
        held += low <= true_auroc <= high
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
