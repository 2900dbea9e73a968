"""The one resize, against Pillow."""

import numpy as np
import pytest
from PIL import Image as Pillow

from detectors.preprocess import Preprocess

PREPROCESS = Preprocess(64, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("shape", [(64, 64), (37, 201), (256, 256), (320, 320), (500, 31), (1024, 768), (1, 1)])
def test_the_resize_is_pillows_within_two_grey_levels_even_on_noise(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = np.asarray(Pillow.fromarray(image).resize((64, 64), Pillow.Resampling.BILINEAR))
    (found,) = PREPROCESS.resize([image]).permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 2


def test_images_of_different_sizes_share_a_batch_in_their_order() -> None:
    images = [np.full((n, 2 * n, 3), n, np.uint8) for n in (10, 90, 200)]
    assert [int(x[0, 0, 0]) for x in PREPROCESS.resize(images)] == [10, 90, 200]
    assert PREPROCESS.resize([]).shape == (0, 3, 64, 64)


def test_an_image_viewed_through_strides_is_read_as_it_looks() -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mirrored = PREPROCESS.resize([image[:, ::-1]])[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(mirrored, image[:, ::-1])


def test_channels_are_normalised_by_their_own_mean_and_deviation() -> None:
    pixels = PREPROCESS.resize([np.full((64, 64, 3), 255, np.uint8)])
    found = PREPROCESS.normalise(pixels)[0, :, 0, 0].tolist()
    assert found == pytest.approx([(1 - 0.5) / 0.2, (1 - 0.4) / 0.3, (1 - 0.3) / 0.4])
