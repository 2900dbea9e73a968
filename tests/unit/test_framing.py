"""What is done to an image first: exact, in its order, and refused where it cannot be done."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.framing import DEAD, PLAIN, Crop, Framing, FramingError, Shrink, Turn
from daemon.images import shrunk
from detectors.base import Image

TURNS: list[Turn] = [0, 90, 180, 270]
SHRINKS: list[Shrink] = [1, 2, 4, 8]


def noise(height: int, width: int, seed: int, low: int = 0) -> Image:
    return np.random.default_rng(seed).integers(low, 256, (height, width, 3), dtype=np.uint8)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Image, Image, Crop]:
    """An image, a flat field of its size, and a crop inside."""
    height, width, seed = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 1000))
    x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    crop = x, y, draw(st.integers(1, width - x)), draw(st.integers(1, height - y))
    return noise(height, width, seed), noise(height, width, seed + 1, low=60), crop


@given(scenes(), st.sampled_from(TURNS))
def test_four_turns_are_none(scene: tuple[Image, Image, Crop], turn: Turn) -> None:
    image, turned = scene[0], scene[0]
    for _ in range(4):
        turned = Framing(rotate=turn).apply(turned)
    assert np.array_equal(turned, image)
    thrice = Framing(rotate=90).apply(Framing(rotate=90).apply(Framing(rotate=90).apply(image)))
    assert np.array_equal(Framing(rotate=270).apply(image), thrice)


def test_a_turn_is_clockwise() -> None:
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 0] = 255  # upper left goes to the upper right
    assert np.argwhere(Framing(rotate=90).apply(image)[..., 0]).tolist() == [[0, 1]]
    assert np.argwhere(Framing(rotate=180).apply(image)[..., 0]).tolist() == [[1, 2]]
    assert np.argwhere(Framing(rotate=270).apply(image)[..., 0]).tolist() == [[2, 0]]


@given(scenes(), st.sampled_from(TURNS))
def test_the_three_steps_together_are_the_three_one_after_the_other(
    scene: tuple[Image, Image, Crop], turn: Turn
) -> None:
    image, flat, crop = scene
    stepwise = Framing(rotate=turn).apply(Framing(crop=crop).apply(Framing(flat).apply(image)))
    assert np.array_equal(Framing(flat, crop, turn).apply(image), stepwise)


@given(scenes())
def test_a_flat_field_gives_each_channel_its_mean_share_rounded_and_clipped(scene: tuple[Image, Image, Crop]) -> None:
    image, flat, _ = scene
    exact = np.clip(image * flat.mean(axis=(0, 1)) / flat, 0, 255)
    assert np.abs(Framing(flat).apply(image) - exact).max() <= 0.5 + 1e-4


@given(scenes())
def test_the_flat_field_itself_becomes_even(scene: tuple[Image, Image, Crop]) -> None:
    flat = scene[1]
    assert np.abs(Framing(flat).apply(flat) - flat.mean(axis=(0, 1))).max() <= 0.5 + 1e-4


def test_what_becomes_brighter_than_white_stays_white() -> None:
    flat = np.full((2, 2, 3), 200, np.uint8)
    flat[0, 0] = 50
    assert Framing(flat).apply(np.full((2, 2, 3), 250, np.uint8))[0, 0].tolist() == [255] * 3


@given(scenes(), st.sampled_from(TURNS))
def test_an_image_is_not_changed_by_being_framed(scene: tuple[Image, Image, Crop], turn: Turn) -> None:
    image, flat, crop = scene
    before = image.copy()
    framed = Framing(flat, crop, turn).apply(image)
    assert framed.dtype == np.uint8
    assert framed.shape[2] == 3
    framed[:] = 7
    assert np.array_equal(image, before)


@given(scenes(), st.sampled_from(TURNS))
def test_labels_are_placed_as_the_image_is_and_keep_their_values(scene: tuple[Image, Image, Crop], turn: Turn) -> None:
    image, flat, crop = scene
    labels = image[..., 0]
    assert np.array_equal(Framing(flat, crop, turn).place(labels), Framing(None, crop, turn).apply(image)[..., 0])


@given(scenes(), st.sampled_from(TURNS), st.sampled_from(SHRINKS))
def test_an_image_is_shrunk_before_all_else_by_us_or_by_whoever_decoded_it(
    scene: tuple[Image, Image, Crop], turn: Turn, shrink: Shrink
) -> None:
    image, flat, crop = scene
    large = np.random.default_rng(1).integers(0, 256, (shrink * len(image), shrink * image.shape[1], 3), dtype=np.uint8)
    framing = Framing(flat, crop, turn, shrink)
    expected = Framing(flat, crop, turn).apply(shrunk(large, shrink))
    assert np.array_equal(framing.apply(large), expected)
    assert np.array_equal(framing.finish(shrunk(large, shrink)), expected)


@pytest.mark.parametrize("crop", [None, (3, 2, 5, 4), (0, 0, 8, 6)])
@pytest.mark.parametrize("turn", TURNS)
def test_labels_of_a_shrunk_image_stay_fine_and_show_what_it_shows(crop: Crop | None, turn: Turn) -> None:
    framing = Framing(crop=crop, rotate=turn, shrink=4)
    labels = np.random.default_rng(2).integers(0, 256, (21, 30), dtype=np.uint8)  # 6 × 8 when shrunk, rounded up
    placed = framing.place(labels).astype(np.uint8)
    image = framing.apply(np.dstack([labels] * 3))
    assert placed.shape == (4 * image.shape[0], 4 * image.shape[1])
    assert np.array_equal(shrunk(np.dstack([placed] * 3), 4), image)
    assert set(np.unique(placed)) <= set(np.unique(labels))


def test_a_crop_outside_the_shrunk_image_is_refused_with_its_size() -> None:
    framing = Framing(crop=(0, 0, 31, 20), shrink=2)
    for refused in (lambda: framing.apply(noise(40, 60, 1)), lambda: framing.place(noise(40, 60, 1)[..., 0])):
        with pytest.raises(FramingError, match=r"the image is 30×20 pixels at 1/2 of its size, but crop = \[0, 0, 31"):
            refused()


def test_fingerprints_from_before_images_were_shrunk_still_hold() -> None:
    assert Framing(crop=(1, 2, 3, 4), rotate=90).fingerprint == "af45a61eb71e"
    flat = np.full((4, 5, 3), 200, np.uint8)
    assert Framing(flat, (1, 0, 3, 4), 180).fingerprint == "9c662faeb66b"


def test_the_plain_framing_gives_the_image_back() -> None:
    image = noise(4, 5, 1)
    assert PLAIN.is_plain
    assert PLAIN.fingerprint == ""
    assert PLAIN.apply(image) is image


@settings(max_examples=30)
@given(scenes())
def test_whatever_changes_images_changes_the_fingerprint(scene: tuple[Image, Image, Crop]) -> None:
    _, flat, crop = scene
    other = flat.copy()
    other[0, 0, 0] ^= 1
    framings = [
        PLAIN,
        Framing(rotate=90),
        Framing(rotate=180),
        Framing(crop=crop),
        Framing(crop=(*crop[:3], crop[3] + 1)),
        Framing(flat),
        Framing(other),
        Framing(flat, crop),
        Framing(flat, crop, 90),
        Framing(shrink=2),
        Framing(shrink=4),
        Framing(flat, crop, 90, 2),
    ]
    assert len({framing.fingerprint for framing in framings}) == len(framings)
    assert replace(Framing(flat.copy(), crop, 90)).fingerprint == framings[8].fingerprint


@pytest.mark.parametrize("crop", [(50, 0, 11, 40), (0, 30, 60, 11), (60, 0, 1, 1), (0, 0, 61, 40)])
def test_a_crop_outside_the_image_is_refused_with_both_sizes(crop: Crop) -> None:
    with pytest.raises(FramingError, match="60×40 pixels") as refused:
        Framing(crop=crop).apply(noise(40, 60, 1))
    assert str(list(crop)) in str(refused.value)
    assert Framing(crop=(50, 30, 10, 10)).apply(noise(40, 60, 1)).shape == (10, 10, 3)


@pytest.mark.parametrize("crop", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0)])
def test_an_empty_crop_is_refused(crop: Crop) -> None:
    with pytest.raises(FramingError, match="width and height from 1"):
        Framing(crop=crop)


def test_a_crop_outside_the_flat_field_is_refused_at_once() -> None:
    with pytest.raises(FramingError, match="60×40 pixels, but crop"):
        Framing(noise(40, 60, 1, low=60), (50, 0, 11, 40))


def test_an_image_of_another_size_than_the_flat_field_is_refused_with_both_sizes() -> None:
    with pytest.raises(FramingError, match="the image is 60×41 pixels, but the flat field 60×40"):
        Framing(noise(40, 60, 1, low=60), (0, 0, 10, 10)).apply(noise(41, 60, 2))


def test_dead_pixels_are_refused_with_their_number_unless_they_are_cut_away() -> None:
    flat = np.full((40, 60, 3), 200, np.uint8)
    flat[3, 4:7, 1] = int(200 * DEAD) - 1
    with pytest.raises(FramingError, match=r"^3 px are darker than 5% of the mean"):
        Framing(flat)
    assert Framing(flat, (0, 4, 60, 36)).apply(flat).shape == (36, 60, 3)
    flat[3, 4:7, 1] = int(200 * DEAD) + 1
    assert Framing(flat).apply(flat)[3, 4].tolist() == [200] * 3


def test_a_black_flat_field_is_refused() -> None:
    with pytest.raises(FramingError, match="2400 px are darker"):
        Framing(np.zeros((40, 60, 3), np.uint8))
