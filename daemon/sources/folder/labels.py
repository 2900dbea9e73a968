"""What is said of a part beside its image: by the name of the file, by a sidecar in JSON, by a message's properties.

    {"part_id": "SN-4711", "batch_id": "B7", "meta": {"shift": 2, "line": "A"}}

It comes from outside, so it is bounded, and what does not fit is left out: a verdict is worth more than its label.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from daemon.messages import Scalar
from daemon.sources.names import clean, part_id
from daemon.wire import encode, number, text

SIDECAR_BYTES = 16_384
"""A larger sidecar is not read."""
META_KEYS = 16
META_BYTES = 512
"""Of all of `meta`, in JSON."""

_TEXT, _KEY, _ID = 128, 64, 64
_WHOLE = 2**53 - 1
"""Receivers keep numbers as doubles, which hold no larger integers exactly."""


@dataclass(frozen=True, slots=True)
class Label:
    """What is said of a part; "" and nothing where nothing is."""

    part_id: str
    batch_id: str = ""
    meta: Mapping[str, Scalar] = field(default_factory=dict)


class NoSidecarError(Exception):
    """There is no sidecar, or none yet."""


class TornSidecarError(Exception):
    """The sidecar is no JSON, or not all of it has been written yet."""


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern for names of files, which must have a group called `part`.

    Raises:
        ValueError: it is none; the message is for an operator.
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"part_id_pattern: {pattern!r} is no regular expression: {error}") from error
    if "part" not in found.groupindex:
        raise ValueError(f"part_id_pattern: {pattern!r} has no group (?P<part>…), which says what the part's id is")
    return found


def by_name(name: str, pattern: re.Pattern[str] | None) -> tuple[Label, bool]:
    """What the name of a file says by the groups of a pattern: `part`, `batch`, and all others into `meta`.

    False if the pattern is not found in it; then, and without a pattern, the stem is the part's id.
    """
    default = Label(part_id(name))
    if pattern is None:
        return default, True
    found = pattern.search(name)
    groups = {} if found is None else {key: said for key, said in found.groupdict().items() if said}
    if "part" not in groups:
        return default, False
    meta, _ = _bounded({key: said for key, said in groups.items() if key not in {"part", "batch"}}, {})
    return Label(clean(groups["part"]), text(groups.get("batch", ""), _ID), meta), True


def sidecar_of(image: Path) -> Path | None:
    """The sidecar beside an image: its name with `.json` after the suffix, or in the place of it."""
    for sidecar in (image.with_name(f"{image.name}.json"), image.with_suffix(".json")):
        if sidecar.is_file() and not sidecar.is_symlink():
            return sidecar
    return None


def by_sidecar(sidecar: Path | None, label: Label) -> tuple[Label, str]:
    """Put over a label what a sidecar says. Also what was left out and why, "" if nothing was.

    Raises:
        NoSidecarError: there is none.
        TornSidecarError: it is not whole.
    """
    try:
        if sidecar is None:
            raise NoSidecarError("there is no sidecar")
        with sidecar.open("rb") as file:
            written = file.read(SIDECAR_BYTES + 1)
    except FileNotFoundError:
        raise NoSidecarError("there is no sidecar") from None
    except OSError as error:
        return label, f"the sidecar cannot be read: {error.strerror}"
    if len(written) > SIDECAR_BYTES:
        return label, f"the sidecar is larger than {SIDECAR_BYTES} bytes"
    try:
        said = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise TornSidecarError(f"the sidecar is no whole JSON: {error}") from None
    if not isinstance(said, dict):
        return label, "the sidecar is no JSON object"
    return _put_over(label, said)


def by_properties(said: Sequence[tuple[str, str]]) -> tuple[Label, str]:
    """What the properties of a message say: part_id, batch_id, and all others into `meta`; the last of a name counts.

    Also what was left out and why, "" if nothing was.
    """
    ids = {key: value for key, value in said if key in {"part_id", "batch_id"}}
    return _put_over(Label(""), {**ids, "meta": {key: value for key, value in said if key not in ids}})


def _put_over(label: Label, said: dict[str, Any]) -> tuple[Label, str]:
    faults = [f"{text(key, _KEY)!r} is no key of a sidecar" for key in said.keys() - {"part_id", "batch_id", "meta"}][
        :1
    ]
    ids = {"part_id": label.part_id, "batch_id": label.batch_id}
    for key in ids:
        match said.get(key, ""):
            case bool() | float() | None | list() | dict():
                faults.append(f'"{key}" is no text')
            case "":
                pass
            case value:
                ids[key] = str(value)
    label = replace(label, part_id=clean(ids["part_id"]), batch_id=text(ids["batch_id"], _ID))
    match said.get("meta", {}):
        case dict() as more:
            meta, more_faults = _bounded(more, label.meta)
            label = replace(label, meta=meta)
            faults += more_faults
        case _:
            faults.append('"meta" is no JSON object')
    return label, "; ".join(faults)


def _bounded(more: Mapping[str, Any], meta: Mapping[str, Scalar]) -> tuple[dict[str, Scalar], list[str]]:
    """As much of `more` over `meta` as there is room for, and what there was against the rest."""
    bounded, faults = dict(meta), []
    for key, value in more.items():
        scalar = _scalar(value)
        if scalar is None:
            faults.append(f'"meta": {text(key, _KEY)!r} is no text, number or truth value')
            continue
        extended = {**bounded, text(key, _KEY): scalar}
        if len(extended) > META_KEYS or len(encode(extended)) > META_BYTES:
            faults.append(f'"meta" has more than {META_KEYS} keys or {META_BYTES} bytes')
            break
        bounded = extended
    return bounded, faults[:2]


def _scalar(value: object) -> Scalar | None:
    match value:
        case bool():
            return value
        case str():
            return text(value, _TEXT)
        case int() if abs(value) <= _WHOLE:
            return value
        case float() if math.isfinite(value):
            return number(value)
        case _:
            return None
