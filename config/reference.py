"""All options as a page, made of the schema alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic.fields import FieldInfo

from config.schema import options

_KINDS: dict[object, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
}
_HEAD = """# Settings

All options of the configuration file, by its sections. `inspectd settings` prints this page for the version that is
installed; [the sample file](../config/inspectd.toml) has them in place, and `inspectd check --config FILE` names each
one that is wrong. Relative paths start at the folder of the file. Nothing unknown is accepted.
"""


def page() -> str:
    """Markdown: a table for each section, with every option, its kind, default, bounds and description."""
    return "\n".join([_HEAD, *_sections()])


def _sections() -> Iterator[str]:
    tables: list[tuple[str, str, list[str]]] = [("", "## At the top of the file\n", [])]
    every = list(options())
    keys = {key for key, _ in every}
    for number, (key, option) in enumerate(every):
        section, _, name = key.rpartition(".")
        if any(other.startswith(f"{key}.") for other in keys):
            tables.append((key, _heading(key, option, every[number + 1][1]), []))
        else:
            rows = next(rows for of, _, rows in reversed(tables) if of == section)
            rows.append(f"| `{name}` | {_kind(option)} | {_default(option)} | {_bounds(option)} | {_cell(option)} |")
    for _, heading, rows in tables:
        head = ["| option | kind | default | bounds | |", "|---|---|---|---|---|"] if rows else []
        yield "\n".join([heading, *head, *rows, ""] if rows else [heading])


def _heading(key: str, section: FieldInfo, first: FieldInfo) -> str:
    """The section's name as it stands in the file; one of several kinds with the line that chooses it."""
    brackets = f"[[{key}]]" if get_origin(section.annotation) is tuple else f"[{key}]"
    kind = get_args(first.annotation) if get_origin(first.annotation) is Literal and first.is_required() else ()
    chosen = f', `type = "{kind[0]}"`' if len(kind) == 1 else ""
    return f"## `{brackets}`{chosen}\n\n{section.description or ''}\n"


def _cell(option: FieldInfo) -> str:
    return (option.description or "").replace("|", "\\|")


def _kind(option: FieldInfo) -> str:
    return _named(option.annotation)


def _named(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _named(inner[0])
    if origin is Literal:
        return " or ".join(f"`{_value(one)}`" for one in inner)
    if origin in {Union, UnionType}:
        return " or ".join(_named(one) for one in inner if one is not NoneType)
    if origin is tuple:
        of = {_named(one) for one in inner if one is not Ellipsis}
        return f"list of {' or '.join(sorted(of))}" if Ellipsis in inner else f"list of {len(inner)} {of.pop()}s"
    if origin is dict:
        return "table"
    return _KINDS[kind]


def _default(option: FieldInfo) -> str:
    if option.is_required():
        return "**required**"
    if option.default_factory is not None or option.default is None:
        return "{}" if get_origin(option.annotation) is dict else "–"
    return f"`{_value(option.default)}`"


def _value(value: object) -> str:
    """As TOML has it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _bounds(option: FieldInfo) -> str:
    low = high = unit = ""
    for rule in option.metadata:
        match rule:
            case Ge(ge):
                low = f"{ge}"
            case Gt(gt):
                low = f"above {gt}"
            case Le(le):
                high = f"{le}"
            case MinLen(fewest) if fewest:
                low, unit = f"{fewest}", " characters"
            case MaxLen(most):
                high, unit = f"{most}", " characters"
            case _:
                pass
    return f"{low} to {high}{unit}" if low and high and low != high else (low or high) + unit
