import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from random import Random

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from daemon.regions import Mask, MaskError, Rule, apply, load_mask, regions
from detectors.base import AnomalyMap, Prediction

Box = tuple[slice, slice]
PLAIN = Rule()
VALUES = (-0.5, 0.0, 0.1, 0.3, 0.30000004, 1.0, 2.5)


def predicted(anomaly_map: AnomalyMap) -> Prediction:
    return Prediction(float(anomaly_map.max()), anomaly_map)


def spots(shape: tuple[int, int], *hot: tuple[Box, float]) -> AnomalyMap:
    anomaly_map = np.full(shape, 0.25, np.float32)
    for box, value in hot:
        anomaly_map[box] = value
    return anomaly_map


def box(top: int, left: int, height: int, width: int) -> Box:
    return np.s_[top : top + height, left : left + width]


def kept(shape: tuple[int, int], *boxes: Box) -> Mask:
    mask = np.zeros(shape, bool)
    for one in boxes:
        mask[one] = True
    return mask


def saved(file: Path, pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> Path:
    assert cv2.imwrite(str(file), pixels)
    return file


def components(found: Mask) -> list[int]:
    """Their sizes, by walking from neighbour to neighbour."""
    left, sizes = {(int(y), int(x)) for y, x in np.argwhere(found)}, []
    while left:
        front, size = [left.pop()], 0
        while front:
            y, x = front.pop()
            size += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front += near
        sizes.append(size)
    return sizes


def meets(found: Mask, image_shape: tuple[int, int], rule: Rule) -> bool:
    """What a rule says of a set of pixels, in fractions."""
    px = Fraction(math.prod(image_shape), found.size)
    smallest = Fraction(rule.smallest_area_px)
    return sum(size * px // smallest if smallest else 1 for size in components(found)) >= rule.count


def covered(mask: Mask, shape: tuple[int, int]) -> Mask:
    """The pixels of a map of which more than half is kept, in fractions."""

    def overlap(cells: int, pixels: int) -> list[list[Fraction]]:
        edges = [Fraction(cell * pixels, cells) for cell in range(cells + 1)]
        none = Fraction(0)
        return [
            [max(none, min(b, Fraction(p + 1)) - max(a, Fraction(p))) for p in range(pixels)]
            for a, b in pairwise(edges)
        ]

    rows, columns = overlap(shape[0], mask.shape[0]), overlap(shape[1], mask.shape[1])
    half = Fraction(mask.size, 2 * math.prod(shape))
    places = [(int(y), int(x)) for y, x in np.argwhere(mask)]
    return np.array([[sum(row[y] * column[x] for y, x in places) > half for column in columns] for row in rows], bool)


def small_maps(smallest_side: int = 1) -> st.SearchStrategy[AnomalyMap]:
    sides = st.integers(smallest_side, 6)
    return arrays(np.float32, st.tuples(sides, sides), elements=st.sampled_from(VALUES).map(np.float32))


@st.composite
def cases(draw: st.DrawFn) -> tuple[AnomalyMap, tuple[int, int], Rule]:
    image_shape = draw(st.tuples(st.integers(1, 13), st.integers(1, 13)))
    mask = draw(st.none() | arrays(np.bool_, image_shape, elements=st.booleans(), fill=st.just(value=True)))
    area = draw(st.sampled_from([0, 0.1, 1, 1.5, 2, 3, 4, 7.25, 10, 20]))
    count = draw(st.integers(1, 4)) if area else 1
    assume(mask is None or (mask.any() and meets(mask, image_shape, Rule(area, count))))
    return draw(small_maps()), image_shape, Rule(area, count, mask)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_a_score_is_above_any_threshold_exactly_if_what_lies_above_it_meets_the_rule(
    case: tuple[AnomalyMap, tuple[int, int], Rule],
) -> None:
    anomaly_map, image_shape, rule = case
    inside = np.ones(anomaly_map.shape, bool) if rule.kept is None else covered(rule.kept, anomaly_map.shape)
    if not rule.is_plain and not meets(inside, image_shape, rule):
        with pytest.raises(ValueError, match=r"no part could be rejected|too thin for the map"):
            apply(predicted(anomaly_map), image_shape, rule)
        return
    score = apply(predicted(anomaly_map), image_shape, rule).anomaly_score
    assert score in anomaly_map
    levels = anomaly_map.astype(np.float64).ravel()
    for threshold in {-9.0, *levels, *np.nextafter(levels, 9), *np.nextafter(levels, -9)}:
        above = (anomaly_map > np.float64(threshold)) & inside
        assert (score > threshold) == meets(above, image_shape, rule)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_regions_add_up_to_the_decision_of_the_score(case: tuple[AnomalyMap, tuple[int, int], Rule]) -> None:
    anomaly_map, image_shape, rule = case
    try:
        prediction = apply(predicted(anomaly_map), image_shape, rule)
    except ValueError:
        assume(condition=False)
    for threshold in (0.1, 0.3, 1.0):
        found = regions(prediction.anomaly_map, threshold, image_shape, rule)
        assert found == regions(anomaly_map, threshold, image_shape, rule)
        counted = sum((r.area_px * (1 + 1e-12)) // rule.smallest_area_px if rule.smallest_area_px else 1 for r in found)
        assert (prediction.anomaly_score > threshold) == (counted >= rule.count)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_a_mirrored_part_has_the_same_score(case: tuple[AnomalyMap, tuple[int, int], Rule]) -> None:
    anomaly_map, (height, width), rule = case

    def score(turned: AnomalyMap, shape: tuple[int, int], mask: Mask | None) -> float | None:
        try:
            return apply(predicted(turned), shape, Rule(rule.smallest_area_px, rule.count, mask)).anomaly_score
        except ValueError:
            return None

    mask = rule.kept
    expected = score(anomaly_map, (height, width), mask)
    assert score(anomaly_map[::-1], (height, width), None if mask is None else mask[::-1]) == expected
    assert score(anomaly_map[:, ::-1], (height, width), None if mask is None else mask[:, ::-1]) == expected
    assert score(anomaly_map.T, (width, height), None if mask is None else mask.T) == expected


@given(small_maps(), st.lists(st.sampled_from([0, 0.5, 1, 2, 3, 5, 8, 13, 36]), min_size=2, max_size=4))
@settings(max_examples=80, deadline=None)
def test_a_larger_smallest_area_never_gives_a_larger_score(anomaly_map: AnomalyMap, areas: list[float]) -> None:
    prediction = predicted(anomaly_map)
    rules = [Rule(area, 1, np.ones((6, 6), bool)) for area in sorted(areas)]
    scores = [apply(prediction, (6, 6), rule).anomaly_score for rule in rules]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] <= prediction.anomaly_score


@given(small_maps(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_where_every_pixel_counts_its_place_does_not_matter(anomaly_map: AnomalyMap, shuffler: Random) -> None:
    pixels = anomaly_map.ravel().tolist()
    shuffler.shuffle(pixels)
    shuffled = np.array(pixels, np.float32).reshape(anomaly_map.shape)
    for count in (1, (len(pixels) + 1) // 2, len(pixels)):
        for order in (anomaly_map, shuffled):
            score = apply(predicted(order), anomaly_map.shape, Rule(1, count)).anomaly_score
            assert score == sorted(pixels, reverse=True)[count - 1]


def test_the_plain_rule_leaves_the_prediction_of_the_detector_as_it_is() -> None:
    prediction = Prediction(7.0, spots((4, 4)))  # a score that is not the map's maximum
    assert PLAIN.is_plain
    assert apply(prediction, (99, 3), PLAIN) is prediction


def test_a_mask_that_keeps_everything_changes_no_score_and_no_map() -> None:
    prediction = predicted(np.random.default_rng(1).normal(size=(64, 48)).astype(np.float32))
    masked = apply(prediction, (100, 90), Rule(kept=np.ones((100, 90), bool)))
    assert masked.anomaly_score == prediction.anomaly_score
    assert np.array_equal(masked.anomaly_map, prediction.anomaly_map)


def test_a_small_peak_gives_way_to_a_lower_but_larger_region() -> None:
    anomaly_map = spots((32, 32), (box(2, 2, 1, 2), 9.0), (box(20, 20, 3, 4), 4.0))
    assert apply(predicted(anomaly_map), (32, 32), Rule(2)).anomaly_score == 9
    assert apply(predicted(anomaly_map), (32, 32), Rule(2.01)).anomaly_score == 4
    assert apply(predicted(anomaly_map), (32, 32), Rule(12)).anomaly_score == 4
    assert apply(predicted(anomaly_map), (32, 32), Rule(13)).anomaly_score == 0.25


def test_pixels_that_touch_at_a_corner_are_one_region() -> None:
    anomaly_map = spots((8, 8), (box(2, 2, 1, 1), 3.0), (box(3, 3, 1, 1), 3.0))
    assert apply(predicted(anomaly_map), (8, 8), Rule(2)).anomaly_score == 3
    assert len(regions(anomaly_map, 1, (8, 8), PLAIN)) == 1


def test_a_region_several_times_the_smallest_area_counts_as_several() -> None:
    one, two = (box(4, 4, 4, 5), 3.0), (box(20, 20, 2, 5), 2.0)
    large, both = predicted(spots((32, 32), one)), predicted(spots((32, 32), one, two))
    assert apply(large, (32, 32), Rule(10, 2)).anomaly_score == 3
    assert apply(large, (32, 32), Rule(10, 3)).anomaly_score == 0.25
    assert apply(both, (32, 32), Rule(10, 3)).anomaly_score == 2
    assert apply(both, (32, 32), Rule(11, 2)).anomaly_score == 0.25  # 20 and 10 pixels: one and none


def test_areas_are_those_of_the_image_and_not_of_the_map() -> None:
    anomaly_map = spots((256, 256), (box(128, 64, 16, 8), 5.0))
    shape = (320, 800)  # of which a pixel of the map covers 1.25 by 3.125
    (region,) = regions(anomaly_map, 2.0, shape, PLAIN)
    assert (region.x, region.y, region.width, region.height) == (200, 160, 25, 20)
    assert region.area_px == 500
    assert (region.peak, region.mean) == (2.5, 2.5)
    assert apply(predicted(anomaly_map), shape, Rule(500)).anomaly_score == 5
    assert apply(predicted(anomaly_map), shape, Rule(500.001)).anomaly_score == 0.25
    assert regions(anomaly_map, 2.0, shape, Rule(500.001)) == []


def test_a_colour_image_gives_its_shape_as_it_is() -> None:
    anomaly_map = spots((8, 8), (box(1, 1, 2, 2), 3.0))
    rule = Rule(16, 1, np.ones((16, 16), bool))
    assert apply(predicted(anomaly_map), (16, 16, 3), rule).anomaly_score == 3
    assert regions(anomaly_map, 1, (16, 16, 3), rule)[0].area_px == 16


def test_boxes_are_rounded_outwards_and_stay_inside_the_image() -> None:
    anomaly_map = spots((256, 256), (box(0, 0, 1, 1), 2.0), (box(255, 254, 1, 2), 3.0))
    corner, origin = regions(anomaly_map, 1.0, (100, 333), PLAIN)
    assert (origin.x, origin.y, origin.width, origin.height) == (0, 0, 2, 1)
    assert (corner.x, corner.y, corner.x + corner.width, corner.y + corner.height) == (330, 99, 333, 100)


def test_regions_come_with_the_highest_peak_first_in_units_of_the_threshold() -> None:
    low, high = (box(1, 1, 2, 2), 3.0), (box(10, 10, 2, 2), 5.0)
    anomaly_map = spots((16, 16), low, high)
    anomaly_map[10, 10] = 9
    first, second = regions(anomaly_map, 2.0, (16, 16), Rule(4))
    assert (first.peak, first.mean, first.x) == (4.5, 3.0, 10)
    assert (second.peak, second.mean, second.x) == (1.5, 1.5, 1)
    assert regions(anomaly_map, 9.0, (16, 16), PLAIN) == []


def test_regions_agree_with_the_verdict_to_the_last_bit() -> None:
    score = float(np.nextafter(np.float32(0.3), np.float32(9)))
    anomaly_map = spots((8, 8), (box(3, 3, 1, 1), score))
    assert regions(anomaly_map, score, (8, 8), PLAIN) == []
    assert len(regions(anomaly_map, float(np.nextafter(score, 0)), (8, 8), PLAIN)) == 1


def test_what_lies_outside_the_mask_is_in_no_score_no_map_and_no_region() -> None:
    anomaly_map = spots((32, 32), (box(2, 2, 6, 6), 9.0), (box(20, 20, 3, 3), 4.0))
    rule = Rule(kept=kept((64, 64), box(32, 32, 32, 32)))
    prediction = apply(predicted(anomaly_map), (64, 64), rule)
    assert prediction.anomaly_score == 4 == prediction.anomaly_map.max()
    assert np.array_equal(prediction.anomaly_map[16:, 16:], anomaly_map[16:, 16:])
    assert [r.x for r in regions(anomaly_map, 1, (64, 64), rule)] == [40]
    assert anomaly_map[2, 2] == 9  # the detector's own map is left alone


@pytest.mark.parametrize("offset", [0.0, 50.0, -50.0])
def test_the_map_outside_the_mask_is_above_no_threshold_and_never_hottest(offset: float) -> None:
    anomaly_map = spots((32, 32), (box(2, 2, 6, 6), 9.0)) + np.float32(offset)
    filled = apply(predicted(anomaly_map), (32, 32), Rule(kept=kept((32, 32), box(16, 16, 16, 16)))).anomaly_map
    assert filled.dtype == np.float32
    assert filled[:16].max() <= min(0, anomaly_map[16:, 16:].min())


def test_a_region_is_cut_where_the_mask_ends() -> None:
    anomaly_map = spots((32, 32), (box(10, 10, 10, 10), 3.0))
    rule = Rule(50, 1, kept((32, 32), box(0, 0, 32, 15)))
    (region,) = regions(anomaly_map, 1, (32, 32), rule)
    assert (region.x, region.width, region.area_px) == (10, 5, 50)
    assert apply(predicted(anomaly_map), (32, 32), rule).anomaly_score == 3
    assert apply(predicted(anomaly_map), (32, 32), Rule(51, 1, rule.kept)).anomaly_score == 0.25


def test_half_a_pixel_of_the_map_is_not_enough_to_be_inspected() -> None:
    anomaly_map = spots((8, 8), (box(0, 4, 8, 1), 5.0))
    assert apply(predicted(anomaly_map), (32, 32), Rule(kept=kept((32, 32), box(0, 0, 32, 18)))).anomaly_score == 0.25
    assert apply(predicted(anomaly_map), (32, 32), Rule(kept=kept((32, 32), box(0, 0, 32, 19)))).anomaly_score == 5


def test_a_mask_too_thin_for_the_map_is_refused_rather_than_lost() -> None:
    with pytest.raises(ValueError, match=r"too thin for the map, whose pixels are 8.0×4.0 of the image's: keep more"):
        apply(predicted(spots((8, 8))), (32, 64), Rule(kept=kept((32, 64), box(7, 0, 2, 64))))


def test_a_mask_of_another_size_is_refused_with_both_sizes() -> None:
    rule = Rule(kept=np.ones((320, 800), bool))
    with pytest.raises(ValueError, match=r"the mask is 800×320 pixels, but the image 801×320: draw the mask anew"):
        apply(predicted(spots((8, 8))), (320, 801), rule)
    with pytest.raises(ValueError, match=r"the mask is 800×320 pixels, but the image 320×800"):
        regions(spots((8, 8)), 1, (800, 320), rule)


def test_a_rule_that_this_image_is_too_small_for_is_refused() -> None:
    assert apply(predicted(spots((8, 8))), (20, 20), Rule(100, 4)).anomaly_score == 0.25
    with pytest.raises(ValueError, match=r"4 × 100 px do not fit into the 399 px inspected"):
        apply(predicted(spots((8, 8))), (19, 21), Rule(100, 4))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_map_that_is_not_finite_has_no_score_except_outside_the_mask(broken: float) -> None:
    anomaly_map = spots((16, 16), (box(2, 2, 1, 1), broken), (box(12, 12, 2, 2), 3.0))
    prediction = Prediction(3.0, anomaly_map)
    assert math.isnan(apply(prediction, (16, 16), Rule(2)).anomaly_score)
    assert math.isnan(apply(prediction, (16, 16), Rule(kept=np.ones((16, 16), bool))).anomaly_score)
    assert apply(prediction, (16, 16), Rule(2, 1, kept((16, 16), box(8, 0, 8, 16)))).anomaly_score == 3


@pytest.mark.parametrize(
    ("area", "count", "mask", "reason"),
    [
        (0, 2, None, "2 regions cannot be counted without a smallest area"),
        (5, 0, None, "a count of 0 would reject every part"),
        (-1, 1, None, "a smallest area of -1 px: give 0 or more"),
        (math.inf, 1, None, "a smallest area of inf px"),
        (math.nan, 1, None, "a smallest area of nan px"),
        (0, 1, np.zeros((4, 4), bool), "leaves nothing to inspect"),
        (0, 1, np.ones((4, 4), np.uint8), "a mask of uint8 with 2 axes: give booleans, H×W"),
        (0, 1, np.ones((4, 4, 3), bool), "a mask of bool with 3 axes"),
        (17, 1, np.ones((4, 4), bool), "1 × 17 px do not fit into the 16 px inspected"),
        (8, 3, np.ones((4, 4), bool), "3 × 8 px do not fit into the 16 px inspected"),
        (4, 1, kept((9, 9), box(0, 0, 3, 1), box(5, 5, 1, 3)), "1 × 4 px do not fit into the 6 px"),  # two islands
    ],
)
def test_a_rule_by_which_nothing_could_ever_be_judged_is_refused(
    area: float, count: int, mask: Mask | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Rule(area, count, mask)


def test_the_fingerprint_changes_with_all_that_changes_scores_and_with_nothing_else() -> None:
    whole, part = np.ones((6, 4), bool), kept((6, 4), box(0, 0, 3, 4))
    different = [
        Rule(5),
        Rule(5.5),
        Rule(5, 2),
        Rule(5, 2, whole),
        Rule(5, 2, np.ones((4, 6), bool)),
        Rule(5, 2, part),
        Rule(kept=whole),
        Rule(kept=part),
        Rule(kept=~part),
    ]
    prints = [rule.fingerprint for rule in different]
    assert len(set(prints)) == len(prints)
    assert all(len(told) == 12 and int(told, 16) >= 0 for told in prints)
    assert PLAIN.fingerprint == Rule(0.0, 1, None).fingerprint == ""
    assert Rule(5.0, 2, part.copy()).fingerprint == Rule(5, 2, np.asfortranarray(part)).fingerprint


def test_a_mask_file_says_where_to_look(tmp_path: Path) -> None:
    inspected = kept((40, 60), box(10, 10, 20, 30))
    ignored = kept((40, 60), box(0, 0, 20, 60))
    roi = saved(tmp_path / "roi.png", np.where(inspected, 255, 0).astype(np.uint8))
    ignore = saved(tmp_path / "ignore.png", np.where(ignored, 255, 0).astype(np.uint8))
    assert load_mask(None, None) is None
    for found, expected in (
        (load_mask(roi, None), inspected),
        (load_mask(None, ignore), ~ignored),
        (load_mask(roi, ignore), inspected & ~ignored),
    ):
        assert found is not None
        assert found.dtype == np.bool_
        assert np.array_equal(found, expected)
        assert Rule(kept=found).fingerprint


def test_white_begins_at_the_middle_whatever_the_depth_of_the_file(tmp_path: Path) -> None:
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    deep = np.array([[0, 0x7FFF, 0x8000, 0xFFFF]], np.uint16)
    colour = np.array([[(0, 0, 0), (255, 255, 0), (128, 200, 255), (255, 255, 255)]], np.uint8)
    for name, pixels in (("grey.png", grey), ("deep.png", deep), ("colour.bmp", colour)):
        found = load_mask(saved(tmp_path / name, pixels), None)
        assert found is not None
        assert found.tolist() == [[False, False, True, True]]


def test_mask_files_that_cannot_be_used_are_refused_with_file_and_cure(tmp_path: Path) -> None:
    white = saved(tmp_path / "white.png", np.full((40, 60), 255, np.uint8))
    larger = saved(tmp_path / "larger.png", np.full((41, 60), 255, np.uint8))
    dark = saved(tmp_path / "dark.png", np.full((40, 60), 1, np.uint8))
    torn = tmp_path / "torn.png"
    torn.write_bytes(white.read_bytes()[:-30])
    missing = tmp_path / "missing.png"
    for roi, ignore, reason in (
        (missing, None, f"{missing}: the mask cannot be read (No such file or directory). Put it there"),
        (tmp_path, None, f"{tmp_path}: the mask cannot be read (Is a directory)."),
        (torn, None, f"{torn}: cannot be read as a mask: the image is damaged or cut off"),
        (white, torn, f"{torn}: cannot be read as a mask"),
        (dark, None, f"{dark}: has no white, so nothing would be inspected. Paint white (255) what is inspected."),
        (white, larger, f"{larger}: is 60×41 pixels, but {white} is 60×40. Draw both on an image of the same camera."),
        (None, white, f"{white}: is white everywhere that is inspected, so nothing is left. Paint less of it white."),
        (white, white, f"{white}: is white everywhere that is inspected"),
    ):
        with pytest.raises(MaskError) as refusal:
            load_mask(roi, ignore)
        assert str(refusal.value).startswith(reason)
