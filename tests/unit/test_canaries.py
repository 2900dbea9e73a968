"""Canaries: each number moves with its own cause and with no other."""

import math
from collections.abc import Iterable
from functools import cache

import cv2
import numpy as np
import pytest

from calibration.drift import Reading, Watch
from daemon.canaries import Reference, appearance, cause, glance, measure, reference_of
from detectors.base import Image


@cache
def part(seed: int, height: int = 240, width: int = 320) -> Image:
    """A disc with a pattern of its own on a textured belt, away from black and white."""
    rng = np.random.default_rng(seed)
    belt = cv2.GaussianBlur(rng.normal(0, 40, (height, width)).astype(np.float32), (0, 0), 2)
    pattern = cv2.GaussianBlur(np.random.default_rng(99).normal(0, 900, (height, width)).astype(np.float32), (0, 0), 9)
    disc = cv2.circle(
        np.zeros((height, width), np.float32), (width // 2, height // 2), height // 3, 1.0, -1, cv2.LINE_AA
    )
    grey = np.clip(80 + belt + disc * (80 + pattern), 5, 250).astype(np.uint8)
    return np.repeat(grey[:, :, np.newaxis], 3, axis=2)


def moved(image: Image, across: float, down: float) -> Image:
    matrix = np.array([[1, 0, across], [0, 1, down]], np.float32)
    size = (image.shape[1], image.shape[0])
    return np.asarray(cv2.warpAffine(image, matrix, size, borderMode=cv2.BORDER_REFLECT), np.uint8)


def average(images: Iterable[Image]) -> Reference:
    looks = appearance([glance(image) for image in images])
    assert looks is not None
    return reference_of(looks)


REFERENCE = average(part(seed) for seed in range(20))
USUAL = [measure(part(seed), REFERENCE) for seed in range(20, 60)]


def test_light_moves_brightness_and_contrast_alone() -> None:
    plain, dark = (measure(image, REFERENCE) for image in (part(1), np.rint(part(1) * 0.9).astype(np.uint8)))
    assert dark.brightness == pytest.approx(0.9 * plain.brightness, rel=0.01)
    assert dark.contrast == pytest.approx(0.9 * plain.contrast, rel=0.01)
    assert dark.sharpness == pytest.approx(plain.sharpness, rel=0.01)
    assert dark.shift == pytest.approx(plain.shift, abs=0.2)


def test_a_veil_of_stray_light_moves_brightness_but_neither_sharpness_nor_shift() -> None:
    plain, veiled = (measure(image, REFERENCE) for image in (part(1), part(1) // 2 + 60))
    assert veiled.contrast == pytest.approx(plain.contrast / 2, rel=0.02)
    assert veiled.sharpness == pytest.approx(plain.sharpness, rel=0.02)
    assert veiled.shift == pytest.approx(plain.shift, abs=0.2)


def test_blur_moves_sharpness_but_neither_brightness_nor_shift() -> None:
    plain = measure(part(1), REFERENCE)
    blurred = measure(np.asarray(cv2.GaussianBlur(part(1), (0, 0), 2), np.uint8), REFERENCE)
    assert blurred.sharpness < 0.9 * plain.sharpness
    assert blurred.brightness == pytest.approx(plain.brightness, abs=0.5)
    assert blurred.shift == pytest.approx(plain.shift, abs=0.5)


@pytest.mark.parametrize(("across", "down"), [(0, 0), (4, 0), (0, -9), (15, 8), (-30, 25)])
def test_a_translation_is_measured_in_pixels_of_the_source(across: int, down: int) -> None:
    assert measure(moved(part(1), across, down), REFERENCE).shift == pytest.approx(math.hypot(across, down), abs=1.5)


def test_a_translation_of_a_large_and_narrow_image_is_measured_too() -> None:
    image = part(1, height=1500, width=600)
    reference = average(part(seed, height=1500, width=600) for seed in range(2, 6))
    assert measure(moved(image, 6, 20), reference).shift == pytest.approx(math.hypot(6, 20), abs=2)


def test_a_dark_part_out_of_place_is_measured_in_place_all_the_same() -> None:
    image = np.rint(moved(part(1), 12, 0) * 0.3).astype(np.uint8)
    assert measure(image, REFERENCE).shift == pytest.approx(12, abs=1.5)


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("shape", [(480, 640), (1, 1), (1, 2000), (3000, 2)])
def test_a_flat_image_gives_finite_numbers(value: int, shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), value, np.uint8)
    measured = measure(image, REFERENCE)
    assert measured.brightness == pytest.approx(value)
    assert (measured.contrast, measured.sharpness, measured.shift) == (0, 0, 0)
    assert measure(part(1), average([image, image])).shift == 0


@pytest.mark.parametrize("seed", range(5))
def test_an_image_unlike_the_reference_has_a_shift_within_the_image(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (200, 300, 3), np.uint8)
    assert 0 <= measure(noise, REFERENCE).shift <= math.hypot(102, 152)


def test_without_a_reference_there_is_no_shift() -> None:
    measured = measure(part(1), None)
    assert math.isnan(measured.shift)
    assert measured.brightness == measure(part(1), REFERENCE).brightness


def test_an_image_is_not_changed_by_measuring_it() -> None:
    image = part(1).copy()
    measure(image, REFERENCE)
    assert np.array_equal(image, part(1))


def test_a_reference_is_the_mean_of_images_of_any_size() -> None:
    sizes = ((40, 30), (600, 900), (128, 128))
    images = [np.full((*size, 3), value, np.uint8) for size, value in zip(sizes, (0, 100, 200), strict=True)]
    assert (average(images) == 100).all()


def test_one_image_has_no_appearance() -> None:
    assert appearance([]) is None
    assert appearance([glance(part(1))]) is None


def test_good_parts_are_compared_with_the_others_not_with_themselves() -> None:
    images = [part(1), moved(part(1), 12, 0), moved(part(1), 12, 0)]
    looks = appearance([glance(image) for image in images])
    assert looks is not None
    assert looks.canaries["shift"][0] == pytest.approx(12, abs=1.5)
    assert looks.canaries["brightness"] == tuple(measure(image, None).brightness for image in images)


QUIET, LOUD = Watch(range(50), 0), Watch(range(50), 0)
for _ in range(100):
    LOUD.update(1e9)


def readings(*alarming: str) -> dict[str, Reading]:
    names = ("score", "shift", "sharpness", "contrast", "brightness")
    return {name: (LOUD if name in alarming else QUIET).reading for name in names}


@pytest.mark.parametrize(
    ("alarming", "expected"),
    [
        ((), ""),
        (("score",), "product"),
        (("score", "shift"), "position"),
        (("score", "shift", "sharpness"), "focus"),
        (("score", "shift", "sharpness", "contrast"), "focus"),
        (("score", "shift", "contrast"), "light"),
        (("score", "shift", "sharpness", "contrast", "brightness"), "light"),
        (("brightness",), "light"),
    ],
)
def test_the_cause_is_light_before_focus_before_position_before_the_product(
    alarming: tuple[str, ...], expected: str
) -> None:
    assert cause(readings(*alarming)) == expected


@pytest.mark.parametrize("change", ["light", "focus", "position"])
def test_a_stream_of_changed_pictures_names_its_cause(change: str) -> None:
    watches = {
        name: Watch([getattr(of, name) for of in USUAL], 0) for name in ("brightness", "contrast", "sharpness", "shift")
    }
    for seed in range(60, 90):
        image = part(seed)
        if change == "light":
            image = np.rint(image * 0.8).astype(np.uint8)
        elif change == "focus":
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), 2), np.uint8)
        else:
            image = moved(image, 10, 0)
        measured = measure(image, REFERENCE)
        for name, watch in watches.items():
            watch.update(getattr(measured, name))
    assert cause({name: watch.reading for name, watch in watches.items()}) == change
