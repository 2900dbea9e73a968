"""The stages in their threads, with a small detector, a real outbox and sources that are lists."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest

from calibration.calibration import fit
from daemon import pipeline
from daemon.channel import Channel, Overflow
from daemon.contract import Identity, Message
from daemon.health import StationHealth
from daemon.messages import Capture, Frame, Outcome, Unreadable
from daemon.outbox import Entry, Outbox, OutboxError
from daemon.pipeline import Concluded, Station
from detectors.base import DeviceLostError, Image, Prediction
from detectors.template import TemplateDetector
from tests.brokers import eventually

GOOD = np.full((8, 8, 3), 100, np.uint8)
BAD = np.full((8, 8, 3), 200, np.uint8)
STRANGE = np.full((8, 8, 3), 7, np.uint8)
LOST = np.full((8, 8, 3), 9, np.uint8)


class Moody(TemplateDetector):
    """Fails on strange images, loses its device on others, and scores NaN on none."""

    def predict(self, images: Sequence[Image]) -> list[Prediction]:
        if any((image == LOST).all() for image in images):
            raise DeviceLostError("the GPU failed")
        if any((image == STRANGE).all() for image in images):
            raise RuntimeError("out of memory")
        return super().predict(images)


class Shelf:
    """A source whose frames are given by the test; it remembers what it may let go of."""

    def __init__(self) -> None:
        self.settled: list[tuple[str, str | None]] = []

    def frames(self, stop: Event) -> Iterator[Frame | Unreadable]:  # noqa: ARG002 -- the protocol's signature
        yield from ()

    def settle(self, capture: Capture, failure: str | None) -> bool:
        self.settled.append((capture.id, failure))
        return True


class Gate:
    """The reject gate's end."""

    def __init__(self) -> None:
        self.heard: list[Message] = []

    def actuate(self, message: Message) -> None:
        self.heard.append(message)

    def notify(self) -> None:
        pass


class FullDisk(Outbox):
    """An outbox whose disk is full until `room` is set."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.room = Event()

    def keep(self, entries: Sequence[Entry], settled: Sequence[str] = ()) -> None:  # type: ignore[override] # narrower
        if not self.room.is_set():
            raise OutboxError("disk full")
        super().keep(entries, settled)


def capture(number: int, station: str = "cam1") -> Capture:
    now = datetime.now(UTC)
    return Capture(f"{number:026d}", station, f"part{number}", now, now, time.monotonic(), f"/in/{number}.png")


def station(name: str = "cam1") -> Station:
    calibration = fit([1.0, 2.0, 3.0], alpha=0.3, detector_fingerprint="f", data_sha256="d", made_at=datetime.now(UTC))
    identity = Identity("plant", "edge", name, "b001", "m", "f" * 64, calibration.id, 0.3)
    return Station(identity, Shelf(), Moody(GOOD), calibration, Gate(), StationHealth(name, 0), 5.0)


class Line:
    """Inspect and record, running."""

    def __init__(self, outbox: Outbox, *stations: Station, batch: int = 4) -> None:
        self.outbox = outbox
        self.stations = {s.identity.station: s for s in stations}
        self.frames: Channel[Frame | Unreadable] = Channel(100, Overflow.WAIT)
        self.pictures: Channel[Concluded] = Channel(100, Overflow.DROP_OLDEST)
        self.stop = Event()
        self.failures: list[BaseException] = []
        concluded: Channel[Concluded] = Channel(100, Overflow.WAIT)
        last = dict.fromkeys(self.stations, 0)
        stages: list[Callable[[], None]] = [
            lambda: pipeline.inspect(self.frames, self.stations, concluded, batch, last),
            lambda: pipeline.record(concluded, self.stations, outbox, self.pictures, self.stop),
        ]
        self.threads = [Thread(target=self._guard, args=(stage,)) for stage in stages]

    def _guard(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except Exception as failure:  # noqa: BLE001 -- what the service would see
            self.failures.append(failure)

    def run(self, *items: Frame | Unreadable) -> list[Concluded]:
        """Put items before the stages start, so that they meet in batches; give what was concluded."""
        for item in items:
            self.frames.put(item)
        self.frames.close()
        for thread in self.threads:
            thread.start()
        return self.join()

    def join(self) -> list[Concluded]:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        return [item for batch in self.pictures.batches(1) for item in batch]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    opened = Outbox(tmp_path / "outbox.sqlite3")
    yield opened
    opened.close()


def outcomes(concluded: list[Concluded]) -> list[Outcome]:
    return [item.verdict.decision.outcome for item in concluded]


def test_a_part_that_breaks_the_detector_gets_an_error_and_its_neighbours_their_verdicts(outbox: Outbox) -> None:
    cam = station()
    images = [GOOD, STRANGE, BAD, GOOD]
    done = Line(outbox, cam).run(*(Frame(capture(n), image) for n, image in enumerate(images)))
    assert outcomes(done) == [Outcome.PASS, Outcome.ERROR, Outcome.FAIL, Outcome.PASS]
    assert "out of memory" in done[1].verdict.decision.detail
    assert [item.verdict.seq for item in done] == [1, 2, 3, 4]
    assert outbox.last_seq("cam1") == outbox.depth("cam1") == 4


def test_what_cannot_be_read_is_refused_and_its_source_told_why(outbox: Outbox) -> None:
    cam = station()
    done = Line(outbox, cam).run(Unreadable(capture(1), "the file is empty"), Frame(capture(2), GOOD))
    assert outcomes(done) == [Outcome.ERROR, Outcome.PASS]
    assert isinstance(cam.source, Shelf)
    assert cam.source.settled == [(f"{1:026d}", "the file is empty"), (f"{2:026d}", None)]


def test_a_lost_device_ends_the_stages_and_what_was_judged_before_is_kept(outbox: Outbox) -> None:
    line = Line(outbox, station(), batch=1)
    line.run(Frame(capture(1), GOOD), Frame(capture(2), LOST), Frame(capture(3), GOOD))
    assert [type(failure) for failure in line.failures] == [DeviceLostError]
    assert outbox.last_seq("cam1") == 1


def test_each_station_is_numbered_and_judged_for_itself(outbox: Outbox) -> None:
    line = Line(outbox, station("a"), station("b"))
    done = line.run(*(Frame(capture(n, "ab"[n % 2]), BAD if n % 2 else GOOD) for n in range(8)))
    for name, outcome in (("a", Outcome.PASS), ("b", Outcome.FAIL)):
        mine = [item for item in done if item.verdict.capture.station == name]
        assert [item.verdict.seq for item in mine] == [1, 2, 3, 4]
        assert set(outcomes(mine)) == {outcome}


def test_the_gate_hears_of_parts_in_time_and_not_of_old_ones(outbox: Outbox) -> None:
    cam = station()
    old = replace(capture(1), arrived_at=datetime.now(UTC) - timedelta(seconds=60))
    done = Line(outbox, cam).run(Frame(old, GOOD), Frame(capture(2), BAD))
    assert isinstance(cam.sink, Gate)
    assert len(done) == 2
    assert [b'"s":2' in message.payload for message in cam.sink.heard] == [True]
    assert "1 too late for the gate" in cam.health.summary()


def test_a_full_disk_holds_the_line_shows_in_the_state_and_loses_nothing(tmp_path: Path) -> None:
    outbox = FullDisk(tmp_path / "outbox.sqlite3")
    cam = station()
    cam.health.source_is(available=True)
    line = Line(outbox, cam)
    for n in range(3):
        line.frames.put(Frame(capture(n), GOOD))
    for thread in line.threads:
        thread.start()
    eventually(lambda: cam.health.state(0).state == "Error", "the state Error")
    assert isinstance(cam.source, Shelf)
    assert cam.source.settled == []
    outbox.room.set()
    line.frames.close()
    assert outcomes(line.join()) == [Outcome.PASS] * 3
    assert cam.health.state(0).state == "ContinuousExecution"
    assert outbox.last_seq("cam1") == 3
    outbox.close()


def test_a_stop_while_the_disk_refuses_leaves_the_parts_to_the_next_start(tmp_path: Path) -> None:
    outbox = FullDisk(tmp_path / "outbox.sqlite3")
    cam = station()
    line = Line(outbox, cam)
    line.stop.set()
    assert line.run(Frame(capture(1), GOOD)) == []
    assert isinstance(cam.source, Shelf)
    assert cam.source.settled == []
    assert outbox.last_seq("cam1") == 0
    outbox.close()


def test_pictures_are_thinned_out_and_one_that_cannot_be_drawn_is_left_out(outbox: Outbox) -> None:
    cam = station()
    done = Line(outbox, cam).run(*(Frame(capture(n), BAD) for n in range(3)))
    broken = replace(done[0], prediction=Prediction(1.0, np.full((0, 0), 1.0, np.float32)))
    pictures: Channel[Concluded] = Channel(9, Overflow.WAIT)
    for item in (broken, done[1], done[2]):
        pictures.put(item)
    pictures.close()
    shown: list[Message] = []
    wanted = [Outcome.FAIL]
    pipeline.illustrate(pictures, {"cam1": cam}, shown.append, wanted=wanted, side=64, limit_bytes=10**6)
    assert [m.topic for m in shown] in ([], ["plant/cam1/image/overlay"])
