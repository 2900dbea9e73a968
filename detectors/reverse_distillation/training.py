"""Learn bottleneck and student from good parts. Not needed, and not imported, by the running daemon."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from detectors import artifact
from detectors.base import ArtifactError, Image
from detectors.preprocess import Preprocess
from detectors.reverse_distillation.network import PUBLISHED_SKIPS, ReverseDistillation, Skips
from detectors.teacher import Teacher

CHECKPOINT = "checkpoint.safetensors"
BATCH = 16
LEAST_STEPS = 60
LEAST_EPOCHS = 12


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. Defaults are SK-RD4AD's published values, `epochs` excepted.

    `consistency` weighs SK-RD4AD's second loss; without skips, which is RD4AD, there is none. `batch` is the largest
    batch; an epoch is cut into batches of nearly equal size, so that batch norm never sees a lone last image.
    """

    epochs: int
    seed: int = 0
    skips: Skips = PUBLISHED_SKIPS
    batch: int = BATCH
    learning_rate: float = 5e-3
    consistency: float = 0.005


@dataclass(frozen=True, slots=True)
class Progress:
    """After each step: `step` of `steps` in all, and the loss of this batch."""

    epoch: int
    step: int
    steps: int
    loss: float


def steps_per_epoch(images: int, batch: int) -> int:
    """How many optimiser steps an epoch has."""
    return -(-images // batch)


def default_epochs(images: int) -> int:
    """LEAST_EPOCHS, or as many as give LEAST_STEPS at the default batch.

    Of the rules tried, this one told pseudo-anomalies painted on held-out good parts best, on average over five kinds
    of real parts; no defect was looked at. The figures are in `docs/results.md`, their source is
    `tests/bench/training_length.py`. Longer is not better for small sets: through the skips the student learns to
    copy anomalies.
    """
    return max(LEAST_EPOCHS, -(-LEAST_STEPS // steps_per_epoch(images, BATCH)))


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
    """Train on good parts; the same arguments give the same weights on the same machine.

    After each epoch a checkpoint is left in `folder`; a later call with the same `recipe` and `identity` (what
    the images and the teacher are, in plain JSON values) goes on from there. Images are taken one by one and held
    at the network's size (192 KiB each at 256×256). The order of an epoch depends on seed and epoch alone.

    Raises:
        ArtifactError: fewer than two images, or a checkpoint of another training in `folder`.
    """
    pixels = preprocess.resize(images)
    if len(pixels) < 2:  # noqa: PLR2004 -- batch norm needs two
        raise ArtifactError(f"training needs at least 2 good parts, there are {len(pixels)}")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = ReverseDistillation(teacher, recipe.skips).to(device)
    learning = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(learning, lr=recipe.learning_rate, betas=(0.5, 0.999))
    identity = {"recipe": json.loads(json.dumps(asdict(recipe))), **identity}
    done = _resume(folder / CHECKPOINT, identity, network, optimiser)
    per_epoch = steps_per_epoch(len(pixels), recipe.batch)
    network.train()
    for epoch in range(done, recipe.epochs):
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(pixels))
        for index, chosen in enumerate(np.array_split(order, per_epoch)):
            x = preprocess.normalise(pixels[torch.from_numpy(chosen)].to(device))
            optimiser.zero_grad(set_to_none=True)
            total = loss(*network(x), consistency=recipe.consistency if recipe.skips else 0.0)
            total.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
            optimiser.step()
            report(Progress(epoch + 1, epoch * per_epoch + index + 1, recipe.epochs * per_epoch, total.item()))
        _checkpoint(folder / CHECKPOINT, identity, epoch + 1, network, optimiser)
    return network.eval()


def loss(teacher: Sequence[Tensor], student: Sequence[Tensor], *, consistency: float) -> Tensor:
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


def _checkpoint(
    path: Path, identity: dict[str, Any], epoch: int, network: ReverseDistillation, optimiser: torch.optim.Adam
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{key}": value for key, value in network.learned().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{key}": value for key, value in state.items()}
    artifact.write_tensors(path, tensors, {"identity": json.dumps(identity, sort_keys=True), "epoch": str(epoch)})


def _resume(path: Path, identity: dict[str, Any], network: ReverseDistillation, optimiser: torch.optim.Adam) -> int:
    """Load a checkpoint if there is one; give the number of epochs already done."""
    if not path.exists():
        return 0
    tensors = artifact.read_tensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    found = json.loads(metadata["identity"])
    if found != json.loads(json.dumps(identity)):
        different = sorted(key for key in found.keys() | identity.keys() if found.get(key) != identity.get(key))
        raise ArtifactError(
            f"{path} is the checkpoint of another training (different: {', '.join(different)}); "
            f"remove it to start afresh, or choose another --out"
        )
    network.load_state_dict(
        {key.removeprefix("network."): t for key, t in tensors.items() if key.startswith("network.")}, strict=False
    )
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(metadata["epoch"])
