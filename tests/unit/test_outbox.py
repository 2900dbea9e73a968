"""What the outbox has kept is there after a crash; what it has not, leaves no trace."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from daemon.messages import Outcome, Reply
from daemon.outbox import REMEMBERED, Answer, Entry, Gap, Note, Outbox, OutboxError
from daemon.stats import Drop, Latencies, Part, Shift, Tally

ROOT = Path(__file__).parents[2]
AT = datetime(2026, 11, 22, 6, 0, tzinfo=UTC)


def entry(seq: int, station: str = "top", payload: bytes = b"{}", outcome: Outcome = Outcome.PASS) -> Entry:
    return Entry(station, seq, f"{station}-{seq}", payload, outcome)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.sqlite3"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    outbox = Outbox(path)
    yield outbox
    outbox.close()


def test_a_new_outbox_is_empty_and_counts_from_one(outbox: Outbox) -> None:
    assert outbox.last_seq("top") == 0
    assert outbox.depth("top") == 0
    assert outbox.entries("top", 0, 9) == []
    outbox.keep([entry(1)])
    assert outbox.last_seq("top") == 1


def test_entries_come_oldest_first_behind_a_number_up_to_a_limit(outbox: Outbox) -> None:
    kept = [entry(seq, payload=bytes([seq])) for seq in range(1, 8)]
    outbox.keep(kept)
    assert outbox.entries("top", 0, 9) == kept
    assert outbox.entries("top", 2, 3) == kept[2:5]
    assert outbox.entries("top", 7, 3) == []
    assert outbox.entries("top", 0, 0) == []


def test_stations_are_numbered_and_forgotten_apart(outbox: Outbox) -> None:
    outbox.keep([entry(1, "top"), entry(1, "side"), entry(2, "top")])
    outbox.forget("top", [1, 2])
    assert outbox.depth("top") == 0
    assert outbox.entries("side", 0, 9) == [entry(1, "side")]
    assert (outbox.last_seq("top"), outbox.last_seq("side")) == (2, 1)


def test_forgotten_verdicts_leave_the_numbering_as_it_is(path: Path) -> None:
    first = Outbox(path)
    first.keep([entry(1), entry(2)])
    first.forget("top", [2, 1])
    first.close()
    again = Outbox(path)
    assert again.depth("top") == 0
    assert again.last_seq("top") == 2
    again.keep([entry(3)])
    again.close()


@pytest.mark.parametrize("seq", [0, 1, 2, 4])
def test_a_number_that_is_not_the_next_is_refused_and_nothing_of_its_batch_is_kept(outbox: Outbox, seq: int) -> None:
    outbox.keep([entry(1)])
    with pytest.raises(AssertionError, match=f"seq {seq} of top is not the next"):
        outbox.keep([entry(2), Entry("top", seq, "stray", b"{}", Outcome.PASS)], settled=["top-1"])
    assert outbox.last_seq("top") == 1
    assert outbox.entries("top", 0, 9) == [entry(1)]
    assert outbox.concluded("top-1")
    assert not outbox.concluded("stray")
    outbox.keep([entry(2)])


def test_an_id_is_concluded_until_its_frame_is_let_go_of_whether_or_not_it_was_delivered(outbox: Outbox) -> None:
    assert not outbox.concluded("top-1")
    outbox.keep([entry(1)])
    outbox.forget("top", [1])
    assert outbox.concluded("top-1")
    outbox.keep([], settled=["top-1"])
    assert not outbox.concluded("top-1")


def test_many_threads_may_keep_read_and_forget(outbox: Outbox) -> None:
    start = threading.Barrier(4)

    def work(station: str) -> None:
        start.wait(20)
        for seq in range(1, 26):
            outbox.keep([entry(seq, station)])
            assert outbox.last_seq(station) == seq
            assert [kept.seq for kept in outbox.entries(station, 0, 9)] == [seq]
            outbox.forget(station, [seq])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, ["a", "b", "c", "d"]))
    assert [outbox.last_seq(station) for station in "abcd"] == [25] * 4


def run_child(script: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_what_keep_returned_from_survives_kill_9(path: Path) -> None:
    child = run_child(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from daemon.messages import Outcome\n"
        "from daemon.outbox import Entry, Outbox\n"
        "outbox = Outbox(Path(sys.argv[1]))\n"
        "outbox.keep([Entry('top', seq, f'top-{seq}', b'{}', Outcome.PASS) for seq in range(1, 31)])\n"
        "outbox.forget('top', range(1, 11))\n"
        "last = Entry('top', 31, 'top-31', b'last', Outcome.FAIL)\n"
        "outbox.keep([last], settled=[f'top-{seq}' for seq in range(1, 21)])\n"
        "print('kept', flush=True)\n"
        "time.sleep(60)\n",
        path,
    )
    with child:
        assert child.stdout is not None
        said = child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
        assert said == "kept\n"
    outbox = Outbox(path)
    kept = outbox.entries("top", 0, 99)
    assert [left.seq for left in kept] == list(range(11, 32))
    assert kept[-1] == Entry("top", 31, "top-31", b"last", Outcome.FAIL)
    assert outbox.last_seq("top") == 31
    assert [outbox.concluded(f"top-{seq}") for seq in (1, 20, 21, 31)] == [False, False, True, True]
    outbox.keep([entry(32)])
    outbox.close()


FULL_DISK = """
import resource, sys
from pathlib import Path
from daemon.messages import Outcome, Reply
from daemon.outbox import Entry, Outbox, OutboxError

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

path = Path(sys.argv[1])
outbox = Outbox(path)
outbox.keep([Entry("top", 1, "top-1", b"{}", Outcome.PASS)])
limit(path.with_name(path.name + "-wal").stat().st_size + 10_000)
seq, refusals = 1, []
while len(refusals) < 3:
    batch = [Entry("top", seq + i, f"top-{seq + i}", bytes(1500), Outcome.PASS) for i in (1, 2)]
    try:
        outbox.keep(batch, settled=[f"top-{seq}"])
        seq += 2
    except OutboxError as error:
        refusals.append(str(error))
        assert (outbox.last_seq("top"), outbox.depth("top")) == (seq, seq), "half a batch was kept"
        assert outbox.concluded(f"top-{seq}") and not outbox.concluded(f"top-{seq + 1}")
limit(resource.RLIM_INFINITY)
outbox.keep(batch)
print(seq + 2, outbox.depth("top"), refusals[0])
"""


def test_a_full_disk_is_said_keeps_no_half_of_a_batch_and_is_survived(path: Path) -> None:
    with run_child(FULL_DISK, path) as child:
        said, complaint = child.communicate(timeout=60)
    assert child.returncode == 0, complaint
    seq, depth, refusal = said.split(maxsplit=2)
    assert seq == depth
    assert str(path) in refusal
    outbox = Outbox(path)
    assert outbox.last_seq("top") == int(seq)
    outbox.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_file_system_loses_nothing_that_was_kept_and_goes_on_when_it_has_room(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    outbox = Outbox(small_disk / "outbox.sqlite3")
    seq = 0
    with pytest.raises(OutboxError, match="full"):  # noqa: PT012 -- which of them fails depends on the disk
        while True:
            outbox.keep([entry(seq + 1, payload=bytes(1500)), entry(seq + 2, payload=bytes(1500))])
            seq += 2
    assert seq > 0
    assert (outbox.last_seq("top"), outbox.depth("top")) == (seq, seq)
    ballast.unlink()
    outbox.keep([entry(seq + 1), entry(seq + 2)])
    outbox.close()
    again = Outbox(small_disk / "outbox.sqlite3")
    assert again.last_seq("top") == again.depth("top") == seq + 2
    again.close()


def test_a_file_that_is_no_database_is_refused_with_its_path_and_a_cure(path: Path) -> None:
    path.write_bytes(b"these are no pages" * 500)
    with pytest.raises(OutboxError) as refusal:
        Outbox(path)
    assert str(path) in str(refusal.value)
    assert "move it away" in str(refusal.value)


def test_a_damaged_page_is_said_with_the_path_and_a_cure_by_whoever_meets_it(path: Path) -> None:
    outbox = Outbox(path)
    outbox.keep([entry(seq, payload=bytes(2000)) for seq in range(1, 40)])
    outbox.close()
    outbox = Outbox(path)
    pages = path.read_bytes()
    path.write_bytes(pages[:4096] + b"\xff" * (len(pages) - 4096))
    for ask in (
        lambda: outbox.entries("top", 0, 99),
        lambda: outbox.last_seq("top"),
        lambda: outbox.concluded("top-1"),
        lambda: outbox.keep([entry(40)]),
        lambda: outbox.forget("top", [1]),
        lambda: Outbox(path),
    ):
        with pytest.raises(OutboxError) as refusal:
            ask()
        assert str(path) in str(refusal.value)
        assert "move it away" in str(refusal.value)
    outbox.close()


def test_a_folder_that_is_missing_is_said_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(OutboxError, match=r"missing/outbox\.sqlite3 cannot be opened"):
        Outbox(tmp_path / "missing" / "outbox.sqlite3")


def test_a_closed_outbox_says_so_as_an_outbox_does(path: Path) -> None:
    outbox = Outbox(path)
    outbox.close()
    with pytest.raises(OutboxError, match="closed"):
        outbox.keep([entry(1)])
    with pytest.raises(OutboxError, match="closed"):
        outbox.last_seq("top")


# Other messages that must arrive


def leaves(outbox: Outbox, station: str = "top", after: int = 0) -> list[tuple[str, bytes]]:
    return [(note.leaf, note.payload) for note in outbox.notes(station, after, 99)]


def test_notes_wait_in_their_order_and_leave_the_numbering_of_verdicts_alone(path: Path, outbox: Outbox) -> None:
    outbox.tell("top", "event", b"first")
    outbox.keep([entry(1)])
    outbox.tell("side", "event", b"elsewhere")
    outbox.tell("top", "alarm/event", b"second")
    outbox.keep([entry(2)])
    outbox.close()
    again = Outbox(path)
    first, second = again.notes("top", 0, 99)
    assert [(first.leaf, first.payload), (second.leaf, second.payload)] == [
        ("event", b"first"),
        ("alarm/event", b"second"),
    ]
    assert again.notes("top", first.number, 99) == [second]
    assert again.notes("top", 0, 1) == [first]
    assert again.entries("top", 0, 9) == [entry(1), entry(2)]
    assert (again.depth("top"), again.last_seq("top")) == (2, 2)
    again.forget("top", notes=[first.number])
    assert again.notes("top", 0, 99) == [second]
    assert leaves(again, "side") == [("event", b"elsewhere")]
    again.close()


def test_a_note_told_after_all_were_forgotten_comes_behind_them(outbox: Outbox) -> None:
    outbox.tell("top", "event", b"first")
    (first,) = outbox.notes("top", 0, 9)
    outbox.forget("top", notes=[first.number])
    outbox.tell("top", "event", b"second")
    assert leaves(outbox, after=first.number) == [("event", b"second")]


EARLIER = """
CREATE TABLE station (name TEXT PRIMARY KEY, seq INTEGER NOT NULL);
CREATE TABLE entry (
    station TEXT NOT NULL, seq INTEGER NOT NULL, id TEXT NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (station, seq)
);
CREATE TABLE unsettled (id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO station VALUES ('top', 3);
INSERT INTO entry VALUES ('top', 2, 'top-2', x'7b7d'), ('top', 3, 'top-3', x'7b7d');
INSERT INTO unsettled VALUES ('top-3');
"""


def test_an_outbox_of_the_first_version_is_opened_where_it_lies_and_goes_on(path: Path) -> None:
    earlier = sqlite3.connect(path)
    earlier.execute("PRAGMA journal_mode=WAL")
    earlier.executescript(EARLIER)
    earlier.close()
    for _ in range(2):  # the second time it is of this version
        outbox = Outbox(path, max_rows=3)
        # whether they passed was not noted, so they count as what is kept longest
        assert outbox.entries("top", 0, 9) == [entry(2, outcome=Outcome.ERROR), entry(3, outcome=Outcome.ERROR)]
        assert (outbox.depth("top"), outbox.last_seq("top")) == (2, 3)
        assert [outbox.concluded(f"top-{seq}") for seq in (2, 3)] == [False, True]
        outbox.close()
    outbox = Outbox(path, max_rows=3)
    outbox.keep([entry(4), entry(5)])
    assert [kept.seq for kept in outbox.entries("top", 0, 9)] == [2, 3, 5]
    outbox.tell("top", "event", b"{}")
    assert leaves(outbox) == [("event", b"{}")]
    outbox.close()


# Bounds


def small(path: Path, rows: int) -> Outbox:
    return Outbox(path, max_rows=rows)


def gaps(outbox: Outbox, station: str = "top") -> list[Gap]:
    told: list[Gap] = []

    def encode(gap: Gap) -> bytes:
        told.append(gap)
        return b"gap"

    while outbox.tell_gap(station, "event", encode):
        pass
    return told


def test_of_too_many_verdicts_the_oldest_that_passed_go_first_and_the_others_only_when_none_passed(path: Path) -> None:
    outbox = small(path, 6)
    outcomes = dict(
        enumerate(
            (Outcome.FAIL, Outcome.PASS, Outcome.ERROR, Outcome.PASS, Outcome.UNCERTAIN, Outcome.PASS, Outcome.FAIL), 1
        )
    )
    outbox.keep([entry(seq, outcome=outcome) for seq, outcome in outcomes.items()])
    assert [kept.seq for kept in outbox.entries("top", 0, 9)] == [1, 3, 4, 5, 6, 7]
    outbox.keep([entry(8, outcome=Outcome.FAIL), entry(9, outcome=Outcome.FAIL)])
    assert [kept.seq for kept in outbox.entries("top", 0, 9)] == [1, 3, 5, 7, 8, 9]
    outbox.keep([entry(10, outcome=Outcome.FAIL)])
    assert [kept.seq for kept in outbox.entries("top", 0, 9)] == [3, 5, 7, 8, 9, 10]
    outbox.keep([entry(11)])  # the only one that passed is the newest
    assert [kept.seq for kept in outbox.entries("top", 0, 9)] == [3, 5, 7, 8, 9, 10]
    assert (outbox.depth("top"), outbox.last_seq("top")) == (6, 11)
    outbox.close()


def test_the_oldest_of_all_stations_goes_and_each_station_is_told_of_its_own(path: Path) -> None:
    outbox = small(path, 4)
    outbox.keep([entry(1, "side"), entry(1), entry(2)])
    outbox.keep([entry(3), entry(4), entry(2, "side")])
    assert [kept.seq for kept in outbox.entries("top", 0, 9)] == [2, 3, 4]
    assert [kept.seq for kept in outbox.entries("side", 0, 9)] == [2]
    assert (outbox.depth("top"), outbox.depth("side")) == (3, 1)
    assert (gaps(outbox), gaps(outbox, "side")) == ([Gap(1, 1, 1)], [Gap(1, 1, 1)])
    outbox.close()


def test_a_run_of_drops_is_one_gap_and_one_warning_even_over_a_restart(path: Path) -> None:
    with capture_logs() as logs:
        outbox = small(path, 3)
        outbox.keep([entry(1, outcome=Outcome.FAIL)])
        for seq in range(2, 10):
            outbox.keep([entry(seq)])
        outbox.close()
        outbox = small(path, 3)
        outbox.keep([entry(10)])
        assert len([said for said in logs if said["log_level"] == "warning"]) == 1
        assert leaves(outbox) == []
        assert gaps(outbox) == [Gap(2, 8, 7)]
        assert leaves(outbox) == [("event", b"gap")]
        outbox.keep([entry(11)])
        assert gaps(outbox) == [Gap(9, 9, 1)]
        assert len(logs) == 2
    outbox.close()


def test_a_gap_that_cannot_be_encoded_is_not_lost(path: Path) -> None:
    outbox = small(path, 1)
    outbox.keep([entry(1), entry(2)])

    def fail(_: Gap) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        outbox.tell_gap("top", "event", fail)
    assert gaps(outbox) == [Gap(1, 1, 1)]
    outbox.close()


def test_of_too_many_notes_the_oldest_goes(path: Path) -> None:
    outbox = small(path, 3)
    for number in range(5):
        outbox.tell("top", "event", bytes([number]))
    assert [payload for _, payload in leaves(outbox)] == [b"\2", b"\3", b"\4"]
    outbox.close()


def test_a_verdict_dropped_before_its_acknowledgement_is_counted_once(path: Path) -> None:
    outbox = small(path, 2)
    outbox.keep([entry(1), entry(2), entry(3)])
    outbox.forget("top", [1, 2])
    outbox.forget("top", [2])
    assert outbox.depth("top") == 1
    outbox.close()


# Quarantine


def test_a_quarantined_message_is_kept_and_not_handed_out_until_it_is_released(path: Path) -> None:
    outbox = Outbox(path)
    outbox.keep([entry(1), entry(2), entry(3)])
    outbox.tell("top", "event", b"odd")
    (odd,) = outbox.notes("top", 0, 9)
    outbox.quarantine(entry(2), "event", b"2 is put aside")
    outbox.quarantine(entry(2))
    outbox.quarantine(odd)
    outbox.close()
    outbox = Outbox(path)
    assert [kept.seq for kept in outbox.entries("top", 0, 9)] == [1, 3]
    assert [kept.seq for kept in outbox.entries("top", 1, 1)] == [3]
    assert leaves(outbox) == [("event", b"2 is put aside")]
    assert (outbox.depth("top"), outbox.quarantined("top")) == (2, 1)
    outbox.release("side")
    assert outbox.quarantined("top") == 1
    outbox.release("top")
    assert outbox.entries("top", 0, 9) == [entry(1), entry(2), entry(3)]
    assert outbox.notes("top", 0, 9)[0] == odd
    assert (outbox.depth("top"), outbox.quarantined("top")) == (3, 0)
    outbox.close()


def test_a_quarantined_verdict_may_be_dropped_for_want_of_room_and_leaves_nothing_behind(path: Path) -> None:
    outbox = small(path, 2)
    outbox.tell("top", "event", b"first")
    outbox.keep([entry(1), entry(2)])
    outbox.quarantine(Note("top", 1, "event", b"first"))
    outbox.quarantine(entry(1))
    outbox.keep([entry(3)])
    assert [kept.seq for kept in outbox.entries("top", 0, 9)] == [2, 3]
    assert (outbox.depth("top"), outbox.quarantined("top")) == (2, 0)
    assert leaves(outbox) == []
    outbox.close()


def test_counts_hold_after_whatever_was_done_and_after_a_failure(path: Path) -> None:
    outbox = small(path, 20)
    outbox.keep([entry(seq, outcome=Outcome(seq % 4)) for seq in range(1, 31)])
    outbox.quarantine(outbox.entries("top", 0, 1)[0])
    with pytest.raises(AssertionError):
        outbox.keep([entry(31), entry(33)])
    outbox.forget("top", [1, 15, 18, 99])
    counted = (outbox.depth("top"), outbox.quarantined("top"))
    assert counted[0] == len(outbox.entries("top", 0, 99))
    outbox.close()
    again = small(path, 20)
    assert (again.depth("top"), again.quarantined("top")) == counted
    again.close()


def test_the_depth_is_known_while_another_holds_the_file(path: Path, outbox: Outbox) -> None:
    outbox.keep([entry(1)])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with ThreadPoolExecutor(1) as pool:
        keeping = pool.submit(outbox.keep, [entry(2)])
        while not outbox._lock.locked():  # noqa: SLF001 -- it waits for the file from here on
            pass
        assert (outbox.depth("top"), outbox.quarantined("top")) == (1, 0)
        assert not keeping.done()
        other.execute("ROLLBACK")
        keeping.result()
    other.close()
    assert outbox.depth("top") == 2


# Answers to parts


def asking(seq: int, reply: Reply) -> Entry:
    return replace(entry(seq), reply=reply)


def test_a_part_is_answered_with_the_commit_of_its_verdict_and_again_after_a_restart(
    path: Path, outbox: Outbox
) -> None:
    reply = Reply("robots/7", b"\x00\xff")
    outbox.keep([asking(1, reply), entry(2), asking(3, Reply(""))])
    (told,) = outbox.notes("top", 0, 9)
    assert (told.reply, told.payload) == (reply, entry(1).payload)
    outbox.forget("top", seqs=[1, 2, 3], notes=[told.number])
    outbox.close()
    again = Outbox(path)
    assert again.tell_again("top", entry(1).id, Reply("robots/8", None))
    assert again.tell_again("top", entry(3).id, Reply(""))
    assert not again.tell_again("top", entry(2).id, reply)
    assert [(n.reply, n.payload) for n in again.notes("top", 0, 9)] == [(Reply("robots/8"), entry(1).payload)]
    again.close()


def test_of_the_parts_that_may_come_again_the_newest_are_remembered(outbox: Outbox) -> None:
    outbox.keep([asking(seq, Reply("")) for seq in range(1, REMEMBERED + 2)])
    known = [outbox.tell_again("top", entry(seq).id, Reply("")) for seq in (1, 2, REMEMBERED + 1)]
    assert known == [False, True, True]


def test_notes_of_an_earlier_version_are_told_on_their_leaves(path: Path) -> None:
    with closing(sqlite3.connect(path)) as earlier:
        earlier.executescript(
            "CREATE TABLE note (number INTEGER PRIMARY KEY AUTOINCREMENT, station TEXT NOT NULL, leaf TEXT NOT NULL, "
            "payload BLOB NOT NULL); INSERT INTO note (station, leaf, payload) VALUES ('top', 'event', x'7b7d');"
        )
    outbox = Outbox(path)
    assert outbox.notes("top", 0, 9) == [Note("top", 1, "event", b"{}")]
    outbox.keep([asking(1, Reply("robots/7"))])
    assert len(outbox.notes("top", 0, 9)) == 2
    outbox.close()


# What is counted


def counts(seq: int, outcome: Outcome = Outcome.PASS, station: str = "top") -> Entry:
    return replace(entry(seq, station, outcome=outcome), part=Part(outcome, 10.0 * seq, AT))


def encode_closed(told: list[Shift]) -> Callable[[Shift], bytes]:
    def encode(shift: Shift) -> bytes:
        told.append(shift)
        return b"closed"

    return encode


def test_verdicts_are_counted_with_the_commit_that_keeps_them_and_by_station(path: Path, outbox: Outbox) -> None:
    outbox.keep([counts(1), counts(1, Outcome.FAIL, "side"), entry(2), counts(3, Outcome.FAIL)])
    with pytest.raises(AssertionError):
        outbox.keep([counts(4), counts(9)])
    for box in (outbox, Outbox(path)):
        top, side = (box.counters(name).figures for name in ("top", "side"))
        assert top.total.stats().outcomes == {**dict.fromkeys(Outcome, 0), Outcome.PASS: 1, Outcome.FAIL: 1}
        assert top.total.stats().latencies == Latencies(10.0, 30.0, 20.0)
        assert (top.shift.stats().inspected, side.shift.stats().inspected) == (2, 1)
        box.close()


def test_what_was_kept_before_there_were_figures_is_in_none(path: Path) -> None:
    with closing(sqlite3.connect(path)) as earlier:
        earlier.executescript(EARLIER)
    for _ in range(2):
        outbox = Outbox(path)
        total = outbox.counters("top").figures.total
        assert (total.after, total.stats().inspected) == (3, outbox.last_seq("top") - 3)
        outbox.keep([counts(outbox.last_seq("top") + 1)])
        outbox.close()


def test_after_kill_9_the_figures_agree_with_the_numbers_and_lack_only_what_came_since_a_checkpoint(path: Path) -> None:
    child = run_child(
        "import sys, time\n"
        "from datetime import UTC, datetime\n"
        "from pathlib import Path\n"
        "from daemon.messages import Outcome\n"
        "from daemon.outbox import Entry, Outbox\n"
        "from daemon.stats import Drop, Part\n"
        "outbox = Outbox(Path(sys.argv[1]))\n"
        "counters = outbox.counters('top')\n"
        "counters.lost(Drop.MISSED, 5)\n"
        "outbox.checkpoint()\n"
        "counters.lost(Drop.QUEUE)\n"
        "for seq in range(1, 100_000):\n"
        "    part = Part(Outcome(seq % 4), 1.0, datetime.now(UTC))\n"
        "    outbox.keep([Entry('top', seq, str(seq), b'{}', part.outcome, part=part)])\n"
        "    if seq == 50:\n"
        "        counters.lost(Drop.DUPLICATE)\n"
        "        print('kept', flush=True)\n",
        path,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        os.kill(child.pid, signal.SIGKILL)
    outbox = Outbox(path)
    stats, last = outbox.counters("top").figures.total.stats(), outbox.last_seq("top")
    assert last >= 50
    assert stats.outcomes == Counter(Outcome(seq % 4) for seq in range(1, last + 1))
    assert (stats.dropped[Drop.MISSED], stats.dropped[Drop.QUEUE]) == (5, 1)
    assert stats.latencies == Latencies(1.0, 1.0, 1.0)
    outbox.close()


def test_an_orderly_end_saves_what_no_commit_has_taken_along(path: Path, outbox: Outbox) -> None:
    outbox.counters("top").came_too_late()
    outbox.close()
    again = Outbox(path)
    assert again.counters("top").figures.total.stats().too_late == 1
    again.close()


def test_a_shift_is_closed_and_told_in_one_commit_and_the_total_goes_on(path: Path, outbox: Outbox) -> None:
    told: list[Shift] = []
    outbox.keep([counts(1), entry(2)])
    outbox.close_shift("top", AT, encode_closed(told))
    outbox.keep([counts(3, Outcome.FAIL)])
    outbox.close()
    again = Outbox(path)
    again.close_shift("top", AT, encode_closed(told))
    again.close_shift("top", AT, encode_closed(told))
    assert [(shift.first_seq, shift.last_seq, shift.stats.inspected, shift.until) for shift in told] == [
        (1, 2, 1, AT),
        (3, 3, 1, AT),
        (0, 0, 0, AT),
    ]
    assert leaves(again) == 3 * [("event", b"closed")]
    total = again.counters("top").figures.total.stats()
    assert (total.inspected, total.since > AT) == (2, True)
    again.close()


def test_a_shift_that_cannot_be_told_goes_on(path: Path, outbox: Outbox) -> None:
    outbox.keep([counts(1)])

    def fail(_: Shift) -> bytes:
        raise ZeroDivisionError

    before = outbox.counters("top").figures
    with pytest.raises(ZeroDivisionError):
        outbox.close_shift("top", AT, fail)
    with pytest.raises(ZeroDivisionError):
        outbox.answer(Answer("top", "c1", 1, b"done"), closing=(AT, fail))
    assert outbox.counters("top").figures == before
    assert outbox.answered("top", "c1", 1) is None
    outbox.close()
    again = Outbox(path)
    assert again.counters("top").figures == before
    again.close()


def test_a_command_that_closes_the_shift_is_answered_in_the_same_commit(outbox: Outbox) -> None:
    told: list[Shift] = []
    outbox.keep([counts(1)])
    outbox.answer(Answer("top", "c1", 1, b"done"), closing=(AT, encode_closed(told)))
    assert (outbox.answered("top", "c1", 1), leaves(outbox)) == (b"done", [("event", b"closed")])
    assert outbox.counters("top").figures.shift == Tally(AT, 1)
    assert told[0].stats.inspected == 1
