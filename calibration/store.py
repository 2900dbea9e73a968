"""A calibration as a JSON file beside its model."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from calibration.calibration import Calibration, CalibrationError, content, fit

SCHEMA = "inspectd.calibration/1"


def save(calibration: Calibration, path: Path) -> None:
    """Write the file so that after a crash or a power cut either the old one or the new one is there, whole.

    Raises:
        OSError: The folder is missing, full or read-only; the file that was there is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(_document(calibration), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, detector_fingerprint: str) -> Calibration:
    """Read the calibration of one model.

    The threshold is chosen again from the stored scores and must come out the same, and so must the id: what
    was edited by hand is refused rather than trusted.

    Raises:
        CalibrationError: The file is missing, torn, of an unknown version, edited, or made for another model.
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
        raise CalibrationError(f"{path}: version {schema!r} is unknown, {SCHEMA!r} is read here")
    calibration = _rebuild(document, path)
    if calibration.detector_fingerprint != detector_fingerprint:
        raise CalibrationError(
            f"{path}: made for another model: {calibration.detector_fingerprint}, not {detector_fingerprint};"
            " run `inspectd calibrate`"
        )
    return calibration


def _rebuild(document: dict[str, Any], path: Path) -> Calibration:
    """Fit again from the stored scores, and refuse whatever does not come out as it is stored."""
    try:
        calibration = fit(
            document["scores"],
            alpha=document["alpha"],
            detector_fingerprint=document["detector_fingerprint"],
            data_sha256=document["data_sha256"],
            made_at=datetime.fromisoformat(document["made_at"]),
        )
    except KeyError as error:
        raise CalibrationError(f"{path}: edited: {error} is missing; run `inspectd calibrate`") from error
    except (CalibrationError, OverflowError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path}: edited: {error}; run `inspectd calibrate`") from error
    fitted = _document(calibration)
    if document != fitted:
        keys = sorted(key for key in document.keys() | fitted if document.get(key) != fitted.get(key))
        raise CalibrationError(f"{path}: edited: {', '.join(keys)} not as calibrated; run `inspectd calibrate`")
    return calibration


def _document(calibration: Calibration) -> dict[str, Any]:
    return {"schema": SCHEMA, "id": calibration.id, **content(calibration)}
