"""Where networks run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from detectors.base import ArtifactError, DeviceLostError


def choose(device: str, threads: int = 0) -> str:
    """Turn "auto", "cpu" or "cuda" into "cpu" or "cuda", and set the number of CPU threads unless it is 0.

    Raises:
        ArtifactError: a GPU is asked for and there is none.
    """
    if threads:
        torch.set_num_threads(threads)
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise ArtifactError('device "cuda" is asked for, but PyTorch sees no GPU; use "auto" or install the driver')
    return "cuda" if present and device != "cpu" else "cpu"


def engine(device: str) -> str:
    """What computes on a device: two engines may differ in a score's last digits, never in more."""
    return f"torch {torch.__version__} {device} float32"


@contextmanager
def watched() -> Iterator[None]:
    """Turn the failure of a GPU into `DeviceLostError`."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise DeviceLostError(f"the GPU failed: {error}") from error


def batch_size(device: str) -> int:
    """How many waiting frames are worth judging together: a CPU gains nothing from more than one."""
    return 8 if choose(device) == "cuda" else 1
