"""Learn to reconstruct the teacher's description of good parts, as each member of the family was published."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from detectors.base import ArtifactError, Image
from detectors.preprocess import Preprocess
from detectors.reverse_distillation.network import PUBLISHED_SKIPS, ReverseDistillation, Skips
from detectors.reverse_distillation.simplex import simplex_patches
from detectors.teacher import Teacher
from detectors.training import Progress, fit, steps_per_epoch

LEAST_STEPS = 60
LEAST_EPOCHS = 12


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. Defaults are SK-RD4AD's published values, `steps` excepted.

    `skips` and `gate` are as `network.Student` has them. `consistency` weighs SK-RD4AD's second loss. `projected` is
    RD++ with its noise and its losses; `transport` adds the last of them, which changes nothing but the time. `batch`
    is the largest batch of a step.
    """

    steps: int = LEAST_STEPS
    seed: int = 0
    skips: Skips = PUBLISHED_SKIPS
    gate: float = 0
    consistency: float = 0.005
    projected: bool = False
    transport: bool = False
    batch: int = 16
    learning_rate: float = 5e-3


RECIPES = {
    "gsk_rd4ad": Recipe(gate=4),
    "sk_rd4ad": Recipe(),
    "rd4ad": Recipe(skips=(), consistency=0),
    "rdpp": Recipe(skips=(), consistency=0, projected=True, batch=32),
}
"""Every detector of the family. RD++ was published with batches of 16 and a step after each second one."""


def default_steps(images: int, batch: int) -> int:
    """LEAST_EPOCHS, or as many epochs as give LEAST_STEPS.

    Of the rules tried, this one told pseudo-anomalies painted on held-out good parts best, on average over five kinds
    of real parts; no defect was looked at. The figures are in `docs/results.md`, their source is
    `tests/bench/training_length.py`.
    """
    per_epoch = max(1, steps_per_epoch(images, batch))
    return per_epoch * max(LEAST_EPOCHS, -(-LEAST_STEPS // per_epoch))


def train(
    images: Iterable[Image],
    teacher: Teacher,
    preprocess: Preprocess,
    recipe: Recipe,
    *,
    folder: Path,
    identity: dict[str, Any],
    device: str,
    report: Callable[[Progress], None],
) -> ReverseDistillation:
    """Train on good parts, as `detectors.training.fit` does; `identity` says what images and teacher are.

    Images are taken one by one and held at the network's size (192 KiB each at 256×256).

    Raises:
        ArtifactError: fewer than two images, or a checkpoint of another training in `folder`.
    """
    pixels = preprocess.resize(images)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = ReverseDistillation(teacher, recipe.skips, gate=recipe.gate, projected=recipe.projected)
    network.train().to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # a fifth faster on a CPU
    learner = (ProjectedLearner if recipe.projected else PlainLearner)(network, preprocess, recipe)
    identity = {"recipe": json.loads(json.dumps(asdict(recipe))), **identity}
    fit(
        learner,
        pixels,
        steps=recipe.steps,
        batch=recipe.batch,
        seed=recipe.seed,
        folder=folder,
        identity=identity,
        report=report,
    )
    return network.eval()


class PlainLearner:
    """RD4AD, SK-RD4AD and GSK-RD4AD: reconstruct the teacher's features."""

    def __init__(self, network: ReverseDistillation, preprocess: Preprocess, recipe: Recipe) -> None:
        self.network = network
        self.optimisers = [_adam(recipe.learning_rate, network.bn, network.decoder)]
        self._preprocess = preprocess
        self._consistency = recipe.consistency if recipe.skips else 0

    def step(self, chosen: Tensor, index: int, rng: np.random.Generator) -> float:  # noqa: ARG002 -- as Learner says
        """One step of Adam."""
        x = self._preprocess.normalise(_onto(self.network, chosen))
        total = loss(*self.network(x), consistency=self._consistency)
        (optimiser,) = self.optimisers
        optimiser.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimiser.step()
        return total.item()


class ProjectedLearner:
    """RD++ (Tien et al., CVPR 2023), its code: distillation of the raw features, and 0.2 of the projections' losses."""

    def __init__(self, network: ReverseDistillation, preprocess: Preprocess, recipe: Recipe) -> None:
        self.network = network
        self.optimisers = [_adam(1e-3, network.projections), _adam(recipe.learning_rate, network.bn, network.decoder)]
        self._preprocess = preprocess
        self._recipe = recipe

    def step(self, chosen: Tensor, index: int, rng: np.random.Generator) -> float:  # noqa: ARG002 -- as Learner says
        """One step of both Adams with the gradients of two half batches, as published."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        halves = torch.tensor_split(_onto(self.network, chosen), 2 if len(chosen) > 3 else 1)  # noqa: PLR2004 -- see fit
        losses = []
        for half in halves:
            images = half.float() / 255
            both = self._preprocess.standardise(torch.cat([images, simplex_patches(images, rng)]))
            clean, noisy = zip(*(level.chunk(2) for level in self.network.teacher(both)), strict=True)
            p, q = self.network.project(clean), self.network.project(noisy)
            shaping = projection_loss(noisy, p, q, transport=self._recipe.transport)
            total = loss(clean, self.network.decode(p, clean)) + 0.2 * shaping
            total.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
            losses.append(total.item())
        for optimiser in self.optimisers:
            optimiser.step()
        return float(np.mean(losses))


def loss(teacher: Sequence[Tensor], student: Sequence[Tensor], *, consistency: float = 0) -> Tensor:
    """SK-RD4AD's loss (its code, not its text): RD4AD's flattened cosine distance and a consistency term.

    Each level's feature map is flattened to one vector per image before the cosine; the per-pixel form is
    known to train worse. The consistency term compares the squared error of a level, upsampled, with that
    of the next finer one, and so ties the student's scale, to which the cosine is blind.
    """
    pairs = list(zip(teacher, student, strict=True))
    total = torch.stack([(1 - functional.cosine_similarity(e.flatten(1), d.flatten(1))).mean() for e, d in pairs]).sum()
    if consistency:
        for (e, d), (coarse_e, coarse_d) in pairwise(pairs):
            up_e, up_d = (
                functional.interpolate(t, e.shape[2:], mode="bilinear", align_corners=True)
                for t in (coarse_e, coarse_d)
            )
            total = total + consistency * (functional.mse_loss(up_e, up_d) - functional.mse_loss(e, d)).abs()
    return total


def projection_loss(noisy: Sequence[Tensor], p: Sequence[Tensor], q: Sequence[Tensor], *, transport: bool) -> Tensor:
    """RD++'s three losses of the projections p (of clean features) and q (of noisy ones), weighted as published.

    Reconstruction draws q to p at each place; contrast keeps p away from the raw noisy features. The published
    transport loss compares the batch with a permutation of itself, whose optimal-transport distance is zero.
    """
    reconstruction = sum((1 - functional.cosine_similarity(b, a)).mean() for a, b in zip(p, q, strict=True))
    contrast = sum(
        (functional.cosine_similarity(e.flatten(1), a.flatten(1)) - 0.5).clamp(min=0).mean()
        for e, a in zip(noisy, p, strict=True)
    )
    total = torch.as_tensor(0.01 * reconstruction + 0.1 * contrast)
    if transport:
        total = total + sum(_transport(a.flatten(1)) for a in p)
    return total / 1.11


def _transport(features: Tensor) -> Tensor:
    try:
        from geomloss import SamplesLoss
    except ImportError as error:
        raise ArtifactError(
            "the transport loss needs the package geomloss: pip install 'inspectd[transport]', or train without it"
        ) from error
    sinkhorn = SamplesLoss("sinkhorn", p=2, blur=0.05, diameter=1e7, scaling=0.95, truncate=10, backend="tensorized")
    points = features.softmax(dim=1)
    divergence: Tensor = sinkhorn(points, points[torch.randperm(len(points), device=points.device)])
    return divergence


def _onto(network: ReverseDistillation, pixels: Tensor) -> Tensor:
    return pixels.to(next(network.parameters()).device)


def _adam(learning_rate: float, *modules: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([p for m in modules for p in m.parameters()], lr=learning_rate, betas=(0.5, 0.999))
