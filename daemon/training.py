"""From a folder of good parts to a model folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from daemon import dataset
from daemon.dataset import DatasetError
from detectors.artifact import write_json
from detectors.reverse_distillation import detector as reverse_distillation
from detectors.reverse_distillation.training import CHECKPOINT, Progress, Recipe, default_epochs, steps_per_epoch
from detectors.reverse_distillation.training import train as learn
from detectors.teacher import digest, load_teacher

SPLIT = "split.json"


@dataclass(frozen=True, slots=True)
class Order:
    """What to train. `epochs` None is the default for the number of images; `skips` () is RD4AD."""

    backbone: str
    weights: Path | None
    skips: tuple[tuple[int, int], ...]
    size: int
    epochs: int | None
    seed: int
    device: str


class Training:
    """One training, ready to start: the teacher is loaded and the length is known."""

    def __init__(self, order: Order, good: Sequence[Path]) -> None:
        """Prepare to learn from images of good parts.

        Raises:
            ArtifactError: no such backbone, or its weights cannot be had.
        """
        epochs = order.epochs or default_epochs(len(good))
        self.recipe = Recipe(epochs=epochs, seed=order.seed, skips=order.skips)
        self.steps = epochs * steps_per_epoch(len(good), self.recipe.batch)
        self._order = order
        self._good = good
        self._teacher = load_teacher(order.backbone, order.weights)

    def run(self, folder: Path, report: Callable[[Progress], None]) -> None:
        """Train and write the model folder; an earlier, interrupted run of the same training is continued."""
        order = self._order
        preprocess = reverse_distillation.preprocess_for(order.backbone, order.size)
        identity = {
            "backbone": order.backbone,
            "teacher_sha256": digest(self._teacher.backbone),
            "size": order.size,
            "good_parts": len(self._good),
            "data_sha256": dataset.digest(self._good),
        }
        network = learn(
            (dataset.read_image(path) for path in self._good),
            self._teacher,
            preprocess,
            self.recipe,
            folder=folder,
            identity=identity,
            device=order.device,
            report=report,
        )
        history = {"epochs": self.recipe.epochs, "seed": order.seed, "steps": self.steps, **identity}
        reverse_distillation.save(folder, network, preprocess, history)
        (folder / CHECKPOINT).unlink()


def write_split(folder: Path, learned: Sequence[Path], held: Sequence[Path], seed: int) -> None:
    """Keep beside the model which images it learned from and which were held out for its calibration."""
    content = {
        "seed": seed,
        "learned": {path.name: dataset.digest([path]) for path in learned},
        "held_out": {path.name: dataset.digest([path]) for path in held},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SPLIT, content)


def unlearned(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Those images that the model in `folder` did not learn from, told by their content.

    Raises:
        DatasetError: nobody knows what it learned from.
    """
    try:
        learned = set(json.loads((folder / SPLIT).read_text())["learned"].values())
    except (OSError, ValueError, LookupError) as error:
        raise DatasetError(
            f"{folder / SPLIT} cannot be read ({error}), so nobody knows which images the model learned from; "
            "restore it, or train again"
        ) from error
    return [path for path in paths if dataset.digest([path]) not in learned]
