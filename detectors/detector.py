"""A trained model of any family, run by any engine."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detectors.base import Image, Prediction
from detectors.devices import watched
from detectors.engines.base import Engine
from detectors.preprocess import Preprocess


class NetworkDetector:
    """Satisfies `detectors.base.Detector`. The score of an image is its map's maximum.

    `draw` makes maps N×H×W, float32, of what the engine found. It is the same code whatever the engine, so that engines
    differ in the networks' arithmetic alone.
    """

    def __init__(
        self, preprocess: Preprocess, engine: Engine, draw: Callable[[Sequence[Tensor]], Tensor], fingerprint: str
    ) -> None:
        self._preprocess = preprocess
        self._engine = engine
        self._draw = draw
        self.fingerprint = fingerprint
        self.engine = engine.label

    @torch.inference_mode()
    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        """Compare all images together.

        Raises:
            DeviceLostError: the GPU does not answer any more.
        """
        if not images:
            return []
        with watched():
            maps = self._draw(self._engine(self._preprocess.resize(images)))
            scores, arrays = maps.amax((1, 2)).tolist(), maps.cpu().numpy()
        return [Prediction(score, array) for score, array in zip(scores, arrays, strict=True)]
