"""How long to train, decided without a single real defect.

For each folder of good parts: learn on two thirds, and at growing numbers of steps measure how well the held-out
third is told from itself with pseudo-anomalies painted in (pasted patches, thin scars, blotches). The default
of `inspectd train --epochs` comes from this table.

    python -m tests.bench.training_length DIR... [--backbone NAME] [--weights FILE] [--steps 320] [--detector rd4ad]
"""

from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from daemon.images import read
from detectors.base import Image
from detectors.preprocess import Preprocess
from detectors.reverse_distillation.anomaly_map import AnomalyMap
from detectors.reverse_distillation.network import ReverseDistillation
from detectors.reverse_distillation.training import RECIPES, loss
from detectors.teacher import load_teacher, preprocess_for

LENGTHS = (10, 20, 40, 60, 80, 120, 160, 240, 320, 480, 640)


def paint(image: Image, donor: Image, rng: np.random.Generator) -> tuple[Image, NDArray[np.bool_]]:
    """Paint one pseudo-anomaly; gives the image and where it differs."""
    height, width = image.shape[:2]
    donor = np.asarray(cv2.resize(donor, (width, height)), np.uint8)
    mask = np.zeros((height, width), np.float32)
    centre = (int(rng.uniform(0.25, 0.75) * width), int(rng.uniform(0.25, 0.75) * height))
    kind = rng.integers(3)
    if kind == 0:  # a patch of another part
        axes = (int(rng.uniform(0.03, 0.08) * width), int(rng.uniform(0.03, 0.08) * height))
        cv2.ellipse(mask, centre, axes, rng.uniform(0, 180), 0, 360, 1.0, -1)
        content = np.roll(donor, rng.integers(-width // 3, width // 3, 2), axis=(0, 1)).astype(np.float32)
        strength = 1.0
    elif kind == 1:  # a scar
        step = rng.uniform(-0.2, 0.2, 2) * (width, height)
        end = (int(centre[0] + step[0]), int(centre[1] + step[1]))
        cv2.line(mask, centre, end, 1.0, max(2, round(0.008 * width)), cv2.LINE_AA)
        content = np.full(image.shape, rng.uniform(0, 255, 3), np.float32)
        strength = rng.uniform(0.5, 1.0)
    else:  # a blotch
        noise = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), 0.02 * width)
        cv2.ellipse(mask, centre, (int(0.1 * width), int(0.1 * height)), 0, 0, 360, 1.0, -1)
        mask *= noise > 0.5 * noise.std()
        content = np.clip(image.astype(np.float32) + rng.choice([-1, 1]) * rng.uniform(25, 70), 0, 255)
        strength = 1.0
    soft = cv2.GaussianBlur(mask, (0, 0), 0.8)[..., None] * strength
    painted = (image * (1 - soft) + content * soft).round().astype(np.uint8)
    return painted, np.abs(painted.astype(int) - image).max(axis=2) > 8


def measure(
    network: ReverseDistillation,
    preprocess: Preprocess,
    good: list[Image],
    bad: list[Image],
    masks: list[NDArray[np.bool_]],
) -> tuple[float, float]:
    """Image and pixel AUROC of pseudo-anomalies against the same parts without."""
    maps = AnomalyMap(preprocess.size, [preprocess.size // s for s in (4, 8, 16)])
    network.eval()
    with torch.inference_mode():
        found = [maps(*network(preprocess.normalise(preprocess.resize([i]))))[0].numpy() for i in good + bad]
    network.train()
    labels = [0] * len(good) + [1] * len(bad)
    truth = [np.zeros_like(found[0], bool)] * len(good) + [
        cv2.resize(m.astype(np.float32), found[0].shape, interpolation=cv2.INTER_AREA) > 0.5 for m in masks
    ]
    pixels = roc_auc_score(np.concatenate([t.ravel() for t in truth]), np.concatenate([f.ravel() for f in found]))
    return float(roc_auc_score(labels, [f.max() for f in found])), float(pixels)


def main(
    folders: list[Path],
    backbone: str = "efficientnet_lite0",
    weights: Annotated[Path | None, typer.Option()] = None,
    steps: int = 320,
    size: int = 256,
    seed: int = 0,
    detector: str = "gsk_rd4ad",
) -> None:
    """Print a row per folder and length."""
    recipe = RECIPES[detector]
    preprocess = preprocess_for(backbone, size)
    for folder in folders:
        paths = sorted(p for p in folder.iterdir() if p.is_file())
        images = [read(path) for path in paths]
        order = np.random.default_rng(seed).permutation(len(images))
        held = [images[i] for i in order[: min(len(images) // 3, 40)]]
        fitted = [images[i] for i in order[len(images) // 3 :]]
        rng = np.random.default_rng(seed + 1)
        painted = [paint(image, held[i - 1], rng) for i, image in enumerate(held)]
        torch.manual_seed(seed)
        network = ReverseDistillation(load_teacher(backbone, weights), recipe.skips, gate=recipe.gate).train()
        optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 5e-3, betas=(0.5, 0.999))
        pixels = preprocess.resize(fitted)
        step = 0
        epoch = 0
        while step < steps:
            shuffled = np.random.default_rng((seed, epoch)).permutation(len(fitted))
            epoch += 1
            for chosen in np.array_split(shuffled, -(-len(fitted) // 16)):
                x = preprocess.normalise(pixels[torch.from_numpy(chosen)])
                optimiser.zero_grad(set_to_none=True)
                value = loss(*network(x), consistency=recipe.consistency)
                value.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
                optimiser.step()
                step += 1
                if step in LENGTHS:
                    image, pixel = measure(network, preprocess, held, [p for p, _ in painted], [m for _, m in painted])
                    name = f"{folder.parent.parent.name:<14} {backbone} {detector}"
                    typer.echo(
                        f"{name} steps {step:4d} epochs {epoch:3d} loss {value.item():.4f} "
                        f"image {image:.3f} pixel {pixel:.3f}"
                    )
                if step >= steps:
                    break


if __name__ == "__main__":
    typer.run(main)
