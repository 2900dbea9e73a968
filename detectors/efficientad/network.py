"""EfficientAD's networks (supplement of the paper, tables 6 to 8): convolutions with a bias, no batch norms."""

from itertools import pairwise
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from detectors.preprocess import Preprocess
from detectors.teacher import IMAGENET_MEAN, IMAGENET_STD

FEATURES = 384
"""Channels of the teacher, of the autoencoder, and of each half of the student."""

PIXELS = 256
"""The only published size: the autoencoder's 8×8 convolution sees the whole picture only here."""

PREPROCESS = Preprocess(PIXELS, IMAGENET_MEAN, IMAGENET_STD)

Size = Literal["s", "m"]
SIZES: tuple[Size, ...] = get_args(Size)


class PDN(nn.Module):
    """Patch description network: each output describes the 33×33 pixels that it sees, at stride 4.

    N×3×256×256 normalised → N×`out_channels`×56×56, or ×64×64 with `padding`, which only the distillation uses. The
    layers' names are those of the public implementations, so that their weights fit.
    """

    def __init__(self, size: Size, out_channels: int = FEATURES, *, padding: bool = False) -> None:
        super().__init__()
        self.size = size
        wide, narrow = (256, 128) if size == "s" else (512, 256)
        pad = int(padding)
        self.pool = nn.AvgPool2d(2, 2, padding=pad)
        self.conv1 = nn.Conv2d(3, narrow, 4, padding=3 * pad)
        self.conv2 = nn.Conv2d(narrow, wide, 4, padding=3 * pad)
        if size == "s":
            self.conv3 = nn.Conv2d(wide, wide, 3, padding=pad)
            self.conv4 = nn.Conv2d(wide, out_channels, 4)
        else:
            self.conv3 = nn.Conv2d(wide, wide, 1)
            self.conv4 = nn.Conv2d(wide, wide, 3, padding=pad)
            self.conv5 = nn.Conv2d(wide, out_channels, 4)
            self.conv6 = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, channels: slice = slice(None)) -> Tensor:
        """Describe the patches; `channels` of the last layer alone, where the others would not be looked at."""
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = functional.relu(self.conv3(x))
        if self.size == "s":
            last = self.conv4
        else:
            x = functional.relu(self.conv4(x))
            x = functional.relu(self.conv5(x))
            last = self.conv6
        return functional.conv2d(x, last.weight[channels], None if last.bias is None else last.bias[channels])


class Autoencoder(nn.Module):
    """Through a code of 64 numbers, N×3×256×256 normalised → N×384×56×56."""

    SIDES = (3, 8, 15, 32, 63, 127)
    """To which the decoder enlarges before each of its 4×4 convolutions, which add one."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 64)
        strided = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths)]
        self.encoder = nn.ModuleList([*strided, nn.Conv2d(64, 64, 8)])
        growing = [nn.Conv2d(64, 64, 4, padding=2) for _ in self.SIDES]
        self.decoder = nn.ModuleList([*growing, nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, FEATURES, 3, padding=1)])
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Describe the picture as a good part would look."""
        *strided, code = self.encoder
        for conv in strided:
            x = functional.relu(conv(x))
        x = code(x)
        *growing, before_last, last = self.decoder
        for conv, side in zip(growing, self.SIDES, strict=True):
            x = self.dropout(functional.relu(conv(functional.interpolate(x, (side, side), mode="bilinear"))))
        x = functional.interpolate(x, (56, 56), mode="bilinear")
        return cast("Tensor", last(functional.relu(before_last(x))))


class EfficientAD(nn.Module):
    """Teacher, student and autoencoder, with what was measured on good parts.

    `mean` and `std` (384) are the teacher's per channel over the training images. `quantiles` (2×2) are q_a and q_b of
    the student-teacher map, then those of the autoencoder-student map, on held-out images.
    """

    mean: Tensor
    std: Tensor
    quantiles: Tensor

    def __init__(self, teacher: PDN) -> None:
        super().__init__()
        self.size = teacher.size
        self.teacher = PDN(teacher.size)
        self.teacher.load_state_dict(teacher.state_dict())
        self.teacher.requires_grad_(requires_grad=False)
        self.student = PDN(teacher.size, 2 * FEATURES)
        self.autoencoder = Autoencoder()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))
        self.register_buffer("quantiles", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))

    def train(self, mode: bool = True) -> "EfficientAD":  # noqa: FBT001, FBT002 -- nn.Module's signature
        """Keep the teacher in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def learned(self) -> dict[str, Tensor]:
        """Everything but the teacher's weights."""
        return {key: tensor for key, tensor in self.state_dict().items() if not key.startswith("teacher.")}

    @torch.no_grad()
    def taught(self, x: Tensor) -> Tensor:
        """What the teacher says, N×384×56×56, standardised."""
        return self.standardised(self.teacher(x))

    def standardised(self, told: Tensor) -> Tensor:
        """The teacher's raw output → each channel with mean 0 and variance 1 over the training images."""
        return (told - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """N×3×256×256 → normalised teacher N×384×56×56, student N×768×56×56, autoencoder N×384×56×56."""
        return self.taught(x), self.student(x), self.autoencoder(x)
