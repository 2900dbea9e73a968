"""The pages are true: what subscribers, operators and newcomers read is compared with the program."""

import json
import re
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.main import get_command

from config.load import load
from daemon import canaries, contract
from daemon.alarms import DEFINITIONS
from daemon.announcements import EventKind
from daemon.challenge import ChallengeStatus
from daemon.cli import app
from daemon.messages import Outcome, Reason
from daemon.requests import REQUEST, TRIGGER, Action, Code, Received, parse

ROOT = Path(__file__).parents[2]
MQTT = (ROOT / "docs/mqtt.md").read_text()
README = (ROOT / "README.md").read_text()
GOLDEN = {path.stem: json.loads(path.read_text()) for path in (ROOT / "tests/golden").glob("*.json")}


def keys(content: object) -> set[str]:
    """Every key of ours, however deep."""
    if isinstance(content, list):
        return set().union(*map(keys, content))
    if not isinstance(content, dict):
        return set()
    return set(content).union(*(keys(value) for key, value in content.items() if key != "meta"))


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_every_key_of_every_payload_is_explained(name: str) -> None:
    unexplained = {key for key in keys(GOLDEN[name]) if f"`{key}`" not in MQTT and f'"{key}":' not in MQTT}
    assert unexplained == set()


def test_the_example_of_the_gate_message_has_its_keys_in_their_order() -> None:
    example = re.search(r'^`(\{"c":.*\})`$', MQTT, re.MULTILINE)
    assert example is not None
    assert list(json.loads(example[1])) == list(GOLDEN["plc"])


def test_every_outcome_and_every_reason_is_listed_with_its_number() -> None:
    for outcome in Outcome:
        assert re.search(rf"{outcome.value} {outcome.name}|{outcome.name} {outcome.value}", MQTT)
    for reason in Reason:
        assert f"| {reason.value} | `{reason.name.lower()}` |" in MQTT


def test_every_state_that_a_station_can_say_is_listed() -> None:
    for state, number in contract.STATES.items():
        assert f"| `{state}` | {number} |" in MQTT


def test_every_drift_and_every_result_of_a_challenge_test_is_listed_with_what_to_do() -> None:
    drifts = {*canaries.CAUSES.values(), "product", "ok", "off"}
    results = {"off", *get_args(get_type_hints(ChallengeStatus)["status"])}
    assert results == {"off", "ok", "due", "failed"}
    for key, values in (("drift.status", drifts), ("challenge.status", results)):
        _, _, table = MQTT.partition(f"| `{key}` |")
        assert set(re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE)) == values


def test_every_topic_is_listed_with_the_schema_of_its_json() -> None:
    for leaf, schema in contract.TOPICS.items():
        assert f"`B/{leaf}`" in MQTT
        assert schema in MQTT or not schema.startswith("inspectd.")


def test_every_alarm_is_listed_with_its_priority_and_its_delays() -> None:
    _, _, table = MQTT.partition("| `alarm_id` | `priority` |")
    listed = re.findall(r"^\| `(\w+)` \| (\d) \| (\d+) s, (\d+) s \|", table.partition("\n\n")[0], re.MULTILINE)
    assert [(name, int(priority), float(on), float(off)) for name, priority, on, off in listed] == [
        (id_.value, alarm.priority, alarm.on_s, alarm.off_s) for id_, alarm in DEFINITIONS.items()
    ]


def test_every_kind_of_event_is_listed() -> None:
    _, _, table = MQTT.partition("| `kind` | what happened |")
    assert re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE) == [kind.value for kind in EventKind]


def test_every_command_and_every_code_is_listed() -> None:
    _, _, table = MQTT.partition("| `action` | `args` |")
    assert re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE) == [
        action.value for action in Action
    ]
    _, _, table = MQTT.partition("| `code` | `result` |")
    listed = re.findall(r"^\| (\d+) \| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE)
    assert [(int(number), name) for number, name in listed] == [(code.value, code.name) for code in Code]


def test_every_command_of_the_page_is_one() -> None:
    shown = [json.loads(line) for line in re.findall(r"`(\{\"cmd_id\":.*?\})`", MQTT)]
    assert [
        parse(Received(f"B/{leaf}", json.dumps(request).encode())).action
        for leaf, request in zip((REQUEST, TRIGGER), shown, strict=True)
    ] == [Action.PREPARE_RECIPE, Action.TRIGGER]


def test_the_smallest_configuration_of_the_readme_is_one(tmp_path: Path) -> None:
    example = re.search(r"```toml\n(.*?)```", README, re.DOTALL)
    assert example is not None
    (tmp_path / "inspectd.toml").write_text(example[1])
    settings = load(tmp_path / "inspectd.toml", {})
    assert settings.stations[0].model == tmp_path / "models/screw"
    assert set(tomllib.loads(example[1])) == {"mqtt", "station"}


def test_every_command_of_the_readme_exists_with_its_options() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined] # a group
    shown = re.findall(r"^inspectd (\w+)(.*?)(?:#|$)", README, re.MULTILINE)
    assert {name for name, _ in shown} >= {"train", "predict", "doctor", "run"}
    for name, arguments in shown:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", arguments)) <= known


def test_every_link_between_pages_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_target_of_the_makefile_that_pages_name_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert set(re.findall(r"\bmake ([a-z-]+)", page.read_text())) <= targets
