"""What every detector takes and gives. Imports numpy only, so that anyone can read these words."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""H×W×3, red-green-blue, 0…255, upright. Whatever the file was, this is what a detector sees."""

AnomalyMap = NDArray[np.float32]
"""H×W at the detector's own resolution; distance from good per pixel, raw, never clamped or normalised."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a detector says of one image.

    `anomaly_score` is in the units of `anomaly_map` (the score of the detectors here is the map's maximum),
    so that one threshold serves both.
    """

    anomaly_score: float
    anomaly_map: AnomalyMap


class DetectorName(StrEnum):
    """The detectors that can be trained, as commands and model folders call them; the default comes first."""

    gsk_rd4ad = "gsk_rd4ad"
    sk_rd4ad = "sk_rd4ad"
    rd4ad = "rd4ad"
    rdpp = "rdpp"
    efficientad_s = "efficientad_s"
    efficientad_m = "efficientad_m"
    puad = "puad"
    patchcore = "patchcore"


class Detector(Protocol):
    """Judges images. Called from one thread at a time."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever weights, preprocessing or scoring change; a calibration is valid for one fingerprint."""

    @property
    def engine(self) -> str:
        """What computes: library, device and precision. A calibration should be made with the one that inspects."""

    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        """Give one prediction per image, in their order. Images may differ in size; an empty list gives one.

        Raises:
            DeviceLostError: the GPU does not answer any more.
        """


class DeviceLostError(Exception):
    """The GPU is gone for this process; only a new one can go on."""


class ArtifactError(Exception):
    """A model folder that is missing, torn, edited or made for something else. The message says which and why."""
