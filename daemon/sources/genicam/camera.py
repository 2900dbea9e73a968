"""GigE Vision and USB3 Vision cameras, by viva-genicam: find one, open it, set its features, read its clock."""

import ipaddress
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING

from daemon.messages import Scalar
from daemon.sources.base import SourceUnavailableError

if TYPE_CHECKING:
    import viva_genicam

DISCOVERY_S = 0.5

_ROUND_TRIP_S = 0.01
_BELIEVABLE_S = 1.0

# Registers that every GigE Vision camera has.
_SERIAL, _NAME, _TEXT_BYTES = 0xD8, 0xE8, 16

# Features by their names in the newer and the older conventions; in the newer a tick is a nanosecond.
_LATCHES = ("TimestampLatch", "GevTimestampControlLatch")
_LATCHED = ("TimestampLatchValue", "GevTimestampValue")
_TICKS_PER_S = "GevTimestampTickFrequency"


@dataclass(frozen=True, slots=True)
class FoundCamera:
    """A camera that answers; "" where it does not say. `ip` is "" on USB."""

    serial: str
    name: str
    vendor: str
    model: str
    ip: str


def discover() -> list[FoundCamera]:
    """The cameras that answer within half a second, on the network and on USB.

    Raises:
        SourceUnavailableError: viva-genicam is not installed, or there is no network to look in.
    """
    require_library()
    import viva_genicam

    try:
        return [_describe(info) for info in _answering()]
    except viva_genicam.GenicamError as error:
        raise SourceUnavailableError(f"no camera can be looked for: {error}; see to the network interfaces") from error


def require_library() -> None:
    """See whether viva-genicam, which is an extra, is installed.

    Raises:
        SourceUnavailableError: it is not.
    """
    try:
        import viva_genicam  # noqa: F401 -- whether it is there
    except ImportError as error:
        raise SourceUnavailableError(
            f"the library for cameras cannot be loaded ({error}); install it: pip install 'inspectd[camera]'"
        ) from error


def _answering() -> "list[viva_genicam.DeviceInfo]":
    import viva_genicam

    found: list[viva_genicam.DeviceInfo] = [*viva_genicam.discover(int(DISCOVERY_S * 1000), all=True)]
    with suppress(viva_genicam.GenicamError):  # a machine without USB
        found += viva_genicam.discover_u3v()
    return found


def _describe(info: "viva_genicam.DeviceInfo", camera: "viva_genicam.Camera | None" = None) -> FoundCamera:
    """What a camera says of itself; it is asked as a bystander unless it is open already."""
    import viva_genicam

    vendor, model = info.manufacturer or "", info.model or ""
    if isinstance(info, viva_genicam.U3vDeviceInfo):
        return FoundCamera(info.serial or "", "", vendor, model, "")
    serial = name = ""
    with (
        suppress(viva_genicam.GenicamError),  # it cannot be reached from here
        nullcontext(camera) if camera else closing(viva_genicam.connect_gige(info, monitor=True)) as asked,
    ):
        serial, name = _text(asked, _SERIAL, "DeviceSerialNumber"), _text(asked, _NAME, "DeviceUserID")
    return FoundCamera(serial, name, vendor, model, info.ip)


def _text(camera: "viva_genicam.Camera", register: int, feature: str) -> str:
    """What stands in a text register or, where that is empty, in the feature of the same meaning."""
    import viva_genicam

    text = camera.read_register(register, _TEXT_BYTES).split(b"\0", 1)[0].decode(errors="replace").strip()
    if not text:
        with suppress(viva_genicam.GenicamError):
            text = camera.get(feature)
    return text


def connect(wanted: str) -> "tuple[viva_genicam.Camera, str]":
    """The camera with this serial number, name or IP address, and the origin of its parts.

    Raises:
        SourceUnavailableError: none answers to it, or another program controls it.
    """
    import viva_genicam

    try:
        by_address = bool(ipaddress.ip_address(wanted))
    except ValueError:
        by_address = False
    seen = []
    for info in _answering():
        address = info.ip if isinstance(info, viva_genicam.GigeDeviceInfo) else ""
        found = FoundCamera("", "", "", "", address) if by_address else _describe(info)
        seen.append(address or found.serial)
        if wanted not in {found.serial, found.name, found.ip}:
            continue
        try:
            camera = viva_genicam.Camera.open(info)
        except viva_genicam.GenicamError as error:
            raise SourceUnavailableError(
                f"the camera {wanted} at {address or 'USB'} cannot be opened: {error}; close the other program that "
                "controls it, or, if there is none, switch it off and on"
            ) from error
        return camera, f"genicam:{_describe(info, camera).serial or wanted}"
    raise SourceUnavailableError(
        f"no camera answers to {wanted} (those that answer: {', '.join(seen) or 'none'}); see to its power and cable, "
        "and that its address is in the subnet of the interface it is on"
    )


def set_feature(camera: "viva_genicam.Camera", wanted: str, name: str, value: Scalar) -> None:
    """Set a feature, or execute it if it is a command and the value is True.

    Raises:
        SourceUnavailableError: the camera does not take it.
    """
    import viva_genicam

    done = True
    try:
        info = camera.node_info(name)
        if info is not None and info.kind == viva_genicam.NodeKind.COMMAND and value is True:
            done = camera.execute(name)
        else:
            camera.set(name, str(value))
    except viva_genicam.GenicamError as error:
        raise SourceUnavailableError(
            f"the camera {wanted} does not take the feature {name} = {value}: {error}; {_cure(camera, name)}"
        ) from error
    if not done:
        raise SourceUnavailableError(f"the camera {wanted} has not finished {name} in time; switch it off and on")


def _cure(camera: "viva_genicam.Camera", name: str) -> str:
    import viva_genicam

    if camera.node_info(name) is None:
        close = get_close_matches(name, camera.nodes(), n=3)
        return f"it has {' and '.join(close)}" if close else "take the name from the camera's manual"
    with suppress(viva_genicam.GenicamError):
        state = camera.feature_state(name)
        if state.enum_entries:
            return f"it takes {', '.join(state.enum_entries)}"
        if state.access not in {"RW", "WO"}:
            return "leave it out, or set first what unlocks it"
        if state.range is not None:
            return f"it takes {state.range.min:g} to {state.range.max:g}"
    return "take a value from the camera's manual"


class DeviceClock:
    """A camera's clock against ours, by one reading of it and its nominal ticks.

    The library fits a rate to readings in quick succession, which may be off by a thousandth: seconds in an hour.

    Args:
        camera: an open camera.
        latch: the command that makes it keep its time, and `value` the feature that then says it.
        ticks_per_s: in what units.
    """

    def __init__(self, camera: "viva_genicam.Camera", latch: str, value: str, ticks_per_s: int) -> None:
        self._camera = camera
        self._latch = latch
        self._value = value
        self._ticks_per_s = ticks_per_s
        self._offset_s: float | None = None
        self.read()

    @classmethod
    def of(cls, camera: "viva_genicam.Camera") -> "DeviceClock | None":
        """None where the camera has no clock that can be read."""
        import viva_genicam

        nodes = set(camera.nodes())
        latch = next((name for name in _LATCHES if name in nodes), None)
        value = next((name for name in _LATCHED if name in nodes), None)
        if latch is None or value is None:
            return None
        try:
            ticks_per_s = camera.get_integer(_TICKS_PER_S) if _TICKS_PER_S in nodes else 1_000_000_000
            return cls(camera, latch, value, ticks_per_s) if ticks_per_s > 0 else None
        except viva_genicam.GenicamError:
            return None

    def read(self) -> None:
        """Read it anew, unless the camera takes long to answer."""
        before = time.time()
        self._camera.execute(self._latch, wait=False)
        after = time.time()
        self._camera.invalidate(self._value)
        ticks = self._camera.get_integer(self._value)
        if after - before < _ROUND_TRIP_S:
            self._offset_s = (before + after) / 2 - ticks / self._ticks_per_s

    def captured_at(self, ticks: int | None, arrived_at: datetime) -> datetime | None:
        """When a frame with this time of the camera's was captured; None where that cannot be, as after a restart."""
        if ticks is None or self._offset_s is None:
            return None
        age_s = arrived_at.timestamp() - (ticks / self._ticks_per_s + self._offset_s)
        return arrived_at - timedelta(seconds=max(0.0, age_s)) if -_ROUND_TRIP_S < age_s < _BELIEVABLE_S else None
