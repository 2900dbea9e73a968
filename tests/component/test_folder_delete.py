"""Judged files that are deleted: never before their verdict is safe, whenever the daemon is killed."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from daemon.outbox import Outbox
from tests.folders import Arrivals, Reader, eventually, file_of, names_under, pixels, source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "incoming"
    path.mkdir()
    return path


def write_parts(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"part{number}.png").write_bytes(file_of(pixels(number % 200)))
        (folder / f"part{number}.json").write_text(json.dumps({"meta": {"number": number}}))


def verdicts(state: Path) -> list[str]:
    """The parts that the record has verdicts of."""
    outbox = Outbox(state / "outbox.sqlite")
    try:
        return sorted(entry.payload.decode() for entry in outbox.entries("s1", 0, 1000))
    finally:
        outbox.close()


def has_more_than(count: int, reader: Reader) -> bool:
    return len(reader.told()) > count


def test_a_judged_file_is_deleted_with_its_sidecar_and_one_without_an_image_goes_to_failed(folder: Path) -> None:
    watched = source(folder, delete=True, sidecar=True, give_up_s=0.3)
    write_parts(folder, 1)
    with Arrivals(watched) as arrivals:
        good = arrivals.frame()
        assert len(names_under(folder)) == 2
        assert watched.settle(good.capture, None)
        assert names_under(folder) == []
        (folder / "torn.png").write_bytes(file_of(pixels(1))[:2000])
        bad = arrivals.unreadable()
        assert watched.settle(bad.capture, bad.reason)
    assert names_under(folder) == names_under(folder / "failed") == ["torn.png", "torn.png.reason.txt"]


@pytest.mark.parametrize("moment", ["handed", "kept", "settled"])
def test_a_daemon_killed_at_a_moment_deletes_nothing_without_a_verdict(
    folder: Path, tmp_path: Path, moment: str
) -> None:
    state = tmp_path / "state"
    write_parts(folder, 6)
    first = Reader(folder, state, "--delete", "--sidecar", f"--die={moment}:3")
    assert first.wait() == -signal.SIGKILL
    left = {name.removesuffix(".json").removesuffix(".png").split("~")[-1] for name in names_under(folder)}
    judged = set(verdicts(state))
    assert left | judged == {f"part{number}" for number in range(6)}
    second = Reader(folder, state, "--delete", "--sidecar", "--idle=8")
    assert second.wait() == 0, second.log()
    assert verdicts(state) == [f"part{number}" for number in range(6)]
    assert names_under(folder) == []


def test_a_daemon_killed_again_and_again_judges_each_part_once_with_its_sidecar_and_leaves_nothing(
    folder: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    chance = random.Random(1)
    write_parts(folder, 200)
    for _ in range(5):
        reader = Reader(folder, state, "--delete", "--sidecar")
        assert eventually(partial(has_more_than, len(reader.told()) + 3, reader)), reader.log()
        time.sleep(chance.random() * 0.03)
        reader.kill()
    last = Reader(folder, state, "--delete", "--sidecar", "--idle=10")
    assert last.wait() == 0, last.log()
    assert verdicts(state) == sorted(f"part{number}" for number in range(200))
    assert all(told["meta"] == {"number": int(told["part"][4:])} for told in last.told())
    assert names_under(folder) == []
