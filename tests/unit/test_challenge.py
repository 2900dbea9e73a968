"""A station must prove again and again that it tells known good parts from known bad ones."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from daemon.challenge import Challenge, ChallengeSet, ChallengeStatus
from daemon.messages import Outcome
from daemon.sources.names import part_id

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
SET = ChallengeSet("box 3", frozenset({"LS-01", "LS-02"}), frozenset({"LS-11", "LS-12"}), 8 * HOUR, 30 * MINUTE)
RIGHT = (("LS-01", Outcome.PASS), ("LS-02", Outcome.PASS), ("LS-11", Outcome.FAIL), ("LS-12", Outcome.UNCERTAIN))
WRONG = [
    ("LS-01", Outcome.FAIL, "LS-01 (good) failed"),
    ("LS-01", Outcome.UNCERTAIN, "LS-01 (good) was uncertain"),
    ("LS-01", Outcome.ERROR, "LS-01 (good) could not be judged"),
    ("LS-12", Outcome.PASS, "LS-12 (bad) passed"),
    ("LS-12", Outcome.ERROR, "LS-12 (bad) could not be judged"),
]

Build = Callable[..., Challenge]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """The challenge test of a daemon that has just started, after earlier ones with the same state folder."""

    def started(parts: ChallengeSet = SET, station: str = "top", *, holds_station: bool = True) -> Challenge:
        return Challenge(parts, station, tmp_path, holds_station=holds_station)

    return started


def send(challenge: Challenge, parts: Sequence[tuple[str, Outcome]] = RIGHT, at: datetime = NOON) -> ChallengeStatus:
    """Send parts a minute apart, the last of them at a time."""
    for number, (part, outcome) in enumerate(parts, 1):
        challenge.conclude(part, outcome, at - (len(parts) - number) * MINUTE)
    return challenge.status(at)


def test_a_test_that_was_never_run_is_due(build: Build) -> None:
    assert build().status(NOON) == ChallengeStatus("due", None, None, 0, 4, 'never passed; send all 4 parts of "box 3"')


def test_parts_of_the_set_are_recognised_by_the_id_that_their_file_gives_them(build: Build) -> None:
    challenge = build()
    assert challenge.recognises(part_id("LS-01.png"))
    assert challenge.recognises("LS-12")
    assert not any(map(challenge.recognises, ("LS-1", "LS-01-1", "ls-01", "LS-01.png", "")))


def test_the_test_passes_with_the_last_part_of_the_set(build: Build) -> None:
    challenge = build()
    assert send(challenge, RIGHT[:3], NOON - MINUTE).status == "due"
    assert send(challenge, RIGHT[3:]) == ChallengeStatus("ok", NOON, NOON + 8 * HOUR, 4, 4, "")


@settings(max_examples=30)
@given(st.permutations(RIGHT), st.lists(st.sampled_from(RIGHT), max_size=6))
def test_parts_may_come_in_any_order_and_more_than_once(
    order: list[tuple[str, Outcome]], repeated: list[tuple[str, Outcome]]
) -> None:
    with TemporaryDirectory() as folder:
        challenge = Challenge(SET, "top", Path(folder), holds_station=False)
        before = [part for part in repeated if part != order[-1]]
        assert send(challenge, [*before, *order[:-1]], NOON - MINUTE).status == "due"
        assert send(challenge, order[-1:]).status == "ok"


def test_parts_of_the_line_are_no_matter_of_the_test(build: Build) -> None:
    challenge = build()
    send(challenge, RIGHT[:3])
    before = challenge.status(NOON)
    for outcome in Outcome:
        challenge.conclude("screw-4711", outcome, NOON)
    assert challenge.status(NOON) == before
    assert send(challenge, RIGHT[3:]).status == "ok"


def test_a_pass_counts_until_the_test_is_due_again(build: Build) -> None:
    challenge = build()
    send(challenge)
    assert challenge.status(NOON + 8 * HOUR - MINUTE).status == "ok"
    due = challenge.status(NOON + 8 * HOUR)
    assert due == ChallengeStatus("due", NOON, NOON + 8 * HOUR, 0, 4, 'due again; send all 4 parts of "box 3"')
    assert not challenge.holding(NOON + 80 * HOUR)


def test_a_run_under_way_tells_what_is_to_come(build: Build) -> None:
    assert send(build(), RIGHT[:2]) == ChallengeStatus(
        "due", None, None, 2, 4, "never passed; 2 of 4 parts were right, to come: LS-11, LS-12"
    )


def test_of_many_parts_to_come_some_are_named_and_the_others_counted(build: Build) -> None:
    many = replace(SET, good=frozenset(f"LS-{number:02}" for number in range(40)), bad=frozenset({"bad"}))
    assert send(build(many), [("bad", Outcome.FAIL)]).detail.endswith(": LS-00, LS-01, LS-02 and 37 more")


@pytest.mark.parametrize(("part", "outcome", "detail"), WRONG)
def test_one_wrong_outcome_fails_the_test_at_once_and_says_which(
    build: Build, part: str, outcome: Outcome, detail: str
) -> None:
    challenge = build()
    send(challenge)
    failed = send(challenge, [*RIGHT[1:3], (part, outcome)], NOON + HOUR)
    assert failed == ChallengeStatus("failed", NOON, None, 0, 4, f'{detail}; send all 4 parts of "box 3"')


def test_a_failed_test_stays_failed_until_the_whole_set_passes(build: Build) -> None:
    challenge = build()
    send(challenge, [*RIGHT[:3], ("LS-12", Outcome.PASS)])
    assert challenge.status(NOON + 100 * HOUR).status == "failed"
    assert send(challenge, RIGHT[3:], NOON + HOUR).detail == (
        "LS-12 (bad) passed; 1 of 4 parts were right, to come: LS-01, LS-02, LS-11"
    )
    assert send(challenge, RIGHT[:3], NOON + HOUR + 3 * MINUTE).status == "ok"


def test_a_failed_test_holds_the_station_only_where_that_is_asked_for(build: Build) -> None:
    for holds in (True, False):
        challenge = build(station=f"holds-{holds}", holds_station=holds)
        assert not challenge.holding(NOON)
        send(challenge, [("LS-11", Outcome.PASS)])
        assert challenge.holding(NOON) is holds
        send(challenge, at=NOON + HOUR)
        assert not challenge.holding(NOON + HOUR)


@pytest.mark.parametrize(("wait", "status"), [(30 * MINUTE, "ok"), (30 * MINUTE + timedelta(seconds=1), "due")])
def test_all_parts_must_come_within_the_time_from_the_first(build: Build, wait: timedelta, status: str) -> None:
    challenge = build()
    for number, (part, outcome) in enumerate(RIGHT):
        challenge.conclude(part, outcome, NOON + number * wait / 3)
    assert challenge.status(NOON + wait).status == status


def test_an_unfinished_run_is_dropped_and_the_next_part_begins_another(build: Build) -> None:
    challenge = build()
    send(challenge, RIGHT[:3])
    dropped = challenge.status(NOON + HOUR)
    assert (dropped.passed, dropped.detail) == (
        0,
        'the run before was dropped: 3 of 4 parts came within 30 min; send all 4 parts of "box 3"',
    )
    begun = send(challenge, RIGHT[3:], NOON + HOUR)
    assert (begun.status, begun.passed) == ("due", 1)
    assert "the run before was dropped" in begun.detail
    assert send(challenge, RIGHT[:3], NOON + HOUR + 4 * MINUTE) == ChallengeStatus(
        "ok", NOON + HOUR + 4 * MINUTE, NOON + 9 * HOUR + 4 * MINUTE, 4, 4, ""
    )


def test_a_run_before_time_that_is_not_finished_takes_nothing_from_the_last_pass(build: Build) -> None:
    challenge = build()
    send(challenge)
    assert send(challenge, RIGHT[:2], NOON + HOUR).status == "ok"
    assert challenge.status(NOON + 2 * HOUR).status == "ok"


def test_a_pass_outlives_a_restart(build: Build) -> None:
    passed = send(build())
    assert build().status(NOON) == passed
    assert build(station="bottom").status(NOON).status == "due"


def test_a_failure_outlives_a_restart_and_holds_the_station_still(build: Build) -> None:
    send(build())
    failed = send(build(), [("LS-12", Outcome.PASS)], NOON + HOUR)
    assert build().status(NOON + HOUR) == failed
    assert build().holding(NOON + 100 * HOUR)
    send(build(), at=NOON + 2 * HOUR)
    assert build().status(NOON + 2 * HOUR).status == "ok"


def test_a_restart_in_the_middle_of_a_run_begins_it_anew(build: Build) -> None:
    send(build(), RIGHT[:3])
    assert send(build(), RIGHT[3:]).passed == 1


@pytest.mark.parametrize(
    "other",
    [
        replace(SET, name="box 4"),
        replace(SET, good=frozenset({"LS-01"})),
        replace(SET, good=SET.bad, bad=SET.good),
    ],
)
@pytest.mark.parametrize("parts", [RIGHT, [("LS-12", Outcome.PASS)]])
def test_what_was_proven_with_another_set_does_not_count(
    build: Build, other: ChallengeSet, parts: Sequence[tuple[str, Outcome]]
) -> None:
    send(build(), parts)
    failed = parts != RIGHT
    changed = build(other).status(NOON)
    assert (changed.status, changed.last_passed) == ("failed" if failed else "due", None)
    assert "the set is another one than that of the last test; send all" in changed.detail
    assert build(other).holding(NOON) == failed  # renaming a box cures no camera


def test_another_interval_applies_to_the_last_pass_too(build: Build) -> None:
    send(build())
    assert build(replace(SET, every=HOUR, within=MINUTE)).status(NOON + 2 * HOUR).next_due == NOON + HOUR


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b'{"schema": "inspectd.challenge/1"',
        b"[" * 100_000,
        b"null",
        b"[]",
        b"{}",
        b'{"schema": "inspectd.challenge/9", "set_sha256": "", "last_passed": null, "failure": ""}',
        b'{"schema": "inspectd.challenge/1", "set_sha256": "", "last_passed": 7, "failure": ""}',
        b'{"schema": "inspectd.challenge/1", "set_sha256": "", "last_passed": "noon", "failure": ""}',
        b'{"schema": "inspectd.challenge/1", "set_sha256": "", "last_passed": "2026-03-02T12:00:00", "failure": ""}',
        b'{"schema": "inspectd.challenge/1", "set_sha256": "", "last_passed": null, "failure": null}',
    ],
)
def test_a_torn_or_foreign_file_makes_the_test_due_with_a_warning(build: Build, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "challenge-top.json"
    file.write_bytes(content)
    with capture_logs() as logs:
        challenge = build(holds_station=False)
    assert [(entry["log_level"], entry["file"]) for entry in logs] == [("warning", str(file))]
    unread = challenge.status(NOON)
    assert (unread.status, unread.last_passed) == ("due", None)
    assert unread.detail.startswith("the result of the last test cannot be read; send all")
    assert build(holds_station=True).holding(NOON)  # nobody knows whether the last test failed
    assert send(challenge).status == "ok"
    assert build().status(NOON).status == "ok"


def test_every_beginning_of_a_kept_result_is_due_rather_than_fatal(build: Build, tmp_path: Path) -> None:
    send(build())
    file = tmp_path / "challenge-top.json"
    whole = file.read_bytes().rstrip()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert build(holds_station=False).status(NOON).status == "due"


def test_a_result_is_written_whole_and_leaves_nothing_else_behind(build: Build, tmp_path: Path) -> None:
    send(build())
    assert list(tmp_path.iterdir()) == [tmp_path / "challenge-top.json"]
    document = json.loads((tmp_path / "challenge-top.json").read_text())
    assert document == {
        "schema": "inspectd.challenge/1",
        "set": "box 3",
        "set_sha256": SET.fingerprint,
        "last_passed": "2026-03-02T12:00:00+00:00",
        "failure": "",
    }


def test_a_result_that_the_disk_refuses_counts_and_is_written_with_the_next_part(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    challenge = Challenge(SET, "top", folder, holds_station=True)
    with capture_logs() as logs:
        send(challenge, [("LS-12", Outcome.PASS)])
    assert [entry["log_level"] for entry in logs] == ["warning", "warning"]
    assert "cannot be kept" in logs[1]["event"]
    assert challenge.holding(NOON)
    folder.mkdir()
    challenge.conclude("LS-01", Outcome.PASS, NOON)
    assert Challenge(SET, "top", folder, holds_station=True).holding(NOON)


def test_a_pass_in_the_future_is_due(build: Build) -> None:
    send(build())
    restarted = build()
    early = restarted.status(NOON - HOUR)
    assert (early.status, early.last_passed, early.next_due) == ("due", None, None)
    assert early.detail.startswith("the clock was set back to before the last pass, which counts no more; send all")


def test_a_pass_in_the_future_does_not_count_once_that_time_comes(build: Build) -> None:
    send(build())
    challenge = build()
    assert challenge.status(NOON - 48 * HOUR).status == "due"
    assert challenge.status(NOON + HOUR).status == "due"
    send(challenge, RIGHT[:1], NOON + HOUR)
    assert build().status(NOON + HOUR).status == "due"


def test_clocks_that_differ_by_less_than_a_second_change_nothing(build: Build) -> None:
    challenge = build()
    send(challenge)
    assert challenge.status(NOON - timedelta(milliseconds=500)).status == "ok"


def test_a_clock_that_is_set_back_drops_the_run(build: Build) -> None:
    challenge = build()
    send(challenge, RIGHT[:3])
    assert send(challenge, RIGHT[3:], NOON - HOUR).passed == 1


def test_a_clock_that_leaps_ahead_and_back_leaves_the_pass_in_force(build: Build) -> None:
    challenge = build()
    send(challenge)
    assert challenge.status(NOON + 1000 * HOUR).status == "due"
    assert challenge.status(NOON + HOUR).status == "ok"


MOSTLY_RIGHT = [*3 * RIGHT, *((part, outcome) for part, outcome, _ in WRONG), ("screw-4711", Outcome.PASS)]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(MOSTLY_RIGHT), st.sampled_from([0, 0, 1, 7, 30, 31, 500])), max_size=40))
def test_the_test_is_passed_exactly_when_a_row_of_right_outcomes_in_time_held_the_whole_set(
    events: list[tuple[tuple[str, Outcome], int]],
) -> None:
    """The rules told again from the record of verdicts, and asked at every step, of one that is restarted too."""
    within, now = SET.within, NOON
    record: list[tuple[str, bool, datetime]] = []
    status, passed_at = "due", None
    with TemporaryDirectory() as folder:
        challenge = Challenge(SET, "top", Path(folder), holds_station=True)
        for (part, outcome), minutes in events:
            now += minutes * MINUTE
            challenge.conclude(part, outcome, now)
            if part in SET.parts:
                right = (outcome is Outcome.PASS) if part in SET.good else outcome in {Outcome.FAIL, Outcome.UNCERTAIN}
                if record and now - record[0][2] > within:
                    record = []
                record.append((part, right, now))
                if not right:
                    record, status = [], "failed"
                elif {name for name, _, _ in record} == SET.parts:
                    record, status, passed_at = [], "ok", now
            expected = "due" if status == "ok" and passed_at and now >= passed_at + SET.every else status
            told = challenge.status(now)
            assert (told.status, told.last_passed) == (expected, passed_at)
            assert challenge.holding(now) == (expected == "failed")
            assert (0 <= told.passed < told.expected) or told.status == "ok"
            restarted = Challenge(SET, "top", Path(folder), holds_station=True).status(now)
            assert (restarted.status, restarted.last_passed) == (expected, passed_at)
