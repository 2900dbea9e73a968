"""From a folder of good parts to a model folder."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, assert_never

from daemon.desk import dataset
from daemon.desk.dataset import DatasetError
from daemon.desk.lens import of_all
from detectors import patchcore
from detectors.artifact import read_manifest, write_json
from detectors.base import ArtifactError, DetectorName, Image
from detectors.efficientad import detector as efficientad
from detectors.efficientad.network import PIXELS
from detectors.efficientad.puad import LEAST_HELD, Feature, fit_puad
from detectors.efficientad.teacher import load_pdn
from detectors.efficientad.training import Recipe as EfficientADRecipe
from detectors.efficientad.training import train as learn_efficientad
from detectors.reverse_distillation import detector as reverse_distillation
from detectors.reverse_distillation.network import ReverseDistillation, Skips
from detectors.reverse_distillation.training import RECIPES, default_steps
from detectors.reverse_distillation.training import train as learn_reverse_distillation
from detectors.teacher import digest, load_teacher, preprocess_for
from detectors.tiling import Tiling, pieces, settings_of, tiling_of
from detectors.training import CHECKPOINT, Progress, steps_per_epoch

SPLIT = "split.json"
Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Order:
    """What to train. `epochs` and `steps` are two ways to say how long; without either the detector's default holds.

    `trained` names networks to take instead of training: for reverse distillation a checkpoint of the public code, for
    PUAD the model folder of an EfficientAD. Reverse distillation looks at `backbone`, `weights`, `skips` (where there
    are any) and `transport` (RD++ alone), EfficientAD and PUAD at `pdn` and `penalty`, PUAD at `weight_unpicturable`
    and `feature`, PatchCore at `backbone` and `weights`, and not at `epochs` and `steps`. With a `tiling` all learn
    from the tiles of the images, and epochs and memories follow their number.
    """

    detector: DetectorName
    size: int
    seed: int
    device: str
    epochs: int | None = None
    steps: int | None = None
    trained: Path | None = None
    backbone: str = "efficientnet_lite0"
    weights: Path | None = None
    skips: Skips | None = None
    transport: bool = False
    pdn: Path | None = None
    penalty: Path | None = None
    weight_unpicturable: float = 1.0
    feature: Feature = "student"
    tiling: Tiling | None = None


class Training(Protocol):
    """One training, ready to start: what it needs from elsewhere is loaded and its length is known."""

    steps: int
    description: str

    def run(self, folder: Path, held: Sequence[Path], report: Report) -> None:
        """Train and write the model folder; an earlier, interrupted run of the same training is continued.

        `held` are the good parts that the model must not learn from; maps and scores are scaled by them.
        """


def prepare(order: Order, good: Sequence[Path]) -> Training:
    """Get ready to learn from images of good parts.

    Raises:
        ArtifactError: a teacher that cannot be had, or one for another detector.
        DatasetError: an image that is to be cut into tiles cannot be read.
    """
    match order.detector:
        case DetectorName.gsk_rd4ad | DetectorName.sk_rd4ad | DetectorName.rd4ad | DetectorName.rdpp:
            return ReverseDistillationTraining(order, good)
        case DetectorName.efficientad_s | DetectorName.efficientad_m | DetectorName.puad:
            return EfficientADTraining(order, good)
        case DetectorName.patchcore:
            return PatchCoreTraining(order, good)
        case _ as unknown:
            assert_never(unknown)


class ReverseDistillationTraining:
    """RD4AD, SK-RD4AD, RD++ and GSK-RD4AD."""

    def __init__(self, order: Order, good: Sequence[Path]) -> None:
        recipe = RECIPES[order.detector]
        if order.skips is not None:
            recipe = replace(recipe, skips=order.skips)
        length = 0
        if not order.trained:
            length = _length(order, good, recipe.batch) or default_steps(_count(good, order.tiling), recipe.batch)
        self._recipe = replace(recipe, steps=length, seed=order.seed, transport=order.transport)
        self._order = order
        self._good = good
        self._teacher = load_teacher(order.backbone, order.weights)
        self.steps = length
        self.description = f"{order.detector} with {order.backbone} at {_scale(order)}"

    def run(self, folder: Path, held: Sequence[Path], report: Report) -> None:  # noqa: ARG002 -- nothing is scaled
        """Train, or take the published networks."""
        order = self._order
        preprocess = preprocess_for(order.backbone, order.size)
        teacher = digest(self._teacher.backbone)
        identity: dict[str, Any] = {"backbone": order.backbone, "teacher_sha256": teacher, "size": order.size}
        if order.trained:
            network = ReverseDistillation(self._teacher, self._recipe.skips).eval()
            reverse_distillation.load_published(order.trained, network)
            history = {"trained": order.trained.name, **identity}
            reverse_distillation.save(folder, order.detector, network, preprocess, history, order.tiling)
            return
        identity |= _data(self._good, order.tiling)
        network = learn_reverse_distillation(
            _pictures(self._good, order.tiling),
            self._teacher,
            preprocess,
            self._recipe,
            folder=folder,
            identity=identity,
            device=order.device,
            report=report,
        )
        history = {"steps": self.steps, "seed": order.seed, **identity}
        reverse_distillation.save(folder, order.detector, network, preprocess, history, order.tiling)
        (folder / CHECKPOINT).unlink()


class EfficientADTraining:
    """EfficientAD S and M, and PUAD on either."""

    def __init__(self, order: Order, good: Sequence[Path]) -> None:
        self._order = order
        self._good = good
        self._recipe = EfficientADRecipe(seed=order.seed)
        length = _length(order, good, batch=1)
        if length:
            self._recipe = replace(self._recipe, steps=length)
        self.steps = 0 if order.trained else self._recipe.steps
        self.description = f"{order.detector} at {_scale(order)}"
        if order.size != PIXELS:
            raise ArtifactError(f"{order.detector} sees {PIXELS} px only, not {order.size}; leave --size out")
        if order.trained:
            split = _split(order.trained)
            alike = split["framing"] == of_all(good).fingerprint
            if not alike or set(split["learned"].values()) != {dataset.identity(path) for path in good}:
                raise ArtifactError(
                    f"{order.trained} learned from other images than PUAD would; give the --good, --alpha and --seed "
                    "that it was trained with"
                )
            if tiling_of(read_manifest(order.trained).settings) != order.tiling:
                raise ArtifactError(f"{order.trained} learned from other tiles; give --tile as it was trained with")
            return
        if order.pdn is None:
            raise ArtifactError(
                f"{order.detector} needs a teacher: make one with `inspectd distill-teacher`, or take published "
                "weights; then name it with --pdn"
            )
        self._teacher = load_pdn(order.pdn)
        if order.detector not in (f"efficientad_{self._teacher.size}", "puad"):
            raise ArtifactError(f"{order.pdn} is efficientad_{self._teacher.size}'s teacher, not {order.detector}'s")

    def run(self, folder: Path, held: Sequence[Path], report: Report) -> None:
        """Train; for PUAD also measure the distance."""
        order = self._order
        if order.detector == "puad" and len(held) < LEAST_HELD:
            raise ArtifactError(f"puad needs {LEAST_HELD} good parts held out, not {len(held)}; give more good parts")
        identity = _data(self._good, order.tiling)
        history: dict[str, Any] = {"seed": order.seed, "steps": self.steps, **identity}
        if order.trained:
            network = efficientad.load_network(order.trained, order.device)
            history |= {"trained": order.trained.name}
        else:
            history |= {"pdn_sha256": digest(self._teacher), "penalty": order.penalty is not None}
            penalty = None if order.penalty is None else map(dataset.read_image, dataset.pictures(order.penalty))
            network = learn_efficientad(
                _pictures(self._good, order.tiling),
                self._teacher,
                self._recipe,
                penalty=penalty,
                held=_pictures(held, order.tiling),
                folder=folder,
                identity=identity,
                device=order.device,
                report=report,
            )
        puad = None
        if order.detector == "puad":
            learned, apart = (_pictures(paths, order.tiling) for paths in (self._good, held))
            puad = fit_puad(network, learned, apart, feature=order.feature, weight=order.weight_unpicturable)
        efficientad.save(folder, network, history, puad, order.tiling)
        (folder / CHECKPOINT).unlink(missing_ok=True)


class PatchCoreTraining:
    """PatchCore: a step is a patch that the memory keeps, its loss that patch's distance from those before.

    What is interrupted starts afresh; it takes minutes.
    """

    def __init__(self, order: Order, good: Sequence[Path]) -> None:
        self._order = order
        self._good = good
        self._teacher = load_teacher(order.backbone, order.weights)
        self.steps = patchcore.bank_size(_count(good, order.tiling), order.size)
        self.description = f"{order.detector} with {order.backbone} at {_scale(order)}"

    def run(self, folder: Path, held: Sequence[Path], report: Report) -> None:  # noqa: ARG002 -- nothing is scaled
        """Describe all images, then choose what to remember."""
        order = self._order
        data = _data(self._good, order.tiling)
        history = {"seed": order.seed, "teacher_sha256": digest(self._teacher.backbone), **data}
        preprocess = preprocess_for(order.backbone, order.size)
        teacher = self._teacher.to(order.device)
        bank = patchcore.coreset(
            (patchcore.describe(picture, teacher, preprocess) for picture in _pictures(self._good, order.tiling)),
            self.steps,
            order.seed,
            lambda kept, distance: report(Progress(1, kept, self.steps, distance)),
        )
        patchcore.save(folder, teacher, bank, preprocess, history, order.tiling)


def _length(order: Order, good: Sequence[Path], batch: int) -> int | None:
    if order.epochs is None:
        return order.steps
    return order.epochs * steps_per_epoch(_count(good, order.tiling), batch)


def _data(good: Sequence[Path], tiling: Tiling | None) -> dict[str, Any]:
    return {"good_parts": len(good), "data_sha256": dataset.digest(good), **settings_of(tiling)}


def _pictures(paths: Sequence[Path], tiling: Tiling | None) -> Iterator[Image]:
    """What a network learns from: the images, or the tiles of each."""
    for path in paths:
        yield from pieces(dataset.read_image(path), tiling)


def _count(paths: Sequence[Path], tiling: Tiling | None) -> int:
    """How many `_pictures` there are; to know, tiled images are read once more."""
    return len(paths) if tiling is None else sum(1 for _ in _pictures(paths, tiling))


def _scale(order: Order) -> str:
    tiling = order.tiling
    whole = f"{order.size} px"
    return f"{whole} a tile of {tiling.side} px, with {tiling.overlap} px of overlap" if tiling else whole


def write_split(folder: Path, learned: Sequence[Path], held: Sequence[Path], seed: int, framing: str = "") -> None:
    """Keep beside the model which images it learned from, how framed, and which were held out for its calibration."""
    content = {
        "seed": seed,
        "framing": framing,
        "learned": {path.name: dataset.identity(path) for path in learned},
        "held_out": {path.name: dataset.identity(path) for path in held},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SPLIT, content)


def learned_framing(folder: Path) -> str | None:
    """The fingerprint of the framing of the images that the model in `folder` learned from; None if nobody knows.

    Raises:
        DatasetError: the record is missing or torn.
    """
    split = _split(folder)
    return split["framing"] if split["learned"] else None


def unlearned(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Those images that the model in `folder` did not learn from, told by their content.

    Raises:
        DatasetError: nobody knows what it learned from.
    """
    learned = set(_split(folder)["learned"].values())
    return [path for path in paths if dataset.identity(path) not in learned]


def unseen(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Those images that neither trained nor, held out at its training, calibrated the model in `folder`.

    Raises:
        DatasetError: nobody knows.
    """
    split = _split(folder)
    seen = {*split["learned"].values(), *split["held_out"].values()}
    return [path for path in paths if dataset.identity(path) not in seen]


def _split(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / SPLIT).read_text())
        # Before there were framings, images were as the camera took them.
        return {"framing": content.get("framing", ""), **{key: content[key] for key in ("learned", "held_out")}}
    except (OSError, ValueError, LookupError) as error:
        raise DatasetError(
            f"{folder / SPLIT} cannot be read ({error}), so nobody knows which images the model learned from; "
            "restore it, or train again"
        ) from error
