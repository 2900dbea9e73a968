"""Rendered flanges on a conveyor belt, seen from above: the parts that the demo inspects.

A turned steel flange with a raised face, a bore, six bolt holes and a laser mark lies on a dark belt under a
bar light, a weaker lamp and a bright ceiling. Each pixel's light follows from the slope of the surface there and
the anisotropic lobe of Ward ("Measuring and Modeling Anisotropic Reflection", SIGGRAPH 1992, eq. 5a): narrow
along the tool marks, wide across them, hence the two bright wedges of a turned face. Edges are antialiased by
their signed distance. Lengths are in radii of the flange unless a name ends in `_px`.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import atan2, cos, hypot, pi, radians, sin
from pathlib import Path
from typing import Self

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Plane = NDArray[np.float32]
"""H×W."""
Colour = NDArray[np.float32]
"""H×W×3, linear light, red-green-blue, 1 is white; one colour is 3 values."""

KINDS: tuple[str, ...] = ("scratch", "dent", "stain", "missing_hole")
"""The kinds of defect, in the order in which they are written."""

_RADIUS = 0.405  # of the flange, in sides of the image
_CHAMFER = 0.028
_BORE = 0.27
_BORE_CHAMFER = 0.03
_HOLES = 6
_HOLE = 0.088
_HOLE_CHAMFER = 0.024
_HOLE_CIRCLE = 0.79
_STEP = 0.585  # the edge of the raised face
_STEP_WIDTH = 0.03
_GROOVES = (0.385, 0.435, 0.485)  # grooves for the gasket
_GROOVE_WIDTH = 0.017
_DEPTH = 0.035  # thickness of the flange, in distances of the camera
_DROP = 0.12  # length of the flange's shadow

_STEEL = np.array([0.98, 0.985, 1.0], np.float32)
_BAR = np.array([1.0, 0.985, 0.955], np.float32)
_SKY = np.array([0.95, 0.985, 1.0], np.float32)
_RUBBER = np.array([0.050, 0.053, 0.056], np.float32)
_OIL = np.array([0.8, 1.0, 1.45], np.float32)  # absorption: oil is brown because it swallows blue


@dataclass(frozen=True, slots=True)
class Part:
    """One rendered part.

    `image` is H×W×3 uint8, red-green-blue; `mask` is H×W bool, true on the defect and false all over a good
    part; `kind` is "good" or one of `KINDS`.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    kind: str


def render(seed: int, kind: str = "good", side: int = 384) -> Part:
    """Render one part; the same arguments give the same part.

    All kinds of one seed share one scene, down to the noise of the sensor, with and without the defect.

    Args:
        seed: Chooses pose, light, textures and noise, and the place and size of the defect; 0 or more.
        kind: "good" or one of `KINDS`.
        side: Height and width of the image in pixels, 64 or more.

    Raises:
        ValueError: `kind` is unknown, or `seed` or `side` is too small.
    """
    if kind not in ("good", *KINDS):
        raise ValueError(f"cannot render a part of kind {kind!r}: choose good, {', '.join(KINDS)}")
    if seed < 0 or side < 64:
        raise ValueError(f"cannot render seed {seed} at {side} px: seed starts at 0 and side at 64")
    chance = np.random.default_rng([seed, 0])
    view = _View.draw(chance, side)
    lamp = _Lamp.draw(chance)
    defect = _damage(np.random.default_rng([seed, 1]), kind, view)
    scene = _compose(view, lamp, defect, _belt(chance, side), _metal(chance, view, lamp, defect))
    return Part(_expose(chance, scene, lamp), defect.mask, kind)


def write_dataset(folder: Path, *, good: int, test_good: int, per_kind: int, seed: int) -> None:
    """Write parts as PNG files in the layout of MVTec AD.

    These are `train/good/000.png`…, `test/good/000.png`…, `test/<kind>/000.png`… and
    `ground_truth/<kind>/000_mask.png`… (8 bits, 0 or 255). No two images show one part, and no two values
    of `seed` share a part.

    Raises:
        OSError: a file cannot be written.
        ValueError: `seed` is negative.
    """
    seeds = count(seed * 1_000_000)
    for split, amount in (("train", good), ("test", test_good)):
        for number in range(amount):
            _write(folder / split / "good" / f"{number:03}.png", render(next(seeds)).image)
    for kind in KINDS:
        for number in range(per_kind):
            part = render(next(seeds), kind)
            _write(folder / "test" / kind / f"{number:03}.png", part.image)
            mask = np.where(part.mask, np.uint8(255), np.uint8(0))
            _write(folder / "ground_truth" / kind / f"{number:03}_mask.png", mask)


def _write(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, png = cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)
    path.write_bytes(png.tobytes())


@dataclass(frozen=True, slots=True)
class _Lamp:
    """The bar light: exposure around 1, its azimuth in radians, and the slope of a facet that mirrors it."""

    level: float
    azimuth: float
    slope: float

    @classmethod
    def draw(cls, chance: Generator) -> Self:
        """Light the scene within 8 % of the usual."""
        level, azimuth, slope = (float(off) for off in chance.uniform(0.92, 1.08, 3))
        return cls(level, radians(-58) * azimuth, 0.34 * slope)


@dataclass(frozen=True, slots=True)
class _View:
    """Where each pixel lies: from the optical axis, from the part's centre, from the nearest bolt hole."""

    radius_px: float
    turn: float
    u: Plane
    v: Plane
    x: Plane
    y: Plane
    r: Plane
    angle: Plane
    """In the part's own frame, 0…2π, the first bolt hole at 0."""
    nearest: NDArray[np.intp]
    hole_x: Plane
    hole_y: Plane
    hole: Plane

    @classmethod
    def draw(cls, chance: Generator, side: int) -> Self:
        """Lay the part down, off its place by up to 1 % of the side and 2.5°."""
        radius_px = _RADIUS * side
        shift_x, shift_y = (float(shift) for shift in chance.uniform(-0.01, 0.01, 2) / _RADIUS)
        turn = radians(chance.uniform(-2.5, 2.5))
        axis = ((np.arange(side) - (side - 1) / 2) / radius_px).astype(np.float32)
        u, v = np.meshgrid(axis, axis)
        x, y = u - shift_x, v - shift_y
        r, azimuth = (_plane(polar) for polar in cv2.cartToPolar(x, y))
        angle = np.mod(azimuth - turn, 2 * pi)
        nearest = np.rint(angle * (_HOLES / (2 * pi))).astype(np.intp) % _HOLES
        at = np.arange(_HOLES) * (2 * pi / _HOLES) + turn
        hole_x = x - (_HOLE_CIRCLE * np.cos(at)).astype(np.float32)[nearest]
        hole_y = y - (_HOLE_CIRCLE * np.sin(at)).astype(np.float32)[nearest]
        hole = _plane(cv2.magnitude(hole_x, hole_y))
        return cls(radius_px, turn, u, v, x, y, np.maximum(r, 1e-6), angle, nearest, hole_x, hole_y, hole)

    def within(self, distance: Plane) -> Plane:
        """Give the share of each pixel on the negative side of a signed distance."""
        return _plane(np.clip(0.5 - distance * self.radius_px, 0, 1))

    def ring(self, low: float, width: float) -> Plane:
        """Give the share of each pixel between two circles around the part's centre."""
        return self.within(np.abs(self.r - (low + width / 2)) - width / 2)

    def drilled(self, defect: "_Defect") -> Plane:
        """Give the distance to the nearest bolt hole that is there."""
        return np.where(defect.undrilled, np.float32(1), self.hole)

    def noise(self, chance: Generator, grain_px: float) -> Plane:
        """Give smooth noise of deviation about 1 whose grains are `grain_px` wide at a side of 384 px."""
        cells = round(384 / grain_px)
        return _stretched(chance.standard_normal((cells, cells), np.float32), len(self.r))


@dataclass(frozen=True, slots=True)
class _Defect:
    """What is wrong with the surface, pixel by pixel; nothing on a good part."""

    relief: Plane
    """Height."""
    torn: Plane
    """Share of the tool marks that is torn up, 0…1."""
    film: Plane
    """Optical density of a fluid on the surface."""
    undrilled: NDArray[np.bool_]
    """Where the nearest bolt hole is missing."""
    mask: NDArray[np.bool_]


def _damage(chance: Generator, kind: str, view: _View) -> _Defect:
    none = np.zeros_like(view.r)
    nowhere = np.zeros(view.r.shape, np.bool_)
    match kind:
        case "scratch":
            line = _scratch(chance, view)
            force = chance.uniform(0.4, 1)
            return _Defect(line * (-force / view.radius_px), line * force, none, nowhere, line > 0.1)
        case "dent":
            hollow = _dent(chance, view)
            torn = hollow / hollow.max() * chance.uniform(0.2, 0.7)
            return _Defect(-hollow, torn, none, nowhere, hollow > 0.1 * hollow.max())
        case "stain":
            film = _stain(chance, view)
            return _Defect(none, none, film, nowhere, film > 0.05)
        case "missing_hole":
            return _missing_hole(chance, view)
        case _:
            return _Defect(none, none, none, nowhere, nowhere)


def _spot(chance: Generator, view: _View, clearance: float) -> tuple[float, float]:
    """Choose a point of the face, as far from every edge as asked."""
    while True:
        x, y = (float(place) for place in chance.uniform(-1, 1, 2))
        if _clearance(x, y, view.turn) > clearance:
            return x, y


def _clearance(x: float, y: float, turn: float) -> float:
    """Give the distance from a point of the face to the nearest edge, negative off the face."""
    sector = 2 * pi / _HOLES
    r, off = hypot(x, y), (atan2(y, x) - turn + sector / 2) % sector - sector / 2
    hole = hypot(r * cos(off) - _HOLE_CIRCLE, r * sin(off)) - _HOLE - _HOLE_CHAMFER
    return min(r - _BORE - _BORE_CHAMFER, 1 - _CHAMFER - r, hole)


def _scratch(chance: Generator, view: _View) -> Plane:
    """Draw one curved stroke, 0…1, that thins out to both ends and runs across the tool marks."""
    steps = 40
    path = np.empty((0, 2))
    while not len(path) or min(_clearance(x, y, view.turn) for x, y in path) < 0:
        x, y = _spot(chance, view, 0.05)
        along = np.linspace(-0.5, 0.5, steps + 1) * chance.uniform(0.2, 0.5)
        heading = atan2(y, x) + chance.uniform(-0.9, 0.9) + chance.uniform(-1.6, 1.6) * along
        strides = np.stack([np.cos(heading), np.sin(heading)], 1) * (along[1] - along[0])
        path = np.cumsum(strides, 0)
        path += np.array([x, y]) - path.mean(0)
    side, fine = len(view.r), 4
    canvas = np.zeros((side * fine, side * fine), np.uint8)
    corner = np.array([view.x[0, 0], view.y[0, 0]])
    points = np.rint(((path - corner) * view.radius_px + 0.5) * fine).astype(int).tolist()
    width = chance.uniform(1.0, 2.0) * fine * side / 384
    pressure = np.sin(np.linspace(0.15, pi - 0.15, steps)) ** 0.6 * chance.uniform(0.7, 1, steps)
    for start, end, force in zip(points[:-1], points[1:], pressure, strict=True):
        cv2.line(canvas, start, end, 255, max(1, round(width * force)))
    return _plane(cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA) / np.float32(255))


def _dent(chance: Generator, view: _View) -> Plane:
    """Press one oval hollow into the face; give its depth."""
    size = chance.uniform(0.04, 0.068)
    x, y = _spot(chance, view, 1.2 * size)
    turn, slim = chance.uniform(0, pi), chance.uniform(0.65, 1)
    long = (view.x - x) * cos(turn) + (view.y - y) * sin(turn)
    short = ((view.y - y) * cos(turn) - (view.x - x) * sin(turn)) / slim
    return _plane(np.exp(-(((long**2 + short**2) / size**2) ** 2)) * (size * chance.uniform(0.2, 0.45)))


def _stain(chance: Generator, view: _View) -> Plane:
    """Let one drop of oil run on the face; give its optical density, highest at its drying edge."""
    size = chance.uniform(0.09, 0.15)
    x, y = _spot(chance, view, 0.05)
    away = _plane(cv2.magnitude(view.x - x, view.y - y)) / size
    away += 0.16 * view.noise(chance, 32) + 0.12 * view.noise(chance, 14) + 0.05 * view.noise(chance, 6)
    edge = np.exp(-(((away - 0.86) / 0.08) ** 2))
    body = _soft(away - 0.95, 0.09) * (0.55 + 0.2 * view.noise(chance, 40) + 0.06 * view.noise(chance, 5) + 0.4 * edge)
    metal = view.ring(_BORE, 1 - _BORE) * view.within(_HOLE - view.hole)
    return _plane(np.maximum(body, 0) * metal * chance.uniform(0.3, 0.9))


def _missing_hole(chance: Generator, view: _View) -> _Defect:
    """Leave one bolt hole undrilled: there is only the cone of the spot drill."""
    undrilled = view.nearest == chance.integers(_HOLES)
    spot = _HOLE * chance.uniform(0.35, 0.65)
    cone = np.minimum(view.hole - spot, 0) * 0.6 * undrilled
    torn = view.within(view.hole - spot) * 0.8 * undrilled
    lost = undrilled & (view.hole < _HOLE + _HOLE_CHAMFER)
    return _Defect(cone, torn, np.zeros_like(cone), undrilled, lost)


def _belt(chance: Generator, side: int) -> Plane:
    """Give the tone around 1 of a rubber belt: a rough coat over a cloth, worn in places, scuffed along its run."""
    scale = side / 384
    coat = _plane(cv2.GaussianBlur(chance.standard_normal((side, side), np.float32), (0, 0), 0.9 * scale))
    run = np.arange(side, dtype=np.float32) * (2 * pi / (5.2 * scale))
    warp, weft = (np.sin(run + float(phase)) for phase in chance.uniform(0, 2 * pi, 2))
    worn = _stretched(chance.standard_normal((9, 9), np.float32), side)
    scuffs = _stretched(chance.standard_normal((side // 2, 5), np.float32), side)
    tone = 1 + 0.42 * coat + 0.10 * warp * weft[:, None] + 0.06 * worn + 0.05 * scuffs
    return _plane(np.maximum(tone, 0.3))


def _metal(chance: Generator, view: _View, lamp: _Lamp, defect: _Defect) -> tuple[Plane, Plane]:
    """Give the light of the bar and of the sky that the slopes of the steel mirror into the camera."""
    hole = view.drilled(defect)
    sink = _soft(hole - (_HOLE + _HOLE_CHAMFER), 0.014)  # a broken edge, not a sharp one
    mark = _laser_mark(view)
    torn = np.maximum(np.maximum(defect.torn, sink), 0.7 * mark)
    marks = _tool_marks(chance, view) * (1 - torn)

    relief = _plane(cv2.GaussianBlur(defect.relief * view.radius_px, (0, 0), 0.7))
    slope_x = _plane(cv2.Sobel(relief, cv2.CV_32F, 1, 0, scale=1 / 8)) + sink * view.hole_x / np.maximum(hole, 0.01)
    slope_y = _plane(cv2.Sobel(relief, cv2.CV_32F, 0, 1, scale=1 / 8)) + sink * view.hole_y / np.maximum(hole, 0.01)
    towards_x, towards_y = view.x / view.r, view.y / view.r
    radial = slope_x * towards_x + slope_y * towards_y + _profile(view) + 0.10 * marks
    tangential = slope_y * towards_x - slope_x * towards_y + 0.03 * marks

    def mirrored(azimuth: float, slope: float, width: Plane) -> Plane:
        """Give the share of facets that mirror a lamp into the camera."""
        lamp_x, lamp_y = slope * cos(azimuth), slope * sin(azimuth)
        t = (tangential + lamp_y * towards_x - lamp_x * towards_y) / width
        r = (radial + lamp_x * towards_x + lamp_y * towards_y) / 0.42
        return _plane(np.exp(-0.5 * (t * t + r * r)))

    width = 0.085 + 0.24 * torn
    bar = mirrored(lamp.azimuth, lamp.slope, width)
    fill = mirrored(lamp.azimuth + 1.75, 1.2 * lamp.slope, 1.8 * width)
    flat = np.exp(-(radial * radial + tangential * tangential) / 0.8)
    shade = (1 + 0.10 * marks + 0.02 * view.noise(chance, 40)) * (1 - 0.4 * mark)
    shade *= 1 - 0.35 * np.exp(-(((view.r - (_STEP + _STEP_WIDTH)) / 0.018) ** 2))
    return 0.58 * bar * shade, (0.24 - 0.08 * flat + 0.16 * fill) * shade


def _profile(view: _View) -> Plane:
    """Give the radial slope of the turned shape: two chamfers, the step of the raised face, three grooves."""
    slope = view.ring(_BORE, _BORE_CHAMFER) - view.ring(1 - _CHAMFER, _CHAMFER + 0.02)
    slope -= 0.8 * view.ring(_STEP, _STEP_WIDTH)
    for groove in _GROOVES:
        slope += 0.5 * view.ring(groove + _GROOVE_WIDTH / 2, _GROOVE_WIDTH / 2)
        slope -= 0.5 * view.ring(groove, _GROOVE_WIDTH / 2)
    return slope


def _tool_marks(chance: Generator, view: _View) -> Plane:
    """Give noise of deviation about 1 that changes from radius to radius and little along the turn."""
    rows = round(1.5 * view.radius_px)
    row = view.r * (rows / 1.5)
    marks = np.zeros_like(view.r)
    for cells, weight in ((3, 0.75), (24, 0.55), (150, 0.4)):
        strip = chance.standard_normal((rows, cells), np.float32)
        column = view.angle * (cells / (2 * pi))
        marks += weight * _plane(cv2.remap(strip, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))
    return marks


def _laser_mark(view: _View) -> Plane:
    """Bend the mark around the part, midway between two bolt holes."""
    text = _engraving()
    rows, columns = text.shape
    height, width, middle = 0.10, 0.58, 1.5 * pi
    column = (view.angle - (middle - width / 2)) * (columns / width)
    row = ((_HOLE_CIRCLE + height / 2) - view.r) * (rows / height)
    return _plane(cv2.remap(text, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0))


@lru_cache(maxsize=1)
def _engraving() -> Plane:
    canvas = np.zeros((120, 560), np.uint8)
    for line, text in enumerate(("FL-25 PN16", "1.4404")):
        cv2.putText(canvas, text, (20, 50 + 58 * line), cv2.FONT_HERSHEY_SIMPLEX, 1.6, 255, 6, cv2.LINE_AA)
    return _plane(cv2.resize(canvas, (140, 30), interpolation=cv2.INTER_AREA) / np.float32(255))


def _compose(view: _View, lamp: _Lamp, defect: _Defect, belt: Plane, metal: tuple[Plane, Plane]) -> Colour:
    """Put the metal on the belt: shadows around it, walls and shaded belt in its holes."""
    bore = view.r < (_BORE + _HOLE_CIRCLE - _HOLE) / 2  # else the nearest hole is a bolt hole
    size = np.where(bore, np.float32(_BORE), np.float32(_HOLE))
    hole_x, hole_y = np.where(bore, view.x, view.hole_x), np.where(bore, view.y, view.hole_y)
    opening = view.within(np.where(bore, view.r, view.drilled(defect)) - size)
    solid = view.within(view.r - 1) * (1 - opening)
    cast_x, cast_y = _DROP * cos(lamp.azimuth), _DROP * sin(lamp.azimuth)

    lit = 0.5 - 0.5 * _soft(_plane(cv2.magnitude(view.x + cast_x, view.y + cast_y)) - 1, 0.09)
    open_sky = 0.5 - 0.3 * np.exp(np.minimum(1 - view.r, 0) / 0.07)

    # The bottom of a hole is farther from the camera, hence nearer to the axis: on the far side the wall shows.
    bottom_x, bottom_y = hole_x + _DEPTH * view.u, hole_y + _DEPTH * view.v
    through = view.within(_plane(cv2.magnitude(bottom_x, bottom_y)) - size)
    lit_bottom = 0.5 * _soft(_plane(cv2.magnitude(bottom_x + cast_x, bottom_y + cast_y)) - size, 0.05)
    facing = np.maximum(-(hole_x * cast_x + hole_y * cast_y) / (size * _DROP), 0)

    bottom, ground = opening * through * belt, (1 - opening - solid) * belt
    bar, sky = metal
    layers = (
        (bar * solid, _BAR * _STEEL),
        (sky * solid, _SKY * _STEEL),
        (lit * ground + lit_bottom * bottom, _BAR * _RUBBER),
        (open_sky * ground + (0.10 + 0.06 * bore) * bottom, _SKY * _RUBBER),
        ((0.035 + 0.22 * facing) * (opening - opening * through), _STEEL),
    )
    red_green_blue = [
        np.exp(-oil * defect.film) * sum(light * tint[channel] for light, tint in layers)
        for channel, oil in enumerate(_OIL)
    ]
    return _plane(cv2.merge(red_green_blue))


def _expose(chance: Generator, scene: Colour, lamp: _Lamp) -> NDArray[np.uint8]:
    """Take the picture: blur and glare of the lens, vignetting, shot and read noise, the curve of a display."""
    side = len(scene)
    small = cv2.resize(scene, (side // 4, side // 4), interpolation=cv2.INTER_AREA)
    glare = cv2.resize(cv2.GaussianBlur(small, (0, 0), side / 96), (side, side))
    seen = _plane(cv2.addWeighted(cv2.GaussianBlur(scene, (0, 0), 0.62), 0.95, glare, 0.05, 0))
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    bright = 1.45 * lamp.level * (1 - 0.11 * (axis**2 + axis[:, None] ** 2))
    seen *= np.repeat(bright, 3, 1).reshape(seen.shape)
    seen += chance.standard_normal(seen.shape, np.float32) * np.sqrt(1.2e-4 * seen + 2e-6)
    shown = _plane(cv2.pow(np.clip(seen, 0, 1, out=seen), 1 / 2.2))
    return (shown * 255 + 0.5).astype(np.uint8)


def _soft(distance: Plane, width: float) -> Plane:
    """Give 1 on the negative side of a signed distance and 0 on the other, with a ramp between."""
    return _plane(np.clip(0.5 - distance / (2 * width), 0, 1))


def _stretched(coarse: Plane, side: int) -> Plane:
    return _plane(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC))


def _plane(array: cv2.typing.MatLike) -> NDArray[np.float32]:
    return np.asarray(array, np.float32)
