"""A camera from opening to closing, in a thread that may hang without anybody waiting for it."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from queue import Empty, Full, Queue
from typing import TYPE_CHECKING

from daemon.messages import Scalar
from daemon.sources.base import TICK_S, Demand, SourceUnavailableError
from daemon.sources.genicam.camera import DeviceClock, connect, set_feature
from daemon.stats import Drop

if TYPE_CHECKING:
    import viva_genicam

HELD = 8
"""Frames that wait to be handed over; beyond these the oldest goes, counted as `Drop.QUEUE`."""
POLL_S = 0.25
CLOCK_S = 10.0
"""How often the camera's clock is read: a quartz drifts by a millisecond meanwhile."""


class Exposure(StrEnum):
    """What makes the camera expose."""

    FREE = "free"
    HARDWARE = "hardware"
    SOFTWARE = "software"


@dataclass(frozen=True, slots=True)
class Shot:
    """A frame as it came; `captured_at` is None where the camera's clock is not known."""

    frame: "viva_genicam.Frame"
    captured_at: datetime | None
    arrived_at: datetime
    seen_at: float


class Session:
    """The camera from opening to closing, in a thread that nobody waits for longer than he wants to.

    `opened` is set once it runs or has failed; after that `check` tells which.
    """

    def __init__(
        self,
        wanted: str,
        trigger: Exposure,
        line: str,
        features: Mapping[str, Scalar],
        demand: Demand,
        lost: Callable[[Drop, int], None],
    ) -> None:
        self.origin = ""
        self.opened = threading.Event()
        self._wanted = wanted
        self._trigger = trigger
        self._line = line
        self._features = features
        self._demand = demand
        self._lost = lost
        self._told: dict[Drop, int] = dict.fromkeys(Drop, 0)
        self._shots = Queue[Shot](HELD)
        self._asked = threading.Event()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"camera {wanted}", daemon=True)
        self._thread.start()

    def take(self, wait_s: float) -> Shot | None:
        """The next frame, waiting for it."""
        try:
            return self._shots.get(block=wait_s > 0, timeout=wait_s)
        except Empty:
            return None

    def expose(self) -> None:
        """Let the camera expose once."""
        self._alive_at = time.monotonic()
        self._asked.set()

    def check(self, silence_s: float) -> None:
        """See whether the camera is well.

        Raises:
            SourceUnavailableError: it failed, or has given no sign of life for `silence_s` seconds.
        """
        if self._error is not None:
            raise self._error
        if time.monotonic() - self._alive_at > silence_s:
            raise SourceUnavailableError(
                f"the camera {self._wanted} has fallen silent; see to its power and cable, and that stall_s is longer "
                "than it takes for a frame"
            )

    def end(self, wait_s: float) -> None:
        """Close the camera, and wait at most so long for that."""
        self._stop.set()
        self._asked.set()
        self._thread.join(wait_s)

    def _run(self) -> None:
        import viva_genicam

        try:
            camera, self.origin = connect(self._wanted)
            with closing(camera):
                self._prepare(camera)
                with closing(camera.stream(deliver_incomplete=True)) as stream:
                    camera.acquisition_start()
                    self._alive_at = time.monotonic()
                    self.opened.set()
                    self._pull(camera, stream)
                    camera.acquisition_stop()
        except viva_genicam.GenicamError as error:
            self._error = SourceUnavailableError(
                f"the camera {self._wanted} cannot be used: {error}; see to its power and cable"
            )
        except Exception as error:  # noqa: BLE001 -- the root of the thread; `check` raises it where it is heard
            self._error = error
        finally:
            self.opened.set()

    def _prepare(self, camera: "viva_genicam.Camera") -> None:
        for name, value in self._features.items():
            set_feature(camera, self._wanted, name, value)
            self._alive_at = time.monotonic()
        is_free = self._trigger is Exposure.FREE
        ours = {"AcquisitionMode": "Continuous", "TriggerSelector": "FrameStart"}
        if not is_free:
            ours["TriggerSource"] = self._line if self._trigger is Exposure.HARDWARE else "Software"
        ours["TriggerMode"] = "Off" if is_free else "On"
        for name, entry in ours.items():
            if camera.node_info(name) is not None or (not is_free and name == "TriggerSource"):
                set_feature(camera, self._wanted, name, entry)

    def _pull(self, camera: "viva_genicam.Camera", stream: "viva_genicam.FrameStream") -> None:
        """Bring frames in until the end, and ask the camera now and then whether it is still there."""
        clock = DeviceClock.of(camera)
        poll_at, clock_at = 0.0, time.monotonic() + CLOCK_S
        exposed_at: datetime | None = None
        while not self._stop.is_set():
            if self._trigger is not Exposure.SOFTWARE or exposed_at:
                if self._receive(stream, clock, exposed_at):
                    exposed_at = None
            elif self._asked.wait(TICK_S) and not self._stop.is_set():
                self._asked.clear()
                exposed_at = datetime.now(UTC)
                camera.trigger_software()
            self._account(stream)
            if time.monotonic() >= poll_at:
                self._poll(camera, is_idle=self._trigger is not Exposure.FREE and not exposed_at)
                poll_at = time.monotonic() + POLL_S
            if clock and time.monotonic() >= clock_at:
                clock.read()
                clock_at = time.monotonic() + CLOCK_S

    def _receive(
        self, stream: "viva_genicam.FrameStream", clock: DeviceClock | None, exposed_at: datetime | None
    ) -> bool:
        """Take a frame, if one comes soon, and leave it for `take`. A part came when its exposure was asked for."""
        import viva_genicam

        until = time.monotonic() + TICK_S
        try:
            frame = stream.next_frame(int(TICK_S * 1000))
        except viva_genicam.TransportError:  # that none came, or worse, which shows in time
            self._stop.wait(until - time.monotonic())
            return False
        if frame is None:
            raise SourceUnavailableError(f"the camera {self._wanted} has ended its stream; it is opened anew")
        now = datetime.now(UTC)
        self._alive_at = time.monotonic()
        if exposed_at or self._demand.wanted():
            captured_at = clock.captured_at(frame.ts_dev, now) if clock else None
            self._leave(Shot(frame, captured_at, exposed_at or now, self._alive_at))
        return True

    def _leave(self, shot: Shot) -> None:
        while True:
            try:
                self._shots.put_nowait(shot)
            except Full:
                with suppress(Empty):
                    self._shots.get_nowait()
                    self._lost(Drop.QUEUE, 1)
            else:
                return

    def _account(self, stream: "viva_genicam.FrameStream") -> None:
        """Tell of frames that the library lost; an incomplete one it hands over."""
        stats = stream.stats()
        counts = {
            Drop.QUEUE: stats.frames_backpressure,
            Drop.MISSED: stats.frames_missed + stats.frames_unsupported,
        }
        for cause, count in counts.items():
            if count > self._told[cause] and self._demand.wanted():
                self._lost(cause, count - self._told[cause])
            self._told[cause] = count

    def _poll(self, camera: "viva_genicam.Camera", *, is_idle: bool) -> None:
        """Notice what no missing frame would tell: that the camera is gone, or somebody else's."""
        import viva_genicam

        if camera.transport == "gige" and camera.control_state is not viva_genicam.ControlState.HELD:
            raise SourceUnavailableError(f"another program has taken the camera {self._wanted}; close that")
        if is_idle:
            camera.read_register(0)
            self._alive_at = time.monotonic()
