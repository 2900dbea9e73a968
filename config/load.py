"""One TOML file → settings, or every one of its faults in an operator's words."""

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from config.schema import FolderSource, Framing, Group, Mqtt, MqttSource, Regions, Settings, Station, options

_OPTIONS: dict[str, FieldInfo] = {}
for _key, _field in options():
    _OPTIONS.setdefault(_key, _field)  # of a section of several kinds the first counts

# The folder source keeps parts here, inside the folder that it watches.
_SUBFOLDERS = ("processing", "done", "failed")

_NO_WHOLE_NUMBER = "{value} is not a whole number. Write digits alone, without quotes or a decimal point."
_NO_NUMBER = "{value} is not a number. Write one like 2.5, without quotes."
_NO_TEXT = '{value} is not text. Put the value in quotes, like {name} = "…".'
_OUT_OF_RANGE = "{value} is out of range. {range}"
_NO_SECTION = "is not written as a section. Start it with the line {heading}, brackets as here."

# pydantic's kinds of fault, in an operator's words.
_WORDS = {
    "missing": 'is missing. Add a line "{name} = …" {place}.',
    "missing section": "is missing. Add a section {heading}.",
    "plain": (
        "is missing, and all that is sent to {host}, a password too, could be read on the way. "
        "Add a section {heading}, or allow_plain = true {place}."
    ),
    "beside": "stands beside {others}. Take those away, or move them into a [[station.recipe]].",
    "twice": 'has "{twice}" twice. Give each recipe a name of its own.',
    "value_error": "{value} {error}",
    "int_type": _NO_WHOLE_NUMBER,
    "int_from_float": _NO_WHOLE_NUMBER,
    "float_type": _NO_NUMBER,
    "finite_number": _NO_NUMBER,
    "greater_than": _OUT_OF_RANGE,
    "greater_than_equal": _OUT_OF_RANGE,
    "less_than_equal": _OUT_OF_RANGE,
    "string_type": _NO_TEXT,
    "path_type": _NO_TEXT,
    "is_instance_of": _NO_TEXT,
    "string_too_short": "is empty. Write at least {min_length} character, or take the line away.",
    "string_too_long": "is too long. Use at most {max_length} characters.",
    "literal_error": "{value} is not a choice. Write {expected}, with the quotes.",
    "union_tag_not_found": 'has no type. Add a line like type = "folder" under {heading}.',
    "union_tag_invalid": 'has the unknown type "{tag}". Write type = {expected_tags}, with the quotes.',
    "tuple_type": _NO_SECTION,
    "model_type": _NO_SECTION,
    "model_attributes_type": _NO_SECTION,
}


class ConfigError(Exception):
    """The configuration cannot be used. One line a fault: file, key, what is wrong, what to do."""


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the configuration, with relative paths made to start at its folder.

    Whether the folders it names exist is not looked at. Where the file is silent, `environ` gives systemd's
    `STATE_DIRECTORY` and the credentials `mqtt_password` and `mqtt_key` in `CREDENTIALS_DIRECTORY`.

    Raises:
        ConfigError: with all faults at once.
    """
    tables = _tables(path)
    _fill_in(tables, environ)
    context = {"folder": path.absolute().parent}
    settings, faults = None, []
    try:
        settings = Settings.model_validate(tables, context=context)
    except ValidationError as error:
        faults = [_fault(details, tables) for details in error.errors(include_url=False)]
    # Stations are compared even when something else is wrong, so that no fault waits for a second run.
    sound: dict[int, Station] = {}
    stations = tables.get("station")
    for index, station in enumerate(stations if isinstance(stations, list) else ()):
        with suppress(ValidationError):
            sound[index] = Station.model_validate(station, context=context)
    faults += _clashes(sound)
    faults += _echoes(sound, tables)
    faults += _lone_views(settings.groups if settings else (), [station.name for station in sound.values()])
    if settings is None or faults:
        # Raised here rather than above: a chained cause would repeat values that have no place in a log.
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    return settings


def read_password(mqtt: Mqtt) -> str | None:
    """Give the broker's password, less one line end; None where no password file is set.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or is empty.
    """
    file = mqtt.password_file
    if file is None:
        return None
    try:
        password = file.read_bytes().decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ConfigError(
            f"{file}: mqtt.password_file: cannot be read ({error.strerror}). "
            "Put the password there, readable by the daemon's user.",
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: mqtt.password_file: is not UTF-8 text. Save it as UTF-8.") from None
    if not password:
        raise ConfigError(f"{file}: mqtt.password_file: is empty. Write the password in it, or take the option away.")
    return password


def _tables(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file. Check the path, or start from the sample.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder. Name the file in it, like {path / 'inspectd.toml'}.") from None
    except PermissionError:
        raise ConfigError(f"{path}: may not be read by this user. Give the user the right to read it.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Check the path and the disk.") from None
    try:
        # Some editors put a byte order mark first, which TOML does not know.
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: is not UTF-8 text. Save the file as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        what, _, place = str(error).removesuffix(")").partition(" (at ")
        raise ConfigError(
            f"{path}, {place}: is not TOML: {what}. "
            'Correct it there or just before; text stands in quotes, like host = "127.0.0.1".',
        ) from None


def _fill_in(tables: dict[str, Any], environ: Mapping[str, str]) -> None:
    if state := environ.get("STATE_DIRECTORY"):
        # systemd names several, joined by colons, where a unit asks for several.
        tables.setdefault("state_dir", state.partition(":")[0])
    if credentials := environ.get("CREDENTIALS_DIRECTORY"):
        mqtt = tables.get("mqtt")
        tls = mqtt.get("tls") if isinstance(mqtt, dict) else None
        for section, option, name in ((mqtt, "password_file", "mqtt_password"), (tls, "key_file", "mqtt_key")):
            credential = Path(credentials, name)
            if isinstance(section, dict) and os.access(credential, os.F_OK):
                section.setdefault(option, str(credential))


def _clashes(stations: Mapping[int, Station]) -> Iterator[str]:
    names: dict[str, int] = {}
    for index, station in stations.items():
        if (first := names.setdefault(station.name, index)) != index:
            yield (
                f'station[{index}].name: "{station.name}" is the name of station[{first}] already. '
                "Give each station a name of its own."
            )
    yield from _shared_calibrations(stations)
    yield from _shared_topics(stations)
    # Links are followed: two names of one folder are one folder.
    watched = {
        i: Path(os.path.realpath(s.source.path)) for i, s in stations.items() if isinstance(s.source, FolderSource)
    }
    for index, folder in watched.items():
        key = f'station[{index}].source.path ("{stations[index].name}")'
        for other, others_folder in watched.items():
            if folder == others_folder and other < index:
                yield (
                    f'{key}: {folder} is watched by station[{other}] ("{stations[other].name}") already. '
                    "Give each station a folder of its own."
                )
            for subfolder in _SUBFOLDERS:
                if folder.is_relative_to(others_folder / subfolder):
                    yield (
                        f'{key}: {folder} is where station[{other}] ("{stations[other].name}") keeps its parts in '
                        f"{subfolder}/. Choose a folder outside {others_folder / subfolder}."
                    )


def _lone_views(groups: Sequence[Group], stations: Sequence[str]) -> Iterator[str]:
    names = dict.fromkeys(stations, "a station")
    of: dict[str, str] = {}
    for index, group in enumerate(groups):
        if taken := names.get(group.name):
            yield f'group[{index}].name: "{group.name}" is the name of {taken} already. Give the group its own.'
        names[group.name] = "a group"
        for view in group.views:
            if view not in stations:
                yield (
                    f'group[{index}].views ("{group.name}"): there is no station "{view}". '
                    f"Name some of these: {', '.join(stations)}."
                )
            elif view in of:
                yield (
                    f'group[{index}].views ("{group.name}"): "{view}" is in the group "{of[view]}" already. '
                    "Take it out of one of the two."
                )
            of.setdefault(view, group.name)


def _echoes(stations: Mapping[int, Station], tables: Mapping[str, Any]) -> Iterator[str]:
    """What inspectd says must not come back to it as a part."""
    mqtt = tables.get("mqtt")
    prefix = mqtt.get("topic_prefix") if isinstance(mqtt, dict) else None
    prefix = prefix if isinstance(prefix, str) else Mqtt.model_fields["topic_prefix"].default
    for index, station in stations.items():
        if isinstance(station.source, MqttSource) and _meets(station.source.topic, prefix):
            yield (
                f'station[{index}].source.topic ("{station.name}"): "{station.source.topic}" has topics below '
                f"{prefix}/, where inspectd itself speaks. Have the images sent to a topic outside of it."
            )


def _meets(topic: str, prefix: str) -> bool:
    """Whether a filter has topics below a prefix."""
    for asked, own in zip_longest(topic.split("/"), prefix.split("/")):
        if asked == "#" or own is None:
            return True
        if asked not in {"+", own}:
            return False
    return False


def _shared_topics(stations: Mapping[int, Station]) -> Iterator[str]:
    """One image is one part, by its one id, so that it must not come to two stations."""
    listening = {i: s.source for i, s in stations.items() if isinstance(s.source, MqttSource)}
    for index, source in listening.items():
        for other, others in listening.items():
            together = source.group != "" and source.group == others.group
            if other < index and not together and _overlap(source.topic.split("/"), others.topic.split("/")):
                yield (
                    f'station[{index}].source.topic ("{stations[index].name}"): images on {source.topic} come to '
                    f'station[{other}] ("{stations[other].name}") too. Give each station topics of its own, or both '
                    "the same group."
                )


def _overlap(one: list[str], other: list[str]) -> bool:
    """Whether a topic may match both filters, given by their levels."""
    if "#" in (*one[:1], *other[:1]):
        return True
    if not one or not other:
        return one == other
    return (one[0] == other[0] or "+" in {one[0], other[0]}) and _overlap(one[1:], other[1:])


def _shared_calibrations(stations: Mapping[int, Station]) -> Iterator[str]:
    """A calibration holds for one framing, and one set of masks and region rules."""
    users: dict[Path, tuple[str, Regions, Framing]] = {}
    for index, station in stations.items():
        for place, recipe in enumerate(station.recipes):
            within = f".recipe[{place}]" if station.own_recipes else ""
            file = recipe.calibration_file
            mine = f'station[{index}]{within} ("{station.name}")', recipe.regions, station.framing
            first, *others = users.setdefault(file, mine)
            for what, own, other in zip(("regions are others", "framing is another"), mine[1:], others, strict=True):
                if own != other:
                    yield (
                        f'station[{index}]{within}.calibration ("{station.name}"): {file} is the calibration of '
                        f"{first} too, whose {what}. Give one of them a calibration file of its own."
                    )


def _fault(error: ErrorDetails, tables: dict[str, Any]) -> str:
    key, shown = "", ""
    for number, step in enumerate(error["loc"], start=1):
        if isinstance(step, int):
            shown += f"[{step}]"
        elif (longer := f"{key}.{step}".removeprefix(".")) in _OPTIONS or number == len(error["loc"]):
            key, shown = longer, f"{shown}.{step}".removeprefix(".")
        # else the step is the `type` that chose among kinds, which is no key
    match error["loc"]:
        case ("station", int(index), _, *_):
            with suppress(KeyError, TypeError):
                shown += f" ({_value(tables['station'][index]['name'])})"
        case _:
            pass
    return f"{shown}: {_words(error, key)}"


def _words(error: ErrorDetails, key: str) -> str:
    section, _, name = key.rpartition(".")
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"is not an option. {_suggestion(section, name)}"
    if kind == "missing" and _is_section(key):
        kind = "missing section"
    words = _WORDS.get(kind, "{value}: {message}. The sample shows how it is written.")
    return words.format(
        value=_value(error["input"]),
        name=name,
        heading=_heading(key),
        place=_place(section),
        range=_range(key),
        message=error["msg"],
        **error.get("ctx", {}),
    )


def _value(value: object) -> str:
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    return json.dumps(value, ensure_ascii=False, default=str)


def _suggestion(section: str, name: str) -> str:
    siblings = [key.rpartition(".")[2] for key in _OPTIONS if key.rpartition(".")[0] == section]
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f'Did you mean "{close[0]}"?'
    # Of two options of one name the one higher up is meant, and of those the first.
    last_to_first = sorted(_OPTIONS, key=_depth)[::-1]
    elsewhere = {key.rpartition(".")[2]: key.rpartition(".")[0] for key in last_to_first}
    if close := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75):
        return f'Did you mean "{close[0]}", which belongs {_place(elsewhere[close[0]])}?'
    return f"Take it away; known here: {', '.join(siblings)}."


def _depth(key: str) -> int:
    return key.count(".")


def _range(key: str) -> str:
    rules = _OPTIONS[key].metadata
    lowest = [f"above {rule.gt}" for rule in rules if isinstance(rule, Gt)]
    lowest += [f"of at least {rule.ge}" for rule in rules if isinstance(rule, Ge)]
    highest = [f"at most {rule.le}" for rule in rules if isinstance(rule, Le)]
    return f"Give a number {' and '.join(lowest + highest)}."


def _is_section(key: str) -> bool:
    return any(other.startswith(f"{key}.") for other in _OPTIONS)


def _heading(key: str) -> str:
    return f"[[{key}]]" if get_origin(_OPTIONS[key].annotation) is tuple else f"[{key}]"


def _place(section: str) -> str:
    return f"under {_heading(section)}" if section else "at the top of the file"
