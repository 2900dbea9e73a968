"""PyTorch as an engine: eager, which is the reference, and compiled for a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detectors.engines.base import Compared, Comparison, EngineName


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


def channels_last(comparison: Comparison) -> Comparison:
    """Lay weights out as CPUs and tensor cores want them, and as the resize lays out pixels."""
    comparison.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it
    return comparison
