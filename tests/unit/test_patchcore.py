"""PatchCore: what the bank keeps, what a distance is, and a model folder that gives the same scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional

from detectors import artifact
from detectors.base import ArtifactError, Image
from detectors.engines.pytorch import Eager
from detectors.engines.start import reference
from detectors.patchcore import BANK, Description, bank_size, coreset, describe, load, run_by, save
from detectors.preprocess import Preprocess
from detectors.teacher import CENTRED, Teacher

PREPROCESS = Preprocess(64, CENTRED, CENTRED)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher("efficientnet_lite0")


def image(seed: int) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def cloud(rows: int, centre: float, seed: int = 0) -> Tensor:
    return centre + torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, 20))).float()


def keep(patches: Sequence[Tensor], count: int, seed: int = 0) -> tuple[Tensor, list[tuple[int, float]]]:
    heard: list[tuple[int, float]] = []
    return coreset(patches, count, seed, lambda kept, distance: heard.append((kept, distance))), heard


@given(st.integers(0, 1000))
def test_two_patches_are_enough_for_two_clusters_however_few_belong_to_one(seed: int) -> None:
    bank, _ = keep([cloud(300, 0), cloud(2, 50)], 2, seed)
    assert sorted((bank.mean(dim=1) > 25).tolist()) == [False, True]


def test_what_is_kept_was_there_once_each_and_what_is_heard_only_shrinks() -> None:
    patches = cloud(80, 0)
    bank, heard = keep([patches[:50], patches[50:]], 30)
    assert (len(set(torch.cdist(bank, patches).argmin(dim=1).tolist())), len(bank)) == (30, 30)
    assert torch.isin(bank, patches).all()
    assert [kept for kept, _ in heard] == list(range(2, 31))
    distances = [distance for _, distance in heard]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] > 0


def test_the_bank_covers_better_than_one_kept_by_chance() -> None:
    patches = cloud(2000, 0) ** 3  # a few are far away
    bank, _ = keep([patches], 100)
    assert torch.cdist(patches, bank).amin(dim=1).max() < 0.7 * torch.cdist(patches, patches[:100]).amin(dim=1).max()


def test_the_seed_decides_what_is_kept_and_nothing_else_does() -> None:
    patches = [cloud(100, 0)]
    first, _ = keep(patches, 10, seed=3)
    torch.manual_seed(99)
    assert torch.equal(first, keep(patches, 10, seed=3)[0])
    assert not torch.equal(first, keep(patches, 10, seed=4)[0])


def test_patches_that_are_all_alike_do_no_harm() -> None:
    bank, heard = keep([torch.ones(9, 20)], 3)
    assert torch.equal(bank, torch.ones(3, 20))
    assert heard[-1] == (3, 0)


def test_the_bank_is_a_tenth_and_never_too_large_to_search() -> None:
    assert bank_size(1, 64) == 6
    assert bank_size(90, 256) == 9216
    assert bank_size(5000, 512) == 10_000


def test_a_patch_is_the_mean_of_its_neighbours_at_two_levels(teacher: Teacher) -> None:
    _, e2, e3 = teacher(PREPROCESS.normalise(PREPROCESS.resize([image(1)])))
    patches = describe(image(1), teacher, PREPROCESS)
    assert patches.shape == (64, 40 + 112)
    torch.testing.assert_close(patches[2 * 8 + 5, :40], e2[0, :, 1:4, 4:7].mean(dim=(1, 2)))
    corners = patches[[0, 7, 56, 63], 40:]  # upsampling leaves them as they are
    means = [e3[0, :, y : y + 2, x : x + 2].sum(dim=(1, 2)) / 9 for y in (0, 2) for x in (0, 2)]
    torch.testing.assert_close(corners, torch.stack(means))


def test_an_image_whose_patches_are_all_in_the_bank_has_score_0_and_any_other_more(teacher: Teacher) -> None:
    bank = describe(image(1), teacher, PREPROCESS)
    known, other = run_by(Eager(Description(teacher, PREPROCESS)), bank, PREPROCESS, "").predict([image(1), image(2)])
    assert known.anomaly_score < 1e-4  # described together with another, its last digits differ
    assert other.anomaly_score > 0


def test_the_map_is_the_distance_to_the_nearest_patch_upsampled_and_smoothed(teacher: Teacher) -> None:
    bank = describe(image(1), teacher, PREPROCESS)[::5]
    (found,) = run_by(Eager(Description(teacher, PREPROCESS)), bank, PREPROCESS, "").predict([image(2)])
    patches = describe(image(2), teacher, PREPROCESS).double()
    nearest = (patches[:, None] - bank.double()).square().sum(dim=2).sqrt().amin(dim=1)
    fine = functional.interpolate(nearest.view(1, 1, 8, 8), scale_factor=8, mode="bilinear")[0, 0]
    np.testing.assert_allclose(found.anomaly_map, gaussian_filter(fine.numpy(), 4), rtol=1e-4)


def test_the_map_is_hottest_in_the_quarter_where_the_part_was_spoiled(teacher: Teacher) -> None:
    good = np.full((64, 64, 3), 120, np.uint8)
    spoiled = good.copy()
    spoiled[40:56, 8:24] = image(3)[:16, :16]
    bank = describe(good, teacher, PREPROCESS)
    (found,) = run_by(Eager(Description(teacher, PREPROCESS)), bank, PREPROCESS, "").predict([spoiled])
    row, column = divmod(int(found.anomaly_map.argmax()), 64)
    assert (row >= 32, column < 32) == (True, True)


@pytest.fixture
def model(teacher: Teacher, tmp_path: Path) -> Path:
    save(tmp_path, teacher, describe(image(1), teacher, PREPROCESS)[::5], PREPROCESS, {})
    return tmp_path


def test_a_saved_model_gives_the_same_maps_and_needs_nothing_else(teacher: Teacher, model: Path) -> None:
    manifest = artifact.read_manifest(model)
    loaded = load(model, manifest, reference)
    bank = describe(image(1), teacher, PREPROCESS)[::5]
    images = [image(2), image(3)]
    before = run_by(Eager(Description(teacher, PREPROCESS)), bank, PREPROCESS, "").predict(images)
    for one, other in zip(before, loaded.predict(images), strict=True):
        assert np.array_equal(one.anomaly_map, other.anomaly_map)
    assert manifest.detector == "patchcore"
    assert loaded.fingerprint == manifest.fingerprint


def test_another_bank_is_another_fingerprint(teacher: Teacher, model: Path) -> None:
    before = artifact.read_manifest(model).fingerprint
    save(model, teacher, describe(image(2), teacher, PREPROCESS), PREPROCESS, {})
    assert artifact.read_manifest(model).fingerprint != before


def test_a_torn_bank_is_refused(model: Path) -> None:
    (model / BANK).write_bytes((model / BANK).read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"bank\.safetensors has .* bytes instead of .*: it is truncated"):
        load(model, artifact.read_manifest(model), reference)


@pytest.mark.parametrize("wrong", [{"backbone": "resnet18"}, {"size": 70}, {"mean": None}])
def test_a_model_whose_settings_do_not_fit_is_refused(model: Path, wrong: dict[str, object]) -> None:
    right = artifact.read_manifest(model)
    files = {name: artifact.load_tensors(model, right, name) for name in right.files}
    manifest = artifact.save(model, right.detector, right.settings | wrong, {}, files)
    with pytest.raises(ArtifactError, match=r"holds no usable patchcore: [\s\S]*; train it again"):
        load(model, manifest, reference)
