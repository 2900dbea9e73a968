"""The Mahalanobis distance of a feature from those of good parts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mahalanobis:
    """A mean (D) and the lower Cholesky factor (D×D) of a covariance, in float64 on the CPU."""

    mean: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, features: Tensor) -> "Mahalanobis":
        """Features N×D of good parts; N may be smaller than D, for the covariance is shrunk (Ledoit & Wolf, 2004)."""
        from sklearn.covariance import LedoitWolf

        known = features.double().cpu()
        covariance = torch.from_numpy(LedoitWolf().fit(known.numpy()).covariance_)
        # A channel that never varied would leave no factor where much data asked for no shrinking.
        covariance.diagonal().add_(1e-9 * covariance.diagonal().mean() + 1e-12)
        return cls(known.mean(0), torch.linalg.cholesky(covariance))

    def distance(self, features: Tensor) -> Tensor:
        """N×D → N, in standard deviations, float64 on the CPU."""
        off = (features.double().cpu() - self.mean).T
        white: Tensor = torch.linalg.solve_triangular(self.factor, off, upper=False)
        return white.square().sum(0).sqrt()
