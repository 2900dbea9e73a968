"""What the archive has named is whole on disk, and what makes room is what is worth least."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from daemon import images
from daemon.archive import REVIEW, Archive, Exhibit, beside, note_review, survey
from daemon.desk import lens
from daemon.messages import Outcome
from daemon.retention import Kept, Limits, Stock
from detectors.base import Image
from tests.payloads import FAILED, IDENTITY, PASSED, UNCERTAIN, UNREADABLE

ROOM = Limits(dict.fromkeys(Outcome, 10**9))
PICTURE: Image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
BY_OUTCOME = {
    Outcome.PASS: PASSED,
    Outcome.FAIL: FAILED,
    Outcome.UNCERTAIN: UNCERTAIN,
    Outcome.ERROR: UNREADABLE,
}


def draw() -> Image:
    return np.zeros((32, 32, 3), np.uint8)


def identified(number: int) -> str:
    return f"01JDA5ZK3V9Q4W8R7T6Y{number:06}"


def exhibit(number: int, outcome: Outcome = Outcome.FAIL, part_id: str = "SN-1", framing: str = "") -> Exhibit:
    verdict = BY_OUTCOME[outcome]
    capture = replace(verdict.capture, id=identified(number), part_id=part_id)
    return Exhibit(replace(verdict, capture=capture, image_ref=""), IDENTITY, PICTURE, draw, framing)


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "archive"


def test_a_reject_lies_with_its_verdict_and_its_overlay_where_its_reference_says(root: Path) -> None:
    archive = Archive(root, ROOM)
    (ref,) = archive.keep([exhibit(1, part_id="../é rocket.v2")])
    archive.close()
    place = f"top/2026-11-22/FAIL/{identified(1)}_"
    assert ref == f"{place}_____rocket_v2.png"
    assert np.array_equal(images.read(root / ref), PICTURE)
    said = json.loads(beside(root / ref, ".json").read_bytes())
    assert (said["image_ref"], said["verdict"], said["id"]) == (ref, "FAIL", identified(1))
    assert images.read(beside(root / ref, ".overlay.jpg")).shape == (32, 32, 3)
    assert len(files_under(root)) == 3


def test_a_part_that_passes_has_no_overlay_and_is_one_of_so_many(root: Path) -> None:
    archive = Archive(root, ROOM, pass_every=10)
    refs = archive.keep([exhibit(number, Outcome.PASS) for number in range(1000)])
    archive.close()
    kept = [ref for ref in refs if ref]
    assert 60 < len(kept) < 140
    assert len(files_under(root)) == 2 * len(kept)
    again = Archive(root, ROOM, pass_every=10)
    assert again.keep([exhibit(number, Outcome.PASS) for number in range(1000)]) == refs
    again.close()


@pytest.mark.parametrize("part", [exhibit(1, Outcome.PASS), replace(exhibit(1, Outcome.ERROR), image=None)])
def test_what_is_not_wanted_or_could_not_be_seen_has_no_reference(root: Path, part: Exhibit) -> None:
    archive = Archive(root, ROOM)
    assert archive.keep([part]) == [""]
    assert archive.trouble is None
    archive.close()
    assert files_under(root) == []


def test_an_outcome_without_a_quota_is_not_kept(root: Path) -> None:
    archive = Archive(root, Limits({**ROOM.quota, Outcome.ERROR: 0}))
    refs = archive.keep([exhibit(1, Outcome.ERROR), exhibit(2, Outcome.UNCERTAIN)])
    archive.close()
    assert [bool(ref) for ref in refs] == [False, True]


def test_a_framed_image_says_how_it_was_framed(root: Path) -> None:
    archive = Archive(root, ROOM)
    refs = archive.keep([exhibit(1, framing="0123456789ab"), exhibit(2)])
    archive.close()
    assert [lens.fingerprint(root / ref) for ref in refs] == ["0123456789ab", ""]
    assert all(np.array_equal(images.read(root / ref), PICTURE) for ref in refs)


def test_a_jpeg_is_close_to_the_image(root: Path) -> None:
    archive = Archive(root, ROOM, "jpeg")
    smooth = np.asarray(cv2.resize(PICTURE[:4, :4], (64, 64), interpolation=cv2.INTER_CUBIC), np.uint8)
    (ref,) = archive.keep([replace(exhibit(1), image=smooth)])
    archive.close()
    assert ref.endswith(".jpg")
    assert np.abs(images.read(root / ref).astype(int) - smooth).mean() < 4


def test_a_part_that_is_judged_again_takes_the_place_of_its_first_image(root: Path) -> None:
    archive = Archive(root, ROOM)
    first = exhibit(1)
    (ref,) = archive.keep([first])
    archive.close()
    archive = Archive(root, ROOM)
    later = replace(first, verdict=replace(first.verdict, decided_at=first.verdict.decided_at + timedelta(days=1)))
    assert archive.keep([later]) == [ref]
    (elsewhere,) = archive.keep([exhibit(1, Outcome.UNCERTAIN)])
    archive.close()
    assert "UNCERTAIN" in elsewhere
    assert len(files_under(root)) == 3
    assert [kept.ref for kept in survey(root).kept] == [elsewhere]


def test_what_a_crash_has_left_is_swept_and_what_is_a_strangers_stays(root: Path) -> None:
    archive = Archive(root, ROOM)
    (ref,) = archive.keep([exhibit(1)])
    archive.close()
    folder = (root / ref).parent
    left = [f".{identified(2)}_a.png.tmp", f"{identified(2)}_a.json", f"{identified(2)}_a.overlay.jpg"]
    strange = ["holiday.png", "notes.txt", ".hidden.tmp", "01JDA5.json"]
    for name in [*left, *strange]:
        (folder / name).write_bytes(b"?")
    before = files_under(root)
    Archive(root, ROOM).close()
    gone = {str((folder / name).relative_to(root)) for name in left}
    assert files_under(root) == [file for file in before if file not in gone]


def test_over_its_quota_the_oldest_goes_with_all_that_belongs_to_it_and_no_stranger(root: Path) -> None:
    archive = Archive(root, ROOM)
    (ref,) = archive.keep([exhibit(1)])
    archive.close()
    size = survey(root).kept[0].bytes
    (root / ref).with_name("mine.png").write_bytes(bytes(10 * size))
    beside(root / ref, REVIEW).write_bytes(b"{}")
    archive = Archive(root, Limits(dict.fromkeys(Outcome, 3 * size + size // 2)))
    refs = archive.keep([exhibit(number) for number in range(2, 7)])
    archive.close()
    assert [bool(ref) for ref in refs] == [False, False, True, True, True]
    assert sorted(kept.ref for kept in survey(root).kept) == refs[2:]
    assert len(files_under(root)) == 3 * 3 + 1


def test_a_review_is_known_at_once_and_lets_its_image_go_first(root: Path) -> None:
    archive = Archive(root, ROOM)
    refs = archive.keep([exhibit(number) for number in range(3)])
    archive.close()
    size = survey(root).kept[0].bytes
    archive = Archive(root, Limits(dict.fromkeys(Outcome, 3 * size + size // 2)))
    note_review(root, identified(1))
    (new,) = archive.keep([exhibit(3)])
    archive.close()
    assert sorted(kept.ref for kept in survey(root).kept) == [refs[0], refs[2], new]


def test_images_go_after_their_days(root: Path) -> None:
    archive = Archive(root, ROOM)
    now = exhibit(2)
    now = replace(now, verdict=replace(now.verdict, decided_at=datetime.now(UTC)))
    before = replace(exhibit(1), verdict=replace(exhibit(1).verdict, decided_at=datetime.now(UTC) - timedelta(days=9)))
    ancient, ref = archive.keep([before, now])
    archive.close()
    assert ancient
    archive = Archive(root, replace(ROOM, days=7))
    archive.keep([])
    archive.close()
    assert [kept.ref for kept in survey(root).kept] == [ref]
    assert len(files_under(root)) == 3


def test_an_overlay_that_cannot_be_drawn_costs_its_image_but_no_verdict(root: Path) -> None:
    def fail() -> Image:
        raise ValueError("no font")

    archive = Archive(root, ROOM)
    assert archive.keep([replace(exhibit(1), overlay=fail)]) == [""]
    assert archive.trouble == "no font"
    archive.close()


def test_two_daemons_do_not_share_an_archive(root: Path) -> None:
    first, second = Archive(root, ROOM), Archive(root, ROOM)
    assert second.keep([exhibit(1)]) == [""]
    assert "another inspectd" in str(second.trouble)
    first.close()
    assert second.keep([exhibit(1)]) != [""]
    assert second.trouble is None
    second.close()


def test_a_folder_that_cannot_be_used_costs_no_verdict_and_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "archive").write_text("a file")
    archive = Archive(tmp_path / "archive", ROOM)
    with capture_logs() as said:
        assert archive.keep([exhibit(1)]) == [""]
        assert archive.keep([exhibit(2), exhibit(3)]) == ["", ""]
        assert archive.trouble is not None
        (tmp_path / "archive").unlink()
        assert archive.keep([exhibit(4)]) != [""]
    assert archive.trouble is None
    assert [entry["log_level"] for entry in said] == ["warning", "info"]
    archive.close()


def aged(number: int, days: int) -> Exhibit:
    part = exhibit(number)
    return replace(part, verdict=replace(part.verdict, decided_at=datetime.now(UTC) - timedelta(days=days)))


def test_an_image_that_cannot_be_removed_keeps_no_other_from_going_and_none_from_coming(root: Path) -> None:
    archive = Archive(root, ROOM)
    refs = archive.keep([aged(number, 20 - number) for number in range(5)])
    archive.close()
    stuck = root / refs[1]
    stuck.unlink()
    stuck.mkdir()
    archive = Archive(root, replace(ROOM, days=7))
    for number in (10, 11):
        (ref,) = archive.keep([aged(number, 0)])
        assert (root / ref).is_file()
        assert str(stuck) in str(archive.trouble)
    assert [kept.id for kept in sorted(survey(root).kept)] == [identified(number) for number in (1, 10, 11)]
    stuck.rmdir()
    archive.keep([])
    assert archive.trouble is None
    assert [kept.id for kept in sorted(survey(root).kept)] == [identified(number) for number in (10, 11)]
    archive.close()


def lay(root: Path, count: int) -> None:
    """Images of FAIL, a block each."""
    folder = root / "top/2026-11-20/FAIL"
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{identified(number)}_a.png").write_bytes(b"?")


def test_what_is_over_a_lower_quota_goes_a_little_with_each_batch_and_each_removal_is_a_sign_of_life(
    root: Path,
) -> None:
    lay(root, 450)
    archive = Archive(root, Limits(dict.fromkeys(Outcome, 50 * 4096)))
    beats: list[None] = []
    archive.keep([], lambda: beats.append(None))
    assert (len(survey(root).kept), len(beats)) == (350, 100)
    (ref,) = archive.keep([exhibit(1000)], lambda: beats.append(None))
    assert (root / ref).exists()
    assert 200 < len(survey(root).kept) <= 251
    for _ in range(4):
        archive.keep([])
    archive.close()
    assert 0 < sum(kept.bytes for kept in survey(root).kept) <= 50 * 4096
    assert ref in {kept.ref for kept in survey(root).kept}


def test_what_is_no_longer_kept_stays_until_its_days_are_over(root: Path) -> None:
    lay(root, 3)
    archive = Archive(root, Limits({**ROOM.quota, Outcome.FAIL: 0}))
    archive.keep([exhibit(10)])
    archive.close()
    assert len(survey(root).kept) == 3


def test_listing_and_each_image_are_signs_of_life(root: Path) -> None:
    lay(root, 2500)
    beats: list[None] = []
    archive = Archive(root, ROOM, beat=lambda: beats.append(None))
    assert len(beats) == 3
    archive.keep([exhibit(number) for number in range(3000, 3005)], lambda: beats.append(None))
    assert len(beats) == 3 + 2 * 5
    archive.close()


def test_a_folder_that_comes_late_is_listed_under_the_eyes_of_the_watchdog(root: Path) -> None:
    root.write_text("a file")
    archive = Archive(root, ROOM)
    root.unlink()
    lay(root, 10)
    beats: list[None] = []
    archive.keep([], lambda: beats.append(None))
    archive.close()
    assert beats


def test_a_trouble_with_the_folder_is_over_with_the_next_part_of_any_outcome(root: Path) -> None:
    root.write_text("a file")
    archive = Archive(root, ROOM)
    archive.keep([exhibit(1)])
    assert archive.trouble is not None
    root.unlink()
    archive.keep([exhibit(2, Outcome.PASS)])
    assert archive.trouble is None
    archive.close()


def test_whether_the_folder_takes_files_again_is_tried_out_once_in_a_while(root: Path) -> None:
    root.mkdir()
    archive, patient = Archive(root, ROOM, probe_s=0), Archive(root.with_name("other"), ROOM)
    (root / ".probe/in the way").mkdir(parents=True)
    for each, folder in ((archive, root), (patient, root.with_name("other"))):
        (folder / "top").write_text("a file")
        assert each.keep([exhibit(1)]) == [""]
        each.keep([exhibit(2, Outcome.PASS)])
        assert "top" in str(each.trouble)
    (root / ".probe/in the way").rmdir()
    (root / ".probe").rmdir()
    archive.keep([exhibit(2, Outcome.PASS)])
    assert archive.trouble is None
    assert files_under(root) == ["top"]
    archive.close()
    patient.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from daemon.archive import Archive
from tests.unit import test_archive as own
archive = Archive(Path(sys.argv[1]), own.ROOM)
number = 0
while True:
    for ref in archive.keep([own.exhibit(number + place) for place in range(8)]):
        print(ref, flush=True)
    number += 8
"""


def test_every_image_that_was_named_before_a_kill_is_whole(root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, root], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    named = [process.stdout.readline().strip() for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    named += [line.strip() for line in process.stdout if line.endswith("\n")]
    process.wait()
    process.stdout.close()
    Archive(root, ROOM).close()
    assert {kept.ref for kept in survey(root).kept} >= set(named)
    assert survey(root).torn == []
    for kept in survey(root).kept:
        assert np.array_equal(images.read(root / kept.ref), PICTURE)
        assert json.loads(beside(root / kept.ref, ".json").read_bytes())["image_ref"] == kept.ref


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_the_floor_takes_what_passed_and_then_waits_rather_than_throw_rejects_away(small_disk: Path) -> None:
    root = small_disk / "archive"
    archive = Archive(root, replace(ROOM, floor=800_000), pass_every=1)
    passed = [archive.keep([exhibit(number, Outcome.PASS)])[0] for number in range(10)]
    rejects = [archive.keep([exhibit(100 + number)])[0] for number in range(10)]
    assert all(passed)
    assert all(rejects)
    others = small_disk / "others"
    while shutil.disk_usage(small_disk).free > 810_000:
        with others.open("ab") as file:
            file.write(bytes(5_000))
    assert archive.keep([exhibit(200)]) != [""]
    assert not (root / passed[0]).exists()
    assert all((root / ref).exists() for ref in rejects)
    with others.open("ab") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - 40_000))
    left = survey(root).kept
    assert archive.keep([exhibit(201)]) == [""]
    assert "has to" in str(archive.trouble) or "have to" in str(archive.trouble)
    assert survey(root).kept == left
    others.unlink()
    assert archive.trouble is not None  # nobody has looked at the disk since
    archive.keep([])
    assert archive.trouble is None
    assert archive.keep([exhibit(202)]) != [""]
    archive.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_on_a_full_disk_the_oldest_rejects_give_way_and_what_is_there_is_whole(small_disk: Path) -> None:
    archive = Archive(small_disk, ROOM)
    refs = [ref for number in range(0, 480, 16) for ref in archive.keep([exhibit(number + n) for n in range(16)])]
    archive.close()
    there = [kept.ref for kept in sorted(survey(small_disk).kept)]
    named = [ref for ref in refs if ref]
    assert 16 < len(there) < 200
    assert set(there) == set(named[-len(there) :])
    for ref in there:
        assert np.array_equal(images.read(small_disk / ref), PICTURE)


sizes = st.integers(1, 40)
events = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(Outcome), sizes, st.integers(0, 300)),
        st.integers(0, 30),
    ),
    max_size=60,
)


@given(events, st.fixed_dictionaries({outcome: st.integers(0, 100) for outcome in Outcome}), st.integers(0, 200))
def test_nothing_goes_over_a_quota_or_before_what_is_worth_less(
    events: list[tuple[Outcome, int, int] | int], quota: dict[Outcome, int], floor: int
) -> None:
    stock, held = Stock(Limits(quota, floor=floor)), dict[str, Kept]()
    for number, event in enumerate(events):
        if isinstance(event, int):
            stock.review(str(event))
            held.update({str(event): replace(held[str(event)], reviewed=True)} if str(event) in held else {})
            continue
        outcome, size, free = event
        new = Kept("2026-11-22", number, str(number), "", outcome, size)
        gone = stock.make_room(new, free, 1000)
        if gone is not None:
            freed = sum(kept.bytes for kept in gone)
            for kept in gone:
                assert held.pop(kept.id) == kept
            assert free + freed - size >= floor
            for kept in gone:
                assert kept.outcome is outcome or kept.rank <= new.rank
                peers = [other for other in held.values() if other.outcome is kept.outcome and other.rank == kept.rank]
                assert all(kept < other for other in peers)
                if kept.rank == 3:  # then nothing else could have gone in its place
                    assert all(other.rank == 3 for other in held.values() if other.outcome is Outcome.FAIL)
                    fails = [other for other in [*held.values(), *gone] if other.outcome is Outcome.FAIL]
                    over_quota = sum(other.bytes for other in fails) + size > quota[Outcome.FAIL]
                    assert over_quota or all(other.rank == 3 for other in held.values())
            held[new.id] = new
        assert len(stock) == len(held)
        for each in Outcome:
            used = sum(kept.bytes for kept in held.values() if kept.outcome is each)
            assert stock.used(each) == used
            assert used <= quota[each]


def test_a_part_that_passed_never_pushes_a_reject_out() -> None:
    stock = Stock(Limits(dict.fromkeys(Outcome, 100), floor=50))
    assert stock.make_room(Kept("2026-11-22", 1, "1", "", Outcome.FAIL, 20), 100, 9) == []
    assert stock.make_room(Kept("2026-11-22", 2, "2", "", Outcome.PASS, 20), 60, 9) is None
    assert stock.make_room(Kept("2026-11-22", 3, "3", "", Outcome.FAIL, 20), 60, 9) == [stock_of("1")]


def test_no_more_than_may_goes_at_once_and_a_later_image_finds_the_room() -> None:
    stock = Stock(Limits(dict.fromkeys(Outcome, 100), floor=50))
    for number in range(5):
        assert stock.make_room(Kept("2026-11-22", number, str(number), "", Outcome.FAIL, 20), 200, 9) == []
    new = Kept("2026-11-22", 5, "5", "", Outcome.FAIL, 20)
    assert stock.make_room(new, 0, 2) == [replace(stock_of(id_), at=int(id_)) for id_ in ("0", "1")]
    assert stock.find("5") is None
    assert len(stock.make_room(new, 40, 2) or []) == 2
    assert stock.find("5") is new
    assert stock.used(Outcome.FAIL) == 40


def stock_of(id_: str) -> Kept:
    return Kept("2026-11-22", 1, id_, "", Outcome.FAIL, 20)


def test_verdicts_of_all_outcomes_are_kept_apart(root: Path) -> None:
    archive = Archive(root, ROOM, pass_every=1)
    refs = archive.keep([exhibit(number, outcome) for number, outcome in enumerate(Outcome)])
    archive.close()
    assert [ref.split("/")[2] for ref in refs] == [outcome.name for outcome in Outcome]
    assert {(kept.ref, kept.outcome) for kept in survey(root).kept} == set(zip(refs, Outcome, strict=True))
