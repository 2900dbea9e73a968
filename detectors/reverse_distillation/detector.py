"""A trained reverse-distillation model on a device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detectors import artifact
from detectors.base import ArtifactError, DeviceLostError, Image, Prediction
from detectors.preprocess import Preprocess
from detectors.reverse_distillation.anomaly_map import AnomalyMap, anomaly_score
from detectors.reverse_distillation.network import ReverseDistillation
from detectors.teacher import BACKBONES, Teacher

TEACHER, STUDENT = "teacher.safetensors", "student.safetensors"


class ReverseDistillationDetector:
    """Satisfies `detectors.base.Detector`. Maps are size×size; the score of an image is its map's maximum."""

    def __init__(self, network: ReverseDistillation, preprocess: Preprocess, fingerprint: str, device: str) -> None:
        self._device = torch.device(device)
        self._network = network.to(self._device).eval()
        self._preprocess = preprocess
        self._map = AnomalyMap(preprocess.size, [preprocess.size // stride for stride in (4, 8, 16)]).to(self._device)
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights and settings."""
        return self._fingerprint

    @torch.inference_mode()
    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        """One forward pass for all images together.

        Raises:
            DeviceLostError: the GPU does not answer any more.
        """
        if not images:
            return []
        try:
            pixels = self._preprocess.resize(images).to(self._device)
            maps = self._map(*self._network(self._preprocess.normalise(pixels)))
            scores = anomaly_score(maps).tolist()
        except torch.OutOfMemoryError:
            raise  # a smaller batch may fit
        except torch.AcceleratorError as error:
            raise DeviceLostError(f"the GPU failed: {error}") from error
        return [Prediction(score, array) for score, array in zip(scores, maps.cpu().numpy(), strict=True)]

    def warm_up(self) -> None:
        """Run once, so that the first part does not pay for lazy initialisation."""
        self.predict([np.zeros((self._preprocess.size, self._preprocess.size, 3), np.uint8)])


def load(folder: Path, manifest: artifact.Manifest, device: str) -> ReverseDistillationDetector:
    """Put a saved model on `device` ("cpu" or "cuda").

    Raises:
        ArtifactError: files that are torn, edited or do not belong together.
    """
    settings: dict[str, Any] = manifest.settings
    try:
        teacher = Teacher(settings["backbone"])
        network = ReverseDistillation(teacher, tuple((a, b) for a, b in settings["skips"]))
        preprocess = Preprocess(int(settings["size"]), tuple(settings["mean"]), tuple(settings["std"]))
        teacher.backbone.load_state_dict(artifact.load_tensors(folder, manifest, TEACHER))
        missing, unexpected = network.load_state_dict(artifact.load_tensors(folder, manifest, STUDENT), strict=False)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder} does not hold a model that {manifest.detector} can use: {error!s:.300}; train it again"
        ) from error
    if unexpected or any(not key.startswith("teacher.") for key in missing):
        raise ArtifactError(f"{folder / STUDENT} holds another network than {artifact.MANIFEST} says; train it again")
    return ReverseDistillationDetector(network, preprocess, manifest.fingerprint, device)


def save(
    folder: Path,
    network: ReverseDistillation,
    preprocess: Preprocess,
    training: dict[str, Any],
) -> artifact.Manifest:
    """Write a trained network as a model folder that needs nothing from elsewhere, the teacher included."""
    skips = network.decoder.skips
    settings = {
        "backbone": network.teacher.name,
        "size": preprocess.size,
        "mean": preprocess.mean,
        "std": preprocess.std,
        "skips": skips,
    }
    files = {TEACHER: network.teacher.backbone.state_dict(), STUDENT: network.learned()}
    return artifact.save(folder, "sk_rd4ad" if skips else "rd4ad", settings, training, files)


def preprocess_for(backbone: str, size: int) -> Preprocess:
    """The preprocessing that a backbone was trained with, at `size`×`size` pixels."""
    return Preprocess(size, BACKBONES[backbone].mean, BACKBONES[backbone].std)
