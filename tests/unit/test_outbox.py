"""What the outbox has kept is there after a crash; what it has not, leaves no trace."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon.outbox import Entry, Outbox, OutboxError

ROOT = Path(__file__).parents[2]


def entry(seq: int, station: str = "top", payload: bytes = b"{}") -> Entry:
    return Entry(station, seq, f"{station}-{seq}", payload)


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
        outbox.keep([entry(2), Entry("top", seq, "stray", b"{}")], settled=["top-1"])
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
        "from daemon.outbox import Entry, Outbox\n"
        "outbox = Outbox(Path(sys.argv[1]))\n"
        "outbox.keep([Entry('top', seq, f'top-{seq}', b'{}') for seq in range(1, 31)])\n"
        "outbox.forget('top', range(1, 11))\n"
        "outbox.keep([Entry('top', 31, 'top-31', b'last')], settled=[f'top-{seq}' for seq in range(1, 21)])\n"
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
    assert kept[-1] == Entry("top", 31, "top-31", b"last")
    assert outbox.last_seq("top") == 31
    assert [outbox.concluded(f"top-{seq}") for seq in (1, 20, 21, 31)] == [False, False, True, True]
    outbox.keep([entry(32)])
    outbox.close()


FULL_DISK = """
import resource, sys
from pathlib import Path
from daemon.outbox import Entry, Outbox, OutboxError

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

path = Path(sys.argv[1])
outbox = Outbox(path)
outbox.keep([Entry("top", 1, "top-1", b"{}")])
limit(path.with_name(path.name + "-wal").stat().st_size + 10_000)
seq, refusals = 1, []
while len(refusals) < 3:
    batch = [Entry("top", seq + i, f"top-{seq + i}", bytes(1500)) for i in (1, 2)]
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
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False)
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
    pages = path.read_bytes()
    path.write_bytes(pages[:4096] + b"\xff" * (len(pages) - 4096))
    outbox = Outbox(path)
    for ask in (
        lambda: outbox.entries("top", 0, 99),
        lambda: outbox.last_seq("top"),
        lambda: outbox.depth("top"),
        lambda: outbox.concluded("top-1"),
        lambda: outbox.keep([entry(40)]),
        lambda: outbox.forget("top", [1]),
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
        outbox.depth("top")
