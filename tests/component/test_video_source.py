import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from PIL import Image as Pillow
from structlog.testing import capture_logs

from daemon.messages import Clock, Frame, Unreadable
from daemon.sources.base import ALWAYS, Demand, SourceUnavailableError
from daemon.sources.video.source import VideoSource, shown
from daemon.stats import Drop

DEADLINE_S = 20.0
SIZE = 64, 48
PYTHON = "/usr/bin/python3"  # Debian's, which has its own bindings
RTSP_SERVER = """
import sys, gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer(address="127.0.0.1", service=sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory(shared=True)
factory.set_launch(
    "( videotestsrc is-live=true pattern=red ! video/x-raw,width=320,height=240,framerate=30/1 !"
    " x264enc tune=zerolatency speed-preset=ultrafast key-int-max=5 ! rtph264pay name=pay0 )"
)
server.get_mount_points().add_factory("/part", factory)
server.attach(None)
assert Gst.ElementFactory.find("x264enc") and Gst.ElementFactory.find("rtph264pay")
print(server.get_bound_port(), flush=True)
GLib.MainLoop().run()
"""

Losses = list[tuple[Drop, int]]


class Wish:
    """Parts are wanted while it is set."""

    def __init__(self, *, wanted: bool) -> None:
        self._event = threading.Event()
        if wanted:
            self.begin()

    def begin(self) -> None:
        self._event.set()

    def end(self) -> None:
        self._event.clear()

    since: datetime | None = None

    def wanted(self, wait_s: float = 0.0) -> bool:
        return self._event.wait(wait_s)


def source(
    place: object, *, live: bool | None = None, stall_s: float = DEADLINE_S, losses: Losses | None = None
) -> VideoSource:
    kept: Losses = [] if losses is None else losses
    return VideoSource("s1", str(place), lost=lambda *loss: kept.append(loss), live=live, stall_s=stall_s)


@contextmanager
def running(video: VideoSource, demand: Demand = ALWAYS) -> Iterator[Iterator[Frame | Unreadable | None]]:
    """The source's parts and ticks; afterwards nothing of it is left."""
    stop = threading.Event()
    parts = video.frames(stop, demand)
    try:
        yield parts
    finally:
        stop.set()
        list(parts)
    assert not readers()


def readers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "reader.py" in " ".join(child.cmdline())]


def take(parts: Iterator[Frame | Unreadable | None], number: int) -> list[Frame]:
    taken: list[Frame] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(taken) < number:
        assert time.monotonic() < deadline, f"{len(taken)} of {number} frames came"
        part = next(parts)
        if part is not None:
            assert isinstance(part, Frame)
            taken.append(part)
    return taken


def exhaust(parts: Iterator[Frame | Unreadable | None], quiet: int = 3) -> list[Frame | Unreadable]:
    """All parts, until only ticks come, `quiet` in a row."""
    taken: list[Frame | Unreadable] = []
    ticks = 0
    while ticks < quiet:
        part = next(parts)
        ticks = ticks + 1 if part is None else 0
        if part is not None:
            taken.append(part)
    return taken


def level(frame: Frame | Unreadable) -> int:
    assert isinstance(frame, Frame)
    return int(frame.image[:, :, 0].mean())


def write_video(path: Path, levels: list[int]) -> Path:
    """Flat pictures, red of the given levels."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, SIZE)
    for red in levels:
        writer.write(np.full((*SIZE[::-1], 3), (0, 0, red), np.uint8))
    writer.release()
    return path


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return write_video(tmp_path / "film.avi", [20 * number for number in range(1, 13)])


@pytest.fixture
def serve() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start an RTSP server at a port, or a free one; `stdout` tells which."""
    servers: list[subprocess.Popen[str]] = []

    def start(port: int = 0) -> subprocess.Popen[str]:
        server = subprocess.Popen(
            [PYTHON, "-c", RTSP_SERVER, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.kill()
        server.communicate()


def address(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    if not port:
        pytest.skip("no RTSP server (apt-get install gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-{base,good,ugly})")
    return f"rtsp://operator:secret@127.0.0.1:{port}/part"


def test_a_file_gives_every_frame_once_in_order_in_red_green_and_blue(film: Path) -> None:
    with running(source(film)) as parts:
        frames = exhaust(parts)
    assert [level(frame) for frame in frames] == pytest.approx([20 * number for number in range(1, 13)], abs=3)
    first = frames[0]
    assert isinstance(first, Frame)
    assert first.image.shape == (*SIZE[::-1], 3)
    assert first.image.dtype == np.uint8
    assert first.image[:, :, 1:].max() < 5
    assert [frame.capture.part_id for frame in frames] == [f"film-{number:06}" for number in range(1, 13)]
    assert [frame.capture.frame_id for frame in frames] == list(range(1, 13))
    assert {(frame.capture.clock, frame.capture.origin) for frame in frames} == {(Clock.HOST_ARRIVAL, str(film))}
    assert all(earlier.capture.id < later.capture.id for earlier, later in pairwise(frames))


def test_the_end_of_a_file_is_said_once_and_then_nothing_comes(film: Path) -> None:
    video = source(film)
    with capture_logs() as logs:
        for expected in (12, 0, 0):
            with running(video) as parts:
                assert len(exhaust(parts)) == expected
    assert [line["event"] for line in logs] == ["all frames were handed over"]


def test_a_slow_taker_misses_no_frame_of_a_file(film: Path) -> None:
    losses: Losses = []
    with running(source(film, losses=losses)) as parts:
        (first,) = take(parts, 1)
        time.sleep(0.3)
        rest = exhaust(parts)
    assert [frame.capture.frame_id for frame in (first, *rest)] == list(range(1, 13))
    assert not losses


def test_a_file_stays_where_it_is_while_no_part_is_wanted(film: Path) -> None:
    wish = Wish(wanted=True)
    with running(source(film), wish) as parts:
        take(parts, 3)
        wish.end()
        assert list(islice(parts, 3)) == [None, None, None]
        wish.begin()
        before = time.time()
        (fourth,) = take(parts, 1)
    assert fourth.capture.frame_id == 4
    assert fourth.capture.arrived_at.timestamp() >= before, "it comes when it is wanted, or no trigger would take it"


def test_a_file_goes_on_where_it_was_after_its_reader_was_struck_down(film: Path) -> None:
    video = source(film)
    with running(video) as parts:
        take(parts, 3)
        (reader,) = readers()
        reader.kill()
        with pytest.raises(SourceUnavailableError, match="ended unexpectedly"):
            take(parts, 12)
    with running(video) as parts:
        assert [frame.capture.frame_id for frame in exhaust(parts)] == list(range(4, 13))


def test_damage_within_a_file_costs_some_frames_which_are_counted_but_not_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    texture = np.random.default_rng(0).integers(0, 80, (240, 320, 3), dtype=np.uint8)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, (320, 240))
    for number in range(30):
        writer.write(np.roll(texture, number, axis=1) + np.uint8(5 * number))
    writer.release()
    content = bytearray(path.read_bytes())
    start, length = len(content) // 2, len(content) // 10
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    losses: Losses = []
    with running(source(path, losses=losses)) as parts:
        frames = exhaust(parts)
    assert {cause for cause, _ in losses} == {Drop.INCOMPLETE}
    assert len(frames) + sum(count for _, count in losses) == 30
    assert level(frames[-1]) == pytest.approx(5 * 29 + 40, abs=8)


def test_a_file_behind_a_url_is_read_to_its_end_if_it_is_said_not_to_be_live(film: Path) -> None:
    handler = functools.partial(_Quiet, directory=str(film.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/film.avi?token=secret"
            with running(source(url, live=False)) as parts:
                frames = exhaust(parts)
        finally:
            server.shutdown()
            thread.join()
    assert [frame.capture.part_id for frame in frames] == [f"film-{number:06}" for number in range(1, 13)]
    assert "secret" not in frames[0].capture.origin


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_still_images_come_in_the_order_of_their_numbers_and_a_damaged_one_is_unreadable(tmp_path: Path) -> None:
    for number in (0, 2, 9, 10):
        Pillow.new("RGB", SIZE, (10 * number, 0, 0)).save(tmp_path / f"part_{number}.png")
    (tmp_path / "part_9.png").write_bytes((tmp_path / "part_9.png").read_bytes()[:60])
    for other in ("part_02.png", "part_x.png", "part_3.txt", "apart_4.png"):
        (tmp_path / other).write_bytes(b"")
    video = source(tmp_path / "part_%d.png")
    with running(video) as parts:
        (first,) = take(parts, 1)
    with running(video) as parts:
        second, damaged, last = exhaust(parts)
    assert [level(frame) for frame in (first, second, last)] == [0, 20, 100]
    assert isinstance(damaged, Unreadable)
    assert "cut off" in damaged.reason
    captures = [part.capture for part in (first, second, damaged, last)]
    assert [capture.part_id for capture in captures] == ["part_0", "part_2", "part_9", "part_10"]
    assert [capture.frame_id for capture in captures] == [0, 2, 9, 10]


def test_still_images_with_leading_zeros_wait_until_they_are_wanted(tmp_path: Path) -> None:
    for number in (7, 1234):
        Pillow.new("RGB", SIZE).save(tmp_path / f"{number:03}.png")
    Pillow.new("RGB", SIZE).save(tmp_path / "8.png")
    wish = Wish(wanted=False)
    with running(source(tmp_path / "%03d.png"), wish) as parts:
        assert list(islice(parts, 3)) == [None, None, None]
        wish.begin()
        assert [frame.capture.part_id for frame in exhaust(parts)] == ["007", "1234"]


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("/nowhere/film.avi", r"no /nowhere/film\.avi; put it there"),
        ("/nowhere/%04d.png", r"no images /nowhere/%04d\.png"),
        ("/dev/video97", r"no /dev/video97; see to its cable"),
        ("97", r"no /dev/video97; see to its cable"),
        ("/dev/null", "/dev/null is no V4L2 device"),
        (__file__, "cannot be opened.*whole video file"),
        (
            "rtsp://operator:secret@127.0.0.1:9/part",
            r"rtsp://127\.0\.0\.1:9/part .* \(Connection refused\)",
        ),
        (
            "http://operator:secret@127.0.0.1:9/part",
            r"http://127\.0\.0\.1:9/part .* \(Connection refused\)",
        ),
    ],
)
def test_a_video_that_is_not_there_is_named_with_its_cure_and_without_its_password(place: str, complaint: str) -> None:
    with pytest.raises(SourceUnavailableError, match=complaint) as refusal, running(source(place)):
        pass
    assert "secret" not in str(refusal.value)
    assert "; " in str(refusal.value), "what to do about it"
    assert not readers()


def test_a_place_is_shown_without_what_is_secret_in_it() -> None:
    assert shown("rtsp://operator:se/c@ret@camera:554/part?user=operator&password=secret") == "rtsp://camera:554/part"
    assert shown("http://camera/video?user=operator&pwd=se@cret") == "http://camera/video"
    assert shown("rtsp://operator:se?cret@camera/part") == "rtsp://…"
    assert shown("/data/a@b?c.avi") == "/data/a@b?c.avi"


def test_options_that_do_not_fit_the_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"film\.avi is none"):
        VideoSource("s1", "film.avi", lost=lambda *_: None, width=640)
    with pytest.raises(ValueError, match="four letters"):
        VideoSource("s1", "/dev/video0", lost=lambda *_: None, fourcc="MJPEG")
    with pytest.raises(ValueError, match="never live"):
        VideoSource("s1", "part_%d.png", lost=lambda *_: None, live=True)


def test_a_camera_that_never_answers_holds_nobody_up_who_wants_to_stop() -> None:
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        stopping = threading.Timer(0.5, stop.set)
        stopping.start()
        parts = source(f"http://127.0.0.1:{mute.getsockname()[1]}/").frames(stop)
        stopping.join()
    assert stop.is_set()
    assert list(parts) == []
    assert not readers()


def test_a_reader_ends_with_its_daemon_even_if_that_is_killed(film: Path) -> None:
    program = (
        "import sys, threading\n"
        "from daemon.sources.video.source import VideoSource\n"
        "parts = VideoSource('s1', sys.argv[1], lost=print).frames(threading.Event())\n"
        "print(next(parts) is not None, flush=True)\n"
        "threading.Event().wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, film], stdout=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == "True\n"
            (reader,) = psutil.Process(daemon.pid).children()
        finally:
            daemon.kill()
        assert not psutil.wait_procs([reader], timeout=DEADLINE_S)[1]


def test_signals_meant_for_the_daemon_do_not_end_its_reader(film: Path) -> None:
    with running(source(film)) as parts:
        take(parts, 1)
        (reader,) = readers()
        reader.send_signal(signal.SIGINT)
        reader.send_signal(signal.SIGTERM)
        assert len(exhaust(parts)) == 11


def test_a_reader_that_hangs_is_noticed_and_ended(film: Path) -> None:
    with running(source(film, live=True, stall_s=0.3)) as parts:
        take(parts, 1)
        (reader,) = readers()
        reader.suspend()
        with pytest.raises(SourceUnavailableError, match=r"film\.avi gave no frame for 0\.3 s"):
            take(parts, 12)


@pytest.mark.long
def test_ten_openings_leave_no_handle_no_process_and_no_memory_behind(tmp_path: Path) -> None:
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (1920, 1080))
    for _ in range(3):
        writer.write(np.zeros((1080, 1920, 3), np.uint8))
    writer.release()
    this = psutil.Process()

    def used() -> tuple[int, int, int]:
        return this.num_fds(), len(this.children(recursive=True)), this.memory_info().rss

    def open_and_take() -> None:
        with running(source(path)) as parts:
            take(parts, 2)

    open_and_take()
    handles, children, memory = used()
    for _ in range(10):
        open_and_take()
    assert used()[:2] == (handles, children)
    assert used()[2] - memory < 2 * 1920 * 1080 * 3


def test_a_network_camera_gives_parts_without_names_that_came_just_now(
    serve: Callable[..., subprocess.Popen[str]],
) -> None:
    url = address(serve())
    started = time.time()
    with running(source(url)) as parts:
        frames = take(parts, 10)
    first = frames[0].capture
    assert (first.part_id, first.origin) == ("", shown(url))
    assert "secret" not in repr(frames[0].capture)
    assert started <= first.arrived_at.timestamp() <= time.time()
    assert frames[0].image.shape == (240, 320, 3)
    assert frames[0].image.mean(axis=(0, 1)) == pytest.approx([255, 0, 0], abs=12)
    assert all(earlier.capture.id < later.capture.id for earlier, later in pairwise(frames))


def test_every_frame_of_a_camera_that_gave_way_to_a_newer_one_is_counted(
    serve: Callable[..., subprocess.Popen[str]],
) -> None:
    losses: Losses = []
    with running(source(address(serve()), losses=losses)) as parts:
        frames = take(parts, 1)
        time.sleep(1.0)
        frames += take(parts, 10)
    numbers = [frame.capture.frame_id for frame in frames]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] - len(numbers) > 5
    assert {cause for cause, _ in losses} == {Drop.QUEUE}
    assert sum(count for _, count in losses) == numbers[-1] - len(numbers)


def test_what_a_camera_sends_while_no_part_is_wanted_is_nobodys(serve: Callable[..., subprocess.Popen[str]]) -> None:
    losses: Losses = []
    wish = Wish(wanted=True)
    with running(source(address(serve()), losses=losses), wish) as parts:
        (last,) = take(parts, 1)
        losses.clear()
        wish.end()
        time.sleep(0.5)  # the buffer overflows
        unwanted = time.monotonic()
        assert set(islice(parts, 30)) == {None}
        wish.begin()
        (first,) = take(parts, 1)
    assert first.capture.seen_at > unwanted
    assert sum(count for _, count in losses) < first.capture.frame_id - last.capture.frame_id - 10


def test_a_frozen_camera_is_away_until_it_thaws_and_one_that_died_until_it_is_back(
    serve: Callable[..., subprocess.Popen[str]],
) -> None:
    server = serve()
    url = address(server)
    video = source(url, stall_s=1.0)
    with running(video) as parts:
        take(parts, 1)
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(SourceUnavailableError, match=r"127\.0\.0\.1:\d+/part gave no frame for 1 s") as late:
            take(parts, 1000)
    assert "secret" not in str(late.value)
    with pytest.raises(SourceUnavailableError, match="did not open within 5 s"):
        video.frames(threading.Event())
    assert not readers()
    os.kill(server.pid, signal.SIGCONT)
    with running(video) as parts:
        take(parts, 2)
        server.kill()
        server.wait()
        with pytest.raises(SourceUnavailableError, match=r"has ended|gave no frame"):
            take(parts, 1000)
    with pytest.raises(SourceUnavailableError, match="Connection refused"):
        video.frames(threading.Event())
    again = serve(int(url.rpartition(":")[2].partition("/")[0]))
    address(again)
    with running(video) as parts:
        take(parts, 2)
