"""Good parts spoiled, to know something of what a faster engine sees of defects where no bad part is at hand."""

import cv2
import numpy as np

from detectors.base import Image


def spotted(image: Image, seed: int) -> Image:
    """A copy with one spot: an ellipse of one colour, by chance from black to white, in the middle half of the image.

    Its larger half axis is 2 to 6 % of the shorter side. The same seed gives the same spot.
    """
    rng = np.random.default_rng(seed)
    height, width = image.shape[:2]
    centre = (int(width * rng.uniform(0.25, 0.75)), int(height * rng.uniform(0.25, 0.75)))
    half_axis = max(1.0, min(height, width) * rng.uniform(0.02, 0.06))
    half_axes = (round(half_axis), max(1, round(half_axis * rng.uniform(0.4, 1))))
    colour = rng.integers(0, 256, 3).tolist()
    spoiled = image.copy()
    cv2.ellipse(spoiled, centre, half_axes, rng.uniform(0, 180), 0, 360, colour, cv2.FILLED, cv2.LINE_AA)
    return spoiled
