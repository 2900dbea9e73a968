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
from detectors.base import DetectorName, Image
from detectors.detector import NetworkDetector
from detectors.engines.base import Compared, Comparison, Engine, Start
from detectors.preprocess import Preprocess
from detectors.teacher import Teacher
from detectors.tiling import Tiling, settings_of

TEACHER, BANK = "teacher.safetensors", "bank.safetensors"
SHARE, MOST = 0.1, 10_000  # the bank keeps this share of all patches, but no more: time grows with it
PROJECTED, SIGMA = 128, 4.0


class Description(Comparison):
    """The teacher's levels 2 and 3, averaged over 3×3 places, side by side: N×C×size/8×size/8. There is no student."""

    def __init__(self, teacher: Teacher, preprocess: Preprocess) -> None:
        super().__init__()
        self.teacher = teacher
        self._preprocess = preprocess
        self._dtype = torch.float32

    def forward(self, pixels: Tensor) -> Compared:
        """Describe."""
        features = self.teacher(self._preprocess.normalise(pixels).to(self._dtype))
        _, e2, e3 = (functional.avg_pool2d(e.float(), 3, stride=1, padding=1) for e in features)
        coarse = functional.interpolate(e3, e2.shape[2:], mode="bilinear")
        return Compared(features, [], [torch.cat([e2, coarse], dim=1)])

    def round_networks(self) -> "Description":
        """Let the teacher compute in bfloat16."""
        self.teacher.to(torch.bfloat16)
        self._dtype = torch.bfloat16
        return self


class Recollection:
    """Draws maps size×size, in distances between features, by looking each patch up in the bank."""

    def __init__(self, bank: Tensor, size: int) -> None:
        self._bank = bank
        self._size = size

    def __call__(self, found: Sequence[Tensor]) -> Tensor:
        """Look up the patches of one image after the other."""
        return torch.stack([self._draw(patches(described)) for described in found[0]])

    def _draw(self, seen: Tensor) -> Tensor:
        nearest = self._bank[torch.cdist(seen, self._bank).argmin(dim=1)]
        distance = (seen - nearest).norm(dim=1).view(1, 1, self._size // 8, -1)  # anew, as cdist is rough near 0
        fine = functional.interpolate(distance, (self._size, self._size), mode="bilinear")[0, 0]
        return torch.from_numpy(gaussian_filter(fine.cpu().numpy(), SIGMA))


def patches(described: Tensor) -> Tensor:
    """C×h×w → one row a patch."""
    return described.flatten(1).T


def describe(image: Image, teacher: Teacher, preprocess: Preprocess) -> Tensor:
    """Image → one row a patch, (size/8)²×C, on the teacher's device."""
    compared = Description(teacher, preprocess).forward(
        preprocess.resize([image]).to(next(teacher.parameters()).device)
    )
    return patches(compared.found[0][0])


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


def save(
    folder: Path,
    teacher: Teacher,
    bank: Tensor,
    preprocess: Preprocess,
    training: dict[str, Any],
    tiling: Tiling | None = None,
) -> None:
    """Write a model folder that needs nothing from elsewhere, the teacher included."""
    files = {TEACHER: teacher.backbone.state_dict(), BANK: {"bank": bank}}
    settings = {"backbone": teacher.name, **asdict(preprocess), **settings_of(tiling)}
    artifact.save(folder, DetectorName.patchcore, settings, training, files)


def load(folder: Path, manifest: artifact.Manifest, start: Start) -> NetworkDetector:
    """Run a saved model on the engine that `start` gives.

    Raises:
        ArtifactError: files that are torn, edited or do not belong together.
    """
    with artifact.usable(folder, manifest):
        bank = artifact.load_tensors(folder, manifest, BANK)["bank"]
        preprocess = preprocess_of(manifest)
    return run_by(start(lambda: load_comparison(folder, manifest)), bank, preprocess, manifest.fingerprint)


def run_by(engine: Engine, bank: Tensor, preprocess: Preprocess, fingerprint: str) -> NetworkDetector:
    """The detector of an engine that runs a `Description`."""
    draw = Recollection(bank.to(engine.device), preprocess.size)
    return NetworkDetector(preprocess, engine, draw, fingerprint)


def load_comparison(folder: Path, manifest: artifact.Manifest) -> Description:
    """What an engine is to compute of a saved model, on the CPU; `ArtifactError` as `load`."""
    with artifact.usable(folder, manifest):
        teacher = Teacher(manifest.settings["backbone"])
        teacher.backbone.load_state_dict(artifact.load_tensors(folder, manifest, TEACHER))
        return Description(teacher, preprocess_of(manifest))


def preprocess_of(manifest: artifact.Manifest) -> Preprocess:
    """What is done to a saved model's images."""
    said = manifest.settings
    return Preprocess(said["size"], tuple(said["mean"]), tuple(said["std"]))
