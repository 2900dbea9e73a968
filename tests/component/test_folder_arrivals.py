"""All the ways in which files come into a folder and go away: each part is handed over once, whatever happens."""

import ftplib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from daemon.messages import Unreadable
from daemon.sources.folder.claims import State
from daemon.sources.names import free_path
from tests.folders import (
    NEVER_MS,
    NOBODY,
    Arrivals,
    Reader,
    eventually,
    file_of,
    names_under,
    pixels,
    source,
    unprivileged,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "incoming"
    path.mkdir()
    return path


@pytest.fixture(params=["move", "leave"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """Of each way of keeping."""
    return tmp_path / "ledger.sqlite" if request.param == "leave" else None


@pytest.fixture
def ftp(folder: Path) -> Iterator[ftplib.FTP]:
    """A camera's side of an FTP server whose folder is the watched one."""
    pytest.importorskip("pyftpdlib", reason="pyftpdlib is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-W", "ignore", "-m", "pyftpdlib", "-i", "127.0.0.1", "-p", str(port), "-w", "-d"]
    with subprocess.Popen([*command, str(folder)], stderr=subprocess.DEVNULL) as server:
        client = ftplib.FTP(timeout=10)  # noqa: S321 -- what cameras speak

        def connected() -> bool:
            with suppress(ConnectionRefusedError):
                client.connect("127.0.0.1", port)
                return True
            return False

        try:
            assert eventually(connected)
            log_in(client)
            yield client
        finally:
            client.close()
            server.terminate()


def log_in(ftp: ftplib.FTP) -> None:
    """As anybody, to send bytes as they are."""
    ftp.login()
    ftp.voidcmd("TYPE I")


def store(ftp: ftplib.FTP, name: str, data: bytes) -> None:
    """Send a file in eight pieces."""
    with ftp.transfercmd(f"STOR {name}") as connection:
        for start in range(0, len(data), len(data) // 7):
            connection.sendall(data[start : start + len(data) // 7])
            time.sleep(0.02)
    ftp.voidresp()


@pytest.mark.parametrize("settle_ms", [5, NEVER_MS])
def test_a_slow_ftp_transfer_is_one_frame(folder: Path, ftp: ftplib.FTP, ledger: Path | None, settle_ms: int) -> None:
    with Arrivals(source(folder, settle_ms=settle_ms, ledger=ledger)) as arrivals:
        assert arrivals.watching()
        store(ftp, "part.png", file_of(pixels(1)))
        assert np.array_equal(arrivals.frame().image, pixels(1))
        assert arrivals.nothing()


def test_an_ftp_transfer_under_a_temporary_name_is_one_frame_under_its_last(folder: Path, ftp: ftplib.FTP) -> None:
    with Arrivals(source(folder, settle_ms=NEVER_MS, rescan_s=NEVER_MS)) as arrivals:
        assert arrivals.watching()
        for shade in range(2):
            store(ftp, "camera_tmp.jpg", file_of(pixels(shade), "JPEG"))
            assert arrivals.nothing()
            ftp.rename("camera_tmp.jpg", "camera.jpg")
            assert arrivals.frame().capture.part_id == "camera"
        assert arrivals.nothing()


def abort(ftp: ftplib.FTP, name: str, data: bytes) -> None:
    connection = ftp.transfercmd(f"STOR {name}")
    connection.sendall(data)
    time.sleep(0.1)
    with suppress(ftplib.Error, EOFError):
        ftp.abort()
    connection.close()


def test_an_ftp_transfer_that_is_aborted_and_repeated_is_one_frame(
    folder: Path, ftp: ftplib.FTP, ledger: Path | None
) -> None:
    data = file_of(pixels(2))
    with Arrivals(source(folder, ledger=ledger)) as arrivals:
        abort(ftp, "part.png", data[:3000])
        assert arrivals.nothing()
        ftp.quit()
        ftp.connect(ftp.host, ftp.port)
        log_in(ftp)
        store(ftp, "part.png", data)
        assert np.array_equal(arrivals.frame().image, pixels(2))
        assert arrivals.nothing()


def test_an_ftp_transfer_that_is_aborted_for_good_is_one_unreadable_part(
    folder: Path, ftp: ftplib.FTP, ledger: Path | None
) -> None:
    with Arrivals(source(folder, give_up_s=0.3, ledger=ledger)) as arrivals:
        abort(ftp, "part.png", file_of(pixels(2))[:3000])
        assert "cut off" in arrivals.unreadable().reason
        assert arrivals.nothing()


def elsewhere(tmp_path: Path) -> Path:
    """A folder on another file system."""
    memory = Path("/dev/shm")  # noqa: S108 -- only its file system matters
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip(f"{memory} is not another file system than that of the tests' temporary folder")
    return Path(tempfile.mkdtemp(dir=memory))


def arrive(way: str, folder: Path, outside: Path) -> None:
    """Let the files 0.png … 4.png arrive in one of the ways."""
    for shade in range(5):
        data, path = file_of(pixels(shade)), folder / f"{shade}.png"
        match way:
            case "written slowly":
                with path.open("wb") as file:
                    for start in range(0, len(data), 2000):
                        file.write(data[start : start + 2000])
                        file.flush()
                        time.sleep(0.01)
            case "renamed":
                (folder / "upload.part").write_bytes(data)
                (folder / "upload.part").rename(path)
            case "linked":
                (outside / path.name).write_bytes(data)
                path.hardlink_to(outside / path.name)
            case _:  # not by shutil.move, which sets a file's times after closing it, when it may have been taken away
                (outside / path.name).write_bytes(data)
                subprocess.run(["mv", outside / path.name, path], check=True)


WAYS = ["written slowly", "renamed", "linked", "moved in", "moved in from another file system"]


@pytest.mark.parametrize("way", WAYS)
def test_each_arriving_file_is_one_frame(way: str, folder: Path, tmp_path: Path, ledger: Path | None) -> None:
    outside = elsewhere(tmp_path) if way.endswith("system") else tmp_path / "outside"
    outside.mkdir(exist_ok=True)
    try:
        with Arrivals(source(folder, ledger=ledger)) as arrivals:
            (folder / "link.png").symlink_to(tmp_path / "outside" / "0.png")
            arrive(way, folder, outside)
            frames = {frame.capture.part_id: frame.image for frame in (arrivals.frame() for _ in range(5))}
            assert arrivals.nothing()
    finally:
        shutil.rmtree(outside)
    assert all(np.array_equal(frames[str(shade)], pixels(shade)) for shade in range(5))
    assert (folder / "link.png").is_symlink()


def without_file_events() -> list[str]:
    """What starts a program to which the kernel grants no inotify instance."""
    unshare = shutil.which("unshare")
    lower = "echo 0 > /proc/sys/user/max_inotify_instances"
    if (
        unshare is None
        or subprocess.run([unshare, "-Ur", "sh", "-c", lower], capture_output=True, check=False).returncode
    ):
        pytest.skip("user namespaces are not to be had here, so inotify cannot be taken from one program alone")
    return [unshare, "-Ur", "sh", "-c", f'{lower} && exec "$@"', "sh"]


@pytest.mark.parametrize("kept", ["--leave", "--rescan=60"])
def test_each_arriving_file_is_one_frame_without_file_events(folder: Path, tmp_path: Path, kept: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with Reader(folder, tmp_path / "state", kept, prefix=without_file_events()) as reader:
        for way in WAYS[:4]:
            before = len(reader.told())
            arrive(way, folder, outside)
            assert eventually(partial(reader.has_told, before + 5)), reader.log()
            for path in folder.glob("*.png"):
                path.unlink()
        assert "no file events" in reader.log()
        time.sleep(0.6)
        assert [told["failure"] for told in reader.told()] == [None] * 20


def test_what_an_overflown_queue_of_events_lost_is_found_by_looking(folder: Path, tmp_path: Path) -> None:
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with Reader(folder, tmp_path / "state", "--rescan=0.5") as reader:
        os.kill(reader.pid, signal.SIGSTOP)
        for number in range(queue):  # two names in turn: the kernel takes equal events in a row for one
            for name in ("a.tmp", "b.tmp"):
                os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT))
            if number % 1000 == 0:
                (folder / f"part{number}.png").write_bytes(file_of(pixels(1)))
        for number in range(20):
            (folder / f"late{number}.png").write_bytes(file_of(pixels(2)))
        os.kill(reader.pid, signal.SIGCONT)
        expected = len([*folder.glob("*.png"), *folder.glob("*/*.png"), *folder.glob("*/*/*.png")])
        assert eventually(lambda: len(reader.told()) == expected), reader.log()
        assert "overflow" in reader.log()
        ids = [told["part"] for told in reader.told()]
        assert len(set(ids)) == len(ids)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kept", ["--leave", "--rescan=5"])
def test_forty_thousand_files_at_once_are_one_frame_each(folder: Path, tmp_path: Path, kept: str) -> None:
    data = file_of(pixels(1)[:4, :4])
    for number in range(40_000):
        (folder / f"part{number}.png").write_bytes(data)
    reader = Reader(folder, tmp_path / "state", kept, "--idle=60")
    try:
        assert reader.wait(500) == 0, reader.log()
    finally:
        reader.kill()
    ids = [told["part"] for told in reader.told()]
    assert len(ids) == len(set(ids)) == 40_000


def test_files_that_vanish_at_any_step_stop_nothing_and_those_that_stay_come_once(
    folder: Path, ledger: Path | None
) -> None:
    chance = random.Random(1)
    vanishing = {f"gone{number}.png" for number in range(150)}
    staying = {f"stay{number}.png" for number in range(50)}
    watched = source(folder, settle_ms=1, give_up_s=0.2, ledger=ledger)
    done = threading.Event()

    def delete() -> None:
        while not done.is_set():
            for found in [*folder.glob("gone*"), *folder.glob("processing/*~gone*")]:
                if chance.random() < 0.3:
                    found.unlink(missing_ok=True)
            time.sleep(0.002)

    deleter = threading.Thread(target=delete)
    taken: list[str] = []
    with capture_logs(), Arrivals(watched) as arrivals:
        deleter.start()
        for number, name in enumerate(chance.sample(sorted(vanishing | staying), 200)):
            data = file_of(pixels(1)[:9, :9])
            (folder / name).write_bytes(data if number % 3 else data[:50])
        while not staying <= {f"{name}.png" for name in taken}:
            part = arrivals.next()
            taken.append(part.capture.part_id)
            watched.settle(part.capture, part.reason if isinstance(part, Unreadable) else None)
        done.set()
        deleter.join()
    assert len(taken) == len(set(taken))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """A folder of a user who is not root."""
    with ExitStack() as stack:
        path = tmp_path / "incoming"
        if os.geteuid() == 0:  # others may not enter pytest's own temporary folders
            path = Path(tempfile.mkdtemp())
            stack.callback(shutil.rmtree, path)
            os.chown(path, NOBODY, NOBODY)
        else:
            path.mkdir()
        yield path


@pytest.mark.parametrize("leave", [False, True])
def test_a_file_that_may_not_be_read_is_unreadable_and_holds_up_no_other(own: Path, *, leave: bool) -> None:
    ledger = own / "ledger.sqlite" if leave else None
    with unprivileged():
        (own / "shut.png").write_bytes(file_of(pixels(1)))
        (own / "shut.png").chmod(0)
        with Arrivals(source(own, give_up_s=0.5, ledger=ledger)) as arrivals:
            (own / "open.png").write_bytes(file_of(pixels(2)))
            assert arrivals.frame().capture.part_id == "open"
            assert arrivals.unreadable().reason == "the file cannot be read: Permission denied"
            assert arrivals.nothing()


def test_a_file_that_may_be_read_in_time_is_a_frame(own: Path) -> None:
    with unprivileged():
        (own / "part.png").write_bytes(file_of(pixels(1)))
        (own / "part.png").chmod(0)
        with Arrivals(source(own)) as arrivals:
            assert arrivals.nothing()
            (own / "part.png").chmod(0o600)
            assert np.array_equal(arrivals.frame().image, pixels(1))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of two users")
def test_a_file_of_another_user_in_a_sticky_folder_is_said_and_holds_up_no_other(own: Path) -> None:
    own.chmod(0o1777)
    os.chown(own, 0, 0)
    (own / "roots.png").write_bytes(file_of(pixels(1)))
    for room in ("processing", "done", "failed"):
        (own / room).mkdir()
        os.chown(own / room, NOBODY, NOBODY)
    with unprivileged(), capture_logs() as logs, Arrivals(source(own)) as arrivals:
        (own / "part.png").write_bytes(file_of(pixels(2)))
        assert arrivals.frame().capture.part_id == "part"
        assert eventually(lambda: bool(logs))
    assert logs[0]["event"] == "a file cannot be claimed"
    assert "roots.png" in logs[0]["reason"]


def test_a_folder_that_may_not_be_changed_is_said_with_its_cure_and_can_be_used_with_a_ledger(own: Path) -> None:
    state = Path(tempfile.mkdtemp())
    try:
        if os.geteuid() == 0:
            os.chown(state, NOBODY, NOBODY)
        with unprivileged():
            (own / "part.png").write_bytes(file_of(pixels(1)))
            own.chmod(0o555)
            with Arrivals(source(own)) as arrivals:
                assert "chgrp" in arrivals.failure()
            with Arrivals(source(own, ledger=state / "ledger.sqlite")) as arrivals:
                assert arrivals.frame().capture.part_id == "part"
            own.chmod(0)
            with Arrivals(source(own, ledger=state / "ledger.sqlite")) as arrivals:
                assert "chmod o+rx" in arrivals.failure()
            own.chmod(0o755)
    finally:
        shutil.rmtree(state)


Mount = Callable[..., None]


@pytest.fixture
def mount(folder: Path) -> Iterator[Mount]:
    """Mount something on a folder, the watched one if not told; it is unmounted in the end."""
    with ExitStack() as stack:

        def mounted(*options: str, at: Path = folder) -> None:
            if subprocess.run(["mount", *options, str(at)], capture_output=True, check=False).returncode:
                pytest.skip("mounting takes root")
            stack.callback(subprocess.run, ["umount", "-l", str(at)], capture_output=True, check=False)

        yield mounted


def fill(path: Path, size: int) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(size))


def test_a_disk_without_room_for_a_day_of_done_files_keeps_them_in_processing_until_there_is(
    folder: Path, mount: Mount
) -> None:
    mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=8", "tmpfs")
    watched = source(folder)
    with capture_logs() as logs, Arrivals(watched) as arrivals:
        (folder / "part.png").write_bytes(file_of(pixels(1)))
        capture = arrivals.frame().capture
        with suppress(OSError):
            for number in range(8):
                (folder / f"{number}.txt").touch()
        assert not watched.settle(capture, None)
        assert any("No space left" in entry.get("reason", "") for entry in logs)
        (folder / "0.txt").unlink()
        assert eventually(lambda: names_under(folder / "done") == ["part.png"])


def test_a_disk_too_full_for_the_reason_keeps_the_file_all_the_same(folder: Path, mount: Mount) -> None:
    mount("-t", "tmpfs", "-o", "size=256k", "tmpfs")
    watched = source(folder, give_up_s=0.1)
    with Arrivals(watched) as arrivals:
        (folder / "bad.png").write_bytes(b"no image")
        part = arrivals.unreadable()
        fill(folder / "full.bin", 4096)
        assert watched.settle(part.capture, part.reason)
    (kept,) = (folder / "failed").glob("*/bad.png")
    assert kept.read_bytes() == b"no image"
    reasons = list((folder / "failed").glob("*/*.reason.txt"))
    assert not reasons or reasons[0].read_text(encoding="utf-8") in {"", f"{part.reason}\n"}


def test_a_disk_too_full_for_the_rooms_is_said_and_tried_again(folder: Path, mount: Mount) -> None:
    mount("-t", "tmpfs", "-o", "size=1m,nr_inodes=3", "tmpfs")
    (folder / "part.png").write_bytes(file_of(pixels(1)))
    watched = source(folder)
    with Arrivals(watched) as arrivals:
        assert "see to space on its disk" in arrivals.failure()
    assert (folder / "part.png").exists()
    subprocess.run(["mount", "-o", "remount,nr_inodes=20", str(folder)], check=True)
    with Arrivals(watched) as arrivals:
        assert arrivals.frame().capture.part_id == "part"


def test_a_disk_too_full_for_the_ledger_holds_the_parts_until_there_is_room(
    folder: Path, tmp_path: Path, mount: Mount
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", at=state)
    watched = source(folder, ledger=state / "ledger.sqlite")
    with Arrivals(watched) as arrivals:
        (folder / "first.png").write_bytes(file_of(pixels(1)))
        first = arrivals.frame().capture
        fill(state / "full.bin", 4096)
        for number in range(200):
            (folder / f"part{number:03}.png").write_bytes(file_of(pixels(2)))
        assert "ledger.sqlite" in arrivals.failure()
        taken = arrivals.taken()
    assert not watched.settle(first, None)
    (state / "full.bin").unlink()
    with Arrivals(watched) as arrivals:
        again = [arrivals.frame().capture.part_id for _ in range(200 - len(taken))]
        assert arrivals.nothing()
    ids = [part.capture.part_id for part in taken] + again
    assert sorted(ids) == [f"part{number:03}" for number in range(200)]


def test_a_folder_that_is_unmounted_and_mounted_again_goes_on_where_it_was(
    folder: Path, tmp_path: Path, mount: Mount, ledger: Path | None
) -> None:
    share = tmp_path / "share"
    share.mkdir()
    mount("--bind", str(share))
    watched = source(folder, ledger=ledger)
    with Arrivals(watched) as arrivals:
        for shade in range(3):
            (share / f"part{shade}.png").write_bytes(file_of(pixels(shade)))
        captures = [arrivals.frame().capture for _ in range(3)]
        watched.settle(captures[0], None)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        assert "mounted over" in arrivals.failure()
    with capture_logs():
        assert watched.settle(captures[1], None) == (ledger is not None)
    with Arrivals(watched) as arrivals:
        assert arrivals.nothing()
        mount("--bind", str(share))
        assert "mounted over" in arrivals.failure()
    with Arrivals(watched) as arrivals:
        assert arrivals.nothing()
        watched.settle(captures[2], None)
        (share / "part3.png").write_bytes(file_of(pixels(3)))
        assert arrivals.frame().capture.part_id == "part3"
        assert arrivals.nothing()
    if ledger is None:
        assert names_under(share / "done") == ["part0.png", "part1.png", "part2.png"]


def test_the_state_of_what_is_no_file_is_not_to_be_had(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder / "nowhere")
    for path in (folder, folder / "link.png", folder / "missing.png"):
        with pytest.raises(FileNotFoundError):
            State.of(path)


@pytest.mark.long
def test_among_a_hundred_thousand_files_of_one_name_a_free_path_is_found_with_few_questions(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    for number in range(1, 100_000):
        os.close(os.open(tmp_path / f"a-{number}.png", os.O_CREAT))
    assert free_path(tmp_path, "a.png").name == "a-100000.png"
