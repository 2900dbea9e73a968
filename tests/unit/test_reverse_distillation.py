"""The networks against the published layers and counts, the map against scipy, the loss against its definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional

from detectors.base import ArtifactError
from detectors.reverse_distillation.anomaly_map import AnomalyMap, distances
from detectors.reverse_distillation.detector import load_published
from detectors.reverse_distillation.network import PUBLISHED_SKIPS, ReverseDistillation, Skips, Student
from detectors.reverse_distillation.training import loss
from detectors.teacher import BACKBONES, Teacher


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("backbone", "teacher", "bottleneck", "student"),
    [
        # Counted in the public code; the bottleneck without its unused convolution.
        ("wide_resnet50_2", 24_862_528, 58_885_120, 24_917_504),
        ("resnet50", 8_543_296, 30_829_568, 15_821_824),
        ("resnet50_msra", 8_543_296, 30_829_568, 15_821_824),
        ("resnet34", 8_170_304, 16_400_640, 5_770_624),
        ("resnet18", 2_782_784, 11_680_000, 3_703_168),
    ],
)
def test_parameter_counts_are_the_published_ones(backbone: str, teacher: int, bottleneck: int, student: int) -> None:
    with torch.device("meta"):
        network = ReverseDistillation(Teacher(backbone), PUBLISHED_SKIPS)
    assert (count(network.teacher), count(network.bn), count(network.decoder)) == (teacher, bottleneck, student)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("skips", [(), PUBLISHED_SKIPS])
def test_the_student_reproduces_the_shapes_of_its_teacher(backbone: str, skips: tuple[tuple[int, int], ...]) -> None:
    with torch.device("meta"):
        network = ReverseDistillation(Teacher(backbone), skips)
        teacher, student = network(torch.empty(2, 3, 256, 256))
        phi = network.bn(teacher)
    assert [e.shape for e in teacher] == [d.shape for d in student]
    assert [e.shape[2] for e in teacher] == [64, 32, 16]
    assert tuple(e.shape[1] for e in teacher) == BACKBONES[backbone].channels
    assert phi.shape[2:] == (8, 8)


def small_network(skips: tuple[tuple[int, int], ...]) -> ReverseDistillation:
    torch.manual_seed(3)
    return ReverseDistillation(Teacher("resnet18"), skips).eval()


def test_skips_add_the_coarser_teacher_feature_to_the_next_stage_and_nothing_else() -> None:
    network = small_network(PUBLISHED_SKIPS)
    with torch.inference_mode():
        features = network.teacher(torch.rand(1, 3, 64, 64))
        phi = network.bn(features)
        d1, d2, d3 = network.decoder(phi, features)
        _, e2, e3 = features
        decoder: Student = network.decoder
        # As published, with the ReLU that the public code applies to each sum.
        assert torch.equal(d3, decoder.layer1(phi))
        assert torch.equal(d2, decoder.layer2(torch.relu(d3 + e3)))
        assert torch.equal(d1, decoder.layer3(torch.relu(d2 + e2)))


def test_a_gated_skip_is_open_where_student_and_teacher_agree_and_shut_where_they_do_not() -> None:
    torch.manual_seed(3)
    decoder = ReverseDistillation(Teacher("resnet18"), PUBLISHED_SKIPS, gate=4).eval().decoder
    d = torch.rand(1, 8, 2, 2)
    e = 3 * d
    e[..., 0, 1] = -d[..., 0, 1]  # opposite
    e[:, :, 1, 0] = torch.randn(1, 8)  # in between
    found = decoder._skip(d, e)  # noqa: SLF001 -- the rule itself
    torch.testing.assert_close(found[..., 0, 0], 4 * d[..., 0, 0])
    assert torch.equal(found[..., 0, 1], d[..., 0, 1])
    cosine = functional.cosine_similarity(d[..., 1, 0], e[..., 1, 0]).clamp(min=0)
    torch.testing.assert_close(found[..., 1, 0], d[..., 1, 0] + cosine**4 * e[..., 1, 0])


def test_a_gate_adds_no_parameters_and_without_one_the_skips_are_the_published_ones() -> None:
    torch.manual_seed(3)
    gated = ReverseDistillation(Teacher("resnet18"), PUBLISHED_SKIPS, gate=4).eval()
    plain = small_network(PUBLISHED_SKIPS)
    assert gated.state_dict().keys() == plain.state_dict().keys()
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        before = gated(x)[1]
        after = plain(x)[1]
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_without_skips_the_student_sees_only_the_bottleneck() -> None:
    network = small_network(())
    with torch.inference_mode():
        features = network.teacher(torch.rand(1, 3, 64, 64))
        phi = network.bn(features)
        other = [torch.rand_like(f) for f in features]
        for mine, theirs in zip(network.decoder(phi, features), network.decoder(phi, other), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("skips", [((1, 1),), ((2, 2),), ((1, 2),), ((3, 2), (3, 2))])
def test_a_skip_that_would_show_the_student_its_answer_is_refused(skips: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="skips"):
        Student(BACKBONES["resnet18"], skips)


def test_the_teacher_never_changes_even_in_train_mode() -> None:
    network = small_network(PUBLISHED_SKIPS)
    before = {key: value.clone() for key, value in network.teacher.state_dict().items()}
    network.train()
    teacher, student = network(torch.rand(4, 3, 64, 64))
    loss(teacher, student, consistency=0.005).backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    assert all(torch.equal(value, before[key]) for key, value in network.teacher.state_dict().items())
    assert all(p.grad is None for p in network.teacher.parameters())
    assert all(p.grad is not None for p in network.bn.parameters())


def features(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, s, s, generator=generator) for c, s in ((4, 64), (6, 32), (8, 16))]


def test_the_map_equals_upsampling_summing_and_scipys_gaussian() -> None:
    teacher, student = features(1), features(2)
    total = sum(
        functional.interpolate(
            1 - functional.cosine_similarity(e, d, dim=1)[:, None], 256, mode="bilinear", align_corners=True
        )[:, 0]
        for e, d in zip(teacher, student, strict=True)
    )
    assert isinstance(total, Tensor)
    expected = np.stack([gaussian_filter(m, sigma=4) for m in total.double().numpy()])
    found = AnomalyMap(256, [64, 32, 16])(distances(teacher, student))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_the_map_is_zero_where_student_and_teacher_agree() -> None:
    same = features(1)
    assert AnomalyMap(256, [64, 32, 16])(distances(same, [2 * f for f in same])).abs().max() < 1e-5


def test_the_loss_flattens_each_level_and_ties_its_scale() -> None:
    teacher, student = features(1), features(2)
    cosine = sum(
        float(1 - (e[i] * d[i]).sum() / (e[i].norm() * d[i].norm()))
        for e, d in zip(teacher, student, strict=True)
        for i in range(2)
    )
    assert loss(teacher, student, consistency=0.0).item() == pytest.approx(cosine / 2, abs=1e-5)
    doubled = [2 * d for d in student]
    assert loss(teacher, doubled, consistency=0.0).item() == pytest.approx(cosine / 2, abs=1e-5)
    assert loss(teacher, doubled, consistency=0.1).item() > loss(teacher, student, consistency=0.1).item()


def published(path: Path, network: ReverseDistillation, **parts: object) -> Path:
    """Write a checkpoint as the public code does, unused convolution included."""
    bottleneck = network.bn.state_dict() | {
        "conv4.weight": torch.zeros(512, 1024, 1, 1),
        "bn4.weight": torch.ones(512),
        "bn4.bias": torch.zeros(512),
        "bn4.running_mean": torch.zeros(512),
        "bn4.running_var": torch.ones(512),
        "bn4.num_batches_tracked": torch.tensor(0),
    }
    torch.save({"bn": bottleneck, "decoder": network.decoder.state_dict()} | parts, path)
    return path


@pytest.mark.parametrize("skips", [(), PUBLISHED_SKIPS])
def test_a_checkpoint_of_the_public_code_gives_its_maps(tmp_path: Path, skips: Skips) -> None:
    original = small_network(skips)
    torch.manual_seed(99)
    network = ReverseDistillation(original.teacher, skips).eval()
    load_published(published(tmp_path / "wres18_screw.pth", original), network)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(network(x)[1], original(x)[1], strict=True))


def test_our_names_are_those_of_the_public_code() -> None:
    with torch.device("meta"):
        network = ReverseDistillation(Teacher("wide_resnet50_2"), PUBLISHED_SKIPS)
    bottleneck, decoder = network.bn.state_dict(), network.decoder.state_dict()
    assert {key.partition(".")[0] for key in bottleneck} == {
        *(f"{n}{i}" for n in ("conv", "bn") for i in (1, 2, 3)),
        "bn_layer",
    }
    assert {key.partition(".")[0] for key in decoder} == {"layer1", "layer2", "layer3"}
    assert bottleneck["bn_layer.0.downsample.0.weight"].shape == (2048, 3072, 1, 1)
    assert decoder["layer1.0.upsample.0.weight"].shape == (2048, 1024, 2, 2)
    assert decoder["layer1.0.conv2.weight"].shape == (512, 512, 2, 2)
    assert [len({k.split(".")[1] for k in decoder if k.startswith(f"layer{i}.")}) for i in (1, 2, 3)] == [3, 4, 6]


def test_a_checkpoint_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    network = small_network(())
    half = tmp_path / "half.pth"
    torch.save({"decoder": network.decoder.state_dict()}, half)
    with pytest.raises(ArtifactError, match=r"no state dict 'bn', only 'decoder'.*--seg 1"):
        load_published(half, network)
    other = ReverseDistillation(Teacher("resnet34"), ())
    with pytest.raises(ArtifactError, match="does not fit resnet18"):
        load_published(published(tmp_path / "r34.pth", other), network)
    with pytest.raises(ArtifactError, match="no such weights file"):
        load_published(tmp_path / "none.pth", network)


def test_a_checkpoint_that_carries_code_is_refused(tmp_path: Path) -> None:
    path = published(tmp_path / "evil.pth", small_network(()), extra=nn.Linear(1, 1))
    with pytest.raises(ArtifactError, match="not a readable weights file"):
        load_published(path, small_network(()))
