"""What a station tells of itself stays whole and small, whatever it is called and however much is wrong."""

import json
from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daemon import announcements
from daemon.alarms import Alarm, AlarmId, Change
from daemon.announcements import Birth, Event
from daemon.contract import TOPICS, Identity
from daemon.messages import Outcome
from daemon.stats import Drop, Shift, Stats, Window
from tests.payloads import (
    ALARM,
    AT,
    BIRTH,
    DRIFTING,
    GAP,
    IDENTITY,
    PAYLOADS,
    STATS,
    UNUSED,
    births,
    changes,
    counts,
    events,
    everything_wrong,
    figures,
    identities,
    moments,
    parse,
    shape,
    unhurried,
)

LONGEST = replace(IDENTITY, prefix="/".join(6 * ["p" * 32]), node="n" * 32, station="s" * 32, model=5000 * "m")


@unhurried
@given(identities(), births, moments)
@example(
    LONGEST,
    replace(BIRTH, version=99 * "v", source_place=5000 * "é", leaves=tuple(TOPICS), commands=24 * ("c" * 24,)),
    AT,
)
def test_every_birth_is_plain_whole_and_small(identity: Identity, birth: Birth, at: datetime) -> None:
    payload = announcements.encode_birth(identity, birth, at).payload
    content = parse(payload)
    assert len(payload) <= 4096
    lists: dict[str, list[object]] = {"topics": [], "commands": [], "recipes": []}
    assert shape(content | lists) == shape(parse(PAYLOADS["birth.json"]()) | lists)
    assert content["recipes"] == list(birth.recipes)[: len(content["recipes"])]
    assert content["recipe_count"] == len(birth.recipes)
    assert [topic["leaf"] for topic in content["topics"]] == list(birth.leaves)


def test_of_too_many_recipes_for_a_plc_the_first_are_named_and_all_are_counted() -> None:
    recipes = [f"recipe-{number:025}" for number in range(1, 201)]
    birth = replace(BIRTH, leaves=tuple(TOPICS), recipes=recipes)
    payload = announcements.encode_birth(IDENTITY, birth, AT).payload
    content = parse(payload)
    assert 4050 < len(payload) <= 4096
    assert content["recipe_count"] == 200
    assert 20 < len(content["recipes"]) < 200
    assert content["recipes"] == recipes[: len(content["recipes"])]


def test_a_topic_that_is_not_in_the_contract_cannot_be_announced() -> None:
    with pytest.raises(KeyError, match="verdikt"):
        announcements.encode_birth(IDENTITY, replace(BIRTH, leaves=("verdikt",)), AT)


@unhurried
@given(identities(), figures, moments, st.sampled_from(Window))
def test_all_stats_are_plain_whole_and_small_and_add_up(
    identity: Identity, stats: Stats, at: datetime, window: Window
) -> None:
    payload = announcements.encode_stats(identity, stats, at, window).payload
    content = parse(payload)
    assert content["window"] == window
    assert content["triggers"] == content["answered"] + content["trigger_errors"]
    assert len(payload) <= 1024
    assert shape(content) == shape(parse(PAYLOADS["stats.json"]()))
    assert content["inspected"] == sum(content[outcome.name.lower()] for outcome in Outcome)
    assert content["frames_in"] == content["inspected"] + sum(content["dropped"].values())
    assert list(content["dropped"]) == [cause.value for cause in Drop]


def test_where_nothing_was_inspected_yield_and_latencies_are_minus_one() -> None:
    content = parse(announcements.encode_stats(IDENTITY, UNUSED, AT).payload)
    figures = ("yield", "t_min_ms", "t_max_ms", "t_avg_ms", "p50_ms", "p95_ms", "p99_ms")
    assert {content[name] for name in figures} == {-1.0}
    assert parse(announcements.encode_stats(IDENTITY, STATS, AT).payload)["yield"] == 0.998571


def test_the_figures_of_the_shift_and_in_total_are_two_topics_of_one_form() -> None:
    shift, total = (announcements.encode_stats(IDENTITY, STATS, AT, window) for window in Window)
    assert (shift.topic, total.topic) == ("acme/lyon/press/top/stats", "acme/lyon/press/top/totals")
    assert parse(shift.payload) | {"window": "total"} == parse(total.payload)
    assert (total.qos, total.retain, total.expires_s) == (0, True, 60)


@unhurried
@given(identities(), figures, moments, counts)
def test_every_event_of_a_shift_is_small_and_tells_its_figures_in_full(
    identity: Identity, stats: Stats, at: datetime, seq: int
) -> None:
    payload = announcements.encode_shift(identity, "schedule", Shift(stats, at, seq, seq))
    content = parse(payload)
    assert len(payload) <= 1536
    assert (content["kind"], content["first_seq"], content["last_seq"]) == ("shift", seq, seq)
    told = dict(word.split("=") for word in content["detail"].split(" "))
    assert sum(int(told[outcome.name.lower()]) for outcome in Outcome) == int(told["inspected"]) == stats.inspected
    assert int(told["dropped"]) == sum(stats.dropped.values())
    assert (int(told["triggers"]), int(told["trigger_errors"])) == (stats.triggers, stats.trigger_errors)
    assert -1 <= float(told["yield"]) <= 1


@unhurried
@given(identities(), changes, moments)
@example(LONGEST, Change(replace(ALARM, detail=5000 * '"', count=2**53 - 1), active=True), AT)
def test_every_alarm_is_plain_whole_and_small(identity: Identity, change: Change, at: datetime) -> None:
    payload = announcements.encode_alarm(identity, change, at).payload
    content = parse(payload)
    assert len(payload) <= 1536
    assert shape(content) == shape(parse(PAYLOADS["alarm_active.json"]()))
    assert content["state"] == ("active" if change.active else "cleared")


@unhurried
@given(everything_wrong)
@example(tuple(Alarm(id_, "0" * 26, 5000 * '"', AT, 2**53 - 1) for id_ in AlarmId))
def test_the_list_of_alarms_names_them_all_and_stays_small(alarms: tuple[Alarm, ...]) -> None:
    payload = announcements.encode_active(IDENTITY, alarms, AT).payload
    content = parse(payload)
    assert len(payload) <= announcements.ACTIVE_LIMIT == 4096
    assert [alarm["alarm_id"] for alarm in content["active"]] == [alarm.id.value for alarm in alarms]
    assert all(alarm["text"] and alarm["advice"] for alarm in content["active"])
    assert content["priority"] == 1


def test_the_details_of_a_few_alarms_are_not_cut() -> None:
    long = 380 * "x"
    content = parse(announcements.encode_active(IDENTITY, [replace(ALARM, detail=long), DRIFTING], AT).payload)
    assert [alarm["detail"] for alarm in content["active"]] == [long, "light"]


def test_an_empty_list_of_alarms_has_priority_zero() -> None:
    content = parse(announcements.encode_active(IDENTITY, [], AT).payload)
    assert (content["active"], content["priority"]) == ([], 0)


@unhurried
@given(identities(), events)
@example(
    LONGEST,
    replace(GAP, subject=5000 * '"', detail=5000 * '"', first_seq=2**53 - 1, last_seq=2**53 - 1, chain=64 * "f"),
)
def test_every_event_is_plain_whole_and_small(identity: Identity, event: Event) -> None:
    payload = announcements.encode_event(identity, event).payload
    assert len(payload) <= 1536
    assert shape(parse(payload)) == shape(parse(PAYLOADS["event_gap.json"]()))


def test_what_must_arrive_is_not_retained_and_what_stands_is() -> None:
    messages = {
        "birth": announcements.encode_birth(IDENTITY, BIRTH, AT),
        "stats": announcements.encode_stats(IDENTITY, STATS, AT),
        "alarm/event": announcements.encode_alarm(IDENTITY, Change(ALARM, active=True), AT),
        "alarm/active": announcements.encode_active(IDENTITY, [ALARM], AT),
        "event": announcements.encode_event(IDENTITY, GAP),
    }
    assert [message.topic for message in messages.values()] == [f"acme/lyon/press/top/{leaf}" for leaf in messages]
    assert {leaf for leaf, message in messages.items() if message.retain} == {"birth", "stats", "alarm/active"}
    assert {leaf for leaf, message in messages.items() if message.qos == 0} == {"stats"}
    assert {leaf: message.expires_s for leaf, message in messages.items() if message.expires_s} == {"stats": 60}
    for leaf, message in messages.items():
        assert message.content_type == "application/json"
        assert json.loads(message.payload)["schema"] == TOPICS[leaf]
