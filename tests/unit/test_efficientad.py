"""EfficientAD: the published networks, losses and scales; training that can be interrupted; files to be trusted."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from detectors import artifact
from detectors.base import ArtifactError, Image
from detectors.efficientad.anomaly_map import align, combine, quantiles
from detectors.efficientad.colour import grey, jitter
from detectors.efficientad.comparison import EfficientADComparison
from detectors.efficientad.detector import STUDENT, TEACHER, load, load_network, run_by, save
from detectors.efficientad.network import PDN, PREPROCESS, Autoencoder, EfficientAD, Size
from detectors.efficientad.teacher import load_pdn
from detectors.efficientad.training import Recipe, hard_loss, train
from detectors.engines.pytorch import Eager
from detectors.engines.start import reference
from detectors.training import CHECKPOINT, Progress

SEQUENTIAL: dict[Size, tuple[int, ...]] = {"s": (0, 3, 6, 8), "m": (0, 3, 6, 8, 10, 12)}
RECIPE = Recipe(steps=3)


def images(count: int, seed: int = 0) -> list[Image]:
    """Coloured squares, so that neighbouring pixels have something in common."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (8, 9, 3), dtype=np.uint8).repeat(30, 0).repeat(30, 1) for _ in range(count)]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def learn(folder: Path, teacher: PDN, report: Callable[[Progress], None] = lambda _: None) -> EfficientAD:
    return train(
        images(2),
        teacher,
        RECIPE,
        penalty=images(2, seed=1),
        held=images(1, seed=2),
        folder=folder,
        identity={"data": "squares"},
        device="cpu",
        report=report,
    )


@dataclass(frozen=True)
class Trained:
    """A hardly trained network, its teacher before, its training as interrupted in the last step, and what was seen."""

    network: EfficientAD
    teacher: PDN
    interrupted: Path
    inputs: list[Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    whole, interrupted = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("interrupted")
    torch.manual_seed(0)
    teacher = PDN("s")
    inputs: list[Tensor] = []

    def watch(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, PDN | Autoencoder):
            inputs.append(given[0].clone())

    hook = register_module_forward_pre_hook(watch)

    def keep(progress: Progress) -> None:
        if progress.step == RECIPE.steps:
            copy(whole / CHECKPOINT, interrupted)

    network = learn(whole, teacher, keep)
    hook.remove()
    return Trained(network, teacher, interrupted, inputs)


@pytest.fixture(scope="module")
def saved(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(folder, trained.network, {"seed": 0})
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """The model in a folder that a test may spoil."""
    for path in saved.iterdir():
        copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("size", "teacher", "student", "total"),
    [("s", 2_694_144, 4_267_392, 8_057_856), ("m", 8_026_624, 11_615_488, 20_738_432)],
)
def test_the_networks_have_as_many_parameters_as_published(size: Size, teacher: int, student: int, total: int) -> None:
    network = EfficientAD(PDN(size))
    parts = (network.teacher, network.student, network.autoencoder, network)
    assert [count(part) for part in parts] == [teacher, student, 1_096_320, total]


@pytest.mark.parametrize(("size", "padding", "side"), [("s", False, 56), ("s", True, 64), ("m", False, 56)])
@torch.inference_mode()
def test_a_pdn_describes_a_picture_on_the_published_grid(size: Size, padding: bool, side: int) -> None:  # noqa: FBT001 -- a parameter of the test
    assert PDN(size, 8, padding=padding)(torch.zeros(1, 3, 256, 256)).shape == (1, 8, side, side)


@torch.inference_mode()
def test_the_autoencoder_takes_the_published_steps() -> None:
    network, sides = Autoencoder(), []
    for conv in (*network.encoder, *network.decoder):
        conv.register_forward_hook(lambda *call: sides.append(call[2].shape[-1]))
    assert network(torch.zeros(1, 3, 256, 256)).shape == (1, 384, 56, 56)
    assert sides == [128, 64, 32, 16, 8, 1, 4, 9, 16, 33, 64, 128, 56, 56]


@pytest.mark.parametrize("size", ["s", "m"])
def test_some_channels_alone_are_what_they_are_among_all(size: Size) -> None:
    network, x = PDN(size, 8), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(network(x, slice(5, None)), network(x)[:, 5:])


@pytest.mark.parametrize("size", ["s", "m"])
def test_an_anomaly_is_shown_in_the_middle_of_what_its_cell_sees(size: Size) -> None:
    network = PDN(size, 1)
    for parameter in network.parameters():
        parameter.data.abs_()  # so that no ReLU hides a pixel
    x = torch.ones(1, 3, 64, 64, requires_grad=True)
    network(x)[0, 0, 2, 5].backward()
    assert x.grad is not None
    rows, columns = (x.grad[0].sum((0, axis)).nonzero().flatten().tolist() for axis in (2, 1))
    assert rows == list(range(8, 41))
    assert columns == list(range(20, 53))
    cells = torch.zeros(1, 56, 56)
    cells[0, 2, 5] = 1
    assert divmod(int(align(cells).argmax()), 256) == ((8 + 40) // 2, (20 + 52) // 2)


def test_aligning_keeps_the_maximum_and_the_size() -> None:
    cells = torch.randn(20, 56, 56, generator=torch.Generator().manual_seed(0))
    maps = align(cells)
    assert maps.shape == (20, 256, 256)
    assert torch.equal(maps[:, 16:237:4, 16:237:4], cells)
    torch.testing.assert_close(maps.amax((1, 2)), cells.amax((1, 2)))


def test_the_hard_loss_is_the_mean_from_the_quantile_up_in_each_picture_apart() -> None:
    taught = (
        torch.randn(2, 384, 56, 56, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 5.0])[:, None, None, None]
    )
    found = hard_loss(taught, torch.zeros_like(taught))
    expected = []
    for squares in taught.square().flatten(1).numpy().astype(np.float64):
        hard = squares[squares >= np.quantile(squares, 0.999)]
        assert len(hard) == 1205
        expected.append(hard.mean())
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_lower_quantile_becomes_0_and_the_upper_a_tenth() -> None:
    found = (
        torch.rand(5, 2, 56, 56, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 70.0])[:, None, None]
    )
    measured = quantiles(found)
    for number in range(2):
        low, high = np.quantile(found[:, number].numpy(), (0.9, 0.995))
        assert measured[number].tolist() == pytest.approx([low, high])
    for number, wanted in enumerate((0.0, 0.1)):
        constant = measured[:, number][None, :, None, None].expand(1, 2, 56, 56)
        torch.testing.assert_close(combine(constant, measured), torch.full((1, 56, 56), wanted))


def test_maps_without_any_variation_give_finite_scores() -> None:
    for value in (0.0, 2.5):
        found = torch.full((1, 2, 56, 56), value)
        assert combine(found, quantiles(found)).isfinite().all()


def test_a_picture_without_colour_is_equal_in_all_channels_and_as_bright() -> None:
    pixels = torch.from_numpy(images(1)[0]).permute(2, 0, 1)[None]
    colourless = grey(pixels)
    assert colourless.shape == pixels.shape
    assert (colourless == colourless[:, :1]).all()
    assert float(luma(colourless.float()).mean()) == pytest.approx(float(luma(pixels.float()).mean()), abs=0.5)


def test_brightness_contrast_or_saturation_changes_by_a_fifth_at_most() -> None:
    pixels = torch.from_numpy(images(1)[0] // 4 + 90).permute(2, 0, 1)[None].float() / 255
    mean = luma(pixels).mean()
    kinds = set()
    for seed in range(40):
        changed = jitter(pixels, np.random.default_rng(seed))
        if torch.allclose(luma(changed), luma(pixels), atol=1e-4):
            kind, factors = "saturation", (changed - luma(pixels)) / (pixels - luma(pixels))
        elif torch.allclose(luma(changed).mean(), mean, atol=1e-4):
            kind, factors = "contrast", (changed - mean) / (pixels - mean)
        else:
            kind, factors = "brightness", changed / pixels
        factor = factors.median()
        assert 0.8 <= factor <= 1.2
        assert ((factors - factor).abs() < 1e-2).float().mean() > 0.99  # where nothing is divided by almost nothing
        kinds.add(kind)
    assert kinds == {"brightness", "contrast", "saturation"}
    extreme = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)
    assert all(jitter(extreme, np.random.default_rng(s)).min() >= 0 for s in range(20))
    assert all(jitter(extreme, np.random.default_rng(s)).max() <= 1 for s in range(20))


def luma(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def test_training_leaves_the_teacher_as_it_was_and_in_eval_mode(trained: Trained) -> None:
    network = trained.network
    for key, tensor in trained.teacher.state_dict().items():
        assert torch.equal(network.teacher.state_dict()[key], tensor)
    assert not network.train().teacher.training
    assert network.student.training
    network.eval()


def test_every_picture_is_seen_normalised_the_augmented_ones_too(trained: Trained) -> None:
    black, white = (PREPROCESS.normalise(torch.full((1, 3, 1, 1), v, dtype=torch.uint8)) for v in (0, 255))
    assert len(trained.inputs) > RECIPE.steps
    for given in trained.inputs:
        assert (given >= black - 1e-5).all()
        assert (given <= white + 1e-5).all()
        assert given.std() > 0.5


def test_the_teacher_is_standardised_over_the_training_images(trained: Trained) -> None:
    said = trained.network.taught(PREPROCESS.normalise(PREPROCESS.resize(images(2))))
    torch.testing.assert_close(said.mean((0, 2, 3)), torch.zeros(384), atol=1e-3, rtol=0)
    torch.testing.assert_close(said.std((0, 2, 3), correction=0), torch.ones(384), atol=1e-3, rtol=0)


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(trained: Trained) -> None:
    seen: list[int] = []
    resumed = learn(trained.interrupted, trained.teacher, lambda p: seen.append(p.step)).learned()
    assert seen == [2, 3]
    whole = trained.network.learned()
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())


def test_a_training_without_good_parts_held_out_is_refused_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="hold out at least 1"):
        train(
            images(2),
            PDN("s"),
            RECIPE,
            penalty=None,
            held=[],
            folder=tmp_path,
            identity={},
            device="cpu",
            report=lambda _: None,
        )


def test_a_saved_model_predicts_what_it_predicted_before(trained: Trained, saved: Path) -> None:
    manifest = artifact.read_manifest(saved)
    assert manifest.detector == "efficientad_s"
    batch = images(1, seed=3)
    before = run_by(Eager(EfficientADComparison(trained.network, None)), None, "").predict(batch)
    after = load(saved, manifest, reference)
    assert after.fingerprint == manifest.fingerprint
    for one, other in zip(before, after.predict(batch), strict=True):
        assert one.anomaly_map.shape == (256, 256)
        assert np.array_equal(one.anomaly_map, other.anomaly_map)
        assert one.anomaly_score == one.anomaly_map.max()
    assert after.predict([]) == []


def test_the_networks_alone_can_be_loaded_of_this_detector_only(trained: Trained, model: Path) -> None:
    network = load_network(model, "cpu")
    assert not network.training
    assert all(torch.equal(value, trained.network.state_dict()[key]) for key, value in network.state_dict().items())
    artifact.save(model, "rd4ad", {}, {}, {})
    with pytest.raises(ArtifactError, match="a model of rd4ad, not of efficientad_s"):
        load_network(model, "cpu")


def refused(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load(folder, artifact.read_manifest(folder), reference)
    return str(caught.value)


@pytest.mark.parametrize("name", [TEACHER, STUDENT])
def test_a_truncated_file_is_refused(model: Path, name: str) -> None:
    path = model / name
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refused(model)


@pytest.mark.parametrize(("setting", "value"), [("pdn", "m"), ("pdn", "xl"), ("size", 512), ("padding", True)])
def test_a_manifest_that_does_not_fit_its_weights_is_refused(model: Path, setting: str, value: object) -> None:
    content = json.loads((model / "manifest.json").read_text())
    content["settings"][setting] = value
    (model / "manifest.json").write_text(json.dumps(artifact.sealed(content)))
    assert "train it again" in refused(model)


def test_a_student_of_another_shape_is_refused(model: Path) -> None:
    manifest = artifact.read_manifest(model)
    tensors = artifact.load_tensors(model, manifest, STUDENT)
    del tensors["quantiles"]
    teacher = artifact.load_tensors(model, manifest, TEACHER)
    artifact.save(model, manifest.detector, manifest.settings, {}, {TEACHER: teacher, STUDENT: tensors})
    assert "holds another network" in refused(model)


@pytest.mark.parametrize("size", ["s", "m"])
@pytest.mark.parametrize("layout", ["ours", "sequential", "named", "folder"])
def test_a_published_teacher_is_read_whatever_its_keys_are(tmp_path: Path, size: Size, layout: str) -> None:
    pdn = PDN(size)
    state = pdn.state_dict()
    if layout == "ours":
        path = tmp_path / "teacher.safetensors"
        save_file(state, path)
    elif layout == "folder":
        path = tmp_path
        torch.save(state, tmp_path / "teacher.pt")
        for name in ("mu.pt", "sigma.pt"):
            torch.save(torch.ones(384), tmp_path / name)
    else:
        path = tmp_path / "teacher.pth"
        if layout == "sequential":
            state = {f"{SEQUENTIAL[size][int(key[4]) - 1]}{key[5:]}": tensor for key, tensor in state.items()}
        torch.save(state, path)
    found = load_pdn(path)
    assert found.size == size
    assert not found.training
    assert all(torch.equal(value, pdn.state_dict()[key]) for key, value in found.state_dict().items())


def spoiled() -> dict[str, tuple[Callable[[dict[str, Tensor]], object], str]]:
    wide = torch.zeros(100, 256, 4, 4)
    return {
        "a layer less": (lambda s: {k: t for k, t in s.items() if "conv3" not in k}, "conv3.* is missing"),
        "another net": (lambda s: s | {"fc.weight": wide}, "fc.weight is odd"),
        "another width": (lambda s: s | {"conv4.weight": wide}, "conv4.weight has shape 100×256×4×4 instead of 384×"),
        "no tensors": (lambda _: {"conv1.weight": "here"}, "no named tensors"),
        "nothing": (lambda _: {}, "is missing"),
        "a whole module": (lambda _: PDN("s"), "not a readable weights file"),
    }


@pytest.mark.parametrize("kind", sorted(spoiled()))
def test_what_is_no_teacher_is_refused_with_its_reason(tmp_path: Path, kind: str) -> None:
    change, reason = spoiled()[kind]
    path = tmp_path / "teacher.pth"
    torch.save(change(PDN("s").state_dict()), path)
    with pytest.raises(ArtifactError, match=reason):
        load_pdn(path)


def test_a_missing_and_a_torn_teacher_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such weights file.*teacher\.pt"):
        load_pdn(tmp_path)
    path = tmp_path / "teacher.pth"
    torch.save(PDN("s").state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="not a readable weights file"):
        load_pdn(path)


class Trap:
    """Touches a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        """Name what an unpickler is to call."""
        return Path.touch, (self.path,)


def test_nothing_in_a_teachers_file_is_run(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Trap(tmp_path / "sprung")}, tmp_path / "teacher.pth")
    with pytest.raises(ArtifactError, match="not a readable weights file"):
        load_pdn(tmp_path / "teacher.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_another_teacher_is_not_continued(trained: Trained) -> None:
    with pytest.raises(ArtifactError, match=r"another training.*teacher_sha256"):
        learn(trained.interrupted, PDN("s"))
