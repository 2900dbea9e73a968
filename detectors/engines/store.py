"""Exported engines in a model folder: engines/NAME/DIGEST/, the files of a runtime and a sealed record.

An export is written beside its place and then takes it by renaming, so that it is there whole or not at all. Several
exports lie side by side, so that a calibration finds the one that it was made with.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from detectors.artifact import Manifest, describe, sealed, write_json
from detectors.base import ArtifactError
from detectors.engines.base import EngineName

SCHEMA = "inspectd.engine/1"
ENGINES, RECORD = "engines", "engine.json"


def write(model: Path, manifest: Manifest, name: EngineName, fill: Callable[[Path], Mapping[str, str]]) -> str:
    """Put an export into a model folder, and give its key.

    Args:
        model: the model folder.
        manifest: of the model.
        name: which engine.
        fill: writes the runtime's files into an empty folder, and gives the versions of what made them.
    """
    new = model / ENGINES / f".{name}.part"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    versions = fill(new)
    files = {path.name: describe(path) for path in sorted(new.iterdir())}
    record = {"schema": SCHEMA, "engine": name, "model": manifest.fingerprint, "versions": versions, "files": files}
    write_json(new / RECORD, sealed(record))
    key = f"{name}/{hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]}"
    place = model / ENGINES / key
    discard(model, key)
    place.parent.mkdir(exist_ok=True)
    new.rename(place)
    return key


def discard(model: Path, key: str) -> None:
    """Take an export away, if it is there."""
    folder = model / ENGINES / key
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # others are left
        folder.parent.rmdir()


def find(model: Path, manifest: Manifest, key: str) -> Path:
    """The folder of an export that is whole and of this model.

    Raises:
        ArtifactError: there is none; the message says why and what to do.
    """
    folder = model / ENGINES / key
    cure = f"restore it, or run `inspectd export --model {model} --engine {key.partition('/')[0]}`"
    try:
        record = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{model} holds no engine {key}; {cure}") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / RECORD} cannot be read: {error}; {cure}") from error
    if not isinstance(record, dict) or record != sealed(record) or record.get("schema") != SCHEMA:
        raise ArtifactError(f"{folder / RECORD} has been edited, or another version wrote it; {cure}")
    if record["model"] != manifest.fingerprint:
        raise ArtifactError(f"{folder} was exported from another model than lies in {model}; {cure}")
    for file, described in record["files"].items():
        if not (folder / file).is_file() or describe(folder / file) != described:
            raise ArtifactError(f"{folder / file} is missing, cut off or changed (its SHA-256 differs); {cure}")
    return folder


def require(model: Path, manifest: Manifest, key: str) -> None:
    """See that an engine is there, if it is one that is exported.

    Raises:
        ArtifactError: as `find`.
    """
    if "/" in key:
        find(model, manifest, key)


def exports(model: Path) -> list[str]:
    """The keys of all exports in a model folder, the newest of each engine last."""
    records = (model / ENGINES).glob(f"*/*/{RECORD}")
    return [
        f"{path.parent.parent.name}/{path.parent.name}" for path in sorted(records, key=lambda r: r.stat().st_mtime)
    ]
