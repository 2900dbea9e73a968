"""A few good parts' images whose scores are known, by which a model proves itself before it judges."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count, takewhile
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calibration.calibration import Calibration, CalibrationError
from calibration.store import synchronise, write_whole

IMAGES = 5
"""At most so many images are kept: those of the lowest score, of the quartiles and of the highest."""
TOLERANCE = 0.05
"""How far a score may differ, as a share of the way from the good parts' median to the threshold.

Where α is 1 % and the scores' tail falls off exponentially, as Gumbel's does, a difference of so much in all of them
makes the false rejects a quarter more or less.
"""

_LEAST_WAY = 0.02  # of the threshold: where good parts are all but equal, the last digits are no difference


@dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """Images as the detector saw them when it was calibrated, H×W×3 uint8, and their scores then, ascending."""

    calibration: Calibration
    images: tuple[NDArray[np.uint8], ...]
    scores: tuple[float, ...]

    def verify(self, scores: Sequence[float]) -> float:
        """Compare what the detector says now of each image, in order, with what it said then.

        A score at the threshold may come to lie on its other side within the tolerance; that is no difference.

        Returns:
            The largest difference as a share of the way from the good parts' median to the threshold (at least 2 % of
            the threshold): 0 for equal scores, at most `TOLERANCE`.

        Raises:
            CalibrationError: A score is not finite, or differs by more than the tolerance.
        """
        threshold = self.calibration.threshold
        way = max(threshold - float(np.median(self.calibration.scores)), _LEAST_WAY * threshold)
        apart = [abs(now - then) / way for now, then in zip(scores, self.scores, strict=True)]
        # NaN is larger than anything here, as it is worse.
        worst = max(range(len(apart)), key=lambda place: math.inf if math.isnan(apart[place]) else apart[place])
        if not apart[worst] <= TOLERANCE:
            raise CalibrationError(
                f"calibration {self.calibration.id}: golden image {worst + 1} of {len(apart)} scored "
                f"{self.scores[worst]:.6g} when the model was calibrated and scores {scores[worst]:.6g} now "
                f"(threshold {threshold:.6g}; they may differ by {TOLERANCE * way:.2g}): the model is damaged, images "
                "are prepared otherwise, or another engine or driver computes than "
                f"{self.calibration.provenance.engine or 'then'}; restore the model folder and the program that it was "
                "calibrated with, or run `inspectd calibrate`"
            )
        return apart[worst]


def spread(scores: ArrayLike) -> list[int]:
    """Choose the places of scores that are worth keeping: lowest, quartiles, highest, each once, in this order."""
    order = np.argsort(scores, kind="stable")
    return [int(order[place]) for place in np.unique(np.linspace(0, len(order) - 1, IMAGES).round().astype(int))]


def place(calibration_file: Path, calibration_id: str) -> Path:
    """Where the golden set of a calibration lies: beside its file, whether it is in force, proposed or history."""
    return calibration_file.with_suffix(".golden") / f"{calibration_id}.npz"


def save(golden: Golden, calibration_file: Path) -> Path:
    """Keep a golden set so that after a crash or a power cut either the whole file is there or none; return its path.

    Raises:
        OSError: The folder is full or read-only.
    """
    path = place(calibration_file, golden.calibration.id)
    path.parent.mkdir(exist_ok=True)
    content = BytesIO()
    np.savez_compressed(
        content,
        allow_pickle=False,
        sha256=np.array(_digest(golden.calibration.id, golden.images, golden.scores)),
        scores=np.array(golden.scores, np.float64),
        **{f"image{number}": image for number, image in enumerate(golden.images, start=1)},
    )
    write_whole(path, content.getvalue())
    synchronise(path.parent.parent)
    return path


def load(calibration_file: Path, calibration: Calibration) -> Golden | None:
    """Read the golden set of a calibration that is kept in `calibration_file`; None if it was made without one.

    Raises:
        CalibrationError: The set is torn, edited, another calibration's, or cannot be read.
    """
    path = place(calibration_file, calibration.id)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            names = takewhile(kept.__contains__, (f"image{number}" for number in count(1)))
            images = tuple(kept[name] for name in names)
            scores = tuple(kept["scores"].tolist())
            whole = kept["sha256"].item() == _digest(calibration.id, images, scores)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CalibrationError(f"{path}: the golden set cannot be read: {error.strerror or error}") from error
    except Exception as error:  # numpy raises whatever its parsers stumble upon; the file is at fault
        raise _refused(path, str(error)) from error
    if not whole:
        raise _refused(path, "its SHA-256 is another")
    if not set(scores) <= set(calibration.scores):
        raise _refused(path, "its scores are not the calibration's")
    return Golden(calibration, images, scores)


def discard(calibration_file: Path, calibration_id: str) -> None:
    """Take away the golden set of a calibration that nobody can return to, if there is one."""
    place(calibration_file, calibration_id).unlink(missing_ok=True)


def _refused(path: Path, why: str) -> CalibrationError:
    return CalibrationError(
        f"{path}: the golden set is torn, edited or another calibration's ({why}); restore it from a backup or run "
        "`inspectd calibrate`"
    )


def _digest(calibration_id: str, images: Sequence[NDArray[np.uint8]], scores: Sequence[float]) -> str:
    told = hashlib.sha256(f"{calibration_id} {list(scores)}".encode())
    for image in images:
        told.update(f" {image.dtype} {image.shape} ".encode() + image.tobytes())
    return told.hexdigest()
