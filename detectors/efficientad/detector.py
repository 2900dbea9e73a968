"""A trained EfficientAD or PUAD model on a device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from detectors import artifact
from detectors.base import ArtifactError
from detectors.detector import NetworkDetector
from detectors.efficientad.anomaly_map import align
from detectors.efficientad.comparison import EfficientADComparison
from detectors.efficientad.mahalanobis import Mahalanobis
from detectors.efficientad.network import FEATURES, PDN, PIXELS, PREPROCESS, SIZES, EfficientAD, Size
from detectors.efficientad.puad import Feature, Puad
from detectors.engines.base import Engine, Start
from detectors.preprocess import Preprocess
from detectors.tiling import Tiling, settings_of

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


class Drawing:
    """Makes maps N×256×256 of what the comparison found; an image's score is its map's maximum.

    Without `puad` a map is in units of the scaled maps: 0.1 is exceeded by some 0.5 % of the cells of good parts.
    With it, in standard deviations of good parts' scores, raised evenly where the picture as a whole is unusual.
    """

    def __init__(self, puad: Puad | None) -> None:
        self._puad = puad

    def __call__(self, found: Sequence[Tensor]) -> Tensor:
        """Draw."""
        maps = align(found[0])
        return self._puad.lift(maps, found[1]) if self._puad else maps


def load(folder: Path, manifest: artifact.Manifest, start: Start) -> NetworkDetector:
    """Run a saved model on the engine that `start` gives.

    Raises:
        ArtifactError: files that are torn, edited or do not belong together.
    """
    puad = _puad(folder, manifest) if manifest.detector == "puad" else None
    return run_by(start(lambda: load_comparison(folder, manifest)), puad, manifest.fingerprint)


def run_by(engine: Engine, puad: Puad | None, fingerprint: str) -> NetworkDetector:
    """The detector of an engine that runs an `EfficientADComparison`, with PUAD's feature if there is a `puad`."""
    return NetworkDetector(PREPROCESS, engine, Drawing(puad), fingerprint)


def load_comparison(folder: Path, manifest: artifact.Manifest) -> EfficientADComparison:
    """What an engine is to compute of a saved model, on the CPU.

    Raises:
        ArtifactError: files that are torn, edited or do not belong together.
    """
    feature = manifest.settings["feature"] if manifest.detector == "puad" else None
    return EfficientADComparison(_network(folder, manifest).eval(), feature)


def preprocess_of(manifest: artifact.Manifest) -> Preprocess:  # noqa: ARG001 -- as the other detectors have it
    """What is done to the images of every model."""
    return PREPROCESS


def load_network(folder: Path, device: str) -> EfficientAD:
    """Put the networks of a saved EfficientAD or PUAD model on `device`, in eval mode, to fit a PUAD to them.

    Raises:
        ArtifactError: no model folder, another detector's, or files that are torn, edited or do not belong together.
    """
    manifest = artifact.read_manifest(folder)
    if manifest.detector not in DETECTORS:
        raise ArtifactError(f"{folder} holds a model of {manifest.detector}, not of {', '.join(DETECTORS)}")
    return _placed(_network(folder, manifest), device)


def save(
    folder: Path, network: EfficientAD, training: dict[str, Any], puad: Puad | None = None, tiling: Tiling | None = None
) -> artifact.Manifest:
    """Write a trained network as a model folder that needs nothing from elsewhere, the teacher included."""
    name = f"efficientad_{network.size}"
    settings = {"pdn": network.size, **SETTINGS, **settings_of(tiling)}
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
