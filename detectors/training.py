"""The loop in which every network learns: its order, its checkpoints, its progress. The daemon never needs it."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from detectors import artifact
from detectors.base import ArtifactError

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_S = 30


@dataclass(frozen=True, slots=True)
class Progress:
    """After each step: `step` of `steps` in all, and the loss of this batch."""

    epoch: int
    step: int
    steps: int
    loss: float


class Network(Protocol):
    """What is being taught, as far as a checkpoint is concerned."""

    def learned(self) -> dict[str, Tensor]:
        """Give the state that training changes: parameters and buffers by name, without the frozen teacher's."""

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = ...) -> Any:  # noqa: FBT001 -- torch's
        """Take such a state."""


class Learner(Protocol):
    """One detector's way to learn. An object serves one training."""

    @property
    def network(self) -> Network:
        """What learns."""

    @property
    def optimisers(self) -> Sequence[torch.optim.Adam]:
        """What moves it."""

    def step(self, chosen: Tensor, index: int, rng: np.random.Generator) -> float:
        """Learn from one batch and give its loss.

        `chosen` are some of the `images` given to `fit`, on the CPU; `index` counts the steps from 0. All chance comes
        from `rng` or from torch's global generator; both depend on the seed and `index` alone.
        """


def steps_per_epoch(images: int, batch: int) -> int:
    """How many optimiser steps an epoch has."""
    return -(-images // batch)


def fit(
    learner: Learner,
    images: Tensor,
    *,
    steps: int,
    batch: int,
    seed: int,
    folder: Path,
    identity: dict[str, Any],
    report: Callable[[Progress], None],
) -> None:
    """Take `steps` steps over `images`; on a CPU the same arguments give the same weights on the same machine.

    `images` are N×3×S×S uint8, or the numbers of N images that the learner keeps.

    `batch` is the largest batch; an epoch is cut into batches of nearly equal size, so that batch norm never sees a
    lone last image. The order of an epoch depends on seed and epoch alone.

    After the first step, then every half minute, and at the end a checkpoint is left in `folder`; a later call with the
    same `identity` (all that decides the result, in plain JSON values) goes on from there.

    Raises:
        ArtifactError: fewer than two images, a checkpoint of another training in `folder`, or a loss that is no number.
    """
    if len(images) < 2:  # noqa: PLR2004 -- batch norm needs two
        raise ArtifactError(f"training needs at least 2 good parts, there are {len(images)}")
    per_epoch = steps_per_epoch(len(images), batch)
    due = time.monotonic()
    for index in range(_resume(folder / CHECKPOINT, identity, learner), steps):
        epoch, place = divmod(index, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        chosen = np.array_split(order, per_epoch)[place]
        rng = np.random.default_rng((seed, epoch, place))
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2**62)))
            loss = learner.step(images[torch.from_numpy(chosen)], index, rng)
        if not np.isfinite(loss):
            raise ArtifactError(f"the training diverged at step {index + 1}: its loss is {loss}; try another --seed")
        report(Progress(epoch + 1, index + 1, steps, loss))
        if time.monotonic() >= due or index + 1 == steps:
            _checkpoint(folder / CHECKPOINT, identity, index + 1, learner)
            due = time.monotonic() + CHECKPOINT_S


def _checkpoint(path: Path, identity: dict[str, Any], steps: int, learner: Learner) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{key}": value for key, value in learner.network.learned().items()}
    for number, optimiser in enumerate(learner.optimisers):
        for index, state in optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{index}.{key}": value for key, value in state.items()}
    artifact.write_tensors(path, tensors, {"identity": json.dumps(identity, sort_keys=True), "steps": str(steps)})


def _resume(path: Path, identity: dict[str, Any], learner: Learner) -> int:
    """Load a checkpoint if there is one; give the number of steps already taken."""
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
    learner.network.load_state_dict(
        {key.removeprefix("network."): t for key, t in tensors.items() if key.startswith("network.")}, strict=False
    )
    for number, optimiser in enumerate(learner.optimisers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"adam.{number}."):
                *_, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(metadata["steps"])
