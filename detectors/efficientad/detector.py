"""A trained EfficientAD or PUAD model on a device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from detectors import artifact
from detectors.base import ArtifactError, Image, Prediction
from detectors.devices import engine, watched
from detectors.efficientad.anomaly_map import align, combine, differences
from detectors.efficientad.mahalanobis import Mahalanobis
from detectors.efficientad.network import FEATURES, PDN, PIXELS, PREPROCESS, SIZES, EfficientAD, Size
from detectors.efficientad.puad import Feature, Puad

TEACHER, STUDENT, PUAD = "teacher.safetensors", "student.safetensors", "puad.safetensors"

DETECTORS = ("efficientad_s", "efficientad_m", "puad")

SETTINGS: dict[str, Any] = {
    "size": PIXELS,
    "mean": list(PREPROCESS.mean),
    "std": list(PREPROCESS.std),
    "padding": False,
    "alignment": "receptive field centres",
}
"""What every model has in common; a folder that says otherwise is of another version."""


class EfficientADDetector:
    """Satisfies `detectors.base.Detector`. Maps are 256×256; the score of an image is its map's maximum.

    Without `puad` a map is in units of the scaled maps: 0.1 is exceeded by some 0.5 % of the cells of good parts.
    With it, in standard deviations of good parts' scores, raised evenly where the picture as a whole is unusual.
    """

    def __init__(self, network: EfficientAD, puad: Puad | None, fingerprint: str, device: str) -> None:
        self._device = torch.device(device)
        self._network = _placed(network, device)
        self._puad = puad
        self.fingerprint = fingerprint
        self.engine = engine(device)

    @torch.inference_mode()
    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        """One forward pass for all images together.

        Raises:
            DeviceLostError: the GPU does not answer any more.
        """
        if not images:
            return []
        with watched():
            pixels = PREPROCESS.normalise(PREPROCESS.resize(images).to(self._device))
            taught, student, autoencoder = self._network(pixels.contiguous(memory_format=torch.channels_last))
            maps = align(combine(differences(taught, student, autoencoder), self._network.quantiles))
            if self._puad:
                maps = self._puad.lift(maps, taught, student)
            arrays = maps.cpu().numpy()
        return [Prediction(float(array.max()), array) for array in arrays]


def load(folder: Path, manifest: artifact.Manifest, device: str) -> EfficientADDetector:
    """Put a saved model on `device` ("cpu" or "cuda").

    Raises:
        ArtifactError: files that are torn, edited or do not belong together.
    """
    network = _network(folder, manifest)
    puad = _puad(folder, manifest) if manifest.detector == "puad" else None
    return EfficientADDetector(network, puad, manifest.fingerprint, device)


def load_network(folder: Path, device: str) -> EfficientAD:
    """Put the networks of a saved EfficientAD or PUAD model on `device`, in eval mode, to fit a PUAD to them.

    Raises:
        ArtifactError: no model folder, another detector's, or files that are torn, edited or do not belong together.
    """
    manifest = artifact.read_manifest(folder)
    if manifest.detector not in DETECTORS:
        raise ArtifactError(f"{folder} holds a model of {manifest.detector}, not of {', '.join(DETECTORS)}")
    return _placed(_network(folder, manifest), device)


def save(folder: Path, network: EfficientAD, training: dict[str, Any], puad: Puad | None = None) -> artifact.Manifest:
    """Write a trained network as a model folder that needs nothing from elsewhere, the teacher included."""
    name = f"efficientad_{network.size}"
    settings = {"pdn": network.size, **SETTINGS}
    files = {TEACHER: network.teacher.state_dict(), STUDENT: network.learned()}
    if puad:
        name = "puad"
        settings |= {"feature": puad.feature, "weight_unpicturable": puad.weight}
        files[PUAD] = {"mean": puad.distance.mean, "factor": puad.distance.factor, "scales": puad.scales}
    return artifact.save(folder, name, settings, training, files)


def _placed(network: EfficientAD, device: str) -> EfficientAD:
    placed: EfficientAD = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it
    return placed.eval()


def _network(folder: Path, manifest: artifact.Manifest) -> EfficientAD:
    with artifact.usable(folder, manifest):
        teacher = PDN(_size(manifest.settings))
        teacher.load_state_dict(artifact.load_tensors(folder, manifest, TEACHER))
        network = EfficientAD(teacher)
        artifact.load_learned(network, folder, manifest, STUDENT)
    return network


def _puad(folder: Path, manifest: artifact.Manifest) -> Puad:
    settings = manifest.settings
    with artifact.usable(folder, manifest):
        tensors = artifact.load_tensors(folder, manifest, PUAD)
        mean, factor, scales = tensors["mean"], tensors["factor"], tensors["scales"]
        if (mean.shape, factor.shape, scales.shape) != ((FEATURES,), (FEATURES, FEATURES), (2, 2)):
            raise ValueError(f"{PUAD} holds tensors of other shapes")
        if settings["feature"] not in get_args(Feature):
            raise ValueError(f"its feature is {settings['feature']!r}")
        return Puad(Mahalanobis(mean, factor), scales, settings["feature"], float(settings["weight_unpicturable"]))


def _size(settings: dict[str, Any]) -> Size:
    odd = sorted(key for key, value in SETTINGS.items() if settings[key] != value)
    if odd:
        raise ValueError(f"its {odd[0]} is {settings[odd[0]]!r} instead of {SETTINGS[odd[0]]!r}")
    size: Size = settings["pdn"]
    if size not in SIZES:
        raise ValueError(f"its pdn is {size!r} instead of one of {', '.join(SIZES)}")
    return size
