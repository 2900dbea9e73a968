"""Figures on real images: train, calibrate and evaluate as a user would, one table row a category and teacher.

    INSPECTD_DATA=… INSPECTD_WEIGHTS=… python -m tests.bench.results [--only screw] [--backbone resnet18]

Every category's test images are seen once, by `inspectd evaluate`, after training and calibration are over.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

CATEGORIES = (
    "mvtec_ad/screw",
    "aws_lookout/cookie",
    "piped/PA_BDP01_TL",
    "piped/PA_BFT01_TL",
    "kolektorsdd/commutator",
)
WEIGHTS = {
    "resnet18": "resnet18.tv_in1k_v1.stem-layer3.bnfolded.safetensors",
    "resnet50_msra": "resnet50.msra_in1k_caffe.stem-layer3.safetensors",
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="Categories, by part of their names; default: all.")] = None,
    backbone: str = "efficientnet_lite0",
    detector: str = "sk_rd4ad",
    epochs: Annotated[int | None, typer.Option(help="Default: the product's.")] = None,
    seed: int = 0,
    out: Path = Path("build/results"),
) -> None:
    """Measure, print a table, and leave each evaluation's JSON behind."""
    data = Path(os.environ.get("INSPECTD_DATA", ""))
    if not (data / CATEGORIES[0]).is_dir():
        sys.exit("INSPECTD_DATA must name a folder with the categories in MVTec layout")
    rows: list[tuple[str, dict[str, Any], float]] = []
    for category in CATEGORIES:
        if only and not any(part in category for part in only):
            continue
        name = f"{Path(category).name}-{detector}-{backbone}-seed{seed}"
        model, figures = out / "models" / name, out / f"{name}.json"
        options = ["--backbone", backbone, "--detector", detector, "--seed", str(seed)]
        if backbone in WEIGHTS:
            options += ["--weights", f"{os.environ['INSPECTD_WEIGHTS']}/{WEIGHTS[backbone]}"]
        if epochs:
            options += ["--epochs", str(epochs)]
        began = time.monotonic()
        _inspectd("train", "--good", data / category / "train/good", "--out", model, "--overwrite", *options)
        seconds = time.monotonic() - began
        _inspectd("evaluate", "--model", model, "--data", data / category, "--json", figures)
        found = json.loads(figures.read_text())
        manifest = json.loads((model / "manifest.json").read_text())
        found |= {"training": manifest["training"], "versions": manifest["versions"], "train_seconds": seconds}
        figures.write_text(json.dumps(found, indent=2) + "\n")
        rows.append((name, found, seconds))
    keys = ("image_auroc", "pixel_auroc", "aupro", "alpha_carried", "false_reject_rate", "escape_rate")
    table = Table("", *keys, "latency p50 ms", "training s", "epochs")
    for name, found, seconds in rows:
        figures_text = ["–" if found[key] is None else f"{found[key]:.3f}" for key in keys]
        table.add_row(
            name, *figures_text, f"{found['latency_ms_p50']:.0f}", f"{seconds:.0f}", str(found["training"]["epochs"])
        )
    Console(width=200).print(table)


def _inspectd(*arguments: str | Path) -> None:
    subprocess.run([str(Path(sys.executable).with_name("inspectd")), *map(str, arguments)], check=True)


if __name__ == "__main__":
    typer.run(main)
