"""ONNX: a whole model as one file, for TensorRT and other runtimes, and ONNX Runtime as an engine. The extra `onnx`."""

import os
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from detectors.artifact import Manifest
from detectors.base import ArtifactError, DetectorName
from detectors.engines import store
from detectors.engines.base import Comparison, EngineName

FILE = "model.onnx"


class OnnxRuntime:
    """An exported engine on the CPU, float32. Satisfies `Engine`.

    Threads of its pool sleep when there is nothing to do, so that other programs are not slowed down.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, key: str, threads: int = 0) -> None:
        library = _library("onnxruntime")
        options = library.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.label = f"{key} onnxruntime {version('onnxruntime')} cpu"
        self._session = library.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])

    def __call__(self, pixels: Tensor) -> Sequence[Tensor]:
        """Compare all pictures together."""
        return [torch.from_numpy(found) for found in self._session.run(None, {"pixels": pixels.contiguous().numpy()})]


class Finding(nn.Module):
    """What the engine's file computes: pixels → what a comparison finds."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__()
        self.comparison = comparison

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Compare."""
        return tuple(self.comparison(pixels).found)


class Judging(nn.Module):
    """What a model's file computes: pixels → maps N×S×S and scores N."""

    def __init__(self, comparison: Comparison, draw: nn.Module) -> None:
        super().__init__()
        self.comparison, self.draw = comparison, draw

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Compare and draw; the score is the map's maximum."""
        maps = self.draw(self.comparison(pixels).found)
        return maps, maps.amax((1, 2))


class Aligned(nn.Module):
    """EfficientAD's map as a module."""

    def forward(self, found: Sequence[Tensor]) -> Tensor:
        """Draw."""
        from detectors.efficientad.anomaly_map import align

        return align(found[0])


def export(model: Path, manifest: Manifest, comparison: Comparison, picture: Tensor) -> str:
    """Convert a comparison for ONNX Runtime, put it into the model folder, and give its key.

    Args:
        model: the model folder.
        manifest: of the model.
        comparison: of the model, on the CPU.
        picture: 1×3×S×S uint8, to trace with.
    """

    def fill(folder: Path) -> dict[str, str]:
        found = [f"found{place}" for place in range(len(comparison(picture).found))]
        _convert(Finding(comparison), picture, found).save(folder / FILE, external_data=False)
        return {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}

    _library("onnxruntime")
    with torch.no_grad():
        return store.write(model, manifest, EngineName.onnxruntime_fp32, fill)


def write(file: Path, manifest: Manifest, comparison: Comparison) -> None:
    """Write all that a model computes as one ONNX file.

    Its input is `pixels`, N×3×S×S uint8, red-green-blue, resized as `Preprocess` does; its outputs are `anomaly_map`,
    N×S×S, and `anomaly_score`, N, float32. The metadata `inspectd.model` is the model's fingerprint.

    Raises:
        ArtifactError: a detector whose maps no network draws, a missing library, or a file that cannot be written.
    """
    if not os.access(file.parent, os.W_OK):
        raise ArtifactError(f"{file} cannot be written: name one in a folder that is there and may be written to")
    size = int(manifest.settings["size"])
    whole = Judging(comparison, _drawing(manifest, size))
    picture = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    program = _convert(whole, picture, ["anomaly_map", "anomaly_score"])
    program.model.metadata_props["inspectd.model"] = manifest.fingerprint
    part = file.with_name(file.name + ".part")
    program.save(part, external_data=False)
    part.replace(file)


def _convert(module: nn.Module, picture: Tensor, outputs: Sequence[str]) -> Any:
    """Trace a module with pictures like this one, for any number of them."""
    for name in ("onnx", "onnxscript"):
        _library(name)
    with warnings.catch_warnings(action="ignore"), torch.no_grad():  # what an exporter says to programmers
        return torch.onnx.export(
            module.eval(),
            (picture.repeat(2, 1, 1, 1),),  # one alone would be taken for a constant
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("parts")},),
            input_names=["pixels"],
            output_names=outputs,
            verbose=False,
        )


def _drawing(manifest: Manifest, size: int) -> nn.Module:
    match DetectorName(manifest.detector):
        case DetectorName.gsk_rd4ad | DetectorName.sk_rd4ad | DetectorName.rd4ad | DetectorName.rdpp:
            from detectors.reverse_distillation.anomaly_map import AnomalyMap
            from detectors.reverse_distillation.detector import STRIDES

            return AnomalyMap(size, [size // stride for stride in STRIDES])
        case DetectorName.efficientad_s | DetectorName.efficientad_m:
            return Aligned()
        case DetectorName.puad | DetectorName.patchcore as unlike:
            raise ArtifactError(
                f"a model of {unlike} cannot be one ONNX file: part of its score is computed outside the networks; "
                f"train another detector, or let inspectd run it (--engine {EngineName.onnxruntime_fp32})"
            )
        case _ as unknown:
            assert_never(unknown)


def _library(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise ArtifactError(
            f"this needs {name}, which is not installed: pip install 'inspectd[onnx]', or choose another engine and "
            "calibrate with it"
        ) from None
