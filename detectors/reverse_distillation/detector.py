"""A trained reverse-distillation model on a device."""

from pathlib import Path
from typing import Any

from detectors import artifact
from detectors.base import ArtifactError
from detectors.detector import NetworkDetector
from detectors.engines.base import Engine, Start
from detectors.preprocess import Preprocess
from detectors.reverse_distillation.anomaly_map import AnomalyMap
from detectors.reverse_distillation.comparison import ReverseDistillationComparison
from detectors.reverse_distillation.network import ReverseDistillation
from detectors.teacher import Teacher, read_checkpoint
from detectors.tiling import Tiling, settings_of

TEACHER, STUDENT = "teacher.safetensors", "student.safetensors"
STRIDES = (4, 8, 16)
"""Pixels of the network's input from one cell of a level to the next."""


def load(folder: Path, manifest: artifact.Manifest, start: Start) -> NetworkDetector:
    """Run a saved model on the engine that `start` gives. Maps are size×size.

    Raises:
        ArtifactError: files that are torn, edited or do not belong together.
    """
    with artifact.usable(folder, manifest):
        preprocess = preprocess_of(manifest)
    return run_by(start(lambda: load_comparison(folder, manifest)), preprocess, manifest.fingerprint)


def run_by(engine: Engine, preprocess: Preprocess, fingerprint: str) -> NetworkDetector:
    """The detector of an engine that runs a `ReverseDistillationComparison`."""
    draw = AnomalyMap(preprocess.size, [preprocess.size // stride for stride in STRIDES]).to(engine.device)
    return NetworkDetector(preprocess, engine, draw, fingerprint)


def load_comparison(folder: Path, manifest: artifact.Manifest) -> ReverseDistillationComparison:
    """What an engine is to compute of a saved model, on the CPU.

    Raises:
        ArtifactError: files that are torn, edited or do not belong together.
    """
    settings: dict[str, Any] = manifest.settings
    with artifact.usable(folder, manifest):
        teacher = Teacher(settings["backbone"])
        skips = tuple((a, b) for a, b in settings["skips"])
        gate, projected = float(settings["gate"]), bool(settings["projected"])
        network = ReverseDistillation(teacher, skips, gate=gate, projected=projected)
        teacher.backbone.load_state_dict(artifact.load_tensors(folder, manifest, TEACHER))
        artifact.load_learned(network, folder, manifest, STUDENT)
        return ReverseDistillationComparison(network.eval(), preprocess_of(manifest))


def preprocess_of(manifest: artifact.Manifest) -> Preprocess:
    """What is done to a saved model's images."""
    settings = manifest.settings
    return Preprocess(int(settings["size"]), tuple(settings["mean"]), tuple(settings["std"]))


def save(
    folder: Path,
    detector: str,
    network: ReverseDistillation,
    preprocess: Preprocess,
    training: dict[str, Any],
    tiling: Tiling | None = None,
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
        **settings_of(tiling),
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
