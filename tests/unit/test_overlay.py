from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from daemon.contract import SCALES, Picture
from daemon.messages import Outcome
from daemon.overlay import Caption, contact_sheet, encode_jpeg, encode_map, fit_jpeg, fit_map, render
from detectors.base import AnomalyMap, Image

CAPTION = Caption(Outcome.FAIL, "line-04 · SN-00091827364", "score 1.84 × threshold · p 0.003")
THRESHOLD = 3.7
MARK = (255, 0, 255)  # a colour that only a part painted with it has
Area = tuple[slice, slice]


def plain(height: int, width: int, colour: tuple[int, int, int] = (90, 90, 90)) -> Image:
    return np.full((height, width, 3), colour, np.uint8)


def noise(height: int, width: int) -> Image:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)


def level(multiple: float, shape: tuple[int, int] = (64, 64)) -> AnomalyMap:
    return np.full(shape, multiple * THRESHOLD, np.float32)


def box(found: NDArray[np.bool_]) -> Area:
    rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def area_of_part(height: int, width: int, side: int = 512) -> Area:
    picture = render(plain(height, width, MARK), level(0), THRESHOLD, CAPTION, side)
    return box((picture == MARK).all(axis=2))


def part(image: Image, anomaly_map: AnomalyMap, threshold: float = THRESHOLD, side: int = 512) -> Image:
    rows, columns = area_of_part(image.shape[0], image.shape[1], side)
    return render(image, anomaly_map, threshold, CAPTION, side)[rows, columns]


def line(picture: Image) -> NDArray[np.bool_]:
    return np.asarray(picture.min(axis=2) > 120)  # over a black part no heat is as near to white as the line


def segments(jpeg: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 2
    while jpeg[at + 1] != 0xDA:
        length = int.from_bytes(jpeg[at + 2 : at + 4], "big")
        found.append((jpeg[at + 1], jpeg[at + 4 : at + 2 + length]))
        at += 2 + length
    return found


def decode(jpeg: bytes) -> Image:
    return np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB), np.uint8)


def test_a_map_below_half_the_threshold_leaves_every_pixel_of_the_part() -> None:
    image = noise(512, 400)
    assert np.array_equal(part(image, level(0.49)), image)


def test_a_map_between_half_and_whole_threshold_tints_the_part_without_a_line() -> None:
    black = plain(512, 512, (0, 0, 0))
    tinted = part(black, level(0.8))
    assert tinted.any()
    assert not line(tinted).any()


def test_a_higher_threshold_makes_the_same_map_cooler_everywhere() -> None:
    black = plain(512, 512, (0, 0, 0))
    anomaly_map = np.linspace(0, 2 * THRESHOLD, 64, dtype=np.float32)[None].repeat(64, axis=0)
    hot, cool = part(black, anomaly_map), part(black, anomaly_map, 2 * THRESHOLD)
    assert hot.any(axis=(0, 2)).argmax() == pytest.approx(128, abs=8)  # a quarter of twice the threshold
    assert cool.any(axis=(0, 2)).argmax() == pytest.approx(256, abs=8)
    assert cool[20:-20, :490].mean() < hot[20:-20, :490].mean() / 3


def test_a_place_keeps_its_colour_whatever_the_rest_of_the_map_shows() -> None:
    image = noise(512, 512)
    calm, alarming = level(0.8), level(0.8)
    alarming[:, 48:] = 3 * THRESHOLD
    assert np.array_equal(part(image, calm)[:, :360], part(image, alarming)[:, :360])


def test_heat_is_the_same_from_twice_the_threshold_upwards() -> None:
    image, inner = noise(512, 512), slice(10, -10)
    assert np.array_equal(part(image, level(2))[inner, inner], part(image, level(50))[inner, inner])
    assert not np.array_equal(part(image, level(1.9))[inner, inner], part(image, level(50))[inner, inner])


def test_the_part_stays_visible_under_the_hottest_heat() -> None:
    stripes = plain(512, 512, (0, 0, 0))
    stripes[:, 250:260] = 255
    row = part(stripes, level(50))[256].astype(int)
    assert (row[255] - row[200]).min() >= 40


@pytest.mark.parametrize("crossing", [200.0, 200.4, 200.8])
def test_the_line_runs_within_a_quarter_of_a_pixel_of_where_the_map_crosses_the_threshold(crossing: float) -> None:
    field = (THRESHOLD * (1 + (np.arange(512) - crossing) / 400)).astype(np.float32)
    drawn = part(plain(512, 512, (0, 0, 0)), field[None].repeat(512, axis=0)).min(axis=2)
    inner = drawn[10:-10, 10:-10].astype(float).clip(min=70) - 70  # without heat; the line closes along the edge
    assert inner.any(axis=1).all()
    assert (inner * np.arange(10, 502)).sum() / inner.sum() == pytest.approx(crossing, abs=0.25)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        elements=st.floats(0, 5.5, width=32),
    ),
    st.integers(1, 60),
    st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_there_is_a_line_exactly_when_the_score_is_above_the_threshold(
    anomaly_map: AnomalyMap, height: int, width: int
) -> None:
    drawn = line(part(plain(height, width, (0, 0, 0)), anomaly_map, side=64))
    assert drawn.any() == (float(anomaly_map.max()) > THRESHOLD)


def test_a_single_hot_pixel_survives_a_reduction_to_a_narrow_part() -> None:
    anomaly_map = level(0.1, (256, 256))
    anomaly_map[101, 77] = anomaly_map[180, 201] = 1.5 * THRESHOLD
    narrow = line(part(plain(1200, 100, (0, 0, 0)), anomaly_map))
    assert narrow[:256].any()
    assert narrow[256:].any()


def test_the_line_agrees_with_the_verdict_to_the_last_bit() -> None:
    score = np.nextafter(np.float32(THRESHOLD), np.float32(9))
    anomaly_map = level(0.2)
    anomaly_map[30, 30] = score
    black = plain(512, 512, (0, 0, 0))
    assert not line(part(black, anomaly_map, float(score))).any()
    assert line(part(black, anomaly_map, float(np.nextafter(float(score), 0)))).any()


@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize("size", [(64, 64), (1200, 100), (100, 1200), (1, 1), (3, 2000), (321, 457), (1536, 2048)])
def test_a_part_of_any_size_lies_whole_in_the_picture(size: tuple[int, int], side: int) -> None:
    rows, columns = area_of_part(*size, side)
    shown = (rows.stop - rows.start, columns.stop - columns.start)
    assert max(shown) == side
    assert min(shown) == max(1, round(side * min(size) / max(size)))
    picture = render(noise(*size), level(1.5), THRESHOLD, CAPTION, side)
    assert picture.dtype == np.uint8
    assert rows.stop < picture.shape[0] - 30  # the caption has its room
    assert columns.stop < picture.shape[1] - 30  # and so has the scale
    assert picture.shape[1] >= 240 * side // 512


def test_the_pointer_shows_how_near_a_good_part_came() -> None:
    far, near = (render(plain(512, 512), level(multiple), THRESHOLD, CAPTION) for multiple in (0.1, 0.4))
    rows, columns = box((far != near).any(axis=2))
    assert columns.start >= area_of_part(512, 512)[1].stop
    assert rows.stop - rows.start == pytest.approx(512 * 0.3 / 2, abs=16)


@pytest.mark.parametrize("ground", [0, 128, 255])
def test_what_is_not_inspected_is_veiled_in_grey_and_the_rest_is_as_it_was(ground: int) -> None:
    image = plain(256, 400, (ground, ground, ground))
    image[40:100] = (200, 20, 90)
    image[140:200] = (20, 90, 200)
    kept = np.zeros((256, 400), bool)
    kept[:, 100:200] = True
    veiled = render(image, level(0), THRESHOLD, CAPTION, 400, kept)[area_of_part(256, 400, 400)]
    assert np.array_equal(veiled[:, 100:200], image[:, 100:200])
    outside = veiled[:, ~kept[0]].astype(int)
    assert np.ptp(outside, axis=2).max() < 16  # no colour
    assert np.abs(outside[10] - image[10, 0]).min() >= 30  # the veil shows
    assert np.ptp(outside[:, 0].mean(axis=1)) > 4  # the part can still be made out


def test_the_veil_fits_an_image_of_any_size_and_needs_no_map() -> None:
    for height, width in ((1000, 1600), (50, 80)):
        kept = np.zeros((height, width), bool)
        kept[:, : width // 2] = True
        picture = render(plain(height, width, MARK), None, float("nan"), CAPTION, 400, kept)
        rows, columns = box((picture == MARK).all(axis=2))
        assert rows.stop - rows.start == 250
        assert columns.stop - columns.start == pytest.approx(200, abs=4)


def test_a_mask_of_everything_and_none_draw_the_same_picture() -> None:
    image, kept = noise(300, 400), np.ones((300, 400), bool)
    whole = render(image, level(1.5), THRESHOLD, CAPTION)
    assert np.array_equal(render(image, level(1.5), THRESHOLD, CAPTION, kept=kept), whole)
    unread = render(None, None, THRESHOLD, CAPTION)
    assert np.array_equal(render(None, None, THRESHOLD, CAPTION, kept=~kept), unread)


def test_the_arguments_are_left_alone() -> None:
    image, anomaly_map = noise(512, 300), level(1.5)
    image.setflags(write=False)
    anomaly_map.setflags(write=False)
    before, kept = image.copy(), np.eye(512, 300, dtype=bool)
    kept.setflags(write=False)
    render(image, anomaly_map, THRESHOLD, CAPTION, kept=kept)
    assert np.array_equal(image, before)


def test_without_a_map_there_is_the_part_and_the_caption_alone() -> None:
    image = noise(512, 512)
    picture = render(image, None, float("nan"), CAPTION)
    margin = (picture.shape[1] - 512) // 2
    assert np.array_equal(picture[margin : margin + 512, margin : margin + 512], image)


def test_an_unreadable_frame_shows_its_reason_in_place_of_the_part() -> None:
    def card(reason: str) -> Image:
        return render(None, None, float("nan"), Caption(Outcome.ERROR, "line-04 · SN-1", reason))

    empty, told = card(""), card("SN-1.jpg ends after 12 345 of 40 217 bytes " * 20)
    assert told.shape == empty.shape
    rows, _ = box((told != empty).any(axis=2))
    assert rows.start > 10
    assert rows.stop < empty.shape[0] - 40


def test_every_outcome_has_its_own_badge() -> None:
    looks = {render(plain(64, 64), None, 1.0, Caption(o, "a", "b")).tobytes() for o in Outcome}
    assert len(looks) == len(Outcome)


def test_long_text_is_cut_and_the_end_of_the_part_id_is_kept() -> None:
    def card(title: str) -> Image:
        return render(plain(64, 64), level(0), THRESHOLD, Caption(Outcome.UNCERTAIN, title, "long " * 90), 256)

    one, other = card("line-04 · " + "0" * 60 + "1"), card("line-04 · " + "0" * 60 + "2")
    assert one.shape == other.shape == card("short").shape
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    "text", ["", "\udcff\udc80.png", "\x00\x1b[0m", "two\nlines\tof", "🙂 é 电 א \u0301", "W" * 5000]
)
def test_any_text_can_be_written(text: str) -> None:
    caption = Caption(Outcome.PASS, text, text)
    assert render(plain(512, 512), None, 1.0, caption).shape[1] == render(None, None, 1.0, caption).shape[1]


def test_threads_draw_the_same_picture() -> None:
    image, anomaly_map = noise(64, 64), level(1.5)

    def draw(_: int) -> bytes:
        return render(image, anomaly_map, THRESHOLD, CAPTION, 128).tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(draw, range(200))) == {draw(0)}


def test_the_comment_comes_back_from_the_jpeg_and_the_picture_decodes() -> None:
    picture, comment = render(noise(300, 500), level(1.2), THRESHOLD, CAPTION), '{"id":"01J","part":"ü"}'.encode()
    jpeg = encode_jpeg(picture, comment)
    kinds = [kind for kind, _ in segments(jpeg)]
    assert kinds[:2] == [0xE0, 0xFE]
    assert [body for kind, body in segments(jpeg) if kind == 0xFE] == [comment]
    assert np.abs(decode(jpeg).astype(int) - picture).mean() < 25
    assert np.array_equal(decode(jpeg), decode(encode_jpeg(picture, b"")))


def test_red_stays_red_in_the_jpeg() -> None:
    assert decode(encode_jpeg(plain(16, 16, (220, 10, 30)), b""))[8, 8].tolist() == pytest.approx((220, 10, 30), abs=6)


def test_a_comment_longer_than_a_segment_is_refused() -> None:
    longest = b"x" * 65_533
    assert segments(encode_jpeg(plain(8, 8), longest))[1] == (0xFE, longest)
    with pytest.raises(ValueError, match="65533 bytes, this one has 65534"):
        encode_jpeg(plain(8, 8), longest + b"x")


def test_a_jpeg_is_made_to_fit_by_quality_first_then_by_size() -> None:
    picture, comment = render(noise(512, 512), None, 1.0, CAPTION), b'{"id":"01J"}'
    steps = [encode_jpeg(picture, comment, quality) for quality in (80, 60, 40)]
    for step in steps:
        assert fit_jpeg(picture, comment, len(step)) == step
    limit, height = len(steps[-1]) - 1, picture.shape[0]
    for scale in (0.75, 0.5):
        fitted = fit_jpeg(picture, comment, limit)
        assert fitted is not None
        assert len(fitted) <= limit
        assert decode(fitted).shape[0] == round(height * scale)
        assert segments(fitted)[1] == (0xFE, comment)
        limit = len(fitted) - 1
    assert fit_jpeg(picture, comment, limit) is None


def opened(png: bytes) -> tuple[NDArray[np.uint8], dict[str, str]]:
    """The values of a PNG file and its texts, read by Pillow."""
    with PIL.Image.open(BytesIO(png)) as image:
        assert isinstance(image, PngImageFile)
        assert image.mode == "L"
        return np.asarray(image), {str(key): str(text) for key, text in image.text.items()}


@given(
    arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(1e-3, 1e6),
)
def test_a_map_as_png_is_above_64_exactly_where_the_map_is_above_the_threshold(
    anomaly_map: AnomalyMap, threshold: float
) -> None:
    values, _ = opened(encode_map(anomaly_map, threshold, b""))
    assert ((values > 64) == (anomaly_map > np.float64(threshold))).all()
    lowest, highest = SCALES[Picture.MAP]
    told = lowest + values / 255 * (highest - lowest)
    surplus = told - np.clip(anomaly_map / np.float64(threshold), lowest, highest)
    assert surplus.min() >= -1e-6
    assert surplus.max() <= 1 / 64 + 1e-6


def test_no_rounding_moves_a_map_across_the_threshold() -> None:
    for value in np.linspace(0.1, 9, 200, dtype=np.float32):
        at = np.full((1, 1), value, np.float32)
        below = np.nextafter(np.float64(value), 0)
        told = [opened(encode_map(at, float(threshold), b""))[0].item() for threshold in (value, below)]
        assert told == [64, 65]


def test_the_comment_of_a_map_is_a_text_chunk_that_any_reader_finds() -> None:
    comment = b'{"id":"01J","part_id":"\\u00fc"}'
    png = encode_map(level(1.2), THRESHOLD, comment)
    assert opened(png)[1] == {"inspectd": comment.decode()}
    assert b"tEXtinspectd\x00" + comment in png


def test_a_map_gives_up_its_size_and_no_peak_to_keep_the_limit() -> None:
    field = np.random.default_rng(7).uniform(0, THRESHOLD, (128, 96)).astype(np.float32)
    field[37, 51] = 2.99 * THRESHOLD
    whole = fit_map(field, THRESHOLD, b"{}", 100_000)
    assert whole == encode_map(field, THRESHOLD, b"{}")
    limit = len(whole) - 1
    for shape in ((64, 48), (32, 24)):
        fitted = fit_map(field, THRESHOLD, b"{}", limit)
        assert fitted is not None
        assert len(fitted) <= limit
        values, texts = opened(fitted)
        assert (values.shape, values.max(), texts) == (shape, 192, {"inspectd": "{}"})
        limit = len(fitted) - 1
    assert fit_map(field, THRESHOLD, b"{}", limit) is None


def test_a_contact_sheet_centres_unequal_pictures_in_equal_cells() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [plain(*size, colour) for size, colour in zip([(200, 300), (120, 80), (50, 260)], colours, strict=True)]
    sheet = contact_sheet(pictures, 2, "bracket-A · rejected parts")
    boxes = [box((sheet == colour).all(axis=2)) for colour in colours]
    centres = [((rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2) for rows, columns in boxes]
    for picture, (rows, columns) in zip(pictures, boxes, strict=True):
        assert (rows.stop - rows.start, columns.stop - columns.start) == picture.shape[:2]
    assert centres[0][0] == centres[1][0]  # one row
    assert centres[0][1] == centres[2][1]  # one column
    gap = boxes[0][1].start
    assert sheet.shape[1] == 2 * 300 + 3 * gap
    assert centres[1][1] - centres[0][1] == 300 + gap
    assert centres[2][0] - centres[0][0] == 200 + gap
    heading = sheet[: boxes[0][0].start]
    assert (heading != heading[0, 0]).any()


def test_a_contact_sheet_is_no_wider_than_its_pictures_need() -> None:
    one = contact_sheet([plain(100, 100)], 1, "")
    assert contact_sheet([plain(100, 100)], 5, "").shape == one.shape
