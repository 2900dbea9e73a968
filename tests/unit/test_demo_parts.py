from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from demo.parts import KINDS, render, write_dataset

ALL = ("good", *KINDS)


SIDE = 192  # a quarter of the demo's pixels, a quarter of its time


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Give the largest difference of a pixel's channels, in grey levels."""
    return np.asarray(cv2.absdiff(one, other).max(axis=2), np.uint8)


@pytest.mark.parametrize("kind", ALL)
def test_one_seed_gives_one_part(kind: str) -> None:
    first, second = render(7, kind, SIDE), render(7, kind, SIDE)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.mask, second.mask)
    assert first.kind == second.kind == kind


@pytest.mark.parametrize("side", [64, 97])
def test_a_part_has_the_size_that_was_asked_for(side: int) -> None:
    for kind in ALL:
        part = render(3, kind, side)
        assert part.image.shape == (side, side, 3)
        assert part.image.dtype == np.uint8
        assert part.mask.shape == (side, side)
        assert part.mask.dtype == np.bool_


def test_a_good_part_has_no_defect() -> None:
    assert not any(render(seed, side=SIDE).mask.any() for seed in range(3))


def test_good_parts_differ_in_light_place_and_texture_yet_stay_alike() -> None:
    images = [render(seed, side=SIDE).image for seed in range(8)]
    for one, other in pairwise(images):
        assert 4 < difference(one, other).mean() < 30
    levels = [image.mean() for image in images]
    assert 1.02 < max(levels) / min(levels) < 1.25


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_shows_inside_its_mask_and_nowhere_else(kind: str) -> None:
    for seed in range(5):
        bad = render(seed, kind, SIDE)
        changed, mask = difference(render(seed, side=SIDE).image, bad.image), bad.mask
        around = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        assert 0.0002 < mask.mean() < 0.03
        assert np.percentile(changed[mask], 90) > 12
        assert changed[~around].max() <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_defects_of_one_kind_differ_in_place(kind: str) -> None:
    centres = {tuple(np.argwhere(render(seed, kind, SIDE).mask).mean(axis=0).round()) for seed in range(6)}
    assert len(centres) == 6


def test_a_missing_hole_is_metal_where_good_parts_are_dark() -> None:
    for seed in range(6):
        bad = render(seed, "missing_hole", SIDE)
        assert bad.image[bad.mask].mean() > render(seed, side=SIDE).image[bad.mask].mean() + 20


@pytest.mark.parametrize(("seed", "kind", "side"), [(0, "rust", 384), (-1, "good", 384), (0, "good", 63)])
def test_an_impossible_part_is_refused(seed: int, kind: str, side: int) -> None:
    with pytest.raises(ValueError, match="cannot render"):
        render(seed, kind, side)


def test_a_data_set_lies_on_disk_in_the_layout_of_mvtec_ad(tmp_path: Path) -> None:
    write_dataset(tmp_path, good=2, test_good=1, per_kind=1, seed=5)
    expected = {f"train/good/00{number}.png" for number in range(2)}
    expected.add("test/good/000.png")
    for kind in KINDS:
        expected |= {f"test/{kind}/000.png", f"ground_truth/{kind}/000_mask.png"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path).as_posix() for path in files} == expected
    photographs = [path.read_bytes() for path in files if "ground_truth" not in path.parts]
    assert len(set(photographs)) == len(photographs)


def test_a_data_set_keeps_colours_and_masks_exactly(tmp_path: Path) -> None:
    write_dataset(tmp_path, good=1, test_good=0, per_kind=1, seed=0)
    stored = cv2.imread(str(tmp_path / "train/good/000.png"))
    assert stored is not None
    assert np.array_equal(stored[..., ::-1], render(0).image)
    for number, kind in enumerate(KINDS, start=1):
        mask = cv2.imread(str(tmp_path / "ground_truth" / kind / "000_mask.png"), cv2.IMREAD_UNCHANGED)
        assert mask is not None
        assert np.array_equal(mask, np.where(render(number, kind).mask, 255, 0))


def test_data_sets_of_different_seeds_share_no_part(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_dataset(tmp_path / str(seed), good=1, test_good=1, per_kind=0, seed=seed)
    photographs = [path.read_bytes() for path in tmp_path.rglob("*.png")]
    assert len(photographs) == len(set(photographs)) == 4
