"""The state folder and the disk under it."""

import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from config.schema import FolderSource, Settings
from daemon.desk.checks.finding import Finding, fail, ok, warn

NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "fuse.sshfs", "fuse.glusterfs"})
"""Kinds of file system where another machine may write: no events come, and SQLite's locks cannot be trusted."""
MEMORY = frozenset({"tmpfs", "ramfs"})
LITTLE, TOO_LITTLE = 2_000_000_000, 200_000_000
"""Bytes free."""
SLOW_MS = 50.0
"""A commit of verdicts waits for one such write; a line of many parts a second does not wait so long."""

_SYNCS = 7


def own_folders(settings: Settings) -> Iterator[Finding]:
    """Whether the daemon can keep its state and its images, as far as its rights say."""
    folders = {"state_dir": settings.state_dir}
    if settings.archive is not None:
        folders["archive.path"] = settings.archive.path
    for option, folder in folders.items():
        place = nearest(folder)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            cure = f"let the daemon's user write it, or name another in {option}"
            yield fail(option, f"{folder} cannot be written by this user", cure)
        else:
            yield ok(option, f"{folder}" if folder.exists() else f"{folder}, which the first run makes")


def disks(settings: Settings) -> Iterator[Finding]:
    """Room, kind and speed of the disks that the daemon writes to."""
    state = settings.state_dir
    yield from _kind(state)
    archive = [] if settings.archive is None else [settings.archive.path]
    watched = {
        station.name: station.source.path
        for station in settings.stations
        if isinstance(station.source, FolderSource) and station.source.path.is_dir()
    }
    for place in {nearest(path).stat().st_dev: path for path in (*watched.values(), *archive, state)}.values():
        yield _room(place)
    if state.is_dir() and os.access(state, os.W_OK | os.X_OK):
        yield _speed(state)
    for name, path in watched.items():
        if nearest(state).stat().st_dev != path.stat().st_dev:
            cut = "another file system than that of state_dir: after a power cut a part may be judged twice"
            yield ok(f"station {name}", f"{path} is on {cut}")


def kind(path: Path) -> str:
    """Which kind of file system a path is on, as the kernel calls it; "" where it does not say."""
    found, longest = "", -1
    real = Path(os.path.realpath(path))
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        at = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        if real.is_relative_to(at) and len(at) >= longest:  # of several on one place the last is seen
            found, longest = after.split()[0], len(at)
    return found


def nearest(path: Path) -> Path:
    """The path, or what there is of it."""
    return next(place for place in (path, *path.parents) if place.exists())


def _kind(state: Path) -> Iterator[Finding]:
    system = kind(nearest(state))
    if system in NETWORK:
        cure = "put state_dir on a disk of this machine"
        yield fail("disk", f"state_dir {state} is on {system}, where SQLite cannot keep the record safe", cure)
    elif system in MEMORY:
        cure = "put state_dir on a disk"
        yield warn("disk", f"state_dir {state} is in memory ({system}): a power cut loses verdicts and numbers", cure)
    else:
        yield ok("disk", f"state_dir {state} is on {system or 'an unknown file system'}")


def _room(path: Path) -> Finding:
    usage = shutil.disk_usage(nearest(path))
    found = f"{path} has {size(usage.free)} free of {size(usage.total)}"
    cure = "delete what is old in done/ and failed/ (docs/service.md); a full disk holds the line"
    if usage.free < TOO_LITTLE:
        return fail("disk", found, cure)
    return warn("disk", found, cure) if usage.free < LITTLE else ok("disk", found)


def _speed(state: Path) -> Finding:
    took = []
    with tempfile.NamedTemporaryFile(dir=state, prefix=".doctor.") as file:
        for _ in range(_SYNCS):
            file.write(bytes(4096))
            file.flush()
            began = time.monotonic()
            os.fsync(file.fileno())
            took.append(1000 * (time.monotonic() - began))
    median = statistics.median(took)
    found = f"a durable write to {state} takes {median:.1f} ms (median of {_SYNCS}, longest {max(took):.1f} ms)"
    if median > SLOW_MS:
        return warn("disk", found, "put state_dir on an SSD, or take load off this disk")
    return ok("disk", found)


def size(number: float) -> str:
    """Bytes, as people say them."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:  # noqa: PLR2004 -- as the metric system has it
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
