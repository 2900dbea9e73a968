"""A trained reverse-distillation model on a device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from detectors import artifact
from detectors.base import ArtifactError, Image, Prediction
from detectors.devices import engine, watched
from detectors.preprocess import Preprocess
from detectors.reverse_distillation.anomaly_map import AnomalyMap, anomaly_score
from detectors.reverse_distillation.network import ReverseDistillation
from detectors.teacher import Teacher, read_checkpoint

TEACHER, STUDENT = "teacher.safetensors", "student.safetensors"


class ReverseDistillationDetector:
    """Satisfies `detectors.base.Detector`. Maps are size×size; the score of an image is its map's maximum."""

    def __init__(self, network: ReverseDistillation, preprocess: Preprocess, fingerprint: str, device: str) -> None:
        self._device = torch.device(device)
        self._network = network.to(self._device).eval()
        self._preprocess = preprocess
        self._map = AnomalyMap(preprocess.size, [preprocess.size // stride for stride in (4, 8, 16)]).to(self._device)
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
            pixels = self._preprocess.resize(images).to(self._device)
            maps = self._map(*self._network(self._preprocess.normalise(pixels)))
            scores, arrays = anomaly_score(maps).tolist(), maps.cpu().numpy()
        return [Prediction(score, array) for score, array in zip(scores, arrays, strict=True)]


def load(folder: Path, manifest: artifact.Manifest, device: str) -> ReverseDistillationDetector:
    """Put a saved model on `device` ("cpu" or "cuda").

    Raises:
        ArtifactError: files that are torn, edited or do not belong together.
    """
    settings: dict[str, Any] = manifest.settings
    with artifact.usable(folder, manifest):
        teacher = Teacher(settings["backbone"])
        skips = tuple((a, b) for a, b in settings["skips"])
        gate, projected = float(settings["gate"]), bool(settings["projected"])
        network = ReverseDistillation(teacher, skips, gate=gate, projected=projected)
        preprocess = Preprocess(int(settings["size"]), tuple(settings["mean"]), tuple(settings["std"]))
        teacher.backbone.load_state_dict(artifact.load_tensors(folder, manifest, TEACHER))
        artifact.load_learned(network, folder, manifest, STUDENT)
    return ReverseDistillationDetector(network, preprocess, manifest.fingerprint, device)


def save(
    folder: Path,
    detector: str,
    network: ReverseDistillation,
    preprocess: Preprocess,
    training: dict[str, Any],
) -> artifact.Manifest:
    """Write a trained network as a model folder that needs nothing from elsewhere, the teacher included."""
    settings = {
        "backbone": network.teacher.name,
        "size": preprocess.size,
        "mean": preprocess.mean,
        "std": preprocess.std,
        "skips": network.decoder.skips,
        "gate": network.decoder.gate,
        "projected": bool(network.projections),
    }
    files = {TEACHER: network.teacher.backbone.state_dict(), STUDENT: network.learned()}
    return artifact.save(folder, detector, settings, training, files)


def load_published(path: Path, network: ReverseDistillation) -> None:
    """Fill bottleneck and student from a checkpoint of the public RD4AD or SK-RD4AD code.

    It is a PyTorch file with the two state dicts `bn` and `decoder`, read with `weights_only`. The bottleneck's unused
    1×1 convolution (`conv4`, `bn4`) is passed over.

    Raises:
        ArtifactError: not such a checkpoint, one without its bottleneck, or one of another backbone.
    """
    parts = read_checkpoint(path)
    for name, module in (("bn", network.bn), ("decoder", network.decoder)):
        state = parts.get(name)
        if not isinstance(state, dict):
            raise ArtifactError(
                f"{path} holds no state dict {name!r}, only {', '.join(map(repr, parts)) or 'nothing'}; the public "
                "SK-RD4AD code leaves the bottleneck out when it is run with --seg 1: such a file cannot be used"
            )
        try:
            module.load_state_dict({k: v for k, v in state.items() if not k.startswith(("conv4.", "bn4."))})
        except RuntimeError as error:
            raise ArtifactError(
                f"{path} does not fit {network.teacher.name}: {error!s:.300}; name its backbone with --backbone"
            ) from error
