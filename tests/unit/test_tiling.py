"""Tiles cover the image, and what is found in them is found in the whole, at its place."""

import json
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon import overlay
from daemon.messages import Outcome
from daemon.regions import PLAIN, RegionDetector, Rule, regions
from detectors.base import AnomalyMap, Image, Prediction
from detectors.tiling import TOGETHER, TiledDetector, Tiling, settings_of, stitch, tiling_of

LENGTHS = st.integers(1, 700)
TILINGS = st.integers(64, 200).flatmap(lambda side: st.builds(Tiling, st.just(side), st.integers(0, side // 2)))
CELLS = st.integers(1, 40)


class Halver:
    """Takes an image's brightness, the largest of each 2×2 pixels, for the anomaly map; remembers what it was shown."""

    fingerprint = "f"
    engine = "numpy"

    def __init__(self) -> None:
        self.shown: list[list[tuple[int, ...]]] = []

    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        self.shown.append([image.shape for image in images])
        return [self._judge(image) for image in images]

    def _judge(self, image: Image) -> Prediction:
        height, width = (length // 2 for length in image.shape[:2])
        cells = image[: 2 * height, : 2 * width, 0].reshape(height, 2, width, 2).max(axis=(1, 3))
        return Prediction(float(cells.max()), cells.astype(np.float32))


def spotted(height: int, width: int, *spots: tuple[int, int, int, int, int]) -> Image:
    """A black image with brighter boxes: top, left, height, width, brightness."""
    image = np.zeros((height, width, 3), np.uint8)
    for top, left, down, across, brightness in spots:
        image[top : top + down, left : left + across] = brightness
    return image


@given(LENGTHS, LENGTHS, TILINGS)
def test_equal_tiles_cover_every_pixel_inside_the_image_and_are_no_more_than_it_takes(
    height: int, width: int, tiling: Tiling
) -> None:
    tiles = tiling.tiles((height, width, 3))
    covered = np.zeros((height, width), bool)
    for tile in tiles:
        assert 0 <= tile.top <= height - tile.height
        assert 0 <= tile.left <= width - tile.width
        tile.cut(covered)[:] = True
    assert covered.all()
    assert {(tile.height, tile.width) for tile in tiles} == {(min(height, tiling.side), min(width, tiling.side))}
    step = tiling.side - tiling.overlap
    needed = [max(1, -(-(length - tiling.overlap) // step)) for length in (height, width)]
    assert len(tiles) == needed[0] * needed[1]


def test_a_camera_of_five_megapixels_takes_thirty_tiles_and_gives_a_map_of_half_its_size() -> None:
    tiles = Tiling(512, 64).tiles((1944, 2592, 3))
    assert len(tiles) == 30
    assert stitch([np.zeros((256, 256), np.float32)] * 30, tiles).shape == (972, 1296)


@given(LENGTHS, TILINGS)
def test_neighbours_share_the_overlap_and_are_evenly_spread(length: int, tiling: Tiling) -> None:
    steps = {below.top - above.top for above, below in pairwise(tiling.tiles((length, 1)))}
    assert all(0 < step <= tiling.side - tiling.overlap for step in steps)
    assert max(steps, default=0) - min(steps, default=0) <= 1


@given(LENGTHS, LENGTHS, TILINGS, CELLS, CELLS, st.integers(0, 2**32))
def test_the_stitched_map_has_the_maximum_of_its_tiles_and_their_scale(
    height: int, width: int, tiling: Tiling, rows: int, columns: int, seed: int
) -> None:
    tiles = tiling.tiles((height, width))
    maps = np.random.default_rng(seed).normal(-3, 5, (len(tiles), rows, columns)).astype(np.float32)
    whole = stitch(list(maps), tiles)
    assert whole.dtype == np.float32
    assert whole.max() == maps.max()
    assert whole.min() >= maps.min()  # nothing is left open
    assert abs(whole.shape[0] - height * rows / tiles[0].height) <= 0.5
    assert abs(whole.shape[1] - width * columns / tiles[0].width) <= 0.5


@given(LENGTHS, LENGTHS, TILINGS, CELLS, st.floats(-1e6, 1e6, width=32))
def test_where_all_tiles_say_the_same_there_is_no_seam(
    height: int, width: int, tiling: Tiling, cells: int, value: float
) -> None:
    tiles = tiling.tiles((height, width))
    assert (stitch([np.full((cells, cells), value, np.float32)] * len(tiles), tiles) == np.float32(value)).all()


def test_what_is_no_number_in_one_tile_is_none_in_the_whole() -> None:
    tiles = Tiling(64, 32).tiles((96, 64))
    maps: list[AnomalyMap] = [np.zeros((8, 8), np.float32), np.full((8, 8), np.nan, np.float32)]
    assert np.isnan(stitch(maps, tiles).max())


def test_an_image_of_one_tile_is_judged_as_by_the_inner_detector() -> None:
    images = [np.random.default_rng(n).integers(0, 256, (40 + n, 64, 3), dtype=np.uint8) for n in range(3)]
    inner = Halver()
    for tiled, plain in zip(TiledDetector(inner, Tiling(64, 8)).predict(images), inner.predict(images), strict=True):
        assert tiled.anomaly_score == plain.anomaly_score
        assert np.array_equal(tiled.anomaly_map, plain.anomaly_map)
    assert [len(together) for together in inner.shown] == [3, 3]  # parts that came together are judged together


def test_a_large_image_goes_through_the_detector_in_pieces_of_a_fixed_number() -> None:
    inner = Halver()
    images = [spotted(1000, 700, (999, 699, 1, 1, 7)), spotted(100, 100, (50, 50, 1, 1, 9)), spotted(64, 300)]
    found = TiledDetector(inner, Tiling(64, 16)).predict(images)
    assert [prediction.anomaly_score for prediction in found] == [7, 9, 0]
    assert [prediction.anomaly_map.shape for prediction in found] == [(500, 350), (50, 50), (32, 150)]
    *full, last = (len(together) for together in inner.shown)
    assert set(full) == {TOGETHER}
    assert 0 < last <= TOGETHER
    assert {shape for together in inner.shown for shape in together} == {(64, 64, 3)}
    assert TiledDetector(inner, Tiling(64, 16)).predict([]) == []


@given(st.integers(0, 299), st.integers(0, 799))
def test_a_spot_is_shown_where_it_is_within_a_pixel_of_the_map(row: int, column: int) -> None:
    found = TiledDetector(Halver(), Tiling(128, 32)).predict([spotted(300, 800, (row, column, 1, 1, 200))])[0]
    assert found.anomaly_score == 200
    for y, x in np.argwhere(found.anomaly_map):
        assert abs(2 * y + 0.5 - row) <= 2
        assert abs(2 * x + 0.5 - column) <= 2


def test_regions_of_a_stitched_map_are_in_pixels_of_the_image_and_follow_rule_and_mask() -> None:
    kept = np.ones((200, 520), bool)
    kept[:, 400:] = False
    image = spotted(200, 520, (20, 100, 10, 30, 100), (150, 60, 4, 4, 150), (150, 440, 20, 20, 250))
    rule = Rule(smallest_area_px=50, kept=kept)
    found = RegionDetector(TiledDetector(Halver(), Tiling(128, 16)), rule).predict([image])[0]
    assert found.anomaly_map.shape == (100, 260)
    assert found.anomaly_score == 100  # the brighter ones are too small, or where nobody looks
    (region,) = regions(found.anomaly_map, 50.0, image.shape, rule)
    assert (region.x, region.y, region.width, region.height) == pytest.approx((100, 20, 30, 10), abs=2)
    assert region.area_px == pytest.approx(300, rel=0.2)
    assert len(regions(found.anomaly_map, 50.0, image.shape, PLAIN)) == 2


def test_pictures_of_a_stitched_map_keep_its_aspect_and_its_peak() -> None:
    noise = np.random.default_rng(0).integers(0, 40, (200, 520, 1), dtype=np.uint8).repeat(3, axis=2)
    image = np.maximum(noise, spotted(200, 520, (150, 440, 20, 20, 250)))
    (found,) = TiledDetector(Halver(), Tiling(128, 16)).predict([image])
    caption = overlay.Caption(Outcome.FAIL, "part", "")
    picture = overlay.render(image, found.anomaly_map, 200.0, caption, side=520)
    clear = overlay.render(image, np.zeros_like(found.anomaly_map), 200.0, caption, side=520)
    margin = 10
    rows, columns = np.nonzero((picture != clear).any(axis=2)[: margin + 200, : margin + 520])
    assert (rows.min(), rows.max()) == pytest.approx((margin + 150, margin + 170), abs=3)
    assert (columns.min(), columns.max()) == pytest.approx((margin + 440, margin + 460), abs=3)
    published = [overlay.fit_map(found.anomaly_map, 200.0, b"", limit) for limit in (10**6, 6000)]
    for png, scale in zip(published, (2, 4), strict=True):
        assert png is not None
        levels = np.asarray(PIL.Image.open(BytesIO(png)))
        assert levels.shape == (200 // scale, 520 // scale)
        assert np.argwhere(levels > 64).mean(axis=0) * scale == pytest.approx((160, 450), abs=4)


@pytest.mark.parametrize(
    ("side", "overlap", "says"), [(63, 0, "too small"), (64, 33, "give 0 to 32"), (64, -1, "give 0")]
)
def test_tiles_that_make_no_sense_are_refused(side: int, overlap: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Tiling(side, overlap)


def test_a_model_remembers_its_tiling_and_one_without_says_nothing() -> None:
    for tiling in (None, Tiling(512, 64)):
        assert tiling_of(json.loads(json.dumps(settings_of(tiling)))) == tiling
    assert settings_of(None) == {}
    with pytest.raises(TypeError):
        tiling_of({"tiling": {"side": 64}})
