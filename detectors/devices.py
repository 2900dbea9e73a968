"""Where networks run."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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


def leave_cores() -> None:
    """Let PyTorch use one thread, where another engine runs the networks: its pool would spin beside that one's.

    Holds for threads that are started from now on, and for this one.
    """
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU says of itself. `used_bytes` is of all programs; `celsius` is None where nobody knows."""

    used_bytes: int
    size_bytes: int
    celsius: int | None


def gpu() -> Gpu | None:
    """The GPU that this process uses, None where it uses none or that one is lost. Any thread may ask."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call] # to ask one would take hold of it
        return None
    celsius = None
    with suppress(Exception):  # the package may be missing, and not every GPU knows
        celsius = torch.cuda.temperature()
    try:
        free, size = torch.cuda.mem_get_info()
    except RuntimeError:
        return None
    return Gpu(size - free, size, celsius)


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


def describe() -> str | None:
    """Take hold of the GPU on which models would run, for `gpu` to be asked; its name and driver, None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.init()  # type: ignore[no-untyped-call] # torch's
    try:
        driver = re.search(r"  (\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        driver = None
    return f"{torch.cuda.get_device_name()}, driver {driver[1] if driver else 'unknown'}"
