"""Published schemas and published payloads agree, in both directions."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError
from typer.main import get_command
from typer.testing import CliRunner

from daemon import announcements, contract, schemas
from daemon.alarms import Alarm, AlarmId, Change
from daemon.announcements import Birth, Event, EventKind
from daemon.cli import app
from daemon.contract import TOPICS, Identity, Picture, Quality
from daemon.messages import Clock, Verdict, View
from daemon.requests import Action, Code
from daemon.stats import Shift, Stats, Window
from tests.payloads import (
    AT,
    GOLDEN,
    PAYLOADS,
    alarms,
    births,
    changes,
    events,
    figures,
    identities,
    qualities,
    unhurried,
    verdicts,
    views,
)


def closed(schema: Any) -> Any:
    """The same schema, which allows no other keys than those it names."""
    if isinstance(schema, list):
        return [closed(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {**inner, "additionalProperties": False} if isinstance(schema.get("properties"), dict) else inner


OPEN = {name: json.loads(schemas.read(name)) for name in schemas.names()}
ASKED = ("command", "trigger")
"""What is said to a station, rather than by it."""
TOLD = {name: schema for name, schema in OPEN.items() if name not in ASKED}
VALIDATORS = {name: Draft202012Validator(closed(schema)) for name, schema in OPEN.items()}


def check(name: str, payload: bytes) -> None:
    VALIDATORS[name].validate(json.loads(payload))


def objects(schema: Any) -> list[dict[str, Any]]:
    """Every object whose keys a schema names, however deep."""
    if isinstance(schema, list):
        return [found for inner in schema for found in objects(inner)]
    if not isinstance(schema, dict):
        return []
    own = [schema] if schema.get("type") == "object" and "properties" in schema else []
    return own + [found for inner in schema.values() for found in objects(inner)]


@pytest.mark.parametrize("name", TOLD)
def test_a_schema_is_valid_demands_every_key_and_forbids_none(name: str) -> None:
    Draft202012Validator.check_schema(OPEN[name])
    assert OPEN[name]["title"] == f"inspectd.{name}/1"
    assert "additionalProperties" not in json.dumps(OPEN[name])
    assert objects(OPEN[name])
    for described in objects(OPEN[name]):
        assert described["required"] == list(described["properties"])


@pytest.mark.parametrize("name", PAYLOADS)
def test_every_stored_payload_follows_its_schema(name: str) -> None:
    check(name.removesuffix(".json").partition("_")[0], (GOLDEN / name).read_bytes())


def test_there_is_a_schema_for_every_json_topic_and_for_what_pictures_carry() -> None:
    told = {schema.removeprefix("inspectd.").removesuffix("/1") for schema in TOPICS.values() if "inspectd." in schema}
    assert told | {"picture"} == set(TOLD)
    assert {Path(name).stem.partition("_")[0] for name in PAYLOADS} == set(TOLD)


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_has_a_valid_schema_that_forbids_other_keys(name: str) -> None:
    Draft202012Validator.check_schema(OPEN[name])
    assert OPEN[name]["title"] == f"inspectd.{name}/1"
    assert OPEN[name]["additionalProperties"] is False


@pytest.mark.parametrize("name", TOLD)
def test_a_key_that_is_missing_of_another_type_or_undocumented_is_noticed(name: str) -> None:
    golden = json.loads(
        next(GOLDEN / file for file in PAYLOADS if file.partition(".")[0].partition("_")[0] == name).read_bytes()
    )
    validator = VALIDATORS[name]
    for key in golden:
        without, other = deepcopy(golden), {**golden, key: None}
        del without[key]
        assert not validator.is_valid(without)
        assert not validator.is_valid(other)
    assert not validator.is_valid({**golden, "surprise": 1})
    Draft202012Validator(OPEN[name]).validate({**golden, "surprise": 1})


def test_an_undocumented_key_inside_a_list_is_noticed() -> None:
    golden = json.loads((GOLDEN / "verdict_fail.json").read_bytes())
    golden["regions"][1]["surprise"] = 1
    with pytest.raises(ValidationError, match="surprise"):
        VALIDATORS["verdict"].validate(golden)


@unhurried
@given(identities(), verdicts())
def test_every_verdict_and_what_goes_with_it_follows_its_schema(identity: Identity, verdict: Verdict) -> None:
    check("verdict", contract.encode_verdict(identity, verdict))
    check("plc", contract.encode_actuation(identity, verdict, 2.0).payload)
    for kind in Picture:
        check("picture", contract.encode_picture_comment(verdict, kind))


@unhurried
@given(identities(), verdicts(), st.lists(views, min_size=1, max_size=8))
def test_every_verdict_of_several_views_follows_its_schema(
    identity: Identity, verdict: Verdict, seen: list[View]
) -> None:
    check("verdict", contract.encode_verdict(identity, replace(verdict, views=tuple(seen))))


@unhurried
@given(identities(), qualities)
def test_every_quality_follows_its_schema(identity: Identity, quality: Quality) -> None:
    check("quality", contract.encode_quality(identity, quality, AT).payload)


@unhurried
@given(identities(), births, figures)
def test_every_birth_and_all_stats_follow_their_schemas(identity: Identity, birth: Birth, stats: Stats) -> None:
    check("birth", announcements.encode_birth(identity, birth, AT).payload)
    for window in Window:
        check("stats", announcements.encode_stats(identity, stats, AT, window).payload)
    check("event", announcements.encode_shift(identity, "schedule", Shift(stats, AT, 0, 0)))


@unhurried
@given(identities(), changes, alarms, events)
def test_every_alarm_and_every_event_follows_its_schema(
    identity: Identity, change: Change, alarm: Alarm, event: Event
) -> None:
    check("alarm", announcements.encode_alarm(identity, change, AT).payload)
    check("alarms", announcements.encode_active(identity, [alarm, change.alarm], AT).payload)
    check("event", announcements.encode_event(identity, event).payload)


def test_what_a_schema_gives_as_examples_is_all_there_is() -> None:
    assert OPEN["alarm"]["properties"]["alarm_id"]["examples"] == [id_.value for id_ in AlarmId]
    assert OPEN["alarms"]["properties"]["active"]["items"]["properties"]["alarm_id"]["examples"] == list(AlarmId)
    assert OPEN["event"]["properties"]["kind"]["examples"] == [kind.value for kind in EventKind]
    assert OPEN["picture"]["properties"]["kind"]["examples"] == [kind.value for kind in Picture]
    assert OPEN["state"]["properties"]["state"]["examples"] == list(contract.STATES)
    assert OPEN["response"]["properties"]["state"]["enum"] == list(contract.STATES)
    assert OPEN["response"]["properties"]["code"]["examples"] == [code.value for code in Code]
    assert OPEN["response"]["properties"]["result"]["examples"] == [code.name for code in Code]
    assert OPEN["command"]["properties"]["action"]["enum"] == [action.value for action in Action]
    assert OPEN["verdict"]["properties"]["ts_source"]["examples"] == [clock.value for clock in Clock]


def test_the_command_lists_all_schemas_and_prints_one() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["schema"]).stdout.split() == schemas.names()
    assert json.loads(runner.invoke(app, ["schema", "plc"]).stdout) == OPEN["plc"]


def test_an_unknown_schema_is_refused_with_those_there_are() -> None:
    with pytest.raises(Exception, match="alarm, alarms, birth"):
        get_command(app).main(["schema", "verdikt"], standalone_mode=False)
