"""Files that stay where they are, and daemons that are killed in whatever they do: still one verdict for each part."""

import json
import os
import random
import signal
import sqlite3
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from daemon.outbox import Outbox
from daemon.sources.folder import ledger
from daemon.sources.folder.claims import Keeping, State
from daemon.sources.folder.ledger import Ledger, LedgerError
from daemon.sources.folder.rooms import Rooms
from tests.folders import Arrivals, Reader, eventually, file_of, names_under, pixels, source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "incoming"
    path.mkdir()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def test_files_stay_where_they_are_and_are_judged_once_over_restarts(folder: Path, file: Path) -> None:
    for number in range(3):
        (folder / f"part{number}.png").write_bytes(file_of(pixels(number)))
    for run, expected in enumerate((4, 1)):
        watched = source(folder, ledger=file)
        with Arrivals(watched) as arrivals:
            (folder / f"new{run}.png").write_bytes(file_of(pixels(9)))
            for _ in range(expected):
                frame = arrivals.frame()
                assert frame.capture.origin == str(folder / f"{frame.capture.part_id}.png")
                assert watched.settle(frame.capture, None)
            assert arrivals.nothing()
    assert names_under(folder) == ["new0.png", "new1.png", "part0.png", "part1.png", "part2.png"]
    assert sorted(path.name for path in folder.iterdir()) == names_under(folder)


def test_what_was_not_settled_comes_again_with_the_same_id_and_what_has_a_verdict_does_not(
    folder: Path, file: Path
) -> None:
    for number in range(3):
        (folder / f"part{number}.png").write_bytes(file_of(pixels(number)))
    with Arrivals(source(folder, ledger=file)) as arrivals:
        before = [arrivals.frame().capture for _ in range(3)]
    judged = before[1].id
    for _ in range(2):
        with Arrivals(source(folder, ledger=file, concluded=lambda claim_id: claim_id == judged)) as arrivals:
            after = [arrivals.frame() for _ in range(2)]
            assert arrivals.nothing()
        assert [frame.capture.id for frame in after] == [before[0].id, before[2].id]
        assert np.array_equal(after[1].image, pixels(2))


def test_an_overwritten_file_is_a_new_part_and_forgets_the_old(folder: Path, file: Path) -> None:
    watched = source(folder, ledger=file)
    with Arrivals(watched) as arrivals:
        captures = []
        for shade in range(5):
            (folder / "image.png").write_bytes(file_of(pixels(shade)))
            frame = arrivals.frame()
            assert np.array_equal(frame.image, pixels(shade))
            captures.append(frame.capture)
            if shade != 2:
                watched.settle(frame.capture, None)
        assert watched.settle(captures[2], None)
    ids = [capture.id for capture in captures]
    assert ids == sorted(set(ids))
    assert Ledger(folder, file).left_over() == []
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("SELECT count(*) FROM file").fetchone() == (1,)


@pytest.mark.parametrize("leave", [False, True])
def test_a_file_that_changed_before_its_claim_must_come_to_rest_again(folder: Path, file: Path, *, leave: bool) -> None:
    path = folder / "part.png"
    path.write_bytes(b"first")
    state = State.of(path)
    path.write_bytes(b"second part")
    keeping: Keeping = Ledger(folder, file) if leave else Rooms(folder)
    keeping.prepare()
    with keeping.alone():
        claim, whole = keeping.claim("0" * 26, path, state, None)
        assert not whole
        claim, whole = keeping.claim("0" * 25 + "1", claim.path, State.of(claim.path), None)
        assert whole
        assert claim.path.read_bytes() == b"second part"
        assert [left.id for left in keeping.left_over()] == [claim.id]


def test_a_file_overwritten_before_its_verdict_is_said_and_the_new_one_is_judged(folder: Path, file: Path) -> None:
    (folder / "image.png").write_bytes(file_of(pixels(1)))
    with Arrivals(source(folder, ledger=file)) as arrivals:
        first = arrivals.frame().capture
    (folder / "image.png").write_bytes(file_of(pixels(2)))
    with capture_logs() as logs, Arrivals(source(folder, ledger=file)) as arrivals:
        second = arrivals.frame()
        assert arrivals.nothing()
    assert np.array_equal(second.image, pixels(2))
    assert second.capture.id > first.id
    (entry,) = logs
    assert "overwritten" in entry["event"]
    assert entry["id"] == first.id


def test_a_file_touched_but_not_changed_is_not_judged_again(folder: Path, file: Path) -> None:
    (folder / "part.png").write_bytes(file_of(pixels(1)))
    with Arrivals(source(folder, ledger=file)) as arrivals:
        arrivals.frame()
        os.close(os.open(folder / "part.png", os.O_WRONLY))
        (folder / "part.png").chmod(0o600)
        assert arrivals.nothing()


def test_a_share_mounted_anew_that_numbers_its_files_anew_is_not_judged_again(folder: Path, file: Path) -> None:
    path = folder / "part.png"
    path.write_bytes(file_of(pixels(1)))
    watched = source(folder, ledger=file)
    with Arrivals(watched) as arrivals:
        watched.settle(arrivals.frame().capture, None)
    before = path.stat()
    (folder / "copy").write_bytes(path.read_bytes())
    os.utime(folder / "copy", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "copy").rename(path)
    assert path.stat().st_ino != before.st_ino
    with Arrivals(source(folder, ledger=file)) as arrivals:
        assert arrivals.nothing()


def test_of_files_that_are_gone_only_so_many_are_remembered(folder: Path, file: Path) -> None:
    kept = Ledger(folder, file)
    (folder / "part.png").touch()
    with kept.alone():
        for number in range(50):
            path = folder / f"{number}.png"
            path.touch()
            claim, _ = kept.claim(f"{number:026}", path, State.of(path), None)
            kept.put_away(claim, None)
        limit, ledger.REMEMBERED = ledger.REMEMBERED, 10
        try:
            kept.listed({"49.png", "0.png", "other.png"})
        finally:
            ledger.REMEMBERED = limit
        remembered = [number for number in range(50) if kept.handed_over(f"{number}.png") is not None]
    assert remembered == [0, *range(39, 50)]
    with kept.alone():
        assert [number for number in range(50) if kept.handed_over(f"{number}.png") is not None] == remembered


def test_a_ledger_that_is_none_is_said_with_its_cure_and_taken_up_when_it_is_gone(folder: Path, file: Path) -> None:
    file.write_bytes(b"no database, " * 1000)
    watched = source(folder, ledger=file)
    with Arrivals(watched) as arrivals:
        failure = arrivals.failure()
    assert str(file) in failure
    assert "move it away" in failure
    with pytest.raises(LedgerError):
        Ledger(folder, file).left_over()
    file.unlink()
    with Arrivals(watched) as arrivals:
        (folder / "part.png").write_bytes(file_of(pixels(1)))
        assert arrivals.frame().capture.part_id == "part"


def test_a_second_daemon_on_the_folder_waits(folder: Path, file: Path, tmp_path: Path) -> None:
    with Arrivals(source(folder, ledger=file)) as arrivals:
        assert arrivals.watching()
        for second in (source(folder, ledger=tmp_path / "other.sqlite"), source(folder, ledger=file)):
            stop = threading.Event()
            with pytest.raises(Exception, match="in use by another inspectd"):
                next(second.frames(stop))


def test_repeated_contents_are_left_out_and_not_looked_at_again(folder: Path, file: Path) -> None:
    with capture_logs() as logs, Arrivals(source(folder, ledger=file, skip_duplicates=True)) as arrivals:
        (folder / "first.png").write_bytes(file_of(pixels(1)))
        arrivals.frame()
        (folder / "second.png").write_bytes(file_of(pixels(1)))
        assert eventually(lambda: bool(logs))
        assert arrivals.nothing()
    assert len(logs) == 1


def write_parts(folder: Path, count: int) -> None:
    """Files and, of each other, a sidecar that says its number."""
    for number in range(count):
        if number % 2:
            (folder / f"part{number}.json").write_text(json.dumps({"meta": {"number": number}}))
        (folder / f"part{number}.png").write_bytes(file_of(pixels(number % 256)))


def verdicts(state: Path) -> list[tuple[str, str]]:
    """Id and part of each verdict in the record."""
    outbox = Outbox(state / "outbox.sqlite")
    try:
        return [(entry.id, entry.payload.decode()) for entry in outbox.entries("s1", 0, 1000)]
    finally:
        outbox.close()


def has_more_than(count: int, reader: Reader) -> bool:
    return len(reader.told()) > count


def check(folder: Path, state: Path, reader: Reader, count: int, *, leave: bool) -> None:
    """Each part has one verdict under the one id it ever had, its sidecar's words, and its place."""
    found = verdicts(state)
    assert sorted(part for _, part in found) == sorted(f"part{number}" for number in range(count))
    assert {(told["id"], told["part"]) for told in reader.told()} == set(found)
    assert all(told["meta"].get("number", 0) in {0, int(told["part"][4:])} for told in reader.told())
    expected = [f"part{number}.png" for number in range(count)]
    if leave:
        assert sorted(path.name for path in folder.glob("*.png")) == sorted(expected)
    else:
        assert names_under(folder / "processing") == []
        assert {path.name for path in folder.glob("done/*/*.png")} == set(expected)


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("moment", ["handed", "kept", "settled"])
def test_a_daemon_killed_at_a_moment_gives_each_part_one_verdict(
    folder: Path, tmp_path: Path, moment: str, *, leave: bool
) -> None:
    state = tmp_path / "state"
    write_parts(folder, 6)
    options = ["--leave"] if leave else []
    first = Reader(folder, state, *options, f"--die={moment}:3")
    assert first.wait() == -signal.SIGKILL
    second = Reader(folder, state, *options, "--idle=8")
    assert second.wait() == 0, second.log()
    check(folder, state, second, 6, leave=leave)


@pytest.mark.parametrize("leave", [False, True])
def test_a_daemon_killed_again_and_again_gives_each_part_one_verdict_with_its_sidecar(
    folder: Path, tmp_path: Path, *, leave: bool
) -> None:
    state = tmp_path / "state"
    chance = random.Random(leave)
    options = ["--sidecar", *(["--leave"] if leave else [])]
    write_parts(folder, 300)
    for number in range(0, 300, 2):
        (folder / f"part{number}.png.json").write_text(json.dumps({"meta": {"number": number}}))
    for _ in range(5):
        reader = Reader(folder, state, *options)
        assert eventually(partial(has_more_than, len(reader.told()) + 3, reader)), reader.log()
        time.sleep(chance.random() * 0.03)
        reader.kill()
    assert len(verdicts(state)) < 300
    last = Reader(folder, state, *options, "--idle=10")
    assert last.wait() == 0, last.log()
    check(folder, state, last, 300, leave=leave)
    assert all(told["meta"] == {"number": int(told["part"][4:])} for told in last.told())
    if not leave:
        assert len(list(folder.glob("done/*/*.png.json"))) == 300
