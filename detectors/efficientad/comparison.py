"""What an engine computes of EfficientAD and PUAD."""

import torch
from torch import Tensor

from detectors.efficientad.anomaly_map import combine, differences
from detectors.efficientad.network import PREPROCESS, EfficientAD
from detectors.efficientad.puad import Feature, pooled
from detectors.engines.base import Compared, Comparison


class EfficientADComparison(Comparison):
    """From pixels to the cells of the combined map, N×56×56; with a `feature` that of PUAD too, N×384."""

    def __init__(self, network: EfficientAD, feature: Feature | None) -> None:
        super().__init__()
        self.network = network
        self._feature = feature
        self._dtype = torch.float32

    def forward(self, pixels: Tensor) -> Compared:
        """Compare."""
        network, x = self.network, PREPROCESS.normalise(pixels).to(self._dtype)
        told, imitated, rebuilt = network.teacher(x), network.student(x), network.autoencoder(x)
        taught, student = network.standardised(told.float()), imitated.float()
        found = [combine(differences(taught, student, rebuilt.float()), network.quantiles)]
        if self._feature is not None:
            found.append(pooled(taught, student, self._feature))
        return Compared([told], [imitated, rebuilt], found)

    def round_networks(self) -> "EfficientADComparison":
        """Let teacher, student and autoencoder compute in bfloat16."""
        for part in (self.network.teacher, self.network.student, self.network.autoencoder):
            part.to(torch.bfloat16)
        self._dtype = torch.bfloat16
        return self
