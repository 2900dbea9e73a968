"""Distil EfficientAD's teacher from an ImageNet network, once for all products (the supplement's algorithm 3)."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from detectors import artifact
from detectors.base import Image
from detectors.efficientad.colour import grey
from detectors.efficientad.network import FEATURES, PDN, PIXELS, PREPROCESS, Size
from detectors.preprocess import Preprocess
from detectors.teacher import BACKBONES, Teacher, digest
from detectors.training import Progress, fit

CELLS = 64
"""Side of the grid on which both networks describe the picture."""

GREY = 0.1
"""Share of the pictures shown without colour."""

MEASURED_IMAGES = 10_000


@dataclass(frozen=True, slots=True)
class DistillationRecipe:
    """How to distil. Defaults are the published values."""

    size: Size = "s"
    steps: int = 60_000
    batch: int = 16
    seed: int = 0
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5


def distil(
    images: Iterable[Image],
    backbone: Teacher,
    recipe: DistillationRecipe,
    *,
    out: Path,
    device: str,
    report: Callable[[Progress], None],
    keep_bytes: int = 4 << 30,
) -> PDN:
    """Teach a PDN to say of 256×256 pixels what `backbone` says of the same picture at 512×512.

    The PDN is written to `out`, a safetensors file for `teacher.load_pdn`. Checkpoints in a folder beside it (its name
    with `.training` appended) let a later call with the same arguments go on. Images are taken one by one and held at
    both sizes (0.94 MiB each); what the backbone says of them (3 MiB each) is kept up to `keep_bytes` on `device`,
    which changes the speed alone.

    Raises:
        ArtifactError: fewer than two images, a checkpoint of another distillation, or a loss that is no number.
    """
    targets = Targets(images, backbone, device, keep_bytes)
    about = {
        **{key: str(value) for key, value in asdict(recipe).items()},
        "backbone": backbone.name,
        "backbone_sha256": digest(backbone),
        "images": str(len(targets.pictures)),
        "images_sha256": targets.sha256,
    }
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = Distilled(recipe.size)
    learner = _Learner(network, targets, recipe, torch.device(device))
    fit(
        learner,
        torch.arange(len(targets.pictures)),  # images by number, so that their targets can be kept
        steps=recipe.steps,
        batch=recipe.batch,
        seed=recipe.seed,
        folder=out.with_name(out.name + ".training"),
        identity=dict(about),
        report=report,
    )
    artifact.write_tensors(out, network.pdn.state_dict(), about)
    return network.pdn.cpu().eval()


class Distilled(nn.Module):
    """What the distillation changes: the PDN, and mean and std (384) of its targets over the images."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.pdn = PDN(size, padding=True)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.zeros(FEATURES))

    def learned(self) -> dict[str, Tensor]:
        """All of it."""
        return self.state_dict()


class Targets:
    """Pictures, and what the backbone says of them, as 384×64×64 in float16 each.

    Levels 2 and 3 (strides 8 and 16, the latter enlarged) of the picture at 512×512, one after the other, and averaged
    over neighbouring channels to 384.
    """

    def __init__(self, images: Iterable[Image], backbone: Teacher, device: str, keep_bytes: int) -> None:
        self._device = torch.device(device)
        self._backbone = backbone.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it
        large = Preprocess(2 * PIXELS, BACKBONES[backbone.name].mean, BACKBONES[backbone.name].std)
        self._normalise = large.normalise
        self.pictures = [(large.resize([image]), PREPROCESS.resize([image])) for image in images]
        self._kept: dict[tuple[int, bool], Tensor] = {}
        self._room = keep_bytes // (2 * FEATURES * CELLS * CELLS)

    @property
    def sha256(self) -> str:
        """Which pictures these are."""
        sha = hashlib.sha256()
        for large, _ in self.pictures:
            sha.update(large.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def of(self, number: int, *, without_colour: bool) -> Tensor:
        """One picture's target. Pictures are described one by one: a batch would round otherwise than its parts."""
        kept = self._kept.get((number, without_colour))
        if kept is not None:
            return kept
        pixels = self.pictures[number][0]
        target = self._describe(grey(pixels) if without_colour else pixels)
        if len(self._kept) < self._room:
            self._kept[number, without_colour] = target
        return target

    def statistics(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mean and std (384) over cells and pictures in colour, 10,000 of them at most."""
        total, squares = torch.zeros(2, FEATURES, dtype=torch.float64, device=self._device)
        chosen = rng.permutation(len(self.pictures))[:MEASURED_IMAGES].tolist()
        for number in chosen:
            cells = self.of(number, without_colour=False).flatten(1).double()
            total += cells.mean(1)
            squares += cells.square().mean(1)
        mean = total / len(chosen)
        std = (squares / len(chosen) - mean.square()).clamp_min(0).sqrt()
        return mean.float(), std.clamp_min(1e-6 * float(std.max()) + 1e-12).float()

    @torch.no_grad()
    def _describe(self, pixels: Tensor) -> Tensor:
        x = self._normalise(pixels.to(self._device)).contiguous(memory_format=torch.channels_last)
        _, level2, level3 = self._backbone(x)
        level3 = functional.interpolate(level3, (CELLS, CELLS), mode="bilinear")
        cells = torch.cat([level2, level3], 1)[0].flatten(1).T  # 4096×C
        return functional.adaptive_avg_pool1d(cells, FEATURES).T.reshape(FEATURES, CELLS, CELLS).half()


class _Learner:
    """Satisfies `detectors.training.Learner`."""

    def __init__(self, network: Distilled, targets: Targets, recipe: DistillationRecipe, device: torch.device) -> None:
        self.network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload] # torch's stub lacks it
        self._targets = targets
        self._seed = recipe.seed
        self._device = device
        adam = torch.optim.Adam(network.pdn.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.optimisers = (adam,)

    def step(self, chosen: Tensor, index: int, rng: np.random.Generator) -> float:  # noqa: ARG002 -- every step is alike
        """Learn from the pictures of these numbers."""
        numbers: list[int] = chosen.tolist()
        colourless = (rng.random(len(numbers)) < GREY).tolist()
        if not self.network.std.any():
            mean, std = self._targets.statistics(np.random.default_rng(self._seed))
            self.network.mean.copy_(mean)
            self.network.std.copy_(std)
        small = [self._targets.pictures[number][1] for number in numbers]
        shown = torch.cat([grey(p) if without else p for p, without in zip(small, colourless, strict=True)])
        x = PREPROCESS.normalise(shown.to(self._device)).contiguous(memory_format=torch.channels_last)
        told = torch.stack(
            [self._targets.of(n, without_colour=without) for n, without in zip(numbers, colourless, strict=True)]
        )
        target = (told.float() - self.network.mean[:, None, None]) / self.network.std[:, None, None]
        loss = functional.mse_loss(self.network.pdn(x), target)
        (optimiser,) = self.optimisers
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimiser.step()
        return loss.item()
