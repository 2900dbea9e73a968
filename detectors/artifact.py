"""The model folder: tensors as safetensors, everything else in one JSON manifest. Nothing in it can run.

manifest.json         what the detector is, what it learned from, and the SHA-256 and size of each file
teacher.safetensors   (for example) named tensors
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detectors.base import ArtifactError

SCHEMA = "inspectd.model/1"
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of a model.

    `settings` decide how images become scores; `training` tells how it came about and decides nothing. `files` maps
    each file's name to its SHA-256 and size in bytes.
    """

    detector: str
    settings: dict[str, Any]
    training: dict[str, Any]
    files: dict[str, dict[str, Any]]
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides a score: detector, settings and weights."""
        decisive = {"detector": self.detector, "settings": self.settings, "files": self.files}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def save(
    folder: Path,
    detector: str,
    settings: dict[str, Any],
    training: dict[str, Any],
    files: Mapping[str, dict[str, Tensor]],
) -> Manifest:
    """Write a model folder; the manifest comes last, so that a torn write is no model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    described = {}
    for name, tensors in files.items():
        path = folder / name
        write_tensors(path, tensors)
        described[name] = describe(path)
    versions = {"inspectd": version("inspectd"), "torch": torch.__version__, "python": platform.python_version()}
    manifest = Manifest(detector, settings, training, described, versions)
    write_json(folder / MANIFEST, sealed({"schema": SCHEMA, **asdict(manifest)}))
    return manifest


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest with its own SHA-256, by which a later edit is noticed."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {**content, "sha256": digest}


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its SHA-256 and its size in bytes."""
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest alone; cheap.

    Raises:
        ArtifactError: the folder holds no model of this schema.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        hint = "; its training was interrupted: run the same `inspectd train` again" if _begun(folder) else ""
        raise ArtifactError(f"{folder} is no model folder: it has no {MANIFEST}{hint}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; train the model again or restore the file") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} is not of the form {SCHEMA}; it was written by another program or version")
    if content != sealed(content):
        raise ArtifactError(f"{path} has been edited since training (its SHA-256 differs); restore the file")
    return Manifest(**{key: value for key, value in content.items() if key not in ("schema", "sha256")})


def load_tensors(folder: Path, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """Read one file of tensors after comparing it with the manifest.

    Raises:
        ArtifactError: missing, truncated or edited; the message says which.
    """
    path = folder / name
    expected = manifest.files.get(name)
    if expected is None:
        raise ArtifactError(f"{folder / MANIFEST} names no file {name}; the model was made by another detector")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; copy the whole model folder again")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ArtifactError(
            f"{path} has {size} bytes instead of {expected['bytes']}: it is truncated or another model's; "
            "copy the model folder again"
        )
    if _sha256(path) != expected["sha256"]:
        raise ArtifactError(
            f"{path} has been changed since training (its SHA-256 differs); copy the model folder again"
        )
    return read_tensors(path)


@contextmanager
def usable(folder: Path, manifest: Manifest) -> Iterator[None]:
    """Say of whatever fails while a detector is built from a model folder that the folder is to blame.

    Raises:
        ArtifactError: settings or tensors that are missing or do not belong together.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{folder} holds no usable {manifest.detector}: {error!s:.300}; train it again") from error


def load_learned(network: nn.Module, folder: Path, manifest: Manifest, name: str) -> None:
    """Fill a network, all but the part called `teacher`, with a file of tensors.

    Raises:
        ArtifactError: as `load_tensors`, or the tensors are another network's.
    """
    missing, unexpected = network.load_state_dict(load_tensors(folder, manifest, name), strict=False)
    if unexpected or any(not key.startswith("teacher.") for key in missing):
        raise ArtifactError(f"{folder / name} holds another network than {MANIFEST} says; train it again")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        ArtifactError: not a whole safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a whole safetensors file: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    part = path.with_name(path.name + ".part")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, part, dict(metadata or {}))
    part.chmod(0o644)  # safetensors lets only its writer read; the daemon runs as another user
    _replace(part, path)


def write_json(path: Path, content: object) -> None:
    """Write JSON whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    _replace(part, path)


def _replace(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _begun(folder: Path) -> bool:
    return any(folder.glob("checkpoint*"))
