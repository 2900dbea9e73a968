"""Learn student and autoencoder from good parts (the supplement's algorithm 1). The running daemon needs none of it."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from detectors.base import ArtifactError, Image
from detectors.efficientad.anomaly_map import differences, quantiles
from detectors.efficientad.colour import grey, jitter
from detectors.efficientad.network import FEATURES, PDN, PIXELS, PREPROCESS, EfficientAD
from detectors.preprocess import Preprocess
from detectors.teacher import digest
from detectors.training import Progress, fit

HARD = 0.999
"""Share of a picture's differences from which the student does not learn: those that are small already."""

PENALTY_GREY = 0.3
KEPT_BYTES = 5 << 29


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. Defaults are the published values; the batch is one picture."""

    steps: int = 70_000
    seed: int = 0
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5


def train(
    images: Iterable[Image],
    teacher: PDN,
    recipe: Recipe,
    *,
    penalty: Iterable[Image] | None,
    held: Iterable[Image],
    folder: Path,
    identity: dict[str, Any],
    device: str,
    report: Callable[[Progress], None],
) -> EfficientAD:
    """Train on good parts, then measure the maps' quantiles on `held`, good parts that are not among `images`.

    `penalty` are pictures of anything else (published: ImageNet); on them the student learns to say nothing, so that it
    does not come to imitate the teacher outside the good parts too. None leaves this out.

    After each epoch, and after each 100 steps of a longer one, a checkpoint is left in `folder`; a later call with the
    same teacher, recipe, penalty pictures and `identity` (what the images are, in plain JSON values) goes on there.
    Pictures are taken one by one and held at 256×256 pixels (192 KiB each), what the teacher says of the images
    (4.6 MiB each) if all of it fits into 2.5 GiB of `device`.

    Raises:
        ArtifactError: fewer than two images, none held out, no penalty pictures where some were promised, a
            checkpoint of another training in `folder`, or a loss that is no number.
    """
    pixels, apart = PREPROCESS.resize(images), PREPROCESS.resize(held)
    others = None if penalty is None else _penalty_pixels(penalty)
    if not len(apart):
        raise ArtifactError(
            "EfficientAD scales its maps on good parts that it has not learned from: hold out at least 1"
        )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        network = EfficientAD(teacher)
    learner = _Learner(network, pixels, others, recipe, torch.device(device))
    fit(
        learner,
        torch.arange(len(pixels)),  # pictures by number, so that what the teacher says of them can be kept
        steps=recipe.steps,
        batch=1,
        seed=recipe.seed,
        folder=folder,
        identity={
            "recipe": asdict(recipe),
            "teacher_sha256": digest(teacher),
            "penalty_sha256": None if others is None else hashlib.sha256(others.numpy().tobytes()).hexdigest(),
            **identity,
        },
        report=report,
    )
    network.eval()
    with torch.inference_mode():
        found = torch.cat([differences(*network(_input(p, device))) for p in torch.split(apart, 1)])
    network.quantiles.copy_(quantiles(found))
    return network


def hard_loss(taught: Tensor, student: Tensor) -> Tensor:
    """Mean of the squared differences N×384×56×56 at or above their 0.999-quantile, taken in each picture apart.

    Of a picture's 1,204,224 differences 1,205 count.
    """
    squares = (taught - student).square().flatten(1)
    each = squares.shape[1]
    return squares.topk(each - int(np.ceil(HARD * (each - 1))), sorted=False).values.mean()


class _Learner:
    """Satisfies `detectors.training.Learner`."""

    def __init__(
        self, network: EfficientAD, pixels: Tensor, others: Tensor | None, recipe: Recipe, device: torch.device
    ) -> None:
        self.network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload] # torch's stub lacks it
        self._pixels = pixels
        self._others = others
        self._device = device
        self._rate = recipe.learning_rate
        self._slow_from = int(0.95 * recipe.steps)
        learning = [p for p in network.parameters() if p.requires_grad]
        self.optimisers = (torch.optim.Adam(learning, lr=recipe.learning_rate, weight_decay=recipe.weight_decay),)
        self._taught: list[Tensor] = []
        self._listen()

    def step(self, chosen: Tensor, index: int, rng: np.random.Generator) -> float:
        """Learn from the picture of this number."""
        number = int(chosen)
        clean = self._pixels[number, None]
        shown = [clean] if self._others is None else [clean, self._penalty(self._others, rng)]
        x = _input(torch.cat(shown), self._device)
        taught = self._taught[number] if self._taught else self.network.taught(x[:1])
        local = self.network.student(x, slice(0, FEATURES))
        loss = hard_loss(taught, local[:1])
        if self._others is not None:
            loss = loss + local[1:].square().mean()
        x = _channels_last(PREPROCESS.standardise(jitter(clean.float() / 255, rng).to(self._device)))
        whole = self.network.autoencoder(x)
        loss = loss + functional.mse_loss(whole, self.network.taught(x))
        # No detach: the autoencoder also learns to say what the student can follow.
        loss = loss + functional.mse_loss(self.network.student(x, slice(FEATURES, None)), whole)
        (optimiser,) = self.optimisers
        optimiser.param_groups[0]["lr"] = self._rate * (1 if index < self._slow_from else 0.1)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimiser.step()
        return loss.item()

    def _penalty(self, others: Tensor, rng: np.random.Generator) -> Tensor:
        chosen = others[int(rng.integers(len(others))), None]
        return grey(chosen) if rng.random() < PENALTY_GREY else chosen

    @torch.no_grad()
    def _listen(self) -> None:
        """Measure the teacher's mean and std per channel over all pictures and cells; keep what it says if it fits."""
        total, squares = torch.zeros(2, FEATURES, dtype=torch.float64, device=self._device)
        said = []
        for picture in torch.split(self._pixels, 1):
            told = self.network.teacher(_input(picture, self._device))
            if told.nbytes * len(self._pixels) <= KEPT_BYTES:
                said.append(told)
            cells = told[0].flatten(1).double()
            total += cells.mean(1)
            squares += cells.square().mean(1)
        mean = total / max(len(self._pixels), 1)
        std = (squares / max(len(self._pixels), 1) - mean.square()).clamp_min(0).sqrt()
        self.network.mean.copy_(mean)
        self.network.std.copy_(std.clamp_min(1e-6 * float(std.max()) + 1e-12))  # a dead channel says nothing
        while said:  # one after the other, so that both never fill the memory together
            self._taught.append(self.network.standardised(said.pop(0)))


def _input(pixels: Tensor, device: torch.device | str) -> Tensor:
    return _channels_last(PREPROCESS.normalise(pixels.to(device)))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _penalty_pixels(pictures: Iterable[Image]) -> Tensor:
    """The middle 256×256 of each picture at 512×512, so that things look about as large as on ImageNet."""
    large = Preprocess(2 * PIXELS, PREPROCESS.mean, PREPROCESS.std)
    middle = slice(PIXELS // 2, PIXELS // 2 + PIXELS)
    crops = [large.resize([picture])[:, :, middle, middle].clone() for picture in pictures]
    if not crops:
        raise ArtifactError("there are no penalty pictures; name a folder that holds some, or leave the penalty out")
    return torch.cat(crops)
