"""Parts seen by a GigE Vision or USB3 Vision camera, by viva-genicam.

    camera ─packets→ viva-genicam ─→ session thread ─Shot→ queue → frames()

The library may wait for seconds for a camera that is gone, and says that it still controls it. So a thread of its own
holds the camera, and whoever asks for frames only looks at how long ago it last gave a sign of life.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from enum import StrEnum
from typing import TYPE_CHECKING

from ulid import ULID

from daemon.messages import Capture, Clock, Frame, Reason, Scalar, Unreadable
from daemon.sources.base import ALWAYS, TICK_S, Demand, SourceUnavailableError
from daemon.sources.genicam.camera import require_library
from daemon.sources.genicam.session import Exposure, Session, Shot
from daemon.stats import Drop
from detectors.base import Image

if TYPE_CHECKING:
    import viva_genicam

PATIENCE_S = 1.0
"""How long `frames` itself waits for the camera to open, and its end for the camera to close."""
OPENING_S = 10.0
"""Opening includes up to 4 s in which a camera does not answer because another program controls it."""


class Incomplete(StrEnum):
    """What becomes of a frame of which packets are missing for good."""

    REJECT = "reject"
    DROP = "drop"


class GenicamSource:
    """One camera. Satisfies `daemon.sources.base.Source`; its frames live in memory only.

    Args:
        station: the name its captures carry.
        camera: its serial number, its user-defined name, or its IP address.
        lost: told of each frame that was lost while parts were wanted, by its cause and how many; from any thread.
        trigger: what makes it expose. On `SOFTWARE` it exposes once for each part that is wanted.
        line: the input that triggers it on `HARDWARE`.
        features: GenICam features to set, in this order, before it starts; True executes a command.
        incomplete: whether an incomplete frame is handed over as `Unreadable`, or dropped and counted.
        stall_s: how long it may be silent: without a frame on `FREE`, without the frame it was told to expose on
            `SOFTWARE`, and else without an answer. So it must be longer than exposure, transfer and pause together.
    """

    def __init__(
        self,
        station: str,
        camera: str,
        *,
        lost: Callable[[Drop, int], None],
        trigger: Exposure = Exposure.FREE,
        line: str = "Line0",
        features: Mapping[str, Scalar] | None = None,
        incomplete: Incomplete = Incomplete.REJECT,
        stall_s: float = 1.0,
    ) -> None:
        self._station = station
        self._camera = camera
        self._lost = lost
        self._trigger = trigger
        self._line = line
        self._features = dict(features or {})
        self._incomplete = incomplete
        self._stall_s = stall_s
        self._last_id = ULID.from_int(0)

    def frames(self, stop: threading.Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:
        """Open the camera and yield what it sees while parts are wanted; what it sees meanwhile is nobody's.

        Opening takes up to `PATIENCE_S` here, the rest of it while None is yielded.

        Raises:
            SourceUnavailableError: there is no such camera, another program controls it, it does not take a feature,
                it has fallen silent, or viva-genicam is not installed.
        """
        return self._open(stop, demand)

    def grab(self, wait_s: float = 5.0) -> Frame | Unreadable:
        """One part, and close the camera again.

        Raises:
            SourceUnavailableError: as `frames`; and there was none within `wait_s` seconds.
        """
        until = time.monotonic() + wait_s
        with closing(self._open(threading.Event(), ALWAYS)) as parts:
            for part in parts:
                if part is not None:
                    return part
                if time.monotonic() > until:
                    break
        cure = f"see to the signal on {self._line}" if self._trigger is Exposure.HARDWARE else "see to its cable"
        raise SourceUnavailableError(f"the camera {self._camera} gave no frame within {wait_s:g} s; {cure}")

    def settle(self, capture: Capture, failure: str | None) -> bool:  # noqa: ARG002 -- the protocol's signature
        """Nothing is kept that could be let go of."""
        return True

    def _open(self, stop: threading.Event, demand: Demand) -> Generator[Frame | Unreadable | None]:
        require_library()
        session = Session(self._camera, self._trigger, self._line, self._features, demand, self._lost)
        session.opened.wait(PATIENCE_S)
        session.check(OPENING_S)
        return self._frames(session, stop, demand)

    def _frames(self, session: Session, stop: threading.Event, demand: Demand) -> Generator[Frame | Unreadable | None]:
        exposing = False
        patience_s = PATIENCE_S
        try:
            while not stop.is_set():
                if self._trigger is Exposure.SOFTWARE and not exposing:
                    exposing = session.opened.wait(TICK_S) and demand.wanted(TICK_S)
                    if exposing:
                        session.expose()
                shot = session.take(TICK_S if exposing or self._trigger is not Exposure.SOFTWARE else 0.0)
                if shot is None:
                    session.check(self._stall_s - TICK_S if session.opened.is_set() else OPENING_S)
                    yield None
                    continue
                exposing = False
                since = demand.since
                if not demand.wanted() or (since is not None and shot.arrived_at < since):
                    yield None  # nobody's, or exposed for a trigger that was given up
                elif self._incomplete is Incomplete.DROP and not shot.frame.is_complete:
                    self._lost(Drop.INCOMPLETE, 1)
                    yield None
                else:
                    yield self._part(shot, session.origin)
        except SourceUnavailableError:
            patience_s = 0.0  # what is dead takes long to close
            raise
        finally:
            session.end(patience_s)

    def _part(self, shot: Shot, origin: str) -> Frame | Unreadable:
        self._last_id = max(ULID(), ULID.from_int(int(self._last_id) + 1))
        frame = shot.frame
        capture = Capture(
            id=str(self._last_id),
            station=self._station,
            part_id="",
            captured_at=shot.captured_at or shot.arrived_at,
            arrived_at=shot.arrived_at,
            seen_at=shot.seen_at,
            origin=origin,
            clock=Clock.DEVICE_MAPPED if shot.captured_at else Clock.HOST_ARRIVAL,
            frame_id=frame.block_id,
        )
        if not frame.is_complete:
            return Unreadable(capture, _damage(frame), Reason.INCOMPLETE_FRAME)
        return Frame(capture, self._image(frame))

    def _image(self, frame: "viva_genicam.Frame") -> Image:
        """Red, green, blue; of more than eight bits the highest eight."""
        import viva_genicam

        try:
            return frame.to_rgb8()
        except viva_genicam.GenicamError as error:
            raise SourceUnavailableError(
                f"the camera {self._camera} sends {frame.pixel_format}, which cannot be read ({error}); "
                "set its feature PixelFormat to Mono8, BayerRG8 or RGB8, say"
            ) from error


def _damage(frame: "viva_genicam.Frame") -> str:
    if frame.missing_packets:
        return f"packets missing from the frame: {frame.missing_packets}; see to cable, switch and packet size"
    if frame.device_status is not None:
        return f"the camera reports the status {frame.device_status:#06x} for the frame"
    return "the end of the frame is missing; see to cable, switch and packet size"
