"""Teachers' weights from files: whole or cut, safetensors or state dict, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from detectors.base import ArtifactError
from detectors.teacher import BACKBONES, Teacher, digest, import_torchvision, load_teacher


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """A ResNet-18 with its layer4 and classifier, as torchvision publishes them."""
    torch.manual_seed(2)
    state: dict[str, torch.Tensor] = import_torchvision().models.resnet18().state_dict()
    return state


def test_a_published_state_dict_and_its_cut_safetensors_are_the_same_teacher(
    whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(whole, tmp_path / "whole.pth")
    cut = {key: value for key, value in whole.items() if not key.startswith(("layer4", "fc"))}
    save_file(cut, tmp_path / "cut.safetensors")
    first = load_teacher("resnet18", tmp_path / "whole.pth")
    second = load_teacher("resnet18", tmp_path / "cut.safetensors")
    assert digest(first.backbone) == digest(second.backbone)
    assert torch.equal(first.backbone.state_dict()["conv1.weight"], whole["conv1.weight"])


def test_weights_of_another_network_are_refused(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(whole, tmp_path / "resnet18.pth")
    with pytest.raises(ArtifactError, match=r"does not hold the weights of wide_resnet50_2: \S+ is missing"):
        load_teacher("wide_resnet50_2", tmp_path / "resnet18.pth")
    torch.save({**whole, "conv1.weight": torch.zeros(3)}, tmp_path / "bent.pth")
    with pytest.raises(ArtifactError, match=r"conv1\.weight has another shape"):
        load_teacher("resnet18", tmp_path / "bent.pth")


class Foreign:
    """Something that only unpickling with code could bring back."""


@pytest.mark.parametrize("content", ["text", "object", "list", "torn"])
def test_a_file_that_holds_no_weights_is_refused(content: str, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    match content:
        case "text":
            path.write_text("hello")
        case "object":
            torch.save({"x": Foreign()}, path)
        case "list":
            torch.save([1, 2], path)
        case _:
            torch.save(whole, path)
            path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match=r"file\.pth"):
        load_teacher("resnet18", path)


def test_the_msra_network_halves_where_the_original_did() -> None:
    stages = Teacher("resnet50_msra").backbone
    plain = Teacher("resnet50").backbone
    strides = {
        name: (module.stride if isinstance(module, torch.nn.Conv2d) else None)
        for name, module in stages.named_modules()
        if name in {"layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2"}
    }
    assert list(strides.values()) == [(2, 2), (1, 1), (2, 2), (1, 1)]
    assert plain.get_submodule("layer2.0.conv2").stride == (2, 2)


def test_a_backbone_without_a_download_says_so() -> None:
    with pytest.raises(ArtifactError, match="give its file with --weights"):
        load_teacher("resnet50_msra")


def test_the_default_teacher_needs_nothing_but_the_package_index() -> None:
    teacher = load_teacher("efficientnet_lite0")
    features = teacher(torch.zeros(1, 3, 64, 64))
    assert tuple(f.shape[1] for f in features) == BACKBONES["efficientnet_lite0"].channels
    assert any(f.min() < 0 for f in features), "linear features, which the student must not rectify"
