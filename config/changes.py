"""What differs between two configurations, and which of it may change while parts come. Pure."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from config.schema import Mqtt, Settings, Station

_OF_STATION = ("model", "calibration", "regions", "challenge", "own_recipes")
_OF_MQTT = ("username", "password_file", "tls")


def adopt(running: Settings, wanted: Settings) -> Settings:
    """The running settings, with what may change while parts come as it is wanted; all else waits for a start.

    That is what stations judge by, and how the daemon proves who it is. A station that is to be framed otherwise
    keeps what it judges by, which belongs to its framing; and for another broker the credentials stay.
    """
    stations = {station.name: station for station in wanted.stations}
    return running.model_copy(
        update={
            "stations": tuple(_adopt_station(one, stations.get(one.name, one)) for one in running.stations),
            "mqtt": _adopt_mqtt(running.mqtt, wanted.mqtt),
        }
    )


def differences(before: Settings, after: Settings) -> list[str]:
    """What has another value, a line each: the key in the file, what it was and what it is."""
    old, new = dict(_flat(_content(before))), dict(_flat(_content(after)))
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {_shown(old, key)} → {_shown(new, key)}" for key in keys if old.get(key) != new.get(key)]


def _adopt_station(running: Station, wanted: Station) -> Station:
    if running.framing != wanted.framing:
        return running
    return running.model_copy(update={option: getattr(wanted, option) for option in _OF_STATION})


def _adopt_mqtt(running: Mqtt, wanted: Mqtt) -> Mqtt:
    if (running.host, running.port, running.protocol) != (wanted.host, wanted.port, wanted.protocol):
        return running
    return running.model_copy(update={option: getattr(wanted, option) for option in _OF_MQTT})


def _content(settings: Settings) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(settings.model_dump_json(by_alias=True))
    return content


def _flat(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every option by its key in the file; of several sections each by its name."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, Sequence) and value and all(isinstance(one, Mapping) for one in value):
        for one in value:
            yield from _flat(one, f"{key}[{one['name']}]")
    else:
        yield key, value


def _shown(options: Mapping[str, object], key: str) -> str:
    value = options.get(key)
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
