"""Where parts come from: folders, cameras, videos. A daemon that runs is never disturbed."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from config.load import ConfigError
from config.schema import FolderSource, GenicamSource, MqttSource, Settings, VideoSource
from daemon.build import build_camera, place_of
from daemon.desk.checks import disk
from daemon.desk.checks.finding import Finding, fail, ok, warn
from daemon.desk.checks.machine import held, runs
from daemon.messages import Frame, Unreadable
from daemon.sources.base import SourceUnavailableError
from daemon.sources.folder.rooms import ROOMS
from daemon.sources.folder.source import examine
from daemon.sources.genicam.camera import discover, require_library
from daemon.stats import Drop

FRAME_S = 5.0
"""How long to wait for a frame."""
BUFFER = 8_000_000
"""Bytes that the kernel must let a camera's stream have: a few frames while the daemon is busy."""
JUMBO = 8000
"""Bytes; a GigE camera sends packets so large or larger where the network lets it."""
FEWEST = {"max_user_watches": 1024, "max_user_instances": 32}
"""Of inotify, for each user."""


def sources(settings: Settings) -> Iterator[Finding]:
    """Whether each source can be used, as far as that is known without taking a part from it."""
    for station in settings.stations:
        subject = f"station {station.name}"
        try:
            match station.source:
                case FolderSource() as source:
                    examine(source.path, writable=source.keep != "leave")
                case GenicamSource():
                    require_library()
                case VideoSource() as source:
                    build_camera(station.name, source, _nothing_lost)
                case _:
                    pass
        except (SourceUnavailableError, ConfigError) as error:
            yield fail(subject, error)
        else:
            yield ok(subject, f"{station.source.type} {place_of(station.source)}")


def folders(settings: Settings) -> Iterator[Finding]:
    """Rights that are really tried, and how the daemon would learn of files."""
    watched = {s.name: s.source for s in settings.stations if isinstance(s.source, FolderSource)}
    for name, source in watched.items():
        subject, path = f"station {name}", source.path
        if not path.is_dir():
            continue  # `sources` has said so
        if held(path if source.keep == "leave" else path / ROOMS[0]) and not runs(settings.state_dir):
            cure = "stop one of the two: each folder has one daemon"
            yield fail(subject, f"another inspectd, with another state_dir, has {path}", cure)
        if source.keep != "leave":
            yield _moving(subject, path)
        if (system := disk.kind(path)) in disk.NETWORK:
            cure = f"nothing, if {source.rescan_s:g} s are soon enough; else rescan_s = 1 in [station.source]"
            yield warn(
                subject, f"{path} is on {system}: no events come, it is listed every {source.rescan_s:g} s", cure
            )
    if watched:
        yield from _events()


def cameras(settings: Settings) -> Iterator[Finding]:
    """Have each camera and video give a frame, unless a daemon looks through it."""
    busy = runs(settings.state_dir)
    for station in settings.stations:
        if isinstance(station.source, FolderSource | MqttSource):
            continue
        subject, place = f"station {station.name}", place_of(station.source)
        if isinstance(station.source, GenicamSource):
            yield from _network(subject, station.source.camera)
        if busy:
            yield ok(subject, f"{place} is not tried, since a daemon runs: see its state")
            continue
        began = time.monotonic()
        try:
            part = _first(station.name, station.source)
        except (SourceUnavailableError, ConfigError) as error:
            yield fail(subject, error)
            continue
        took = time.monotonic() - began
        if isinstance(part, Frame):
            height, width = part.image.shape[:2]
            yield ok(subject, f"{place} gave a frame of {width} × {height} px after {took:.1f} s")
        elif isinstance(part, Unreadable):
            yield fail(subject, f"{place} gave a frame that cannot be used: {part.reason}", "see to cable and network")
        elif isinstance(station.source, GenicamSource) and station.source.trigger == "hardware":
            cure = f"nothing, if no part passed; else see to the signal on {station.source.line}"
            yield warn(subject, f"{place} is open, and gave no frame within {FRAME_S:g} s", cure)
        else:
            yield fail(subject, f"{place} gave no frame within {FRAME_S:g} s", "see to its cable and its trigger")


def _nothing_lost(_: Drop, __: int) -> None:
    pass


def _first(name: str, source: GenicamSource | VideoSource) -> Frame | Unreadable | None:
    """The first part within a while, and the camera closed again."""
    stop = threading.Event()
    parts = build_camera(name, source, _nothing_lost).frames(stop)
    until = time.monotonic() + FRAME_S
    try:
        return next((part for part in parts if part is not None or time.monotonic() > until), None)
    finally:
        stop.set()
        with suppress(SourceUnavailableError):
            for _ in parts:
                pass


def _moving(subject: str, path: Path) -> Finding:
    """Write a file that no daemon takes, claim it as one would, and take it away."""
    let_in = f"chgrp -R inspectd {path}; chmod -R g+rwX {path}"
    cure = f"let the daemon's group in ({let_in}), on one file system, with room on its disk"
    rooms = [path / room for room in ROOMS if (path / room).is_dir()]
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".doctor.", delete=False) as file:
            at = Path(file.name)
        try:
            for place in (*(room / at.name for room in rooms), path / f"{at.name}.moved"):
                at = at.rename(place)
        finally:
            at.unlink()
    except OSError as error:
        return fail(subject, f"files cannot be moved in {path}: {error.strerror} ({error.filename})", cure)
    return ok(subject, f"files can be written and moved in {path}")


def _events() -> Iterator[Finding]:
    allowed = {}
    for name in FEWEST:
        with suppress(OSError, ValueError):
            allowed[name] = int(Path("/proc/sys/fs/inotify", name).read_text(encoding="ascii"))
    found = ", ".join(f"{name} {number}" for name, number in allowed.items())
    if low := [name for name, number in allowed.items() if number < FEWEST[name]]:
        cure = f"sysctl -w fs.inotify.{low[0]}={8 * FEWEST[low[0]]}, and the same in /etc/sysctl.d"
        yield warn(
            "folders", f"few file-system events are granted ({found}): folders may have to be listed often", cure
        )
    else:
        yield ok("folders", f"file-system events are granted ({found})")


def _network(subject: str, camera: str) -> Iterator[Finding]:
    """Whether the camera answers, and how its packets come."""
    try:
        found = next((one for one in discover() if camera in {one.serial, one.name, one.ip}), None)
    except SourceUnavailableError as error:
        yield fail(subject, error)
        return
    if found is None:
        cure = "see to its power and cable, and to its address (inspectd sources list shows who answers)"
        yield fail(subject, f"no camera answers to {camera}", cure)
        return
    yield ok(subject, f"{found.vendor} {found.model}, serial {found.serial}, answers at {found.ip or 'USB'}")
    if not found.ip:
        return
    interface = _interface(found.ip)
    mtu = int(Path("/sys/class/net", interface, "mtu").read_text(encoding="ascii")) if interface else 0
    if mtu < JUMBO:
        cure = f"ip link set {interface or 'INTERFACE'} mtu 9000, if the switches between allow it"
        yield warn(subject, f"packets of {mtu or 'unknown'} bytes at most on {interface or 'its interface'}", cure)
    else:
        yield ok(subject, f"packets of up to {mtu} bytes on {interface}")
    buffer = int(Path("/proc/sys/net/core/rmem_max").read_text(encoding="ascii"))
    if buffer < BUFFER:
        cure = "sysctl -w net.core.rmem_max=33554432, and the same in /etc/sysctl.d"
        yield warn(
            subject, f"net.core.rmem_max is {disk.size(buffer)}: packets are lost when the machine is busy", cure
        )
    else:
        yield ok(subject, f"net.core.rmem_max is {disk.size(buffer)}")


def _interface(address: str) -> str:
    """By which network interface an IPv4 address is reached; "" if by none that is known."""
    if address.startswith("127."):
        return "lo"
    wanted = int.from_bytes(map(int, address.split(".")), "little")
    best, longest = "", -1
    for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]:
        name, destination, _, flags, *_, mask = line.split()[:8]
        bits = int(mask, 16)
        if int(flags, 16) & 1 and wanted & bits == int(destination, 16) and bits.bit_count() > longest:
            best, longest = name, bits.bit_count()
    return best
