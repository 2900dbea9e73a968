"""Files of images → pixels. The daemon, training, calibration and evaluation read through here and see the same.

PNG, JPEG, BMP and TIFF, 8 or 16 bits a channel; of several pages, the first. Pillow reads them all: sizes ahead of
pixels, EXIF, and no JPEG that was cut off, which OpenCV completes with grey. A JPEG without the slightest fault and a
plain BMP get their pixels by a quicker way, the same to the last bit.
"""

import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as Pillow
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo

from detectors.base import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
"""Extensions of files worth opening, in lower case."""

MAX_SIDE = 16_384
"""Pixels; more on a side is refused before anything is decoded."""

MAX_PIXELS = 100_000_000
"""Width times height; more is refused before anything is decoded."""

MAX_BYTES = 8 * MAX_PIXELS
"""The largest file: four channels of 16 bits for each pixel allowed. More is refused before anything is read."""

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_START_OF_PNG = b"\x89PNG\r\n\x1a\n"
_START_OF_JPEG, _START_OF_SCAN, _END_OF_JPEG = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"

Pillow.MAX_IMAGE_PIXELS = None  # its own limit would speak before ours does, in words for a programmer
warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a file is said by an exception, not on stderr


class UndecodableError(Exception):
    """These bytes are no image that can be judged. The message is the reason, in words for an operator."""


def read(path: Path, shrink: int = 1) -> Image:
    """Read an image file, as `decode` does.

    Raises:
        UndecodableError: it is no whole image, or too large a one.
        OSError: the file is missing or may not be read.
    """
    if path.stat().st_size > MAX_BYTES:
        raise UndecodableError(f"the file is larger than the limit of {MAX_BYTES} bytes")
    return decode(path.read_bytes(), shrink)


def notes(path: Path) -> Mapping[str, str]:
    """What is noted in a PNG ahead of its pixels, by keyword; nothing in other files, whole or not.

    Raises:
        OSError: the file is missing or may not be read.
    """
    with path.open("rb") as file:
        if file.read(len(_START_OF_PNG)) != _START_OF_PNG:
            return {}
        file.seek(0)
        try:
            with Pillow.open(file, formats=("PNG",)) as picture:
                return {str(key): text for key, text in picture.info.items() if isinstance(text, str)}
        except Exception:  # noqa: BLE001 -- as in `decode`, which says what is wrong with it
            return {}


def write_png(path: Path, image: Image, notes: Mapping[str, str]) -> None:
    """Write an image with notes, by keyword, in Latin-1.

    Raises:
        OSError: the file cannot be written.
    """
    noted = PngInfo()
    for key, text in notes.items():
        noted.add_text(key, text)
    Pillow.fromarray(image).save(path, "PNG", pnginfo=noted, compress_level=1)  # smaller takes several times as long


def decode(data: bytes, shrink: int = 1) -> Image:
    """Turn the bytes of an image file into H×W×3 uint8 RGB, upright, writable.

    With 2, 4 or 8 for `shrink` the image comes at 1/shrink of its width and height, rounded up: a JPEG by scaled DCT
    decoding, which is quicker than to decode it whole, all else by `shrunk`.

    Every image is treated by the same fixed rules, never by its own contents:
        16 bits become 8 by their high byte, so 0…65535 fills 0…255 (a 12-bit camera must fill the upper bits);
        grey is repeated in the three channels, palettes are looked up;
        alpha is dropped, for the colours underneath are what the camera saw, and any backdrop would be invented;
        EXIF orientation is applied.

    Raises:
        UndecodableError: the data is empty, cut off, too large, damaged, or something else than an image.
    """
    if not data:
        raise UndecodableError("the file is empty: was its transfer interrupted?")
    try:
        with Pillow.open(BytesIO(data), formats=_FORMATS) as picture:
            _check_header(picture)
            remaining = _draft(picture, shrink)
            pixels = _quick(data, picture)
            if pixels is None:
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)
                pixels = _pixels(picture)
            _check_end(data)
            return shrunk(pixels, remaining)
    except UndecodableError:
        raise
    except MemoryError:
        raise UndecodableError("there is not enough memory to decode the image") from None
    except UnidentifiedImageError:
        raise UndecodableError("not a PNG, JPEG, BMP or TIFF image, or cut off inside its header") from None
    except Exception as error:  # Pillow raises whatever its parsers stumble upon; the bytes are at fault
        raise UndecodableError(f"the image is damaged or cut off: {error}") from error


def shrunk(image: Image, shrink: int) -> Image:
    """An image at 1/shrink of its width and height, rounded up; each pixel is the mean of shrink × shrink.

    Beyond the right and the lower edge the last pixels go on. With 1 it is the image itself.
    """
    if shrink == 1:
        return image
    height, width = image.shape[:2]
    below, beside = -height % shrink, -width % shrink
    if below or beside:
        image = np.asarray(cv2.copyMakeBorder(image, 0, below, 0, beside, cv2.BORDER_REPLICATE), np.uint8)
    size = (width + beside) // shrink, (height + below) // shrink
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _check_header(picture: Pillow.Image) -> None:
    width, height = picture.size
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
        limit = f"1 to {MAX_SIDE} pixels a side and {MAX_PIXELS} in all"
        raise UndecodableError(f"the image is {width}×{height} pixels; the limit is {limit}")
    if picture.mode in {"I", "F"}:
        raise UndecodableError("the image has 32 bits a channel; let the camera save 8 or 16")


def _check_end(data: bytes) -> None:
    """Refuse a JPEG whose tail is there but was never written: its zeros would pass for flat grey.

    An end marker ahead of the last scan is a thumbnail's. Inside a scan neither marker can occur.
    """
    if data.startswith(_START_OF_JPEG) and data.rfind(_END_OF_JPEG) < data.rfind(_START_OF_SCAN):
        raise UndecodableError("the image is cut off: the JPEG has no end marker. Was its transfer interrupted?")


def _quick(data: bytes, picture: ImageFile) -> Image | None:
    """The pixels of the usual kinds of files, as Pillow gives them; None where Pillow must, or must say why not."""
    width, height = picture.size
    try:
        match picture.format, picture.mode, picture.tile:
            case "JPEG", "RGB" | "L", _ if picture.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                # It raises on the slightest fault, so missing pixels never come as grey, and if room is too small.
                room = np.empty((height, width, 3), np.uint8)
                return np.asarray(simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, buffer=room))
            case "BMP", _, [(_, _, int(start), ("BGR", int(stride), int(direction)))]:
                rows = np.frombuffer(data, np.uint8, height * stride, start).reshape(height, stride)
                pixels = cv2.cvtColor(rows[:, : 3 * width].reshape(height, width, 3), cv2.COLOR_BGR2RGB)
                return np.asarray(pixels if direction > 0 else cv2.flip(pixels, 0, pixels), np.uint8)
            case _:
                return None
    except ValueError:
        return None


def _draft(picture: Pillow.Image, shrink: int) -> int:
    """Set a JPEG to be decoded at 1/shrink of its size; gives by how much the image must be shrunk after that."""
    width, height = picture.size
    drafted = min(width, height) >= shrink and picture.draft(None, (width // shrink, height // shrink))
    return 1 if drafted else shrink


def _pixels(picture: Pillow.Image) -> Image:
    if picture.mode.startswith("I;16"):  # Pillow takes the high byte of 16-bit colour, but clips 16-bit grey
        return _colour((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "L":
        return _colour(np.asarray(picture))
    if picture.mode != "RGB":
        picture.info.pop("transparency", None)
        picture = picture.convert("RGB")
    return np.array(picture)


def _colour(grey: NDArray[np.uint8]) -> Image:
    return np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), np.uint8)
