import re
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps

from daemon.images import MAX_BYTES, MAX_PIXELS, MAX_SIDE, UndecodableError, decode, read, shrunk
from detectors.base import Image

PART = np.random.default_rng(7).integers(0, 256, (48, 64, 3), dtype=np.uint8)
SMOOTH = np.dstack([np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8) + shade for shade in (0, 40, 90)])


def saved(picture: Pillow.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def encoded(suffix: str, pixels: NDArray[np.uint8] | NDArray[np.uint16], *options: int) -> bytes:
    """A file as OpenCV writes it; it takes blue first."""
    return cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels, options)[1].tobytes()


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def reason(data: bytes) -> str:
    with pytest.raises(UndecodableError) as refusal:
        decode(data)
    return str(refusal.value)


def same(image: Image, expected: NDArray[np.uint8]) -> bool:
    return image.dtype == np.uint8 and image.flags.writeable and np.array_equal(image, expected)


def pillows(data: bytes, shrink: int = 1) -> Image:
    """What Pillow alone makes of a file; a JPEG by scaled decoding."""
    with Pillow.open(BytesIO(data)) as picture:
        if shrink > 1:
            picture.draft(None, (picture.width // shrink, picture.height // shrink))
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def wavy(height: int, width: int, seed: int) -> Image:
    """An image with edges, gradients and noise, as a JPEG finds them hard."""
    waves = np.sin(np.arange(height)[:, None] / 5) * np.cos(np.arange(width) / 3 + seed) * 90 + 120
    noise = np.random.default_rng(seed).normal(0, 20, (height, width, 3))
    return np.clip(waves[..., None] * (1.0, 0.8, 1.1) + noise, 0, 255).astype(np.uint8)


SAMPLINGS = {"4:4:4": 0x111111, "4:2:2": 0x211111, "4:2:0": 0x221111, "4:4:0": 0x121111, "4:1:1": 0x411111}


@st.composite
def jpegs(draw: st.DrawFn) -> bytes:
    pixels = wavy(draw(st.integers(8, 70)), draw(st.integers(8, 70)), draw(st.integers(0, 99)))
    quality = draw(st.integers(30, 100))
    if draw(st.booleans()):  # OpenCV writes any sampling, but no EXIF
        sampling = SAMPLINGS[draw(st.sampled_from(sorted(SAMPLINGS)))]
        options = {cv2.IMWRITE_JPEG_SAMPLING_FACTOR: sampling, cv2.IMWRITE_JPEG_QUALITY: quality}
        options[cv2.IMWRITE_JPEG_PROGRESSIVE] = draw(st.integers(0, 1))
        options[cv2.IMWRITE_JPEG_RST_INTERVAL] = draw(st.integers(0, 3))
        return encoded(".jpg", pixels, *[number for option in options.items() for number in option])
    exif = Pillow.Exif()
    exif[0x0112] = draw(st.integers(0, 9))
    mode = draw(st.sampled_from(["L", "RGB", "CMYK"]))
    more = {"keep_rgb": True} if mode == "RGB" and draw(st.booleans()) else {}
    picture = Pillow.fromarray(pixels).convert(mode)
    return saved(picture, "JPEG", quality=quality, progressive=draw(st.booleans()), exif=exif, **more)


@settings(deadline=None)
@given(jpegs(), st.sampled_from([1, 2, 4, 8]))
def test_every_jpeg_has_the_pixels_that_pillow_gives_it_whole_and_shrunk(data: bytes, shrink: int) -> None:
    assert same(decode(data, shrink), pillows(data, shrink))


@settings(max_examples=200, deadline=None)
@given(jpegs(), st.data())
def test_a_damaged_jpeg_has_the_pixels_that_pillow_gives_it_or_none(data: bytes, drawn: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(drawn.draw(st.integers(1, 3))):
        damaged[drawn.draw(st.integers(2, len(data) - 1))] = drawn.draw(st.integers(0, 255))
    try:
        image = decode(bytes(damaged))
    except UndecodableError:
        return
    assert same(image, pillows(bytes(damaged)))


@pytest.mark.parametrize("shrink", [1, 4])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}, {"quality": 100}], ids=str
)
def test_a_jpeg_cut_off_at_whatever_byte_is_refused_as_cut_off(options: dict[str, object], shrink: int) -> None:
    data = saved(Pillow.fromarray(wavy(33, 41, 1)), "JPEG", **options)
    for kept in range(1, len(data)):
        with pytest.raises(UndecodableError, match="cut off"):
            decode(data[:kept], shrink)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 61])
def test_every_bmp_has_the_pixels_that_pillow_gives_it(mode: str, width: int) -> None:
    data = saved(Pillow.fromarray(wavy(9, width, 2)).convert(mode), "BMP")
    assert same(decode(data), pillows(data))


def test_a_bmp_that_begins_with_its_uppermost_row_is_read() -> None:
    data = bytearray(saved(Pillow.fromarray(PART), "BMP"))
    data[22:26] = struct.pack("<i", -PART.shape[0])
    assert same(decode(bytes(data)), PART[::-1])


def test_a_bmp_cut_off_at_whatever_byte_is_refused_as_cut_off() -> None:
    data = saved(Pillow.fromarray(PART[:9, :12]), "BMP")
    for kept in range(1, len(data)):
        assert "cut off" in reason(data[:kept])


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([2, 4, 8]))
def test_a_shrunk_pixel_is_the_mean_of_those_it_covers(height: int, width: int, shrink: int) -> None:
    image = wavy(height, width, 3)
    whole = np.pad(image, ((0, -height % shrink), (0, -width % shrink), (0, 0)), mode="edge").astype(float)
    blocks = whole.reshape(whole.shape[0] // shrink, shrink, whole.shape[1] // shrink, shrink, 3)
    small = shrunk(image, shrink)
    assert small.shape == (-(-height // shrink), -(-width // shrink), 3)
    assert np.abs(small - blocks.mean(axis=(1, 3))).max() <= 0.5 + 1e-4
    assert shrunk(image, 1) is image


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_all_but_a_jpeg_are_shrunk_by_their_means(kind: str, shrink: int) -> None:
    assert same(decode(saved(Pillow.fromarray(PART), kind), shrink), shrunk(PART, shrink))


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("shape", [(49, 63), (5, 64), (7, 6), (1, 1)])
def test_a_shrunk_jpeg_is_as_large_as_any_other_and_much_the_same(shape: tuple[int, int], shrink: int) -> None:
    pixels = np.dstack([np.add.outer(np.arange(shape[0]), np.arange(shape[1])).astype(np.uint8) + 60] * 3)
    small = decode(saved(Pillow.fromarray(pixels), "JPEG", quality=95), shrink)
    expected = shrunk(pixels, shrink)
    assert small.shape == expected.shape
    assert np.abs(small.astype(int) - expected).max() <= 8


def test_a_jpeg_is_decoded_at_its_shrunk_size_and_never_whole() -> None:
    data = saved(Pillow.fromarray(wavy(64, 64, 4)), "JPEG")
    assert not np.array_equal(decode(data, 2), shrunk(decode(data), 2))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_colour_pixels_come_back_as_they_were_saved(kind: str) -> None:
    assert same(decode(saved(Pillow.fromarray(PART), kind)), PART)


def test_jpeg_pixels_come_back_within_its_own_loss() -> None:
    image = decode(saved(Pillow.fromarray(SMOOTH), "JPEG", quality=95, subsampling=0))
    assert image.shape == SMOOTH.shape
    assert np.abs(image.astype(int) - SMOOTH).max() <= 4


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits"])
def test_tiff_compressions_are_read(compression: str) -> None:
    assert same(decode(saved(Pillow.fromarray(PART), "TIFF", compression=compression)), PART)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_grey_is_repeated_in_three_channels(kind: str) -> None:
    grey = PART[..., 0]
    assert same(decode(saved(Pillow.fromarray(grey), kind)), np.dstack([grey] * 3))


def test_grey_jpeg_is_repeated_in_three_channels() -> None:
    image = decode(saved(Pillow.fromarray(SMOOTH[..., 0]), "JPEG", quality=95))
    assert image.shape == SMOOTH.shape
    assert np.array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_becomes_its_high_byte(suffix: str) -> None:
    deep = np.array([[0, 255, 256, 32768, 65279, 65280, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 128, 254, 255, 255]], np.uint8)
    assert same(decode(encoded(suffix, deep)), np.dstack([expected] * 3))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_colour_becomes_its_high_byte(suffix: str) -> None:
    deep = np.random.default_rng(1).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    assert same(decode(encoded(suffix, deep)), (deep >> 8).astype(np.uint8))


def test_a_dark_sixteen_bit_image_stays_dark() -> None:
    dark = np.full((8, 8), 1024, np.uint16)
    dark[0, 0] = 1280
    assert decode(encoded(".png", dark)).max() == 5


def test_eight_bits_widened_to_sixteen_either_way_come_back_exactly() -> None:
    for factor in (256, 257):
        assert same(decode(encoded(".png", PART.astype(np.uint16) * np.uint16(factor))), PART)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_dropped_and_the_colours_underneath_stay(kind: str) -> None:
    alpha = np.zeros((*PART.shape[:2], 1), np.uint8)
    assert same(decode(saved(Pillow.fromarray(np.dstack([PART, alpha])), kind)), PART)
    grey = PART[..., 1]
    with_alpha = Pillow.fromarray(np.dstack([grey, alpha[..., 0]]))
    assert with_alpha.mode == "LA"
    assert same(decode(saved(with_alpha, kind)), np.dstack([grey] * 3))


def test_a_palette_is_looked_up_whether_transparent_or_not() -> None:
    palette = Pillow.fromarray(PART).quantize(16)
    expected = np.array(palette.convert("RGB"))
    assert same(decode(saved(palette, "PNG")), expected)
    assert same(decode(saved(palette, "PNG", transparency=bytes(range(16)))), expected)


def test_black_and_white_is_read() -> None:
    bits = PART[..., 0] > 127
    assert same(decode(saved(Pillow.fromarray(bits), "PNG")), np.dstack([bits * np.uint8(255)] * 3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255
    upright[:8, 16:] = 90
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    stored = Pillow.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    image = decode(saved(stored, kind, exif=exif))
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).max() <= 8


def test_an_empty_file_is_refused_as_empty() -> None:
    assert reason(b"").startswith("the file is empty")


def test_a_text_is_refused_as_no_image() -> None:
    assert reason(b"part 4711, station 2\n").startswith("not a PNG, JPEG, BMP or TIFF image")


def test_a_gif_is_refused_as_no_image() -> None:
    assert reason(saved(Pillow.fromarray(PART), "GIF")).startswith("not a PNG, JPEG, BMP or TIFF image")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(suffix: str, kept: float) -> None:
    data = encoded(suffix, PART)
    assert "cut off" in reason(data[: int(len(data) * kept)])


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_tiff_that_has_its_directory_but_not_its_pixels_is_refused(compression: str) -> None:
    data = saved(Pillow.fromarray(PART), "TIFF", compression=compression)
    assert "cut off" in reason(data[: len(data) - 500])


def test_a_truncated_progressive_jpeg_is_refused() -> None:
    data = saved(Pillow.fromarray(SMOOTH), "JPEG", progressive=True)
    assert "cut off" in reason(data[: len(data) - 40])


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_file_whose_tail_is_zeros_is_refused(suffix: str) -> None:
    data = encoded(suffix, PART)
    half = len(data) // 2
    assert "cut off" in reason(data[:half] + bytes(len(data) - half))


def test_the_end_of_a_thumbnail_is_not_taken_for_the_end_of_the_image() -> None:
    thumbnail = saved(Pillow.fromarray(SMOOTH[:8, :8]), "JPEG")
    data = saved(Pillow.fromarray(PART), "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert decode(data).shape == PART.shape
    half = len(thumbnail) + (len(data) - len(thumbnail)) // 2
    assert "cut off" in reason(data[:half] + bytes(len(data) - half))


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    data = saved(Pillow.fromarray(SMOOTH), "JPEG")
    assert np.array_equal(decode(data + bytes(512) + b"camera notes"), decode(data))


@pytest.mark.parametrize(("width", "height"), [(30_000, 20), (20, 30_000), (16_000, 16_000)])
def test_absurd_sizes_are_refused_from_the_header_and_named(width: int, height: int) -> None:
    refusal = reason(png_header(width, height) + b"\0\0\0\0IDAT")
    assert f"{width}×{height} pixels" in refusal
    assert str(MAX_SIDE) in refusal
    assert str(MAX_PIXELS) in refusal


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_absurd_sizes_are_refused_in_every_format(kind: str) -> None:
    strip = Pillow.new("L", (1, MAX_SIDE + 1))
    assert f"1×{MAX_SIDE + 1} pixels" in reason(saved(strip, kind))


def test_the_longest_side_allowed_is_read() -> None:
    assert decode(saved(Pillow.new("L", (MAX_SIDE, 1)), "PNG")).shape == (1, MAX_SIDE, 3)


def test_a_file_larger_than_any_image_allowed_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "endless.bmp"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 2)
    with pytest.raises(UndecodableError, match=f"limit of {MAX_BYTES} bytes"):
        read(path)


@pytest.mark.parametrize("pixels", [np.float32, np.int32])
def test_thirty_two_bits_a_channel_are_refused_with_what_to_do(pixels: type[np.generic]) -> None:
    deep = Pillow.fromarray(np.ones((4, 4), pixels))
    assert "let the camera save 8 or 16" in reason(saved(deep, "TIFF"))


def test_a_broken_png_checksum_is_refused() -> None:
    data = bytearray(saved(Pillow.fromarray(PART), "PNG"))
    data[20] ^= 1
    assert re.match("not a PNG|the image is damaged", reason(bytes(data)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([".jpg", ".png", ".bmp", ".tif"]), st.data())
def test_damaged_bytes_give_an_image_or_a_reason_and_nothing_else(suffix: str, data: st.DataObject) -> None:
    content = bytearray(encoded(suffix, PART[:16, :16]))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode(bytes(content))
        except UndecodableError:
            pass
        else:
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif"])
def test_nothing_is_printed_about_a_damaged_file(suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = encoded(suffix, PART)
    reason(data[: len(data) * 2 // 3])
    assert capfd.readouterr() == ("", "")


def test_read_gives_what_decode_gives_and_lets_a_missing_file_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "part.png"
    path.write_bytes(saved(Pillow.fromarray(PART), "PNG"))
    assert same(read(path), PART)
    assert same(read(path, 2), shrunk(PART, 2))
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.png")
