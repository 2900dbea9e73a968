"""One trouble is one alarm, raised when it lasts and cleared when it is over."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.alarms import DEFINITIONS, AlarmId, Alarms, Change

START = datetime(2026, 11, 22, 6, 0, tzinfo=UTC)
CAMERA, CHALLENGE, DRIFT, OUTBOX = AlarmId.CAMERA_OFFLINE, AlarmId.CHALLENGE_DUE, AlarmId.DRIFT, AlarmId.OUTBOX_HIGH
DELAY = 5.0  # the camera's, both ways

conditions = st.dictionaries(st.sampled_from(AlarmId), st.none() | st.text(max_size=3))
courses = st.lists(st.tuples(st.floats(0, 40), conditions), max_size=40)


def update(alarms: Alarms, now: float, **wrong: str | None) -> list[Change]:
    told = {AlarmId[name]: text for name, text in wrong.items()}
    return alarms.update(told, now, START + timedelta(seconds=now))


@given(courses)
def test_an_alarm_is_raised_once_before_it_is_cleared_and_never_two_of_one_kind(
    course: list[tuple[float, dict[AlarmId, str | None]]],
) -> None:
    alarms, now, standing, used = Alarms(), 0.0, dict[AlarmId, str](), set[str]()
    for pause, told in course:
        now += pause
        for change in alarms.update(told, now, START + timedelta(seconds=now)):
            alarm = change.alarm
            if change.active:
                assert alarm.id not in standing
                assert alarm.instance not in used
                assert told[alarm.id] == alarm.detail
                standing[alarm.id] = alarm.instance
                used.add(alarm.instance)
            else:
                assert standing.pop(alarm.id) == alarm.instance
                assert told.get(alarm.id) is None
        active = alarms.active()
        assert {alarm.id: alarm.instance for alarm in active} == standing
        assert len(active) == len(standing)
        assert [a.definition.priority for a in active] == sorted(a.definition.priority for a in active)


@given(st.lists(st.tuples(st.floats(0.01, DELAY - 0.01), st.floats(0, 100)), max_size=30))
def test_what_chatters_faster_than_the_on_delay_raises_nothing(course: list[tuple[float, float]]) -> None:
    alarms, now = Alarms(), 0.0
    for wrong, right in course:
        assert update(alarms, now, CAMERA_OFFLINE="away") == []
        now += wrong
        assert update(alarms, now) == []
        now += right
    assert alarms.active() == []


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, DELAY - 0.01)), max_size=30))
def test_what_comes_back_within_the_off_delay_is_the_same_alarm_counted_once_more(
    course: list[tuple[float, float]],
) -> None:
    alarms = Alarms()
    update(alarms, 0, CAMERA_OFFLINE="away")
    (raised,) = update(alarms, DELAY, CAMERA_OFFLINE="away")
    now = DELAY
    for wrong, right in course:
        now += wrong
        assert update(alarms, now) == []
        now += right
        assert update(alarms, now, CAMERA_OFFLINE="again") == []
    (alarm,) = alarms.active()
    assert (alarm.instance, alarm.since, alarm.count) == (raised.alarm.instance, raised.alarm.since, 1 + len(course))


def test_the_course_of_one_alarm() -> None:
    alarms = Alarms()
    assert update(alarms, 10, CAMERA_OFFLINE="/srv is away") == []
    assert update(alarms, 14.9, CAMERA_OFFLINE="/srv is away") == []
    (raised,) = update(alarms, 15, CAMERA_OFFLINE="no disk")
    assert (raised.active, raised.alarm.id, raised.alarm.detail, raised.alarm.count) == (True, CAMERA, "no disk", 1)
    assert raised.alarm.since == START + timedelta(seconds=15)
    assert len(raised.alarm.instance) == 26
    assert update(alarms, 16, CAMERA_OFFLINE="no net") == []
    assert [alarm.detail for alarm in alarms.active()] == ["no net"]
    assert update(alarms, 20, CAMERA_OFFLINE=None) == []
    assert update(alarms, 24.9) == []
    (cleared,) = update(alarms, 25)
    assert (cleared.active, cleared.alarm.instance, cleared.alarm.count) == (False, raised.alarm.instance, 1)
    assert alarms.active() == []
    update(alarms, 26, CAMERA_OFFLINE="")
    (again,) = update(alarms, 31, CAMERA_OFFLINE="")
    assert again.alarm.instance != raised.alarm.instance


def test_without_delays_an_alarm_follows_its_condition_at_once() -> None:
    alarms = Alarms()
    assert [change.active for change in update(alarms, 1, CHALLENGE_DUE="due again")] == [True]
    assert [change.active for change in update(alarms, 1, CHALLENGE_DUE=None)] == [False]


def test_the_most_urgent_comes_first_and_then_the_oldest() -> None:
    alarms = Alarms()
    update(alarms, 0, DRIFT="light")
    update(alarms, 1, DRIFT="light", CHALLENGE_DUE="due", OUTBOX_HIGH="12", CAMERA_OFFLINE="away")
    update(alarms, 20, DRIFT="light", CHALLENGE_DUE="due", OUTBOX_HIGH="12", CAMERA_OFFLINE="away")
    assert [alarm.id for alarm in alarms.active()] == [CAMERA, OUTBOX, DRIFT, CHALLENGE]


@pytest.mark.parametrize("id_", AlarmId)
def test_every_alarm_has_its_words_and_an_urgency(id_: AlarmId) -> None:
    definition = DEFINITIONS[id_]
    assert definition.priority in {1, 2, 3, 4}
    assert definition.text
    assert definition.advice.endswith(".")
    assert definition.on_s >= 0 <= definition.off_s
