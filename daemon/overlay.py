"""The picture that people see: the anomaly map over the part, and the verdict under it.

Colours mean a multiple of the calibrated threshold and nothing else, in every picture of every part: clear below half
of it, a line exactly on it, hottest from twice it. A picture scaled to its own extremes would paint a good part as red
as a bad one.

All functions are pure and may be called from several threads at once.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from textwrap import wrap

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngInfo

from daemon.messages import Outcome
from detectors.base import AnomalyMap, Image

_Colour = tuple[int, int, int]

_GROUND: _Colour = (19, 21, 25)
_PANEL: _Colour = (34, 37, 43)
_SHADE: _Colour = (56, 60, 68)
_GREY: _Colour = (92, 96, 104)
_MUTED: _Colour = (164, 171, 181)
_TEXT: _Colour = (240, 242, 245)
_LINE: _Colour = (255, 255, 255)
_EDGE: _Colour = (14, 14, 18)

# Ground and ink of each badge; the outcomes differ in lightness and symbol too, for eyes that do not see the hue.
_BADGES: dict[Outcome, tuple[_Colour, _Colour]] = {
    Outcome.PASS: ((0, 128, 92), (255, 255, 255)),
    Outcome.FAIL: ((206, 44, 50), (255, 255, 255)),
    Outcome.UNCERTAIN: ((246, 184, 46), (40, 29, 0)),
    Outcome.ERROR: ((112, 104, 146), (255, 255, 255)),
}

_REGULAR, _BOLD = 400, 600
_COOLEST, _HOTTEST = 0.5, 2.0  # in thresholds: colour begins above the one and stays the same above the other
_VEIL = 0.7  # opacity over what is not inspected
_ENCLOSING = 3  # points that it takes to go round something
_RING = 16 * np.array([(3, 0), (2, 2), (0, 3), (-2, 2), (-3, 0), (-2, -2), (0, -3), (2, -2)], np.int32)
_JPEG_STEPS = ((80, 1.0), (60, 1.0), (40, 1.0), (40, 0.75), (40, 0.5))  # quality, size
_STEPS = 64  # of a map's picture, from zero to the threshold
_LONGEST_COMMENT = 0xFFFF - 2  # a JPEG segment's length counts its own two bytes


@dataclass(frozen=True, slots=True)
class _Type:
    """How a line is set: pixels from ascender to descender, 100…900, and its colour."""

    size: int
    weight: int
    colour: _Colour


@dataclass(frozen=True, slots=True)
class Caption:
    """What is written under the part: `outcome` as a badge, `title` beside it, `detail` below both."""

    outcome: Outcome
    title: str
    detail: str


def render(
    image: Image | None,
    anomaly_map: AnomalyMap | None,
    threshold: float,
    caption: Caption,
    side: int = 512,
    kept: NDArray[np.bool_] | None = None,
) -> Image:
    """Draw the part with its anomaly map, a colour bar and a caption.

    Args:
        image: H×W×3; None where the frame could not be read: the detail then stands in the part's place.
        anomaly_map: finite, of any size, stretched over the whole image; None where nothing was measured.
        threshold: positive, in the map's units.
        caption: any text; what is too long for its line is cut with an ellipsis.
        side: pixels that the image's longer side takes in the picture, whatever the image's own size.
        kept: True where the image is inspected, stretched over it like the map; the rest is veiled in grey. None for
            everywhere.

    Returns:
        The image, enlarged or reduced, on a dark card. A line surrounds what is above the threshold; there is one
        exactly when the map's maximum is above it. The bar's pointer stands at that maximum.
    """
    type_size = max(12, round(side * 14 / 512))  # every distance follows the type
    margin = round(0.7 * type_size)
    part = _blank(side, caption.detail, type_size) if image is None else _fit(image, side)
    if image is not None and kept is not None:
        part = _veil(part, kept)
    if anomaly_map is not None:
        stretched = _stretch(anomaly_map, part.shape[0], part.shape[1])
        part = _heat(part, stretched / np.float32(threshold))
        _outline(part, stretched, threshold, max(1, type_size // 14))

    height, width = part.shape[:2]
    gutter = 0 if anomaly_map is None else round(3.6 * type_size)
    stage_height, stage_width = max(height, 5 * type_size), max(width + gutter, 20 * type_size)
    detail = "" if image is None else caption.detail
    strip = _strip(Caption(caption.outcome, caption.title, detail), stage_width, type_size)
    picture = _plane(margin + stage_height + strip.shape[0], stage_width + 2 * margin, _GROUND)
    _paste(picture, strip, margin + stage_height, margin)
    left = margin + (stage_width - width - gutter) // 2
    _paste(picture, part, margin + (stage_height - height) // 2, left)
    if anomaly_map is not None:
        peak = float(anomaly_map.max()) / threshold
        _paste(picture, _scale(peak, stage_height, gutter, type_size), margin, left + width)
    return picture


def encode_jpeg(picture: Image, comment: bytes, quality: int = 80) -> bytes:
    """Encode as a JPEG file with `comment` in a COM segment.

    Args:
        picture: H×W×3.
        comment: at most 65 533 bytes.
        quality: 1…100.

    Raises:
        ValueError: the comment is too long for one segment.
    """
    if len(comment) > _LONGEST_COMMENT:
        raise ValueError(
            f"a JPEG comment holds {_LONGEST_COMMENT} bytes, this one has {len(comment)}: shorten what it carries"
        )
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    jpeg = encoded.tobytes()
    # JFIF wants its APP0 segment right behind the start marker, so the comment goes behind both.
    behind = 4 + int.from_bytes(jpeg[4:6], "big")
    segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
    return jpeg[:behind] + segment + jpeg[behind:]


def fit_jpeg(picture: Image, comment: bytes, limit_bytes: int) -> bytes | None:
    """Encode as the best JPEG of at most `limit_bytes`, or None.

    Quality is given up first, 80, 60, 40, then size, three quarters and a half.
    """
    height, width = picture.shape[:2]
    for quality, scale in _JPEG_STEPS:
        reduced = picture if scale == 1 else _resize(picture, round(height * scale), round(width * scale))
        jpeg = encode_jpeg(reduced, comment, quality)
        if len(jpeg) <= limit_bytes:
            return jpeg
    return None


def encode_map(anomaly_map: AnomalyMap, threshold: float, comment: bytes) -> bytes:
    """Encode a map as a grey PNG file in units of the threshold, with `comment` in a tEXt chunk named `inspectd`.

    A pixel's value divided by 64 is the map's as a multiple of the threshold, up to 1/64 above it, from 0 to 255/64,
    where it ends. It is above 64 exactly where the map is above the threshold.

    Args:
        anomaly_map: finite, of any size.
        threshold: positive, in the map's units.
        comment: ASCII without NUL.
    """
    steps = np.clip(np.ceil(anomaly_map * (_STEPS / np.float64(threshold))), 0, 255)
    # Rounding may bring what is just above the threshold down to it; x · (1/x) never exceeds 1, so nothing comes up.
    above = anomaly_map > np.float64(threshold)
    levels = np.where(above, np.maximum(steps, _STEPS + 1), steps).astype(np.uint8)
    chunk = PngInfo()
    chunk.add_text("inspectd", comment.decode("ascii"))
    file = BytesIO()
    PIL.Image.fromarray(levels).save(file, "PNG", pnginfo=chunk)
    return file.getvalue()


def fit_map(anomaly_map: AnomalyMap, threshold: float, comment: bytes, limit_bytes: int) -> bytes | None:
    """Encode a map as the largest PNG of at most `limit_bytes`, or None: whole, in half, or in quarter size.

    Where it is reduced, each pixel takes the largest value around it: no peak is lost.
    """
    for divisor in (1, 2, 4):
        height, width = (max(1, side // divisor) for side in anomaly_map.shape)
        reduced = anomaly_map if divisor == 1 else _stretch(anomaly_map, height, width)
        png = encode_map(reduced, threshold, comment)
        if len(png) <= limit_bytes:
            return png
    return None


def contact_sheet(pictures: Sequence[Image], columns: int, title: str) -> Image:
    """Lay pictures out row by row under a heading, each in the middle of an equal cell.

    Args:
        pictures: at least one, H×W×3, of any sizes.
        columns: at least one; no more are used than there are pictures.
        title: the heading, cut with an ellipsis where it is too long.
    """
    columns = min(columns, len(pictures))
    rows = ceil(len(pictures) / columns)
    cell_height, cell_width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    gap = max(8, min(cell_height, cell_width) // 20)
    width = columns * (cell_width + gap) + gap
    type_size = min(40, max(14, width // 44))
    heading = 3 * type_size
    sheet = _plane(heading + rows * (cell_height + gap), width, _PANEL)
    bold = _Type(type_size, _BOLD, _TEXT)
    _write(sheet, _elide(title, width - 2 * gap, bold), gap, heading // 2, bold)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        top = heading + row * (cell_height + gap) + (cell_height - picture.shape[0]) // 2
        left = gap + column * (cell_width + gap) + (cell_width - picture.shape[1]) // 2
        _paste(sheet, picture, top, left)
    return sheet


def _plane(height: int, width: int, colour: _Colour) -> Image:
    plane: Image = np.empty((height, width, 3), np.uint8)
    plane[:] = colour
    return plane


def _paste(picture: Image, piece: Image, top: int, left: int) -> None:
    picture[top : top + piece.shape[0], left : left + piece.shape[1]] = piece


def _resize(image: Image, height: int, width: int) -> Image:
    shrinks = height * width < image.shape[0] * image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), np.uint8)


def _fit(image: Image, side: int) -> Image:
    height, width = image.shape[:2]
    scale = side / max(height, width)
    return image if scale == 1 else _resize(image, max(1, round(height * scale)), max(1, round(width * scale)))


def _stretch(anomaly_map: AnomalyMap, height: int, width: int) -> AnomalyMap:
    """Give the map the picture's size without losing a peak or making one up.

    Linear, because a cubic overshoots: it could draw a line on a part that passed. Where the map is reduced, each
    pixel takes the largest value around it.
    """
    rows, columns = anomaly_map.shape
    window = np.ones((ceil(rows / height), ceil(columns / width)), np.uint8)
    widened = cv2.dilate(anomaly_map, window) if window.size > 1 else anomaly_map
    stretched = np.asarray(cv2.resize(widened, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    # The new grid may step over the very pixel that decided the verdict.
    row, column = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
    stretched[row * height // rows, column * width // columns] = anomaly_map[row, column]
    return stretched


def _veil(part: Image, kept: NDArray[np.bool_]) -> Image:
    """Take colour and contrast from what is not inspected: it can still be made out, and draws no eye.

    The shade is darker than most parts and lighter than a black ground, so that the veil shows on both.
    """
    height, width = part.shape[:2]
    interpolation = cv2.INTER_AREA if height * width < kept.size else cv2.INTER_LINEAR
    shown = cv2.resize(kept.astype(np.float32), (width, height), interpolation=interpolation)[:, :, np.newaxis]
    grey = cv2.cvtColor(part, cv2.COLOR_RGB2GRAY)[:, :, np.newaxis]
    veiled = grey * np.float32(1 - _VEIL) + np.array(_SHADE, np.float32) * np.float32(_VEIL)
    return np.asarray(np.round(veiled + (part - veiled) * shown), np.uint8)


def _ramp() -> tuple[Image, Image]:
    """Two colour tables over _COOLEST…_HOTTEST: what the heat adds, and how much of the part it leaves, 0…255.

    Heat and opacity rise together, along the upper part of the plasma colour map (van der Walt and Smith, 2015),
    whose lightness rises evenly.
    """
    step = np.linspace(0, 1, 256)
    plasma = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_PLASMA)[:, 0, ::-1]
    colour = plasma[np.round(np.linspace(70, 240, 256)).astype(int)]
    # At 0.75×, 1× and 2×: a hint below the threshold, where many good parts reach, unmistakable above.
    opacity = np.interp(step, [0, 1 / 6, 1 / 3, 1], [0, 0.12, 0.5, 0.8])[:, None]
    adds = np.round(colour * opacity).astype(np.uint8)[:, None]
    leaves = np.round(255 * (1 - opacity)).astype(np.uint8)[:, None].repeat(3, axis=2)
    return adds, leaves


_ADDS, _LEAVES = _ramp()


def _heat(part: Image, ratio: NDArray[np.float32]) -> Image:
    level = np.clip((ratio - _COOLEST) * (255 / (_HOTTEST - _COOLEST)), 0, 255).astype(np.uint8)
    dimmed = cv2.multiply(part, cv2.applyColorMap(level, _LEAVES), scale=1 / 255)
    return np.asarray(cv2.add(dimmed, cv2.applyColorMap(level, _ADDS)), np.uint8)


def _outline(part: Image, field: AnomalyMap, threshold: float, weight: int) -> None:
    # In double precision, as the verdict was: the line and the verdict agree to the last bit.
    above = (field > np.float64(threshold)).astype(np.uint8)
    contours, _ = cv2.findContours(above, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return
    points = _refine(np.concatenate(contours)[:, 0].astype(np.int32), field, threshold)
    lines = np.split(points, np.cumsum([len(contour) for contour in contours])[:-1])
    # One or two pixels have no outline that could be seen, but may have decided the verdict: they get a ring.
    lines = [line if len(line) >= _ENCLOSING else line[0] + weight * _RING for line in lines]
    cv2.polylines(part, lines, isClosed=True, color=_EDGE, thickness=weight + 1, lineType=cv2.LINE_AA, shift=4)
    cv2.polylines(part, lines, isClosed=True, color=_LINE, thickness=weight, lineType=cv2.LINE_AA, shift=4)


def _refine(points: NDArray[np.int32], field: AnomalyMap, threshold: float) -> NDArray[np.int32]:
    """Move points of the pixel grid onto the threshold by one Newton step; N×2, in sixteenths of a pixel."""
    x, y = points.T
    bottom, right = field.shape[0] - 1, field.shape[1] - 1
    slope_x = (field[y, np.minimum(x + 1, right)] - field[y, np.maximum(x - 1, 0)]) / 2
    slope_y = (field[np.minimum(y + 1, bottom), x] - field[np.maximum(y - 1, 0), x]) / 2
    slope = np.stack([slope_x, slope_y], axis=1)
    steepness = (slope**2).sum(axis=1, dtype=np.float64) + 1e-12 * threshold**2  # a plateau has no slope to follow
    step = slope * ((field[y, x] - threshold) / steepness)[:, None]
    return np.asarray(np.round(16 * (points - np.clip(step, -1, 1))), np.int32)


def _scale(peak: float, height: int, width: int, type_size: int) -> Image:
    """Give the colour bar from zero to _HOTTEST, marks at half, one and two thresholds, and a pointer at the peak."""
    scale = _plane(height, width, _GROUND)
    left, right = round(0.9 * type_size), round(1.45 * type_size)
    ratio = np.linspace(_HOTTEST, 0, height, dtype=np.float32)[:, None].repeat(right - left, axis=1)
    scale[:, left:right] = _heat(_plane(height, right - left, _GREY), ratio)

    def row(multiple: float) -> int:
        return round((height - 1) * (1 - multiple / _HOTTEST))

    cv2.line(scale, (left, row(1)), (right - 1, row(1)), _EDGE, 3)
    cv2.line(scale, (left - 1, row(1)), (right, row(1)), _LINE, 1)
    size = max(10, round(0.75 * type_size))
    for multiple, label, colour in ((_HOTTEST, "2×", _MUTED), (1, "1×", _TEXT), (_COOLEST, "0.5×", _MUTED)):
        middle = min(max(row(multiple), size // 2), height - size // 2)
        _write(scale, label, right + round(0.35 * type_size), middle, _Type(size, _REGULAR, colour))
    tip, reach = left - 2, round(0.4 * type_size)
    pointed = row(min(max(peak, 0), _HOTTEST))
    pointed = min(max(pointed, reach), height - 1 - reach)
    pointer = np.array([(tip, pointed), (tip - reach, pointed - reach), (tip - reach, pointed + reach)], np.int32)
    cv2.fillPoly(scale, [pointer], _TEXT, cv2.LINE_AA)
    return scale


def _strip(caption: Caption, width: int, type_size: int) -> Image:
    bold, regular = _Type(type_size, _BOLD, _TEXT), _Type(max(11, round(0.93 * type_size)), _REGULAR, _MUTED)
    strip = _plane(round((3.9 if caption.detail else 2.9) * type_size), width, _GROUND)
    middle = round(1.45 * type_size)
    left = _draw_badge(strip, caption.outcome, middle, type_size) + round(0.7 * type_size)
    _write(strip, _elide(caption.title, width - left, bold, tail=8), left, middle, bold)
    _write(strip, _elide(caption.detail, width, regular), 0, round(3.1 * type_size), regular)
    return strip


def _draw_badge(strip: Image, outcome: Outcome, middle: int, type_size: int) -> int:
    """Draw symbol and word on a pill at the left edge and give the pill's right end."""
    ground, ink = _BADGES[outcome]
    word = _Type(round(0.9 * type_size), _BOLD, ink)
    radius, indent = round(0.78 * type_size), round(0.7 * type_size)
    word_left = indent + round(0.95 * type_size)
    right = word_left + _width(outcome.name, word) + indent
    cv2.rectangle(strip, (radius, middle - radius), (right - radius, middle + radius), ground, cv2.FILLED)
    for centre in (radius, right - radius):
        cv2.circle(strip, (centre, middle), radius, ground, cv2.FILLED, cv2.LINE_AA)
    size = round(0.6 * type_size)
    match outcome:
        case Outcome.PASS:
            _draw_strokes(strip, [[(0.0, 0.1), (0.35, 0.45), (1.0, -0.4)]], (indent, middle), size, ink)
        case Outcome.FAIL:
            cross = [[(0.05, -0.42), (0.9, 0.42)], [(0.05, 0.42), (0.9, -0.42)]]
            _draw_strokes(strip, cross, (indent, middle), size, ink)
        case Outcome.UNCERTAIN:
            _write(strip, "?", indent, middle, _Type(type_size, 800, ink))
        case Outcome.ERROR:
            _write(strip, "!", indent + size // 4, middle, _Type(type_size, 800, ink))
    _write(strip, outcome.name, word_left, middle, word)
    return right


def _draw_strokes(
    strip: Image, strokes: list[list[tuple[float, float]]], origin: tuple[int, int], size: int, ink: _Colour
) -> None:
    lines = [np.round(16 * (np.array(stroke) * size + origin)).astype(np.int32) for stroke in strokes]
    cv2.polylines(strip, lines, isClosed=False, color=ink, thickness=2, lineType=cv2.LINE_AA, shift=4)


def _blank(side: int, reason: str, type_size: int) -> Image:
    """Give what stands in the place of a part that nobody could see: the reason, on an empty pane."""
    pane = _plane(round(side * 9 / 16), side, _PANEL)
    regular = _Type(type_size, _REGULAR, _MUTED)
    lines = wrap(_plain(reason), round(side / (0.56 * type_size)) - 6, max_lines=6, placeholder=" …")
    pitch = round(1.5 * type_size)
    for place, line in enumerate(lines):
        middle = pane.shape[0] // 2 + round((place - (len(lines) - 1) / 2) * pitch)
        _write(pane, line, (side - _width(line, regular)) // 2, middle, regular)
    return pane


def _font() -> cv2.FontFace:
    # OpenCV carries this one within itself. A new one each time: a font keeps the weight it was last used with, so that
    # two threads sharing one would write in each other's; opening it takes microseconds.
    return cv2.FontFace("sans")


def _plain(text: str) -> str:
    # OpenCV kills the process over half a surrogate pair, which is how Python reads a file name that is not UTF-8.
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _width(text: str, style: _Type) -> int:
    return cv2.getTextSize((0, 0), text, (0, 0), _font(), style.size, style.weight)[2]


def _elide(text: str, width: int, style: _Type, tail: int = 0) -> str:
    """Cut text to `width` pixels, keeping its last `tail` letters: serial numbers differ at their end."""
    text = _plain(text)
    if _width(text, style) <= width:
        return text

    end = max(len(text) - tail, 0)

    def cut(length: int) -> str:
        return text[:length].rstrip() + "…" + text[end:]

    fitting = bisect_right(range(end), width, key=lambda length: _width(cut(length), style))
    return cut(max(fitting - 1, 0))


def _write(picture: Image, text: str, left: int, middle: int, style: _Type) -> None:
    """Write one line of plain text, its capitals centred on row `middle`."""
    at = (left, middle + round(0.35 * style.size))
    cv2.putText(picture, text, at, style.colour, _font(), style.size, style.weight)
