"""A calibration as a JSON file beside its model, a proposal for another, and those that were in force before."""

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from calibration.calibration import Appearance, Calibration, CalibrationError, Provenance, content, fit, named, promise
from calibration.tail import Tail
from calibration.threshold import Method

SCHEMA = "inspectd.calibration/2"
_BINS = 16


def save(calibration: Calibration, path: Path) -> None:
    """Write the file so that after a crash or a power cut either the old one or the new one is there, whole.

    Raises:
        OSError: The folder is missing, full or read-only; the file that was there is untouched.
    """
    write_whole(path, (json.dumps(_document(calibration), indent=1, allow_nan=False) + "\n").encode())


def load(path: Path, model: str, regions: str = "", framing: str | None = "") -> Calibration:
    """Read the calibration of one model, judged within certain regions of images that were framed in a certain way.

    The threshold is chosen again from the stored scores and must come out the same, and so must the id: what
    was edited by hand is refused rather than trusted.

    Raises:
        CalibrationError: The file is missing, torn, of an unknown version, edited, or made for another model, for
            other masks and region rules, or under another framing; with None for `framing`, any will do.
    """
    calibration = read(path)
    require(calibration, model, regions, framing, path)
    return calibration


def require(calibration: Calibration, model: str, regions: str, framing: str | None, path: Path) -> None:
    """See that a calibration, read from `path`, is one of this model, these regions and this framing (None: any).

    Raises:
        CalibrationError: It was made for another model, for other masks and region rules, or under another framing.
    """
    made = calibration.provenance
    if made.model != model:
        raise CalibrationError(f"{path}: made for another model: {made.model}, not {model}; run `inspectd calibrate`")
    if made.regions != regions:
        raise CalibrationError(
            f"{path}: made with other masks or region rules ({made.regions or 'none'}, not {regions or 'none'}); "
            "run `inspectd calibrate --config FILE --station NAME`"
        )
    if framing is not None and made.framing != framing:
        raise CalibrationError(
            f"{path}: made of images framed otherwise ({made.framing or 'not at all'}, now {framing or 'not at all'}); "
            "run `inspectd calibrate --config FILE --station NAME`"
        )


def read(path: Path) -> Calibration:
    """Read a calibration, of whatever model.

    Raises:
        CalibrationError: As `load`, but for the model and the regions.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CalibrationError(f"{path}: there is no calibration; run `inspectd calibrate`") from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CalibrationError(f"{path}: torn or not JSON: {error}; run `inspectd calibrate`") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise CalibrationError(
            f"{path}: version {schema!r} is unknown, {SCHEMA!r} is read here; run `inspectd calibrate`"
        )
    return _rebuild(document, path)


def propose(calibration: Calibration, path: Path) -> Path:
    """Lay a calibration beside the one in force, where `accept` finds it; return its path.

    Raises:
        OSError: As `save`.
    """
    save(calibration, proposal(path))
    return proposal(path)


def proposal(path: Path) -> Path:
    """Where the proposal for a calibration lies."""
    return path.with_suffix(".proposed.json")


def proposed(path: Path, calibration_id: str) -> Calibration:
    """Read the proposal of this id.

    Raises:
        CalibrationError: There is no proposal, it is another one, or it cannot be trusted.
    """
    file = proposal(path)
    if not file.exists():
        raise CalibrationError(f"{file}: there is no proposal; run `inspectd calibrate` with the reviewed good parts")
    calibration = read(file)
    if calibration.id != calibration_id:
        raise CalibrationError(f"{file}: the proposal is {calibration.id}, not {calibration_id}; read its card first")
    return calibration


def accept(path: Path, calibration_id: str) -> Calibration:
    """Put the proposal of this id in force; the calibration that was is kept in the history.

    Raises:
        CalibrationError: As `proposed`.
        OSError: As `save`; whatever happens, one of the two is in force.
    """
    calibration = proposed(path, calibration_id)
    install(calibration, path)
    proposal(path).unlink()
    return calibration


def history(path: Path) -> list[Calibration]:
    """All calibrations that have been in force, the first one first, without those that cannot be trusted."""
    return [one for file in _kept(path) if (one := _trusted(file))]


def earlier(path: Path, calibration_id: str | None = None) -> Calibration:
    """Find what to return to: the calibration of an id, or the last one that was in force before the present one.

    Raises:
        CalibrationError: There is no such calibration.
    """
    known = history(path)
    ids = [one.id for one in known]
    present = _trusted(path)
    if calibration_id is None:
        before = known[: ids.index(present.id)] if present and present.id in ids else known
        found = before[-1] if before else None
    else:
        found = next((one for one in known if one.id == calibration_id), None)
    if found is None:
        which = f" {calibration_id}" if calibration_id else ""
        raise CalibrationError(f"{path}: no earlier calibration{which}; known: {', '.join(ids) or 'none'}")
    return found


def write_whole(path: Path, content: bytes, *, lasting: bool = True) -> None:
    """Write a file so that after a crash or a power cut either the old one or the new one is there, whole.

    Args:
        path: The file.
        content: All that will be in it.
        lasting: The new one is there for good; otherwise only once its folder is synchronised, for many in one folder.

    Raises:
        OSError: The folder is missing, full or read-only; the file that was there is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if lasting:
        synchronise(path.parent)


def synchronise(folder: Path) -> None:
    """Have the names of a folder's files on the platter.

    Raises:
        OSError: The folder is missing, or its disk fails.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def install(calibration: Calibration, path: Path) -> None:
    """Put a calibration in force. It and the one that was are in the history, each once; no kill loses either.

    Raises:
        OSError: As `save`; whatever happens, one of the two is in force.
    """
    for one in (_trusted(path), calibration):
        kept = _kept(path)
        if one and one.id not in {file.stem[7:] for file in kept}:
            archive = _archive(path)
            archive.mkdir(exist_ok=True)
            save(one, archive / f"{int(kept[-1].name[:6]) + 1 if kept else 1:06}-{one.id}.json")
    save(calibration, path)


def _archive(path: Path) -> Path:
    return path.with_suffix(".history")


def _kept(path: Path) -> list[Path]:
    """The files of the history, in the order in which they came into force; what else lies there is left alone."""
    return sorted(file for file in _archive(path).glob("*.json") if re.fullmatch(r"\d{6}-[0-9a-f]{12}", file.stem))


def _trusted(path: Path) -> Calibration | None:
    try:
        return read(path)
    except CalibrationError:
        return None


def _rebuild(document: dict[str, Any], path: Path) -> Calibration:
    """Fit again from the stored scores, and refuse whatever does not come out as it is stored."""
    try:
        made = document["provenance"]
        looks = document["appearance"]
        tail = document["tail"]
        fitted = fit(
            document["scores"],
            alpha=document["alpha"],
            confidence=document["confidence"],
            method=None if document["asked"] is None else Method(document["asked"]),
            groups=[f"{number:09}" for number in document["groups"]],
            images=document["images"],
            fail_alpha=document["fail_alpha"],
            provenance=Provenance(**made | {"made_at": datetime.fromisoformat(made["made_at"])}),
            appearance=looks and Appearance({k: tuple(v) for k, v in looks["canaries"].items()}, looks["thumbnail"]),
        )
        refitted = json.loads(json.dumps(_document(fitted)))
        both = document.keys() & refitted
        keys = document.keys() ^ refitted | {key for key in both if not _agree(document[key], refitted[key])}
        # The last digit of a fitted number may depend on the machine, and the id with it; the file's own are kept.
        kept = named(
            replace(
                fitted,
                threshold=document["threshold"],
                fail_threshold=document["fail_threshold"],
                tail=tail and Tail(**tail),
            )
        )
    except KeyError as error:
        raise CalibrationError(f"{path}: edited: {error} is missing; run `inspectd calibrate`") from error
    except (CalibrationError, AttributeError, OverflowError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path}: edited: {error}; run `inspectd calibrate`") from error
    keys = keys - {"id"} or ({"id"} if kept.id != document.get("id") else set())
    if keys:
        raise CalibrationError(f"{path}: edited: {', '.join(sorted(keys))} not as calibrated; run `inspectd calibrate`")
    return kept


def _agree(stored: Any, fitted: Any) -> bool:
    """Whether two JSON values are the same, floats but for the last digits."""
    if type(stored) is not type(fitted):
        return False
    if isinstance(fitted, dict):
        return stored.keys() == fitted.keys() and all(_agree(stored[key], fitted[key]) for key in fitted)
    if isinstance(fitted, float):
        return math.isclose(stored, fitted, rel_tol=1e-9)
    if isinstance(fitted, list):
        return len(stored) == len(fitted) and all(map(_agree, stored, fitted))
    return bool(stored == fitted)


def _document(calibration: Calibration) -> dict[str, Any]:
    return {"schema": SCHEMA, "id": calibration.id, "card": _card(calibration), **content(calibration)}


def _card(calibration: Calibration) -> dict[str, Any]:
    """What follows from the rest, for readers without this program; it must come out the same when it is loaded."""
    counts, edges = np.histogram(calibration.scores, bins=_BINS)
    return {
        "promise": promise(calibration),
        "alpha_carried": calibration.alpha_carried,
        "expected_false_rejects": calibration.expected_false_rejects,
        "false_reject_interval": list(calibration.false_reject_interval),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
