"""The spot that stands in for a defect."""

import numpy as np
import pytest

from daemon.desk.spoiling import spotted


@pytest.mark.parametrize("shape", [(64, 64, 3), (1024, 1280, 3), (40, 900, 3)])
def test_one_small_spot_in_the_middle_half_is_painted_on_a_copy(shape: tuple[int, int, int]) -> None:
    image = np.full(shape, 128, np.uint8)
    for seed in range(20):
        rows, columns = np.nonzero((spotted(image, seed) != image).any(axis=2))
        assert 0 < len(rows) < 0.02 * image.size / 3
        reach = 0.06 * min(shape[:2]) + 2
        for places, length in ((rows, shape[0]), (columns, shape[1])):
            assert 0.25 * length - reach <= places.min() <= places.max() <= 0.75 * length + reach
            assert np.ptp(places) <= 2 * reach
    assert (image == 128).all()


def test_the_same_seed_gives_the_same_spot_and_another_one_another() -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    assert np.array_equal(spotted(image, 1), spotted(image, 1))
    assert not np.array_equal(spotted(image, 1), spotted(image, 2))
