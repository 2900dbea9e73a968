"""PUAD's addition to EfficientAD (Sugawara & Imamura, ICIP 2024, arXiv 2402.15143): anomalies that no map can show."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from detectors.base import ArtifactError, Image
from detectors.efficientad.anomaly_map import align, combine, differences
from detectors.efficientad.mahalanobis import Mahalanobis
from detectors.efficientad.network import FEATURES, PREPROCESS, EfficientAD

Feature = Literal["student", "teacher"]

LEAST_HELD = 5
"""Fewer held-out parts have no scale to speak of: of one the deviation is 0, of two the two scores may cancel."""


@dataclass(frozen=True, slots=True)
class Puad:
    """Judges the mean of a picture's feature, and adds this to the map.

    `feature` is that of the student's half that imitates the teacher (published), or the teacher's own. `scales` (2×2)
    are mean and std of EfficientAD's score and of the distance, on held-out good parts. `weight` multiplies the
    distance: 1 is published, 0 leaves EfficientAD's ranking.
    """

    distance: Mahalanobis
    scales: Tensor
    feature: Feature = "student"
    weight: float = 1.0

    def lift(self, maps: Tensor, feature: Tensor) -> Tensor:
        """Maps N×256×256 of EfficientAD → the same in standard deviations, each raised by the distance of its `pooled`.

        The whole map is raised evenly: its maximum is PUAD's score, the sum of both standardised scores, and its
        shape still shows where EfficientAD sees an anomaly.
        """
        (mean, std), (far_mean, far_std) = self.scales.tolist()
        far = self.distance.distance(feature)
        raised = self.weight * (far - far_mean) / far_std
        lifted: Tensor = (maps - mean) / std + raised.to(maps)[:, None, None]
        return lifted


def pooled(taught: Tensor, student: Tensor, feature: Feature) -> Tensor:
    """Outputs of `EfficientAD` → N×384, the mean over the grid."""
    return (student[:, :FEATURES] if feature == "student" else taught).mean((2, 3))


@torch.inference_mode()
def fit_puad(
    network: EfficientAD,
    images: Iterable[Image],
    held: Iterable[Image],
    *,
    feature: Feature = "student",
    weight: float = 1.0,
) -> Puad:
    """Measure good parts with a trained network: the distance on `images`, the scales on `held`.

    `images` are those it was trained on, `held` those it was not. Where held-out scores do not vary, those of `images`
    tell the std.

    Raises:
        ArtifactError: fewer than two images, or fewer than five held out.
    """
    network.eval()
    scores, features = _measure(network, images, feature)
    held_scores, held_features = _measure(network, held, feature)
    if len(scores) < 2 or len(held_scores) < LEAST_HELD:  # noqa: PLR2004 -- a covariance needs two
        raise ArtifactError(
            f"PUAD needs at least 2 good parts and {LEAST_HELD} held out, "
            f"there are {len(scores)} and {len(held_scores)}"
        )
    distance = Mahalanobis.fit(features)
    scales = [
        _scale(held_scores, scores),
        _scale(distance.distance(held_features), distance.distance(features)),
    ]
    return Puad(distance, torch.tensor(scales, dtype=torch.float64), feature, weight)


def _measure(network: EfficientAD, images: Iterable[Image], feature: Feature) -> tuple[Tensor, Tensor]:
    scores, features = [torch.empty(0)], [torch.empty(0, FEATURES)]
    for image in images:
        x = PREPROCESS.normalise(PREPROCESS.resize([image]).to(network.mean.device))
        taught, student, autoencoder = network(x)
        maps = align(combine(differences(taught, student, autoencoder), network.quantiles))
        scores.append(maps.amax((1, 2)).cpu())
        features.append(pooled(taught, student, feature).cpu())
    return torch.cat(scores).double(), torch.cat(features)


def _scale(held: Tensor, learned: Tensor) -> tuple[float, float]:
    """Mean and population std."""
    stds = [float(scores.std(correction=0)) for scores in (held, learned)]
    return float(held.mean()), next((std for std in stds if std > 1e-9 * (1 + float(held.mean().abs()))), 1.0)
