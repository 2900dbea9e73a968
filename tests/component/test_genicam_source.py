import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Self

import numpy as np
import pytest

from daemon.execution import Asked, Execution, Mode
from daemon.messages import Clock, Frame, Reason, Unreadable
from daemon.sources.base import ALWAYS, Demand, SourceUnavailableError
from daemon.sources.genicam.camera import DeviceClock, discover
from daemon.sources.genicam.session import Exposure
from daemon.sources.genicam.source import GenicamSource, Incomplete
from daemon.stats import Drop
from tests.cameras import ADDRESS, DEADLINE_S, Simulator, need_simulator

viva = pytest.importorskip("viva_genicam", reason="needs viva-genicam: pip install 'inspectd[camera]'")
testing = pytest.importorskip("viva_genicam.testing")

FAST = {"AcquisitionFrameRate": 100.0}
NOTICED_S = 2.0
"""A dead camera is promised to be noticed within 1 s; the rest is for a busy machine."""

Part = Frame | Unreadable


@pytest.fixture(scope="module")
def shared() -> Iterator[Simulator]:
    camera = Simulator()
    yield camera
    camera.close()


@pytest.fixture
def simulator(shared: Simulator) -> Simulator:
    need_simulator()
    return shared


@pytest.fixture
def fake(shared: Simulator) -> Iterator[Callable[..., Any]]:
    """Starts viva-genicam's own camera, which counts what reaches it."""
    shared.kill()
    started = []

    def start(**options: Any) -> Any:
        camera = testing.FakeGigeCamera(width=320, height=240, bind_ip=ADDRESS, **options)
        until = time.monotonic() + DEADLINE_S
        while True:
            try:
                camera.start()
            except viva.GenicamError:
                if time.monotonic() > until:
                    pytest.skip(f"another camera has UDP port 3956 of {ADDRESS}")
                time.sleep(0.1)
            else:
                started.append(camera)
                return camera

    yield start
    for camera in started:
        camera.stop()


class Line:
    """Takes parts from a camera as the daemon does, and keeps what was lost."""

    def __init__(self, camera: str = ADDRESS, demand: Demand = ALWAYS, **options: Any) -> None:
        self.lost = Counter[Drop]()
        self.source = GenicamSource("s1", camera, lost=self._count, **options)
        self.demand = demand
        self.stop = threading.Event()

    def _count(self, cause: Drop, frames: int) -> None:
        self.lost[cause] += frames

    def __enter__(self) -> Self:
        self._parts = self.source.frames(self.stop, self.demand)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        assert not list(filter(None, self._parts))

    def take(self, count: int) -> list[Part]:
        until = time.monotonic() + DEADLINE_S
        taken: list[Part] = []
        while len(taken) < count:
            part = next(self._parts)
            if part is not None:
                taken.append(part)
            assert time.monotonic() < until, f"only {len(taken)} of {count} parts came"
        return taken

    def spend(self, seconds: float) -> list[Part]:
        until = time.monotonic() + seconds
        taken = []
        while time.monotonic() < until:
            part = next(self._parts)
            if part is not None:
                taken.append(part)
        return taken

    def ends(self) -> tuple[str, float]:
        """Wait until the camera is found to be gone; what is said of it, and how long that took in seconds."""
        since = time.monotonic()
        with pytest.raises(SourceUnavailableError) as raised:
            self.spend(DEADLINE_S)
        return str(raised.value), time.monotonic() - since


def numbers(parts: list[Part]) -> list[int]:
    return [part.capture.frame_id for part in parts]


def between(earlier: Part, later: Part) -> int:
    """How many frames the camera made from one to the other; its count goes from 65,535 to 1."""
    return (later.capture.frame_id - earlier.capture.frame_id) % 65_535


def follow_each_other(parts: list[Part]) -> bool:
    return all(between(*pair) == 1 for pair in pairwise(parts))


def reopened(line: Line) -> None:
    """Open the camera again, as often as it takes."""
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            with line:
                assert line.take(1)
        except SourceUnavailableError:
            assert time.monotonic() < until
        else:
            return


def test_every_frame_comes_once_in_order_with_its_pixels(simulator: Simulator) -> None:
    simulator.start()
    with Line(simulator.serial, features={"Width": 512, "Height": 512, **FAST}) as line:
        parts = line.take(30)
    assert follow_each_other(parts)
    assert not line.lost
    ids = [part.capture.id for part in parts]
    assert ids == sorted(set(ids))
    for part in parts:
        assert isinstance(part, Frame)
        assert part.image.shape == (512, 512, 3)
        assert part.image.dtype == np.uint8
        assert part.capture.origin == f"genicam:{simulator.serial}"
        assert part.capture.part_id == ""
        assert part.capture.clock is Clock.HOST_ARRIVAL
    assert line.source.settle(parts[0].capture, None)


@pytest.mark.parametrize("pixels", ["Mono16", "RGB8", "BayerRG8"])
def test_features_are_set_and_every_pixel_format_becomes_rgb(simulator: Simulator, pixels: str) -> None:
    simulator.start()
    options = {"Width": 256, "Height": 128, "PixelFormat": pixels, "AcquisitionFrameRate": 50.0, "TestBoolean": True}
    with Line(features=options) as line:
        (part,) = line.take(1)
    assert isinstance(part, Frame)
    assert part.image.shape == (128, 256, 3)
    assert part.image.dtype == np.uint8
    assert part.image.max() > 0


@pytest.mark.parametrize(("pixels", "bits"), [("Mono10", 10), ("Mono12", 12), ("Mono16", 16)])
def test_the_library_takes_the_highest_eight_bits_of_more(pixels: str, bits: int) -> None:
    levels = np.arange(2**bits, dtype=np.uint16)
    image = viva.Frame.from_bytes(levels.astype("<u2").tobytes(), 2**bits, 1, pixels).to_rgb8()
    assert np.array_equal(image[0], np.repeat((levels >> (bits - 8)).astype(np.uint8)[:, None], 3, axis=1))


def test_packed_pixels_are_unpacked(fake: Callable[..., Any]) -> None:
    fake(pixel_format="Mono12p")
    with Line() as line:
        (part,) = line.take(1)
    assert isinstance(part, Frame)
    assert part.image.shape == (240, 320, 3)
    assert len(np.unique(part.image)) > 16


@pytest.mark.parametrize(
    ("name", "value", "cure"),
    [
        ("Widht", 256, "it has Width"),
        ("Width", 99_999, "it takes 1 to 2048"),
        ("PixelFormat", "Mono7", "it takes BayerBG8, BayerGB8"),
        ("DeviceVendorName", "ours", "leave it out"),
    ],
)
def test_a_wrong_feature_is_refused_by_name_with_the_cure(
    simulator: Simulator, name: str, value: str | int, cure: str
) -> None:
    simulator.start()
    with pytest.raises(SourceUnavailableError, match=f"does not take the feature {name} = {value}: .*{cure}"):
        GenicamSource("s1", ADDRESS, lost=lambda _, __: None, features={name: value}).frames(threading.Event())


def test_an_absent_camera_is_named_with_the_cure() -> None:
    with pytest.raises(SourceUnavailableError, match=r"no camera answers to 127\.0\.0\.99 .*power and cable"):
        GenicamSource("s1", "127.0.0.99", lost=lambda _, __: None).frames(threading.Event())


def test_a_missing_library_is_named_with_the_cure() -> None:
    program = (
        "import sys, threading; sys.modules['viva_genicam'] = None\n"
        "from daemon.sources.genicam.source import GenicamSource\n"
        "GenicamSource('s1', '127.0.0.1', lost=print).frames(threading.Event())"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "SourceUnavailableError" in ended.stderr
    assert "pip install 'inspectd[camera]'" in ended.stderr


def test_a_command_among_the_features_is_executed(fake: Callable[..., Any]) -> None:
    fake()
    with Line(features={"ExposureTime": 4321.0, "UserSetSelector": "UserSet1", "UserSetSave": True}) as line:
        line.take(1)
    with Line(features={"ExposureTime": 77.0, "UserSetSelector": "UserSet1", "UserSetLoad": True}) as line:
        line.take(1)
    (info,) = [info for info in viva.discover(all=True) if info.ip == ADDRESS]
    with viva.connect_gige(info) as camera:
        assert camera.exposure_time() == pytest.approx(4321.0)


def test_a_camera_is_found_with_what_it_says_of_itself(simulator: Simulator) -> None:
    simulator.start()
    (found,) = [one for one in discover() if one.ip == ADDRESS]
    assert (found.serial, found.vendor, found.model) == (simulator.serial, "Aravis", "Fake")


def test_one_frame_is_grabbed_and_the_camera_let_go_of(simulator: Simulator) -> None:
    simulator.start()
    source = GenicamSource("s1", simulator.serial, lost=lambda _, __: None)
    grabbed = [source.grab(), source.grab()]
    assert all(isinstance(part, Frame) for part in grabbed)


def test_a_camera_that_waits_for_its_line_gives_nothing_to_grab(simulator: Simulator) -> None:
    simulator.start()
    source = GenicamSource("s1", ADDRESS, lost=lambda _, __: None, trigger=Exposure.HARDWARE, line="Line0")
    with pytest.raises(SourceUnavailableError, match=r"no frame within 1\.5 s; see to the signal on Line0"):
        source.grab(1.5)


@pytest.mark.parametrize(
    ("trigger", "death"),
    [
        (Exposure.FREE, signal.SIGKILL),
        (Exposure.HARDWARE, signal.SIGSTOP),
        (Exposure.SOFTWARE, signal.SIGKILL),
    ],
)
def test_a_dead_camera_is_noticed_and_opened_anew_when_it_is_back(
    simulator: Simulator, trigger: Exposure, death: signal.Signals
) -> None:
    simulator.start()
    idle = Execution("s1", Mode.READY, 0)
    with Line(simulator.serial, ALWAYS if trigger is Exposure.FREE else idle, trigger=trigger) as line:
        assert bool(line.spend(0.5)) == (trigger is Exposure.FREE)
        simulator.signal(death)
        _, noticed_s = line.ends()
    assert noticed_s < NOTICED_S
    simulator.kill()
    simulator.start()
    reopened(Line(simulator.serial))


def test_an_exposure_that_the_camera_does_not_answer_is_noticed(simulator: Simulator) -> None:
    simulator.start()
    with Line(trigger=Exposure.SOFTWARE) as line:
        line.take(1)
        simulator.signal(signal.SIGSTOP)
        said, noticed_s = line.ends()
    simulator.kill()
    assert "fallen silent" in said
    assert noticed_s < NOTICED_S


def test_an_incomplete_frame_is_handed_over_as_unreadable(simulator: Simulator) -> None:
    simulator.start("-r", "5")
    with Line(features=FAST) as line:
        parts = line.take(50)
    assert follow_each_other(parts)
    broken = [part for part in parts if isinstance(part, Unreadable)]
    assert 0 < len(broken) < 50
    assert {part.cause for part in broken} == {Reason.INCOMPLETE_FRAME}
    assert not line.lost


def test_an_incomplete_frame_says_how_much_is_missing(fake: Callable[..., Any]) -> None:
    fake(drop_packets=[(3, 2), (3, 4)], packet_resend=False)
    with Line() as line:
        (broken,) = [part for part in line.take(5) if isinstance(part, Unreadable)]
    assert broken.capture.frame_id == 3
    assert broken.reason.startswith("packets missing from the frame: 2; ")


def test_an_incomplete_frame_is_dropped_and_counted(simulator: Simulator) -> None:
    simulator.start("-r", "5")
    with Line(incomplete=Incomplete.DROP, features=FAST) as line:
        before = line.take(1)
        before_lost = Counter(line.lost)
        parts = line.take(20)
        lost = line.lost - before_lost
    assert all(isinstance(part, Frame) for part in parts)
    assert set(lost) == {Drop.INCOMPLETE}
    assert between(before[0], parts[-1]) == len(parts) + lost[Drop.INCOMPLETE]


def test_a_camera_sends_again_what_was_lost_on_the_way(fake: Callable[..., Any]) -> None:
    fake(drop_packets=[(3, 2), (5, 1)])
    with Line() as line:
        parts = line.take(8)
    assert numbers(parts) == list(range(1, 9))
    assert all(isinstance(part, Frame) for part in parts)


def test_a_frame_that_never_came_is_counted_as_missed(fake: Callable[..., Any]) -> None:
    fake(drop_packets=[(frame, packet) for frame in (3, 6) for packet in range(200)], packet_resend=False)
    with Line() as line:
        parts = line.take(8)
    assert numbers(parts) == [1, 2, 4, 5, 7, 8, 9, 10]
    assert line.lost == {Drop.MISSED: 2}


def test_frames_that_come_faster_than_they_are_taken_are_counted(simulator: Simulator) -> None:
    simulator.start()
    with Line(features=FAST) as line:
        before = line.take(1)
        time.sleep(0.5)
        after = line.take(30)
        lost = line.lost[Drop.QUEUE]
    assert lost > 10
    assert between(before[0], after[-1]) == len(after) + lost


def test_frames_that_nobody_wants_are_nobodys(simulator: Simulator) -> None:
    simulator.start()
    execution = Execution("s1", Mode.CONTINUOUS, 0)
    with Line(demand=execution, features=FAST) as line:
        (before,) = line.take(1)
        time.sleep(0.05)  # what waits to be taken when parts are no longer wanted
        execution.become(Mode.READY)
        assert not line.spend(0.5)
        time.sleep(0.05)  # and what comes while nobody asks
        execution.become(Mode.CONTINUOUS)
        since = datetime.now(UTC)
        (after,) = line.take(1)
    assert after.capture.arrived_at >= since
    assert between(before, after) > 20
    assert not line.lost


def test_the_camera_exposes_exactly_once_for_each_trigger(fake: Callable[..., Any]) -> None:
    camera = fake()
    execution = Execution("s1", Mode.READY, 0)
    with Line(demand=execution, trigger=Exposure.SOFTWARE) as line:
        assert not line.spend(0.3)
        for number in range(1, 6):
            asked_at = datetime.now(UTC)
            with execution.reserve(Asked(f"t{number}", f"part {number}"), asked_at):
                pass
            (part,) = line.take(1)
            (admitted,) = execution.admit(part)
            assert admitted.capture.part_id == f"part {number}"
            assert admitted.capture.arrived_at >= asked_at
            assert execution.number(admitted) == number
        assert not line.spend(0.3)
        assert camera.software_triggers() == 5
    assert not line.lost


def test_a_cameras_time_is_mapped_to_ours(fake: Callable[..., Any]) -> None:
    fake()
    (info,) = [info for info in viva.discover(all=True) if info.ip == ADDRESS]
    with viva.connect_gige(info) as camera:
        clock = DeviceClock.of(camera)
        assert clock is not None
        before = datetime.now(UTC)
        camera.execute("TimestampLatch")
        after = datetime.now(UTC)
        camera.invalidate("GevTimestampValue")
        ticks = camera.get_integer("GevTimestampValue")
    later = after + timedelta(seconds=0.3)
    captured_at = clock.captured_at(ticks, later)
    assert captured_at is not None
    assert before - timedelta(milliseconds=20) < captured_at < after + timedelta(milliseconds=20)
    assert clock.captured_at(ticks, after + timedelta(seconds=5)) is None
    assert clock.captured_at(ticks + 10**9, after) is None
    assert clock.captured_at(None, after) is None


def test_captures_are_timed_by_arrival_where_the_camera_restarts_its_clock(fake: Callable[..., Any]) -> None:
    fake()
    time.sleep(1.2)  # the fake's frames count from the start of acquisition, its clock from its own
    with Line() as line:
        parts = line.take(5)
    for part in parts:
        assert part.capture.clock is Clock.HOST_ARRIVAL
        assert part.capture.captured_at == part.capture.arrived_at


def test_a_camera_that_another_program_takes_is_unavailable(fake: Callable[..., Any]) -> None:
    camera = fake()
    with Line() as line:
        line.take(1)
        camera.revoke_control()
        said, _ = line.ends()
    assert said.startswith("another program has taken the camera")
