"""How commands see files of images: framed as a station frames them, and never twice.

What `inspectd` itself writes framed says so in the file, by the framing's fingerprint, and of what file it was made.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from daemon import images
from daemon.desk.layouts import DatasetError
from daemon.framing import FRAMING, PLAIN, Framing, FramingError
from daemon.images import UndecodableError
from detectors.base import Image

SOURCE = "inspectd-source"
"""What is noted in a framed image beside its framing's fingerprint: the SHA-256 of the file it was made of."""


@dataclass(frozen=True, slots=True)
class Lens:
    """Shows images framed as `fingerprint` says.

    `framing` is the one of that fingerprint; where it is not known it is plain, and images must be framed already.
    """

    fingerprint: str = ""
    framing: Framing = PLAIN

    def lacking(self, path: Path) -> Framing:
        """What is still to be done to the image of a file, and to its masks.

        Raises:
            DatasetError: it was framed otherwise.
            OSError: the file is missing or may not be read.
        """
        carried = fingerprint(path)
        if carried == self.fingerprint:
            return PLAIN
        if carried:
            raise DatasetError(
                f"{path}: was framed otherwise than now ({carried}, now {self.fingerprint or 'not at all'}); give the "
                "image as the camera took it, or grab it anew"
            )
        if self.framing.is_plain:
            raise DatasetError(
                f"{path}: is not framed, and others are ({self.fingerprint}); frame it with `inspectd sources frame`"
            )
        return self.framing

    def read(self, path: Path) -> Image:
        """An image that has to be readable, framed.

        Raises:
            DatasetError: it is not, was framed otherwise, or cannot be framed.
        """
        lacking = self.lacking(path)
        try:
            return lacking.finish(images.read(path, lacking.shrink))
        except UndecodableError as error:
            raise DatasetError(f"{path}: {error}; repair it or take it out of the folder") from error
        except FramingError as error:
            raise DatasetError(f"{path}: {error}") from error


def of_all(paths: Sequence[Path]) -> Lens:
    """Take images as they are, which must all have been framed alike, or none.

    Raises:
        DatasetError: two of them differ.
    """
    if not paths:
        return Lens()
    lens = Lens(fingerprint(paths[0]))
    for path in paths[1:]:
        if (carried := fingerprint(path)) != lens.fingerprint:
            raise DatasetError(
                f"{path}: was framed otherwise than {paths[0]} ({carried or 'not at all'}, "
                f"{lens.fingerprint or 'not at all'}); give images that are all framed alike, or none of them"
            )
    return lens


def fingerprint(path: Path) -> str:
    """That of the framing that a file says it was made with; empty where it was not framed.

    Raises:
        OSError: the file is missing or may not be read.
    """
    return images.notes(path).get(FRAMING, "")


def sha256(path: Path) -> str:
    """What tells a picture: the SHA-256 of its file, or of the file that it was made of by framing.

    Raises:
        OSError: the file is missing or may not be read.
    """
    return images.notes(path).get(SOURCE) or hashlib.sha256(path.read_bytes()).hexdigest()


def frame(path: Path, framing: Framing, to: Path) -> None:
    """Write the framed image of a file as a PNG.

    Raises:
        DatasetError: the image cannot be read or framed, or has been framed before.
        OSError: a file cannot be read or written.
    """
    if carried := fingerprint(path):
        raise DatasetError(f"{path}: has been framed before ({carried}); give images as the camera took them")
    save(Lens(framing.fingerprint, framing).read(path), framing.fingerprint, to, sha256(path))


def save(image: Image, framing: str, to: Path, source: str = "") -> None:
    """Write an image as a PNG that says how it was framed, and of which file, if of any.

    Raises:
        OSError: the file cannot be written.
    """
    noted = {FRAMING: framing, SOURCE: source}
    images.write_png(to, image, {key: text for key, text in noted.items() if text})
