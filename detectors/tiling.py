"""Large images in pieces: cut into tiles that overlap, judged tile by tile, and put together again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import numpy as np

from detectors.base import AnomalyMap, Detector, Image, Prediction

LEAST_SIDE = 64
TOGETHER = 8
"""Tiles that are judged at once, so that memory does not grow with the image."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: Image) -> Image:
        """What the image shows there; a view."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How images are cut: tiles of `side` pixels, of which neighbours share `overlap` pixels or more.

    An overlap as wide as the largest defect that must be seen whole is enough.

    Raises:
        ValueError: tiles too small, or an overlap above half of their side, which would only cost time.
    """

    side: int
    overlap: int

    def __post_init__(self) -> None:
        if self.side < LEAST_SIDE:
            raise ValueError(f"tiles of {self.side} px are too small: give {LEAST_SIDE} or more")
        if not 0 <= self.overlap <= self.side // 2:
            raise ValueError(
                f"tiles of {self.side} px cannot overlap by {self.overlap} px: give 0 to {self.side // 2}, half of it"
            )

    def tiles(self, shape: tuple[int, ...]) -> list[Tile]:
        """Cover an image of this height and width, row by row; what follows the two is not looked at.

        All tiles are equally large, inside the image, and evenly spread, so that nothing has to be padded. Where the
        image is not larger than a tile, the tile is as large as the image.
        """
        rows, columns = (self._starts(length) for length in shape[:2])
        height, width = (min(length, self.side) for length in shape[:2])
        return [Tile(top, left, height, width) for top, left in product(rows, columns)]

    def _starts(self, length: int) -> list[int]:
        if length <= self.side:
            return [0]
        gaps = -(-(length - self.side) // (self.side - self.overlap))
        return [place * (length - self.side) // gaps for place in range(gaps + 1)]


def tiling_of(settings: Mapping[str, Any]) -> Tiling | None:
    """How the images of a model with these settings are cut; None for not at all.

    Raises:
        TypeError, ValueError: the settings are not such as `settings_of` gives.
    """
    return Tiling(**settings["tiling"]) if "tiling" in settings else None


def settings_of(tiling: Tiling | None) -> dict[str, Any]:
    """What a model's settings say of its tiling; nothing without one, so that such models keep their fingerprints."""
    return {} if tiling is None else {"tiling": {"side": tiling.side, "overlap": tiling.overlap}}


def pieces(image: Image, tiling: Tiling | None) -> list[Image]:
    """What a network is shown of an image: its tiles, as views, or without a tiling the image itself."""
    return [image] if tiling is None else [tile.cut(image) for tile in tiling.tiles(image.shape)]


def stitch(maps: Sequence[AnomalyMap], tiles: Sequence[Tile]) -> AnomalyMap:
    """Put the maps of an image's tiles, all equally large, together to one map of the image at the same scale.

    Where tiles overlap the largest value stands: a defect is whole in one tile and cut off in its neighbour, and a mean
    of both would make less of it. Each map is laid down as it is, at most half of its pixels' width from its place, so
    that the maximum of the whole is exactly that of the pieces.
    """
    rows, columns = maps[0].shape
    last = tiles[-1]
    whole = np.full(
        (_scaled(last.top, rows, last.height) + rows, _scaled(last.left, columns, last.width) + columns),
        -np.inf,
        np.float32,
    )
    for piece, tile in zip(maps, tiles, strict=True):
        top, left = _scaled(tile.top, rows, tile.height), _scaled(tile.left, columns, tile.width)
        part = whole[top : top + rows, left : left + columns]
        np.maximum(part, piece, out=part)
    return whole


def _scaled(pixels: int, cells: int, side: int) -> int:
    """Round pixels × cells / side, a half upwards: the same for pixels that are whole tiles apart."""
    return (2 * pixels * cells + side) // (2 * side)


class TiledDetector:
    """A detector that judges images tile by tile. Satisfies `detectors.base.Detector`.

    The score of an image is the maximum of its stitched map. The tiling is among the settings of the model, and so in
    the inner detector's fingerprint.
    """

    def __init__(self, detector: Detector, tiling: Tiling) -> None:
        self._detector = detector
        self._tiling = tiling
        self.fingerprint = detector.fingerprint
        self.engine = detector.engine

    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        """Judge the tiles of all images, a few at once, and stitch.

        Raises:
            DeviceLostError: the GPU does not answer any more.
        """
        plans = [self._tiling.tiles(image.shape) for image in images]
        maps = self._maps(tile.cut(image) for image, tiles in zip(images, plans, strict=True) for tile in tiles)
        stitched = [stitch(list(islice(maps, len(tiles))), tiles) for tiles in plans]
        return [Prediction(float(whole.max()), whole) for whole in stitched]

    def _maps(self, pieces: Iterator[Image]) -> Iterator[AnomalyMap]:
        while several := list(islice(pieces, TOGETHER)):
            for prediction in self._detector.predict(several):
                yield prediction.anomaly_map
