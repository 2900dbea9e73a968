"""PyTorch as an engine: eager, which is the reference, and compiled for a CPU."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detectors.base import ArtifactError
from detectors.engines.base import Compared, Comparison, EngineName
from detectors.engines.folding import folded


class Eager:
    """The reference: float32, layer by layer, on a CPU or a GPU. Satisfies `Engine`."""

    def __init__(self, comparison: Comparison, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.label = f"{EngineName.torch} {torch.__version__} {device} float32"
        self._comparison = channels_last(comparison.to(self.device).eval())

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Sequence[Tensor]:
        """Compare all pictures together."""
        compared: Compared = self._comparison(pixels.to(self.device).contiguous(memory_format=torch.channels_last))
        return compared.found


HOW: dict[str, Any] = {
    "freezing": True,  # weights are laid out once
    "cpp_cache_precompile_headers": False,  # they would lie outside the cache, 150 MB, made anew after each restart
}


class Compiled:
    """Kernels made for this CPU as the engine starts. Satisfies `Engine`. Pictures are compared one by one.

    A first start takes one to three minutes, the next ones some ten seconds if the kernels are in the compiler's
    cache, TORCHINDUCTOR_CACHE_DIR. OpenVINO is as fast and starts sooner: this is for where it cannot be installed.
    """

    device = torch.device("cpu")

    def __init__(self, comparison: Comparison, name: EngineName, size: int) -> None:
        from torch._dynamo.exc import TorchDynamoException  # the compiler loads slowly, and the reference needs none

        networks = folded(comparison)
        if name is EngineName.compiled_bf16:
            networks.round_networks()
        self.label = f"{name} torch {torch.__version__} cpu"
        self._compare: Any = torch.compile(channels_last(networks), dynamic=False, options=HOW)
        try:
            with warnings.catch_warnings(action="ignore"):  # what a compiler says to programmers
                self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except TorchDynamoException as error:
            lines = str(error).splitlines()
            fault = next((line for line in lines if " error: " in line), lines[0])
            raise ArtifactError(
                f"{name} could not be compiled: {fault:.300}; it needs a C++ compiler and Python's headers (Debian: "
                "apt install g++ python3-dev) and room in TORCHINDUCTOR_CACHE_DIR; or choose another engine, "
                f"{EngineName.openvino_fp32} needs none of this"
            ) from error

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Sequence[Tensor]:
        """Compare one picture after the other."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        each = [self._compare(picture).found for picture in torch.split(pixels, 1)]
        return [torch.cat(found) for found in zip(*each, strict=True)]


def channels_last(comparison: Comparison) -> Comparison:
    """Lay weights out as CPUs and tensor cores want them, and as the resize lays out pixels."""
    comparison.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it
    return comparison
