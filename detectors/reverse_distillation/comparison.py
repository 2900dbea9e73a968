"""What an engine computes of reverse distillation."""

import torch
from torch import Tensor, nn

from detectors.engines.base import Compared, Comparison
from detectors.preprocess import Preprocess
from detectors.reverse_distillation.anomaly_map import distances
from detectors.reverse_distillation.network import ReverseDistillation


class ReverseDistillationComparison(Comparison):
    """From pixels to the cosine distance of teacher and student at three levels, N×h×w each."""

    def __init__(self, network: ReverseDistillation, preprocess: Preprocess) -> None:
        super().__init__()
        self.network: nn.Module = network
        self._preprocess = preprocess
        self._dtype = torch.float32

    def forward(self, pixels: Tensor) -> Compared:
        """Compare."""
        teacher, student = self.network(self._preprocess.normalise(pixels).to(self._dtype))
        return Compared(teacher, student, distances([e.float() for e in teacher], [d.float() for d in student]))

    def round_networks(self) -> "ReverseDistillationComparison":
        """Let teacher and student compute in bfloat16."""
        self.network.to(torch.bfloat16)
        self._dtype = torch.bfloat16
        return self
