"""The networks: bottleneck (OCBE), student and their assembly. Pure modules, no files.

Shapes are for a ResNet-50-like teacher at 256×256; E1 256×64×64, E2 512×32×32, E3 1024×16×16. Module names and
tensor order follow the public RD4AD code.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from detectors.teacher import BACKBONES, Backbone, Teacher

Skips = tuple[tuple[int, int], ...]
"""Which teacher feature is added to the input of which student stage: (3, 2) adds E3 to the input of D2's stage."""

PUBLISHED_SKIPS: Skips = ((3, 2), (2, 1))
"""SK-RD4AD as its code has it; `()` is RD4AD."""


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class Residual(nn.Module):
    """A ResNet block that halves (`scale` ½), keeps (1) or doubles (2) the resolution.

    `basic` has two convolutions, `bottleneck` three with a narrow middle. Halving is a stride of 2 in the 3×3
    convolution, doubling a transposed 2×2 convolution in its place; the shortcut changes likewise.
    """

    def __init__(self, kind: str, inputs: int, outputs: int, scale: float, base_width: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None
        if kind == "bottleneck":
            width = outputs // 4 * base_width // 64
            self.conv1: nn.Module = _conv(inputs, width, 1)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2, self.bn2 = _resampling(width, width, scale), nn.BatchNorm2d(width)
            self.conv3: nn.Module | None = _conv(width, outputs, 1)
            self.bn3 = nn.BatchNorm2d(outputs)
        else:
            self.conv1, self.bn1 = _resampling(inputs, outputs, scale), nn.BatchNorm2d(outputs)
            self.conv2, self.bn2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
            self.conv3 = None
        if scale < 1:
            self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride=2), nn.BatchNorm2d(outputs))
        elif scale > 1:
            self.upsample = nn.Sequential(
                nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """N×inputs×H×W → N×outputs×(H·scale)×(W·scale), not negative."""
        resampled = self.downsample or self.upsample
        shortcut = resampled(x) if resampled else x
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.conv3 is not None:
            x = self.bn3(self.conv3(self.relu(x)))
        out: Tensor = self.relu(x + shortcut)
        return out


def _resampling(inputs: int, outputs: int, scale: float) -> nn.Module:
    if scale > 1:
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False)
    return _conv(inputs, outputs, 3, stride=2 if scale < 1 else 1)


def _stage(backbone: Backbone, inputs: int, outputs: int, blocks: int, scale: float) -> nn.Sequential:
    kind, width = backbone.block, backbone.base_width
    first = Residual(kind, inputs, outputs, scale, width)
    return nn.Sequential(first, *(Residual(kind, outputs, outputs, 1, width) for _ in range(blocks - 1)))


class Bottleneck(nn.Module):
    """One-class bottleneck embedding: E1, E2, E3 fused at stride 16, then compressed to phi 2048×8×8.

    The public code's unused 1×1 convolution (`conv4`, 8.4 M parameters) is left out.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        c1, c2, c3 = backbone.channels
        self.relu = nn.ReLU(inplace=True)
        self.conv1, self.bn1 = _conv(c1, c2, 3, stride=2), nn.BatchNorm2d(c2)
        self.conv2, self.bn2 = _conv(c2, c3, 3, stride=2), nn.BatchNorm2d(c3)
        self.conv3, self.bn3 = _conv(c2, c3, 3, stride=2), nn.BatchNorm2d(c3)
        self.bn_layer = _stage(backbone, 3 * c3, code_width(backbone), backbone.depths[0], 0.5)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Three teacher features → phi."""
        e1, e2, e3 = features
        p1 = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(e1))))))
        p2 = self.relu(self.bn3(self.conv3(e2)))
        phi: Tensor = self.bn_layer(torch.cat([p1, p2, e3], dim=1))
        return phi


class Student(nn.Module):
    """The reversed decoder: phi → D3 1024×16×16 → D2 512×32×32 → D1 256×64×64.

    For a skip (k+1, k) the teacher's E of level k+1 is added to D of level k+1 before stage k; a level never sees
    its own E. The public code passes the sum through a ReLU, which does nothing to the sum of two rectified
    features; it is left out, so that teachers whose features are not rectified lose nothing either. For
    such a teacher each stage ends in a linear 1×1 convolution (`head1…3`).

    With `gate` > 0 each place of a skip is weighted by max(0, cos(D, E))^gate, the agreement there: where the student's
    own D, which comes through the bottleneck, differs from the teacher's E, the skip is shut, so that it cannot carry
    the anomaly past the bottleneck. At 0 it is open, as published.
    """

    def __init__(self, backbone: Backbone, skips: Skips, gate: float = 0) -> None:
        super().__init__()
        if any((source, target) not in PUBLISHED_SKIPS for source, target in skips) or len(set(skips)) < len(skips):
            raise ValueError(f"skips may be any of {PUBLISHED_SKIPS}, each once; not {skips}")
        self.skips = skips
        self.gate = gate
        c1, c2, c3 = backbone.channels
        w1, w2, w3 = student_widths(backbone)
        _, n3, n2, n1 = backbone.depths
        self.layer1 = _stage(backbone, code_width(backbone), w3, n3, 2)
        self.layer2 = _stage(backbone, c3, w2, n2, 2)
        self.layer3 = _stage(backbone, c2, w1, n1, 2)
        self.head3, self.head2, self.head1 = (
            nn.Identity() if backbone.rectified else nn.Conv2d(w, c, 1) for w, c in ((w3, c3), (w2, c2), (w1, c1))
        )

    def forward(self, phi: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Phi and the teacher's features (for the skips) → [D1, D2, D3], in the teacher's order."""
        _, e2, e3 = features
        d3 = self.head3(self.layer1(phi))
        d2 = self.head2(self.layer2(self._skip(d3, e3) if (3, 2) in self.skips else d3))
        d1 = self.head1(self.layer3(self._skip(d2, e2) if (2, 1) in self.skips else d2))
        return [d1, d2, d3]

    def _skip(self, d: Tensor, e: Tensor) -> Tensor:
        if not self.gate:
            return d + e
        agreement = functional.cosine_similarity(d, e, dim=1).clamp(min=0).unsqueeze(1)
        return d + agreement**self.gate * e


class Projection(nn.Module):
    """RD++'s projection of one level (CVPR 2023): C×h×w → C×h×w through C/2, C/4 and C/2 channels, no shortcut.

    Its instance norms take each image's own mean and contrast away.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [channels, channels // 2, channels // 4, channels // 2, channels]
        self.layers = nn.Sequential(
            *(
                layer
                for inputs, outputs in pairwise(widths)
                for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.InstanceNorm2d(outputs), nn.LeakyReLU())
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project one level."""
        out: Tensor = self.layers(x)
        return out


class ReverseDistillation(nn.Module):
    """Teacher, bottleneck and student together, and with `projected` RD++'s projections between the first two.

    Only `projections`, `bn` (the bottleneck) and `decoder` (the student) learn.
    """

    def __init__(self, teacher: Teacher, skips: Skips, *, gate: float = 0, projected: bool = False) -> None:
        super().__init__()
        backbone = BACKBONES[teacher.name]
        self.teacher = teacher
        self.bn = Bottleneck(backbone)
        self.decoder = Student(backbone, skips, gate)
        self.projections = nn.ModuleList(Projection(c) for c in backbone.channels if projected)
        _initialise(self.bn)
        _initialise(self.decoder)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """N×3×S×S normalised, S a multiple of 32 → teacher's and student's features, three each."""
        features = self.teacher(x)
        return features, self.reconstruct(features)

    def reconstruct(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Teacher's features → student's."""
        return self.decode(self.project(features), features)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Teacher's features → what the bottleneck sees: the same without projections."""
        if not self.projections:
            return list(features)
        return [project(e) for project, e in zip(self.projections, features, strict=True)]

    def decode(self, projected: Sequence[Tensor], features: Sequence[Tensor]) -> list[Tensor]:
        """What the bottleneck sees, and the teacher's features for the skips → student's features."""
        student: list[Tensor] = self.decoder(self.bn(projected), features)
        return student

    def learned(self) -> dict[str, Tensor]:
        """The state that training changes: parameters and running statistics of all but the teacher."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("teacher.")}


def code_width(backbone: Backbone) -> int:
    """Channels of phi: 2048 for bottleneck blocks, 512 for basic ones."""
    return 2048 if backbone.block == "bottleneck" else 512


def student_widths(backbone: Backbone) -> tuple[int, int, int]:
    """Channels inside the student's stages: the teacher's own, or ResNet-18's where a head follows."""
    return backbone.channels if backbone.rectified else (64, 128, 256)


def _initialise(module: nn.Module) -> None:
    """As published: Kaiming normal (fan out) for convolutions; transposed ones keep PyTorch's default."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
