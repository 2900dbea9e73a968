"""Nobody changes the audit trail unseen; and neither a power cut, a full disk nor a forger stops the daemon."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from typer.testing import CliRunner

from daemon.alarms import Alarm, AlarmId, Change
from daemon.announcements import EventKind
from daemon.audit import BROKEN, GENESIS, MENDED, Audit, AuditError, Damage, Fact, Trail, encode_entry, examine, witness
from daemon.cli import app
from daemon.journal import WAITING, Journal
from daemon.outbox import Outbox
from tests.payloads import ALARM, AT, IDENTITY, texts


def fact(number: int, **more: Any) -> Fact:
    said = {"station": "top", "kind": "command", "subject": "start", "detail": "DONE", "user": "m.weber"}
    return Fact(AT + timedelta(minutes=number), event=f"{number:026d}", **{**said, **more})


def chain(count: int, first: int = 1, prev: str = GENESIS) -> list[bytes]:
    lines = []
    for number in range(first, first + count):
        line, prev = encode_entry(number, prev, fact(number))
        lines.append(line)
    return lines


def hashes(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["hash"] for line in lines]


def steps(work: Callable[[], object], most: int) -> int:
    """How many lines of the trail's program that takes, those of a loop again each time round; up to `most`."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != examine.__code__.co_filename:
            return None
        count += event == "line"
        assert count <= most, f"more than {most} steps"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


# The chain


def test_a_chain_is_whole_from_the_first_entry_to_the_last() -> None:
    trail = examine(b"".join(chain(5)))
    assert (trail.fault, trail.unsaid, trail.lines, trail.torn) == (None, None, 5, b"")
    assert [entry.number for entry in trail.entries] == [1, 2, 3, 4, 5]
    assert trail.entries[0].prev == GENESIS
    assert trail.head == trail.entries[-1].hash
    assert examine(b"").fault is None


def test_hashes_can_be_checked_with_the_tools_of_the_system(path: Path) -> None:
    lines = chain(2)
    path.write_bytes(b"".join(lines))
    script = "tail -n 1 \"$1\" | sed 's/,\"hash\":.*//' | tr -d '\\n' | sha256sum"
    said = subprocess.run(["sh", "-c", script, "sh", path], capture_output=True, text=True, check=True).stdout
    assert said.split()[0] == json.loads(lines[1])["hash"]


@given(texts, texts, texts)
@settings(deadline=None, max_examples=100)
def test_whatever_is_said_is_one_line_that_is_read_again(subject: str, detail: str, user: str) -> None:
    line, own = encode_entry(1, GENESIS, fact(1, subject=subject, detail=detail, user=user))
    assert line.count(b"\n") == 1
    assert len(line) < 2048
    (entry,) = examine(line).entries
    assert (entry.hash, entry.ts) == (own, "2026-11-22T07:59:04.001Z")


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_any_change_of_any_byte_is_found(data: st.DataObject) -> None:
    whole = b"".join(chain(4))
    place = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.sampled_from(["replace", "remove", "insert"]))
    byte = bytes([data.draw(st.integers(0, 255))])
    changed = whole[:place] + (b"" if change == "remove" else byte) + whole[place + (change != "insert") :]
    assume(changed != whole)
    assert examine(changed).fault is not None


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_any_line_that_is_removed_doubled_moved_or_swapped_is_found_where_it_was(data: st.DataObject) -> None:
    lines = chain(6)
    order = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=9))
    kept = list(range(len(order)))
    trail = examine(b"".join(lines[number] for number in order))
    if order == kept:  # its end alone is gone
        assert trail.fault is None
        fault = witness(trail, hashes(lines)[5])
        assert (fault is None) == (len(order) == 6)
    else:
        assert trail.fault is not None
        first = next(place for place, number in enumerate(order) if place >= 6 or number != place)
        assert trail.fault.line == first + 1


def test_it_is_said_what_was_done_and_where() -> None:
    lines = chain(6)
    edited = lines[2].replace(b"m.weber", b"m.meier")
    forged = encode_entry(3, hashes(lines)[1], fact(3, user="m.meier"))[0]
    added = encode_entry(3, hashes(lines)[1], fact(9))[0]
    done = {
        "edited": (Damage.EDITED, 3, [*lines[:2], edited, *lines[3:]]),
        "the last edited": (Damage.EDITED, 6, [*lines[:5], lines[5].replace(b"DONE", b"GONE")]),
        "edited with its hash": (Damage.EDITED, 3, [*lines[:2], forged, *lines[3:]]),
        "removed": (Damage.REMOVED, 3, [*lines[:2], *lines[3:]]),
        "the first removed": (Damage.REMOVED, 1, lines[1:]),
        "several removed": (Damage.REMOVED, 2, [lines[0], *lines[4:]]),
        "a copy inserted": (Damage.INSERTED, 4, [*lines[:3], lines[1], *lines[3:]]),
        "a new one inserted": (Damage.INSERTED, 3, [*lines[:2], added, *lines[2:]]),
        "nonsense inserted": (Damage.INSERTED, 3, [*lines[:2], b"{}\n", *lines[2:]]),
        "neighbours swapped": (Damage.REORDERED, 3, [*lines[:2], lines[3], lines[2], *lines[4:]]),
        "others swapped": (Damage.REORDERED, 2, [lines[0], lines[4], *lines[2:4], lines[1], lines[5]]),
        "torn": (Damage.TORN, 6, [*lines[:5], lines[5][:40]]),
        "without its end": (Damage.TORN, 6, [*lines[:5], lines[5][:-1]]),
    }
    for what, (damage, line, content) in done.items():
        fault = examine(b"".join(content)).fault
        assert fault is not None, what
        assert (fault.damage, fault.line) == (damage, line), what


def test_behind_a_removed_line_ten_times_the_entries_are_ten_times_the_work() -> None:
    lines = chain(50_000)
    short, long = b"".join([*lines[:99], *lines[100:5_000]]), b"".join([*lines[:99], *lines[100:]])
    few = steps(lambda: examine(short), 5_000 * 1_000)
    found: list[Trail] = []
    assert steps(lambda: found.append(examine(long)), 12 * few) > 8 * few
    fault = found[0].fault
    assert fault is not None
    assert (fault.line, fault.damage) == (100, Damage.REMOVED)


def test_who_breaks_a_trail_anew_behind_each_entry_that_says_so_makes_no_more_work_than_once() -> None:
    content, digest = b"", hashlib.sha256()
    for number in range(1, 2_000, 2):
        said, own = encode_entry(number, digest.hexdigest(), fact(number, kind=BROKEN))
        lines = said + encode_entry(number + 2, own, fact(number))[0]
        content += lines
        digest.update(lines)
    trail = examine(content)
    assert trail.fault is not None
    assert trail.unsaid is not None
    assert (trail.fault.line, trail.fault.damage) == (1, Damage.SAID)
    assert (trail.unsaid.line, trail.unsaid.damage) == (2_000, Damage.REMOVED)
    few = steps(lambda: examine(content[: len(content) // 4]), 1_000_000)
    steps(lambda: examine(content), 6 * few)


def test_a_chain_written_anew_or_cut_at_its_end_is_whole_but_not_as_it_was_witnessed() -> None:
    lines = chain(5)
    anew = [encode_entry(1, GENESIS, fact(1, user="nobody"))[0]]
    anew += chain(4, first=2, prev=hashes(anew)[0])
    for content in (lines[:4], anew):
        trail = examine(b"".join(content))
        assert trail.fault is None
        fault = witness(trail, hashes(lines)[4])
        assert fault is not None
        assert fault.damage is Damage.UNWITNESSED
    assert witness(examine(b"".join(lines)), hashes(lines)[2]) is None


# The file


def test_entries_go_on_where_the_last_run_ended(path: Path) -> None:
    told = [Audit(path).append(fact(number)) for number in (1, 2, 3)]
    trail = examine(path.read_bytes())
    assert (trail.fault, [entry.hash for entry in trail.entries]) == (None, told)
    assert path.stat().st_mode & 0o007 == 0  # it names people


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_an_unfinished_last_line_is_cut_off_and_said(path: Path, cut: int) -> None:
    whole = b"".join(chain(3))
    path.write_bytes(whole[:-cut])
    audit = Audit(path)
    said = audit.unsaid()
    assert said is not None
    assert said[0] == MENDED
    assert path.read_bytes() == b"".join(chain(2))
    audit.append(fact(3, kind=said[0], detail=said[1]))
    audit.append(fact(4))
    assert audit.unsaid() is None
    trail = examine(path.read_bytes())
    assert (trail.fault, [entry.kind for entry in trail.entries]) == (None, ["command", "command", MENDED, "command"])


def test_behind_a_broken_chain_it_goes_on_once_it_is_said_and_what_was_found_is_sealed(path: Path) -> None:
    lines = chain(4)
    path.write_bytes(b"".join([*lines[:1], *lines[2:]]))
    for _ in range(2):  # the next run need not say it again
        audit = Audit(path)
        said = audit.unsaid()
        if said is not None:
            assert said[0] == BROKEN
            assert "line 2: removed" in said[1]
            audit.append(fact(5, kind=BROKEN, detail=said[1]))
        audit.append(fact(6))
    trail = examine(path.read_bytes())
    assert [entry.kind for entry in trail.entries].count(BROKEN) == 1
    assert trail.unsaid is None
    assert trail.fault is not None  # it stays known
    assert (trail.fault.line, trail.fault.damage) == (2, Damage.REMOVED)
    sealed = path.read_bytes()
    mended = b"".join(lines) + b"".join(sealed.splitlines(keepends=True)[3:])
    assert examine(mended).unsaid is not None


def test_what_another_hand_does_while_the_daemon_runs_is_seen_at_the_next_entry(path: Path) -> None:
    audit = Audit(path)
    for number in (1, 2, 3):
        audit.append(fact(number))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    said = audit.unsaid()
    assert said == (BROKEN, "the audit trail was changed by another hand; entry 3 is gone, which was the last")
    audit.append(fact(4, kind=BROKEN, detail=said[1]))
    path.unlink()
    said = audit.unsaid()
    assert said is not None
    assert "entry 3 is gone" in said[1]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]).returncode:  # noqa: PLW1510 -- it is looked at
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)


def test_a_full_disk_takes_no_half_of_an_entry_and_the_chain_goes_on_when_it_has_room(disk: Path) -> None:
    (disk / "ballast").write_bytes(bytes(30_000))
    audit, number = Audit(disk / "audit.jsonl"), 0
    with pytest.raises(AuditError, match=r"audit\.jsonl cannot be written"):  # noqa: PT012 -- whichever fails
        while True:
            audit.append(fact(number + 1))
            number += 1
    assert examine((disk / "audit.jsonl").read_bytes()).lines == number
    (disk / "ballast").unlink()
    audit.append(fact(number + 1))
    trail = examine((disk / "audit.jsonl").read_bytes())
    assert (trail.fault, trail.lines) == (None, number + 1)


def test_a_trail_that_cannot_be_mended_is_not_looked_through_again_each_time(disk: Path) -> None:
    (disk / "audit.jsonl").write_bytes(b"".join(chain(100))[:-1])
    remount(disk, "ro")
    audit = Audit(disk / "audit.jsonl")

    def refused() -> None:
        with pytest.raises(AuditError, match="Read-only file system"):
            audit.unsaid()

    first = steps(refused, 100_000)
    assert steps(refused, first) < first / 10
    remount(disk, "rw")
    said = audit.unsaid()
    assert said is not None
    assert said[0] == MENDED
    assert examine((disk / "audit.jsonl").read_bytes()).lines == 99


# The journal


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    outbox = Outbox(tmp_path / "outbox.sqlite3")
    yield outbox
    outbox.close()


def published(outbox: Outbox) -> list[dict[str, Any]]:
    return [json.loads(note.payload) for note in outbox.notes("top", 0, 99)]


def test_every_event_is_audited_and_bears_the_hash_of_its_entry(path: Path, outbox: Outbox) -> None:
    told: list[str] = []
    journal = Journal(outbox, Audit(path), told.append)
    journal.note(IDENTITY, EventKind.STARTED, "0.1.0", "recipe a")
    journal.note(IDENTITY, EventKind.COMMAND, "start", "DONE by m.weber", "m.weber")
    entries, events = examine(path.read_bytes()).entries, published(outbox)
    assert [entry.hash for entry in entries] == [event["chain"] for event in events]
    for entry, event in zip(entries, events, strict=True):
        said = (entry.event, entry.ts, entry.station, entry.kind, entry.subject, entry.detail)
        assert said == tuple(event[key] for key in ("id", "ts", "station", "kind", "subject", "detail"))
    assert ([entry.user for entry in entries], told) == (["", "m.weber"], ["top", "top"])


def test_while_the_trail_cannot_be_written_events_wait_and_alarms_do_not(tmp_path: Path, outbox: Outbox) -> None:
    path = tmp_path / "away" / "audit.jsonl"
    journal = Journal(outbox, Audit(path), lambda _: None)
    with capture_logs() as logs:
        journal.note(IDENTITY, EventKind.STARTED, "0.1.0", "")
        journal.note(IDENTITY, EventKind.COMMAND, "halt", "DONE")
        journal.alarm(IDENTITY, Change(Alarm(AlarmId.DRIFT, "0" * 26, "light", datetime.now(UTC), 1), active=True))
        journal.deliver()
    assert [said["event"] for said in logs if said["log_level"] == "error"] == [
        "events wait, for they cannot be audited"
    ]
    assert [message["schema"] for message in published(outbox)] == ["inspectd.alarm/1"]
    path.parent.mkdir()
    journal.deliver()
    assert [message.get("kind") for message in published(outbox)] == [None, "started", "command"]
    assert examine(path.read_bytes()).fault is None


def test_the_trail_is_looked_through_when_it_is_opened_and_not_by_the_first_event(path: Path, outbox: Outbox) -> None:
    path.write_bytes(b"".join([*chain(100)[1:], b'{"number":101']))
    journal = Journal(outbox, Audit(path), lambda _: None)
    opened = steps(journal.open, 100_000)
    assert path.read_bytes().endswith(b"\n"), "an unfinished line is still there"
    assert (journal.trouble, published(outbox)) == (None, [])
    assert steps(lambda: journal.note(IDENTITY, EventKind.STARTED, "0.1.0", ""), opened) < opened / 2
    assert [event["kind"] for event in published(outbox)] == [BROKEN, MENDED, "started"]


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff\n" * 9, b"[" * 20_000 + b"\n", b'{"number":1}\n'])
def test_whatever_stands_there_opening_raises_nothing(path: Path, outbox: Outbox, content: bytes | None) -> None:
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    journal = Journal(outbox, Audit(path), lambda _: None)
    journal.open()
    assert (journal.trouble is not None) == (content is None)
    journal.note(IDENTITY, EventKind.STARTED, "0.1.0", "")
    assert (journal.trouble is not None) == (content is None)


def test_a_trail_that_cannot_be_written_is_a_trouble_until_it_can(disk: Path, outbox: Outbox) -> None:
    remount(disk, "ro")
    journal = Journal(outbox, Audit(disk / "audit.jsonl"), lambda _: None)
    journal.open()
    assert journal.trouble is None
    journal.note(IDENTITY, EventKind.STARTED, "0.1.0", "")
    journal.note(IDENTITY, EventKind.COMMAND, "halt", "DONE")
    path = disk / "audit.jsonl"
    why = f"the audit trail {path} cannot be written: Read-only file system; check its rights and the disk"
    assert journal.trouble == f"2 events wait: {why}"
    remount(disk, "rw")
    journal.deliver()
    assert journal.trouble is None
    assert [event["kind"] for event in published(outbox)] == ["started", "command"]


def test_of_too_many_events_that_wait_the_oldest_are_lost_and_counted(tmp_path: Path, outbox: Outbox) -> None:
    path = tmp_path / "away" / "audit.jsonl"
    journal = Journal(outbox, Audit(path), lambda _: None)
    with capture_logs() as logs:
        for number in range(WAITING + 3):
            journal.note(IDENTITY, EventKind.COMMAND, str(number), "DONE")
        assert journal.trouble is not None
        assert journal.trouble.startswith(f"{WAITING} events wait, 3 are lost: the audit trail {path}")
        journal.close()
    errors = [said for said in logs if said["log_level"] == "error"]
    assert [said["event"] for said in errors] == [
        "events wait, for they cannot be audited",
        "no more events can wait to be audited; the oldest are lost",
        "events are lost: they could not be audited",
    ]
    assert errors[-1]["count"] == WAITING + 3


def test_at_the_stop_nothing_is_said_to_be_lost_that_is_not(tmp_path: Path, outbox: Outbox) -> None:
    path = tmp_path / "away" / "audit.jsonl"
    journal = Journal(outbox, Audit(path), lambda _: None)
    journal.note(IDENTITY, EventKind.STOPPED, "0.1.0", "as it was asked to")
    path.parent.mkdir()
    with capture_logs() as logs:
        journal.close()
    assert [said["log_level"] for said in logs] == ["warning"]  # it can be audited again
    assert [event["kind"] for event in published(outbox)] == ["stopped"]


def test_at_the_stop_it_is_said_how_much_the_outbox_has_not_taken(path: Path, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.sqlite3")
    outbox.close()
    journal = Journal(outbox, Audit(path), lambda _: None)
    journal.note(IDENTITY, EventKind.STOPPED, "0.1.0", "")
    journal.alarm(IDENTITY, Change(ALARM, active=True))
    with capture_logs() as logs:
        journal.close()
    assert [(said["log_level"], said["count"]) for said in logs] == [("error", 2)]


def test_what_the_outbox_refuses_is_audited_once(path: Path, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.sqlite3")
    outbox.close()  # as a disk that refuses
    journal = Journal(outbox, Audit(path), lambda _: None)
    journal.note(IDENTITY, EventKind.STARTED, "0.1.0", "")
    journal.alarm(IDENTITY, Change(ALARM, active=True))
    journal.deliver()
    assert examine(path.read_bytes()).lines == 1


def test_a_trail_that_was_changed_is_said_as_an_error_and_as_an_event_and_stops_nothing(
    path: Path, outbox: Outbox
) -> None:
    path.write_bytes(b"".join(chain(3)[1:]) + b'{"number":4')
    with capture_logs() as logs:
        journal = Journal(outbox, Audit(path), lambda _: None)
        journal.note(IDENTITY, EventKind.STARTED, "0.1.0", "")
    assert len([said for said in logs if said["log_level"] == "error"]) == 2
    events = published(outbox)
    assert [event["kind"] for event in events] == [BROKEN, MENDED, "started"]
    assert "line 1: removed" in events[0]["detail"]
    assert [event["chain"] for event in events] == hashes(path.read_bytes().splitlines()[2:])


def test_a_change_of_shift_is_told_and_what_the_disk_refuses_is_due_again(path: Path, outbox: Outbox) -> None:
    told: list[str] = []
    journal = Journal(outbox, Audit(path), told.append)
    now = datetime.now(UTC)
    counters = outbox.counters("top")
    journal.change_shift(IDENTITY, now)
    (event,) = published(outbox)
    assert (event["kind"], event["subject"], event["chain"], told) == ("shift", "schedule", "", ["top"])
    assert counters.figures.shift.since == now
    outbox.close()
    journal.change_shift(IDENTITY, now + timedelta(hours=8))
    assert (counters.figures.shift.since, told) == (now, ["top"])


# The commands


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)], env={"COLUMNS": "120"})
    return result.exit_code, re.sub(r"\s+", " ", result.stdout), re.sub(r"\s+", " ", result.stderr)


def test_verify_says_how_much_is_whole_or_the_first_line_that_is_wrong(path: Path) -> None:
    lines = chain(3)
    path.write_bytes(b"".join(lines))
    status, said, _ = run("verify", "--file", path)
    assert status == 0
    assert "3 entries, 2026-11-22T07:59:04.001Z to 2026-11-22T08:01:04.001Z" in said
    assert hashes(lines)[2] in said
    assert run("verify", "--file", path, "--expect", hashes(lines)[0].upper())[0] == 0
    status, _, complaint = run("verify", "--file", path, "--expect", "5e" * 32)
    assert (status, "its end was cut off" in complaint) == (1, True)
    path.write_bytes(lines[0] + lines[2])
    status, _, complaint = run("verify", "--file", path)
    assert status == 1
    assert "line 2: removed: entry 3 stands here" in complaint


def test_show_prints_what_was_asked_for_in_columns(path: Path) -> None:
    lines, head = [], GENESIS
    for number, (station, kind, subject) in enumerate(
        [("top", "started", "0.1.0"), ("side", "command", "start [x]"), ("top", "command", "halt")], 1
    ):
        line, head = encode_entry(number, head, fact(number, station=station, kind=kind, subject=subject))
        lines.append(line)
    path.write_bytes(b"".join(lines))
    result = CliRunner().invoke(app, ["audit", "show", "--file", str(path)], env={"COLUMNS": "120"})
    rows = [line for line in result.stdout.splitlines() if "m.weber" in line]
    assert len(rows) == 3
    assert len({row.index("m.weber") for row in rows}) == 1
    assert "start [x]" in result.stdout
    for options, subjects in (
        (["--station", "top"], ["0.1.0", "halt"]),
        (["--kind", "command"], ["start [x]", "halt"]),
        (["--since", "2100-01-01"], []),
    ):
        said = run("show", "--file", path, *options)[1]
        assert [subject for subject in ("0.1.0", "start [x]", "halt") if subject in said] == subjects


def test_a_trail_or_a_way_to_it_must_be_named(tmp_path: Path) -> None:
    assert run("verify")[0] == 2
    assert run("verify", "--file", tmp_path / "a", "--config", tmp_path / "b")[0] == 2


def test_the_digest_of_nothing_is_what_a_deleted_trail_goes_on_from(path: Path) -> None:
    audit = Audit(path)
    audit.append(fact(1))
    path.unlink()
    audit.append(fact(2, kind=BROKEN))
    (entry,) = examine(path.read_bytes()).entries
    assert (entry.number, entry.prev) == (1, hashlib.sha256().hexdigest())
    assert examine(path.read_bytes()).fault is not None
