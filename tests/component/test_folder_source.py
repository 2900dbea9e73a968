import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from structlog.testing import capture_logs

from daemon.sources.folder.source import Order
from daemon.sources.names import free_path, is_candidate, natural, part_id, shortened
from tests.folders import NEVER_MS, Arrivals, eventually, file_of, names_under, pixels, source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "incoming"
    path.mkdir()
    return path


def test_a_file_is_a_frame_with_its_origin_and_its_time(folder: Path) -> None:
    path = folder / "part 4711.png"
    path.write_bytes(file_of(pixels(1)))
    os.utime(path, (1_700_000_000, 1_700_000_000))
    with Arrivals(source(folder)) as arrivals:
        frame = arrivals.frame()
    assert np.array_equal(frame.image, pixels(1))
    assert frame.capture.station == "s1"
    assert frame.capture.part_id == "part_4711"
    assert frame.capture.captured_at == datetime.fromtimestamp(1_700_000_000, UTC)
    assert frame.capture.origin == str(path)
    assert names_under(folder) == [f"{frame.capture.id}~part 4711.png"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_a_slow_writer_gets_exactly_one_frame_with_whole_pixels(folder: Path, kind: str) -> None:
    data = file_of(pixels(2), kind)
    with Arrivals(source(folder, settle_ms=5)) as arrivals:
        with (folder / f"part.{kind}").open("wb") as file:
            for start in range(0, len(data), len(data) // 7 + 1):
                file.write(data[start : start + len(data) // 7 + 1])
                file.flush()
                time.sleep(0.03)
        frame = arrivals.frame()
        assert arrivals.nothing()
    with Pillow.open(BytesIO(data)) as whole:
        assert np.array_equal(frame.image, np.array(whole))


def test_a_file_renamed_when_done_is_taken_once_at_once_and_under_its_last_name(folder: Path) -> None:
    temporary = ["a.tmp", "a.png.part", "a.filepart", ".a.png", "a_tmp.png", "a.png~"]
    with Arrivals(source(folder, settle_ms=NEVER_MS, rescan_s=NEVER_MS)) as arrivals:
        assert arrivals.watching()
        for name in temporary:
            (folder / name).write_bytes(file_of(pixels(3)))
        assert arrivals.nothing()
        for number, name in enumerate(temporary):
            (folder / name).rename(folder / f"part{number}.png")
            assert arrivals.frame().capture.part_id == f"part{number}"
        assert arrivals.nothing()


def test_a_file_moved_in_is_taken_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "part.png").write_bytes(file_of(pixels(4)))
    with Arrivals(source(folder, settle_ms=NEVER_MS, rescan_s=NEVER_MS)) as arrivals:
        assert arrivals.watching()
        (tmp_path / "part.png").rename(folder / "part.png")
        assert np.array_equal(arrivals.frame().image, pixels(4))


def test_a_file_closed_by_its_writer_is_taken_at_once(folder: Path) -> None:
    with Arrivals(source(folder, settle_ms=NEVER_MS, rescan_s=NEVER_MS)) as arrivals:
        assert arrivals.watching()
        (folder / "part.png").write_bytes(file_of(pixels(5)))
        assert np.array_equal(arrivals.frame().image, pixels(5))


def test_a_hard_link_is_taken_when_it_rests(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "part.png").write_bytes(file_of(pixels(6)))
    with Arrivals(source(folder, rescan_s=NEVER_MS)) as arrivals:
        assert arrivals.watching()
        (folder / "part.png").hardlink_to(tmp_path / "part.png")
        assert np.array_equal(arrivals.frame().image, pixels(6))
    assert (tmp_path / "part.png").exists()


def test_a_folder_reached_by_a_symbolic_link_is_watched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with Arrivals(source(tmp_path / "link", settle_ms=NEVER_MS, rescan_s=NEVER_MS)) as arrivals:
        assert arrivals.watching()
        (folder / "part.png").write_bytes(file_of(pixels(6)))
        assert arrivals.frame().capture.part_id == "part"


def test_one_name_used_for_twenty_parts_gives_twenty_frames(folder: Path) -> None:
    path = folder / "image.png"
    watched = source(folder)
    with Arrivals(watched) as arrivals:
        for shade in range(20):
            assert eventually(lambda: not path.exists())
            path.write_bytes(file_of(pixels(shade)))
        frames = [arrivals.frame() for _ in range(20)]
        assert arrivals.nothing()
    assert [frame.image[0, 0, 0] for frame in frames] == list(range(20))
    assert len({frame.capture.id for frame in frames}) == 20
    for frame in frames:
        watched.settle(frame.capture, None)
    assert names_under(folder) == sorted(["image.png", *(f"image-{number}.png" for number in range(1, 20))])


def test_a_file_overwritten_all_the_time_gives_whole_pictures_each_once(folder: Path) -> None:
    with Arrivals(source(folder, settle_ms=0)) as arrivals:
        for shade in range(200):
            (folder / "image.bmp").write_bytes(file_of(np.full((80 + shade, 100, 3), shade, np.uint8), "BMP"))
        shades: list[int] = []
        while 199 not in shades:
            frame = arrivals.frame()
            assert frame.image.min() == frame.image.max() == frame.image.shape[0] - 80
            shades.append(int(frame.image.max()))
    assert len(shades) == len(set(shades))


def test_many_files_at_once_come_oldest_first_with_rising_ids(folder: Path) -> None:
    for number in range(300):
        path = folder / f"part{number:03}.png"
        path.write_bytes(file_of(pixels(0)[:4, :4]))
        os.utime(path, (1_700_000_000 - number // 2, 1_700_000_000 - number // 2))
    with Arrivals(source(folder)) as arrivals:
        captures = [arrivals.frame().capture for _ in range(300)]
    expected = sorted(range(300), key=lambda number: (-(number // 2), number))
    assert [capture.part_id for capture in captures] == [f"part{number:03}" for number in expected]
    ids = [capture.id for capture in captures]
    assert ids == sorted(set(ids))


def test_what_is_no_part_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").write_bytes(file_of(pixels(7)))
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (folder / "folder.png").mkdir()
    (folder / "folder.png" / "part.png").write_bytes(file_of(pixels(7)))
    (folder / "notes.txt").write_text("shift 2")
    os.mkfifo(folder / "pipe.png")
    with Arrivals(source(folder)) as arrivals:
        assert arrivals.nothing()
    assert (folder / "folder.png" / "part.png").exists()


def test_a_file_that_vanishes_before_it_rests_is_forgotten(folder: Path) -> None:
    with Arrivals(source(folder, settle_ms=200)) as arrivals:
        assert arrivals.watching()
        os.close(os.open(folder / "gone.png", os.O_CREAT | os.O_RDONLY))
        (folder / "gone.png").unlink()
        (folder / "part.png").write_bytes(file_of(pixels(8)))
        assert arrivals.frame().capture.part_id == "part"
        assert arrivals.nothing()


def test_bad_files_are_given_up_with_their_reasons_and_hold_up_no_other(folder: Path) -> None:
    watched = source(folder, give_up_s=0.5)
    jpeg = file_of(pixels(9), "JPEG")
    half = len(jpeg) // 2
    bad = {"empty": b"", "text": b"part 4711\n", "torn": jpeg[:half], "zeros": jpeg[:half] + bytes(half)}
    for name, data in bad.items():
        (folder / f"{name}.jpg").write_bytes(data)
    with Arrivals(watched) as arrivals:
        (folder / "good.jpg").write_bytes(jpeg)
        good = arrivals.frame()
        refused = [arrivals.unreadable() for _ in bad]
        assert arrivals.nothing()
    reasons = {part.capture.part_id: part.reason for part in refused}
    assert reasons["empty"].startswith("the file is empty")
    assert reasons["text"].startswith("not a PNG, JPEG, BMP or TIFF image")
    assert reasons["torn"].startswith("the image is damaged or cut off")
    assert reasons["zeros"].startswith("the image is cut off")
    watched.settle(good.capture, None)
    for part in refused:
        watched.settle(part.capture, part.reason)
    assert names_under(folder / "done") == ["good.jpg"]
    assert names_under(folder / "failed") == sorted([f"{n}.jpg" for n in bad] + [f"{n}.jpg.reason.txt" for n in bad])
    (explanation,) = folder.glob("failed/*/text.jpg.reason.txt")
    assert explanation.read_text(encoding="utf-8") == reasons["text"] + "\n"
    assert names_under(folder / "processing") == []


def test_a_transfer_that_stalls_and_goes_on_gives_a_frame(folder: Path) -> None:
    data = file_of(pixels(10))
    (folder / "part.png").write_bytes(data[:3000])
    with Arrivals(source(folder)) as arrivals:
        assert arrivals.nothing()
        with (folder / "part.png").open("ab") as file:
            file.write(data[3000:])
        assert np.array_equal(arrivals.frame().image, pixels(10))


def test_what_a_killed_daemon_left_unjudged_comes_first_with_the_same_ids(folder: Path) -> None:
    for number in range(3):
        (folder / f"part{number}.png").write_bytes(file_of(pixels(number)))
    with Arrivals(source(folder)) as arrivals:
        before = [arrivals.frame().capture for _ in range(3)]
    (folder / "older.png").write_bytes(file_of(pixels(3)))
    os.utime(folder / "older.png", (0, 0))
    judged = before[1].id
    with Arrivals(source(folder, concluded=lambda claim_id: claim_id == judged)) as arrivals:
        after = [arrivals.frame() for _ in range(3)]
        assert arrivals.nothing()
    assert [(f.capture.id, f.capture.part_id) for f in after[:2]] == [(c.id, c.part_id) for c in (before[0], before[2])]
    assert [f.capture.captured_at for f in after[:2]] == [before[0].captured_at, before[2].captured_at]
    assert np.array_equal(after[1].image, pixels(2))
    assert after[2].capture.part_id == "older"
    assert after[2].capture.id > before[2].id
    assert names_under(folder / "done") == ["part1.png"]


def test_a_file_left_over_that_cannot_be_decoded_is_unreadable_again(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"no image")
    with Arrivals(source(folder, give_up_s=0.1)) as arrivals:
        before = arrivals.unreadable()
    with Arrivals(source(folder)) as arrivals:
        after = arrivals.unreadable()
    assert (after.capture.id, after.reason) == (before.capture.id, before.reason)


def test_ids_rise_even_if_the_clock_was_set_back(folder: Path) -> None:
    left = "7ZZZZZZZZZ0000000000000000~part.png"
    (folder / "processing").mkdir()
    (folder / "processing" / left).write_bytes(file_of(pixels(1)))
    (folder / "next.png").write_bytes(file_of(pixels(2)))
    with Arrivals(source(folder)) as arrivals:
        assert arrivals.frame().capture.id == left[:26]
        assert arrivals.frame().capture.id == "7ZZZZZZZZZ0000000000000001"


def test_looking_again_does_not_repeat_what_is_being_judged(folder: Path) -> None:
    watched = source(folder)
    (folder / "part.png").write_bytes(file_of(pixels(11)))
    with Arrivals(watched) as arrivals:
        first = arrivals.frame()
    with Arrivals(watched) as arrivals:
        assert arrivals.nothing()
    watched.settle(first.capture, None)
    watched.settle(first.capture, None)
    assert names_under(folder) == ["part.png"]


def test_a_settled_file_never_overwrites_another(folder: Path) -> None:
    watched = source(folder)
    with Arrivals(watched) as arrivals:
        for shade in range(3):
            (folder / "part.png").write_bytes(file_of(pixels(shade)))
            watched.settle(arrivals.frame().capture, None)
    (day,) = (folder / "done").iterdir()
    contents = [(day / name).read_bytes() for name in ("part.png", "part-1.png", "part-2.png")]
    assert contents == [file_of(pixels(shade)) for shade in range(3)]


def test_a_verdict_while_the_folder_is_away_is_remembered_until_it_is_back(folder: Path) -> None:
    watched = source(folder, give_up_s=0.1)
    (folder / "bad.png").write_bytes(b"no image")
    with Arrivals(watched) as arrivals:
        part = arrivals.unreadable()
        folder.rename(folder.with_name("away"))
        assert "mkdir -p" in arrivals.failure()
    with capture_logs() as logs:
        watched.settle(part.capture, part.reason)
    assert [entry["log_level"] for entry in logs] == ["warning"]
    folder.with_name("away").rename(folder)
    with Arrivals(watched) as arrivals:
        assert arrivals.nothing()
    assert names_under(folder) == ["bad.png", "bad.png.reason.txt"]


def test_a_missing_folder_is_said_with_its_path_and_its_cure(tmp_path: Path) -> None:
    with Arrivals(source(tmp_path / "nowhere")) as arrivals:
        failure = arrivals.failure()
    assert f"mkdir -p {tmp_path / 'nowhere'}" in failure
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_worked_in_is_said_with_its_cure(folder: Path) -> None:
    (folder / "processing").write_text("in the way")
    with Arrivals(source(folder)) as arrivals:
        failure = arrivals.failure()
    assert str(folder / "processing") in failure
    assert "chgrp" in failure


def test_a_folder_removed_while_it_is_watched_is_noticed_and_taken_up_again(folder: Path) -> None:
    watched = source(folder)
    with Arrivals(watched) as arrivals:
        assert arrivals.watching()
        folder.rename(folder.with_name("away"))
        shutil.rmtree(folder.with_name("away"))
        assert "mkdir -p" in arrivals.failure()
    folder.mkdir()
    with Arrivals(watched) as arrivals:
        (folder / "part.png").write_bytes(file_of(pixels(12)))
        assert arrivals.frame().capture.part_id == "part"


def test_a_folder_replaced_by_another_is_noticed(folder: Path) -> None:
    with Arrivals(source(folder)) as arrivals:
        assert arrivals.watching()
        (folder.parent / "other").mkdir()
        folder.rename(folder.parent / "unmounted")
        (folder.parent / "other").rename(folder)
        assert "replaced" in arrivals.failure()


@contextmanager
def files_left_to_open(count: int) -> Iterator[None]:
    """Let this process open only so many files more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[1]), limits[1]))
    held: list[int] = []
    try:
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            for _ in range(count):
                os.close(held.pop())
        yield
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_file_events_it_looks_often_and_says_so_once(folder: Path) -> None:
    with capture_logs() as logs, Arrivals(source(folder, rescan_s=NEVER_MS)) as arrivals:
        assert arrivals.watching()
    assert logs == []
    with capture_logs() as logs, files_left_to_open(3), Arrivals(source(folder, rescan_s=NEVER_MS)) as arrivals:
        assert eventually(lambda: bool(logs))
        for shade in range(2):
            outside = folder.parent / f"{shade}.png"
            outside.write_bytes(file_of(pixels(shade)))
            outside.rename(folder / f"part{shade}.png")
            assert arrivals.frame().capture.part_id == f"part{shade}"
    (warning,) = logs
    assert warning["log_level"] == "warning"
    assert "max_user_instances" in warning["cure"]


def test_strange_names_make_clean_part_ids_and_come_through_unchanged(folder: Path) -> None:
    names = [
        os.fsdecode(name)
        for name in (b"Teil \xc3\xbc.png", b"no utf-8 \xff.png", b"two\nlines.png", b"a+#.png", b"~.png")
    ]
    watched = source(folder)
    for name in names:
        (folder / name).write_bytes(file_of(pixels(13)))
    with Arrivals(watched) as arrivals:
        captures = [arrivals.frame().capture for _ in names]
    assert {capture.part_id for capture in captures} == {"Teil_ü", "no_utf-8__", "two_lines", "a__", "_"}
    for capture in captures:
        assert capture.origin.encode()
        watched.settle(capture, "strange")
    assert set(names_under(folder)) == {*names, *(f"{name}.reason.txt" for name in names)}


def test_a_name_as_long_as_the_system_allows_is_shortened_and_keeps_its_suffix(folder: Path) -> None:
    watched = source(folder)
    for _ in range(2):
        (folder / ("ü" * 125 + ".png")).write_bytes(file_of(pixels(14)))
        with Arrivals(watched) as arrivals:
            capture = arrivals.frame().capture
        assert capture.part_id == "ü" * 64
        watched.settle(capture, "too long")
    names = names_under(folder / "failed")
    assert len(names) == 4
    assert all(name.startswith("ü" * 90) and name.endswith((".png", ".reason.txt")) for name in names)


def test_candidates_are_told_by_their_names() -> None:
    assert all(map(is_candidate, ["a.png", "A.JPG", "b.jpeg", "c.bmp", "d.tif", "e.TIFF", "a.b.png", "tmp.png"]))
    assert not any(
        map(is_candidate, ["a.txt", ".a.png", "a.png.part", "a.tmp", "a.png~", "cam_TMP.jpg", "png", ".png"])
    )


def test_a_part_id_is_the_stem_cut_to_what_receivers_take() -> None:
    assert part_id("SN-1.2_3.png") == "SN-1.2_3"
    assert part_id("a b/c.png") == "c"
    assert part_id("x" * 80 + ".png") == "x" * 64


def test_a_short_name_stays_as_it_is() -> None:
    assert shortened("part.png") == "part.png"


def test_a_free_path_is_found_among_many_and_in_gaps(tmp_path: Path) -> None:
    assert free_path(tmp_path, "a.png").name == "a.png"
    (tmp_path / "a.png").touch()
    for number in range(1, 40):
        assert free_path(tmp_path, "a.png").name == f"a-{number}.png"
        (tmp_path / f"a-{number}.png").touch()
    (tmp_path / "a-17.png").unlink()
    assert not free_path(tmp_path, "a.png").exists()


class Tap:
    """A demand that the test turns on for a number of parts."""

    def __init__(self) -> None:
        self.open_for = 0

    since: datetime | None = None

    def wanted(self, wait_s: float = 0.0) -> bool:  # noqa: ARG002 -- the protocol's signature
        return self.open_for > 0


def test_nothing_is_claimed_while_no_part_is_wanted_and_then_as_many_as_are(folder: Path) -> None:
    tap = Tap()
    for number in range(5):
        (folder / f"part{number}.png").write_bytes(file_of(pixels(number)))
        os.utime(folder / f"part{number}.png", (1_700_000_000 + number, 1_700_000_000 + number))
    stop = threading.Event()
    taken = []
    waited = 0
    for part in source(folder).frames(stop, tap):
        if part is not None:
            taken.append(part.capture.part_id)
            tap.open_for -= 1
            waited = 0
            continue
        waited += 1
        if waited == 5:
            assert len(names_under(folder / "processing")) == len(taken)
            if len(taken) == 3:
                stop.set()
            tap.open_for = 1 if not taken else 2 if len(taken) == 1 else 0
    assert taken == ["part0", "part1", "part2"]
    assert names_under(folder / "processing")[0].endswith("~part0.png")
    assert {"part3.png", "part4.png"} <= set(names_under(folder))


def test_a_waiting_folder_yields_none_again_and_again(folder: Path) -> None:
    stop = threading.Event()
    for number, part in enumerate(source(folder).frames(stop)):
        assert part is None
        if number == 3:
            stop.set()


def test_a_file_that_waits_unwanted_may_go_away_or_be_overwritten(folder: Path) -> None:
    tap = Tap()
    for name in ("gone", "changed", "kept"):
        (folder / f"{name}.png").write_bytes(file_of(pixels(1)))
    with Arrivals(source(folder), tap) as arrivals:
        assert arrivals.nothing()
        (folder / "gone.png").unlink()
        (folder / "changed.png").write_bytes(file_of(pixels(2)))
        tap.open_for = 1
        frames = {frame.capture.part_id: frame.image for frame in (arrivals.frame(), arrivals.frame())}
        assert arrivals.nothing()
    assert np.array_equal(frames["changed"], pixels(2))
    assert np.array_equal(frames["kept"], pixels(1))


def test_by_name_numbers_come_in_their_order(folder: Path) -> None:
    names = ["img10.png", "img2.png", "img1.png", "IMG3.png", "b1.png"]
    for age, name in enumerate(names):
        (folder / name).write_bytes(file_of(pixels(age)))
        os.utime(folder / name, (1_700_000_000 - age, 1_700_000_000 - age))
    tap = Tap()
    with Arrivals(source(folder, order=Order.NAME), tap) as arrivals:
        assert arrivals.nothing()
        tap.open_for = 1
        ids = [arrivals.frame().capture.part_id for _ in names]
    assert ids == ["b1", "img1", "img2", "IMG3", "img10"]


def test_natural_order_has_no_trouble_with_strange_names() -> None:
    names = ["2.png", "a٣.png", "a²b.png", "10.png", "a.png", "001.png", "ü1.png"]
    assert sorted(names, key=natural)[:3] == ["001.png", "2.png", "10.png"]


def test_a_repeated_content_is_put_away_without_a_second_verdict_and_counted(folder: Path) -> None:
    told: list[None] = []
    watched = source(folder, skip_duplicates=True, duplicate=lambda: told.append(None), give_up_s=0.2)
    (folder / "first.png").write_bytes(file_of(pixels(1)))
    with capture_logs() as logs, Arrivals(watched) as arrivals:
        first = arrivals.frame()
        (folder / "second.png").write_bytes(file_of(pixels(1)))
        (folder / "other.png").write_bytes(file_of(pixels(2)))
        assert arrivals.frame().capture.part_id == "other"
        assert eventually(lambda: names_under(folder / "done") == ["second.png"])
        for name in ("bad", "worse"):
            (folder / f"{name}.png").write_bytes(b"")
        assert {arrivals.unreadable().capture.part_id for _ in range(2)} == {"bad", "worse"}
    assert len(told) == 1
    (entry,) = logs
    assert (entry["file"], entry["earlier"]) == ("second.png", "first.png")
    assert watched.settle(first.capture, None)
    assert names_under(folder / "done") == ["first.png", "second.png"]


def test_without_the_option_a_repeated_content_gets_its_own_verdict(folder: Path) -> None:
    with Arrivals(source(folder)) as arrivals:
        for _ in range(2):
            (folder / "part.png").write_bytes(file_of(pixels(1)))
            arrivals.frame()


@pytest.mark.long
def test_of_many_contents_the_oldest_are_forgotten(folder: Path) -> None:
    watched = source(folder, skip_duplicates=True)
    with Arrivals(watched) as arrivals:
        ids: list[str] = []
        for shade in [*range(1001), 1000, 0]:
            image = np.full((2, 2, 3), (shade % 256, shade // 256, 0), np.uint8)
            (folder / f"{shade}.tmp").write_bytes(file_of(image, "BMP"))
            (folder / f"{shade}.tmp").rename(folder / f"part{shade}.bmp")
            ids += [arrivals.frame().capture.part_id] if len(ids) <= 1000 else []
        ids.append(arrivals.frame().capture.part_id)
        assert arrivals.nothing()
    assert ids == [*(f"part{shade}" for shade in range(1001)), "part0"]
    assert names_under(folder / "done") == ["part1000.bmp"]
