"""Which engine is which."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import assert_never

from torch import Tensor

from detectors.artifact import Manifest
from detectors.base import ArtifactError, DetectorName
from detectors.engines import store
from detectors.engines.base import Comparison, Engine, EngineName, Start, name_of


def starter(folder: Path, manifest: Manifest, key: str, device: str, threads: int) -> Start:
    """Give what starts the engine of that key for the model in `folder`; `threads` 0 leaves the number to the library.

    What it gives raises ArtifactError if the engine is not there, is another model's, or cannot run on this machine.
    """
    return partial(_start, folder, manifest, key, device, threads)


def _start(
    folder: Path, manifest: Manifest, key: str, device: str, threads: int, load: Callable[[], Comparison]
) -> Engine:
    match name_of(key):
        case EngineName.torch:
            from detectors.engines.pytorch import Eager

            return Eager(load(), device)
        case EngineName.openvino_fp32 | EngineName.openvino_bf16 | EngineName.openvino_mixed | EngineName.openvino_int8:
            from detectors.engines.openvino import OpenVino

            return OpenVino(store.find(folder, manifest, key), key, threads)
        case EngineName.onnxruntime_fp32:
            from detectors.engines.onnx import OnnxRuntime

            return OnnxRuntime(store.find(folder, manifest, key), key, threads)
        case EngineName.compiled_fp32 | EngineName.compiled_bf16 as name:
            from detectors.engines.pytorch import Compiled

            return Compiled(load(), name, int(manifest.settings["size"]))
        case EngineName.cudagraph_bf16 as name:
            if device != "cuda":
                raise ArtifactError(
                    f'{name} runs on an NVIDIA GPU, and there is none, or device = "cpu" keeps it from being used; '
                    "calibrate with another engine"
                )
            from detectors.engines.cuda import CudaGraphs

            return CudaGraphs(load(), int(manifest.settings["size"]))
        case _ as unknown:
            assert_never(unknown)


def export(
    folder: Path, manifest: Manifest, name: EngineName, comparison: Comparison, pictures: Sequence[Tensor]
) -> str:
    """Put an engine into a model folder and give its key; those of PyTorch need nothing there.

    Args:
        folder: the model's.
        manifest: its manifest.
        name: which engine.
        comparison: of the model, on the CPU.
        pictures: 1×3×S×S uint8 of good parts, of which int8 takes its ranges; the others take the first to trace with.

    Raises:
        ArtifactError: the engine's library is not installed, or the engine is not for this model.
    """
    match name:
        case EngineName.torch | EngineName.compiled_fp32 | EngineName.compiled_bf16 | EngineName.cudagraph_bf16:
            return name.value
        case EngineName.onnxruntime_fp32:
            from detectors.engines import onnx

            return onnx.export(folder, manifest, comparison, pictures[0])
        case EngineName.openvino_fp32 | EngineName.openvino_bf16 | EngineName.openvino_mixed | EngineName.openvino_int8:
            from detectors.engines import openvino

            return openvino.export(folder, manifest, name, comparison, pictures)
        case _ as unknown:
            assert_never(unknown)


def candidates(device: str, manifest: Manifest) -> list[EngineName]:
    """The engines that may be faster than the reference on a device, "cpu" or "cuda", and can run on this machine.

    On a CPU these are OpenVINO's: the others are no faster, or start later, and must be asked for.

    Raises:
        ArtifactError: none can; the message says what to install.
    """
    from detectors.engines.openvino import can_bf16

    if device == "cuda":
        return [EngineName.cudagraph_bf16]
    rounded = [EngineName.openvino_bf16] if can_bf16() else []
    if rounded and manifest.detector != DetectorName.patchcore:  # which has no student to round
        rounded.append(EngineName.openvino_mixed)
    return [EngineName.openvino_fp32, *rounded, EngineName.openvino_int8]


def reference(load: Callable[[], Comparison]) -> Engine:
    """Start the engine that every other one is compared with, on the CPU."""
    from detectors.engines.pytorch import Eager

    return Eager(load())
