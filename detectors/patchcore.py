"""PatchCore (Roth et al., CVPR 2022): remember patches of good parts; a patch unlike all of them is an anomaly.

Of the paper two things are left out: the reweighting of an image's score, which here is the maximum of its map, and the
pooling of features to 1024 channels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional

from detectors import artifact
from detectors.base import DetectorName, Image, Prediction
from detectors.devices import engine, watched
from detectors.preprocess import Preprocess
from detectors.teacher import Teacher

TEACHER, BANK = "teacher.safetensors", "bank.safetensors"
SHARE, MOST = 0.1, 10_000  # the bank keeps this share of all patches, but no more: time grows with it
PROJECTED, SIGMA = 128, 4.0


class PatchCoreDetector:
    """Satisfies `detectors.base.Detector`. Maps are size×size, in distances between features."""

    def __init__(self, teacher: Teacher, bank: Tensor, preprocess: Preprocess, fingerprint: str, device: str) -> None:
        self._teacher, self._bank, self._preprocess = teacher.to(device), bank.to(device), preprocess
        self.fingerprint = fingerprint
        self.engine = engine(device)

    @torch.inference_mode()
    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        """Judge one after the other; `DeviceLostError` if the GPU does not answer any more."""
        with watched():
            return [self._judge(image) for image in images]

    def _judge(self, image: Image) -> Prediction:
        size = self._preprocess.size
        patches = describe(image, self._teacher, self._preprocess)
        nearest = self._bank[torch.cdist(patches, self._bank).argmin(dim=1)]
        distance = (patches - nearest).norm(dim=1).view(1, 1, size // 8, -1)  # anew, as cdist is rough near 0
        fine = functional.interpolate(distance, (size, size), mode="bilinear")[0, 0]
        anomaly_map = gaussian_filter(fine.cpu().numpy(), SIGMA)
        return Prediction(float(anomaly_map.max()), anomaly_map)


def describe(image: Image, teacher: Teacher, preprocess: Preprocess) -> Tensor:
    """Image → one row a patch, (size/8)²×C: the teacher's levels 2 and 3, averaged over 3×3 places, side by side."""
    pixels = preprocess.resize([image]).to(next(teacher.parameters()).device)
    _, e2, e3 = (functional.avg_pool2d(e, 3, stride=1, padding=1) for e in teacher(preprocess.normalise(pixels)))
    return torch.cat([e2, functional.interpolate(e3, e2.shape[2:], mode="bilinear")], dim=1)[0].flatten(1).T


def bank_size(images: int, size: int) -> int:
    """How many patches are kept of so many images of size×size pixels."""
    return min(MOST, int(SHARE * images * (size // 8) ** 2))


def coreset(described: Iterable[Tensor], count: int, seed: int, report: Callable[[int, float], None]) -> Tensor:
    """Keep `count` patches that cover all (algorithm 1): each time the one farthest from those that are kept already.

    Distances are of a random projection, which nearly keeps them. `report` hears how many are kept and how far the last
    one was; none that is left out is farther. Needs 2 to 13 MB of memory for each image of 256 px.
    """
    patches = torch.cat([*described])
    chance = torch.Generator().manual_seed(seed)
    points = patches @ (torch.randn(patches.shape[1], PROJECTED, generator=chance) / PROJECTED**0.5).to(patches)
    kept = [int(torch.randint(len(points), (), generator=chance))]
    distance = torch.full_like(points[:, 0], torch.inf)
    while len(kept) < count:
        to_last = torch.cdist(points, points[kept[-1:]], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        distance = torch.minimum(distance, to_last)
        kept.append(int(distance.argmax()))
        report(len(kept), float(distance[kept[-1]]))
    return patches[kept]


def save(folder: Path, teacher: Teacher, bank: Tensor, preprocess: Preprocess, training: dict[str, Any]) -> None:
    """Write a model folder that needs nothing from elsewhere, the teacher included."""
    files = {TEACHER: teacher.backbone.state_dict(), BANK: {"bank": bank}}
    artifact.save(folder, DetectorName.patchcore, {"backbone": teacher.name, **asdict(preprocess)}, training, files)


def load(folder: Path, manifest: artifact.Manifest, device: str) -> PatchCoreDetector:
    """Put a saved model on `device`; `ArtifactError` if files are torn, edited or do not belong together."""
    said = manifest.settings
    with artifact.usable(folder, manifest):
        teacher = Teacher(said["backbone"])
        teacher.backbone.load_state_dict(artifact.load_tensors(folder, manifest, TEACHER))
        bank = artifact.load_tensors(folder, manifest, BANK)["bank"]
        preprocess = Preprocess(said["size"], tuple(said["mean"]), tuple(said["std"]))
    return PatchCoreDetector(teacher, bank, preprocess, manifest.fingerprint, device)
