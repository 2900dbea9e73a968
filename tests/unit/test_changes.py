"""What a changed configuration changes at once, and what waits for a start."""

from pathlib import Path

import pytest

from config.changes import adopt, differences
from config.load import load
from config.schema import Settings

FILE = """
[mqtt]
host = "127.0.0.1"
{mqtt}
[[station]]
name = "cam1"
model = "models/a"
{cam1}
[station.source]
type = "folder"
path = "in1"
{source}
{framing}
[[station]]
name = "cam2"
[station.source]
type = "folder"
path = "in2"
[[station.recipe]]
name = "A"
model = "models/a2"
[[station.recipe]]
name = "{recipe}"
model = "models/b"
{more}
"""


def settings(folder: Path, **parts: str) -> Settings:
    blank = dict.fromkeys(("mqtt", "cam1", "source", "framing", "more"), "") | {"recipe": "B"}
    file = folder / "inspectd.toml"
    file.write_text(FILE.format(**blank | parts))
    return load(file, {})


def test_the_same_file_has_no_differences(tmp_path: Path) -> None:
    assert differences(settings(tmp_path), settings(tmp_path)) == []


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({"cam1": 'calibration = "c.json"'}, 'station[cam1].calibration: none → "{folder}/c.json"'),
        (
            {"framing": "[station.regions]\nsmallest_area_px = 20.0"},
            "station[cam1].regions.smallest_area_px: 0.0 → 20.0",
        ),
        ({"mqtt": 'username = "edge"'}, 'mqtt.username: none → "edge"'),
        (
            {"more": '[[station.recipe]]\nname = "C"\nmodel = "models/c"'},
            'station[cam2].recipe[C].model: none → "{folder}/models/c"',
        ),
    ],
)
def test_what_stations_judge_by_and_the_credentials_change_at_once(
    tmp_path: Path, parts: dict[str, str], line: str
) -> None:
    before, wanted = settings(tmp_path), settings(tmp_path, **parts)
    assert adopt(before, wanted) == wanted
    assert line.format(folder=tmp_path) in differences(before, wanted)


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({"source": "settle_ms = 50"}, "station[cam1].source.settle_ms: 200 → 50"),
        ({"cam1": 'mode = "triggered"'}, 'station[cam1].mode: "continuous" → "triggered"'),
        ({"mqtt": "keepalive_s = 30"}, "mqtt.keepalive_s: 10 → 30"),
        ({"mqtt": 'overlays = "all"'}, 'mqtt.overlays: "rejects" → "all"'),
    ],
)
def test_all_else_waits_for_a_start(tmp_path: Path, parts: dict[str, str], line: str) -> None:
    before, wanted = settings(tmp_path), settings(tmp_path, **parts)
    running = adopt(before, wanted)
    assert running == before
    assert differences(running, wanted) == [line]


def test_a_station_that_is_framed_otherwise_keeps_what_belongs_to_its_framing(tmp_path: Path) -> None:
    before = settings(tmp_path)
    wanted = settings(tmp_path, cam1='calibration = "c.json"', framing="[station.framing]\nrotate = 90")
    running = adopt(before, wanted)
    assert running == before
    assert len(differences(running, wanted)) == 2


def test_for_another_broker_the_credentials_stay(tmp_path: Path) -> None:
    before = settings(tmp_path)
    wanted = settings(tmp_path, mqtt='port = 1884\nusername = "edge"')
    assert adopt(before, wanted) == before


def test_stations_that_come_or_go_wait_for_a_start(tmp_path: Path) -> None:
    before = settings(tmp_path)
    fewer = before.model_copy(update={"stations": before.stations[:1]})
    assert adopt(before, fewer) == before
    assert adopt(fewer, before) == fewer
