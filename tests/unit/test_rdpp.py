"""RD++ against its published layers, noise and losses."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from detectors.reverse_distillation.network import Projection, ReverseDistillation
from detectors.reverse_distillation.simplex import simplex_field, simplex_patches
from detectors.reverse_distillation.training import RECIPES, ProjectedLearner, projection_loss
from detectors.teacher import Teacher, preprocess_for


@pytest.mark.parametrize(("channels", "count"), [(256, 737_856), (512, 2_950_272), (1024, 11_798_784)])
def test_a_projection_has_the_published_parameters_and_keeps_its_shape(channels: int, count: int) -> None:
    with torch.device("meta"):
        projection = Projection(channels)
        assert projection(torch.empty(2, channels, 16, 16)).shape == (2, channels, 16, 16)
    assert sum(p.numel() for p in projection.parameters()) == count


def test_a_projection_treats_each_image_by_itself_in_training_and_in_use() -> None:
    torch.manual_seed(0)
    projection = Projection(16)
    x = torch.randn(3, 16, 8, 8)
    together = projection.train()(x)
    torch.testing.assert_close(together[1:2], projection.eval()(x[1:2]))


def small_network() -> ReverseDistillation:
    torch.manual_seed(3)
    return ReverseDistillation(Teacher("resnet18"), (), projected=True)


def test_the_bottleneck_sees_projections_and_the_student_is_compared_with_raw_features() -> None:
    network = small_network().eval()
    with torch.inference_mode():
        raw, student = network(torch.rand(1, 3, 64, 64))
        projected = [layer(e) for layer, e in zip(network.projections, raw, strict=True)]
        expected = network.decoder(network.bn(projected), raw)
    assert all(torch.equal(a, b) for a, b in zip(student, expected, strict=True))
    assert not torch.equal(projected[0], raw[0])


def test_one_step_moves_projections_bottleneck_and_student_and_leaves_the_teacher() -> None:
    network = small_network().train()
    learner = ProjectedLearner(network, preprocess_for("resnet18", 64), RECIPES["rdpp"])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    loss = learner.step(torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8), 0, np.random.default_rng(0))
    assert 0 < loss < 4
    moved = {
        key.partition(".")[0] for key, value in network.state_dict().items() if not torch.equal(value, before[key])
    }
    assert moved == {"projections", "bn", "decoder"}
    assert [group["lr"] for adam in learner.optimisers for group in adam.param_groups] == [1e-3, 5e-3]


def levels(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, c, s, s, generator=generator) for c, s in ((4, 8), (6, 4), (8, 2))]


def test_the_projections_losses_are_those_published() -> None:
    noisy, p, q = levels(1), levels(2), levels(3)
    p = [a + e for a, e in zip(p, noisy, strict=True)]  # so alike that the margin of the contrast is passed
    reconstruction = sum(
        float((1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()) for a, b in zip(p, q, strict=True)
    )
    contrast = sum(
        float(functional.cosine_embedding_loss(e.flatten(1), a.flatten(1), -torch.ones(3), margin=0.5))
        for e, a in zip(noisy, p, strict=True)
    )
    assert contrast > 0
    found = projection_loss(noisy, p, q, transport=False)
    assert found.item() == pytest.approx((0.01 * reconstruction + 0.1 * contrast) / 1.11, abs=1e-6)


def test_the_published_transport_loss_adds_nothing() -> None:
    noisy, p, q = levels(1), levels(2), levels(3)
    p = [a.requires_grad_() for a in p]
    plain, transported = (projection_loss(noisy, p, q, transport=t) for t in (False, True))
    assert transported.item() == pytest.approx(plain.item(), abs=1e-6)
    gradients = [torch.autograd.grad(value, p[0], retain_graph=True)[0] for value in (plain, transported)]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [64, 256])
def test_the_noise_is_one_rectangle_an_image_of_the_published_size_and_strength(side: int) -> None:
    images = torch.full((40, 3, side, side), 0.5)
    changed = (simplex_patches(images, np.random.default_rng(1)) - images).abs()
    scale = side / 256
    for image in changed:
        rows, columns = (np.flatnonzero(image.sum(0).sum(axis).numpy()) for axis in (1, 0))
        for found in (rows, columns):
            assert round(10 * scale) - 1 <= np.ptp(found) + 1 <= round(31 * scale)
            assert found[0] >= 1
            assert found[-1] < side
    assert 0 < changed.max() <= 0.2 * sum(0.6**i for i in range(6))


def test_every_patch_shows_the_same_texture() -> None:
    patched = simplex_patches(torch.zeros(6, 3, 64, 64), np.random.default_rng(4))
    corners = {
        tuple(image[:, rows[0] : rows[0] + 2, columns[0] : columns[0] + 2].flatten().tolist())
        for image in patched
        for rows, columns in [np.nonzero(image.abs().sum(0).numpy())]
    }
    assert len(corners) == 1


def test_the_noise_has_six_octaves_and_neighbouring_channels_are_alike() -> None:
    field = simplex_field(256)
    assert field.shape == (3, 31, 31)
    near, far = np.abs(field[0] - field[1]).mean(), np.abs(field[0] - np.roll(field[0], 15, axis=1)).mean()
    assert near < far


def test_the_noise_follows_its_generator() -> None:
    images = torch.rand(2, 3, 64, 64)
    first, second, third = (simplex_patches(images, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
