"""What every engine takes and gives."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from detectors.base import ArtifactError


class EngineName(StrEnum):
    """Engines as options and folders call them, with the precision of their arithmetic; the reference comes first.

    `mixed` rounds the teacher to bf16 and the rest to int8: the map compares two networks, and the one that is
    compared with should stay exact.
    """

    torch = "torch"
    openvino_fp32 = "openvino-fp32"
    openvino_bf16 = "openvino-bf16"
    openvino_mixed = "openvino-mixed"
    openvino_int8 = "openvino-int8"
    onnxruntime_fp32 = "onnxruntime-fp32"
    compiled_fp32 = "compiled-fp32"
    compiled_bf16 = "compiled-bf16"
    cudagraph_bf16 = "cudagraph-bf16"


class Engine(Protocol):
    """Runs one model's comparison. Called from one thread at a time.

    `label` says what computes: a key, then library, version and device. Where keys are equal, scores are equal but for
    their last digits.
    """

    @property
    def label(self) -> str:
        """The key, library, version and device."""

    @property
    def device(self) -> torch.device:
        """Where the found tensors are."""

    def __call__(self, pixels: Tensor) -> Sequence[Tensor]:
        """N×3×S×S uint8 on the CPU → what the comparison finds, float32. It holds until the next call.

        Raises:
            DeviceLostError: the GPU does not answer any more.
        """


class Compared(NamedTuple):
    """Features of teacher and student, and what was found: small float32 tensors N×…, of which the map is drawn."""

    teacher: Sequence[Tensor]
    student: Sequence[Tensor]
    found: Sequence[Tensor]


class Comparison(nn.Module):
    """Teacher and student of a model, from pixels to how much they differ.

    What is found is computed in float32 whatever the precision of the networks.
    """

    def forward(self, pixels: Tensor) -> Compared:
        """N×3×S×S uint8 → what the teacher says, what is compared with it, and what was found."""
        raise NotImplementedError

    def round_networks(self) -> "Comparison":
        """Let the networks compute in bfloat16 from here on, and what compares them still in float32."""
        raise NotImplementedError


REFERENCE = EngineName.torch.value
"""The key of the engine that every other one is compared with."""

Start = Callable[[Callable[[], Comparison]], Engine]
"""Starts an engine; is given what loads the networks, which an exported engine does not need."""


def key(label: str) -> str:
    """What of an engine's label must be equal for a calibration to hold: its name, and of an export the digest.

    A calibration that does not say was made by the reference.
    """
    return label.partition(" ")[0] or REFERENCE


def name_of(key: str) -> EngineName:
    """Which engine a key is of.

    Raises:
        ArtifactError: none that this version knows.
    """
    try:
        return EngineName(key.partition("/")[0])
    except ValueError:
        raise ArtifactError(f"no engine is called {key}; choose one of {', '.join(EngineName)}") from None
