"""The machine: accelerator, clock, rights, cores, memory, service manager, and who else runs."""

import ctypes
import fcntl
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from config.schema import GenicamSource, Metrics, Settings
from daemon.desk.checks.disk import size
from daemon.desk.checks.finding import Finding, fail, ok, warn

OLDEST_SYSTEMD = 252
OF_SERVICES = Path("/var/lib/inspectd")
"""Where systemd keeps the state folders of the units."""
HOT_C = 85
LITTLE_GPU = 1_000_000_000
SPARE = 500_000_000
"""Bytes of memory that are wanted beside the models."""

_UNSYNCHRONISED = 0x40
_PTP = ("PtpEnable", "GevIEEE1588")


def accelerator(settings: Settings) -> Iterator[Finding]:
    """Whether there is the GPU that is asked for, and how it is."""
    from detectors.devices import describe, gpu

    if settings.device == "cpu":
        yield ok("gpu", "not wanted: device is cpu")
        return
    name = describe()
    now = gpu()
    if name is None or now is None:
        if settings.device == "cuda":
            cure = 'install the driver (nvidia-smi must work) and a PyTorch with CUDA, or set device = "auto"'
            yield fail("gpu", "device is cuda, and PyTorch sees no GPU", cure)
        else:
            yield ok("gpu", "none is seen; device is auto, so models run on the CPU")
        return
    free = now.size_bytes - now.used_bytes
    temperature = "" if now.celsius is None else f", {now.celsius} °C"
    found = f"{name}, {size(free)} free of {size(now.size_bytes)}{temperature}"
    if free < LITTLE_GPU:
        yield warn("gpu", found, "end the other programs on it (nvidia-smi lists them)")
    elif (now.celsius or 0) >= HOT_C:
        yield warn("gpu", found, "see to its cooling; it slows itself down")
    else:
        yield ok("gpu", found)


class _Timex(ctypes.Structure):
    """The head of adjtimex(2)'s structure, and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def clock(settings: Settings) -> Iterator[Finding]:
    """Whether the kernel's clock is kept by NTP or PTP. How far off the broker's is, nobody here can know."""
    timex = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) < 0:
        cure = "run it where the kernel's clock may be read"
        yield warn("clock", f"its state cannot be read: {os.strerror(ctypes.get_errno())}", cure)
        return
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    if timex.status & _UNSYNCHRONISED:
        cure = "run chrony or systemd-timesyncd (timedatectl set-ntp true); receivers drop gate messages that seem old"
        yield warn("clock", f"{now}, synchronised by nobody", cure)
    else:
        yield ok("clock", f"{now}, synchronised, at most {timex.maxerror / 1000:.0f} ms off its source")
    wanting = [
        station.name
        for station in settings.stations
        if isinstance(station.source, GenicamSource) and any(station.source.features.get(name) for name in _PTP)
    ]
    if wanting and not list(Path("/dev").glob("ptp*")):
        cure = "use a network card with PTP, and run ptp4l"
        yield warn("clock", f"the camera of station {wanting[0]} wants PTP, and no /dev/ptp* is here", cure)


def rights(settings: Settings) -> Iterator[Finding]:
    """Who may read what is secret, and whether this user's rights are the service's."""
    if os.geteuid() == 0:
        cure = "run it in the service's shoes: docs/service.md, Try it"
        yield warn("rights", "run by root, who may do all: the rights of the service's user are not tried", cure)
    mqtt = settings.mqtt
    secret = {"password_file": mqtt.password_file, "key_file": mqtt.tls.key_file if mqtt.tls else None}
    for option, file in secret.items():
        if file is not None and file.exists():
            mode = stat.S_IMODE(file.stat().st_mode)
            if mode & stat.S_IROTH:
                yield warn("rights", f"{option} {file} can be read by everybody ({mode:04o})", f"chmod 0640 {file}")
            else:
                yield ok("rights", f"{option} {file} is closed to others ({mode:04o})")


def capacity(settings: Settings) -> Iterator[Finding]:
    """Cores and memory against what is configured."""
    cores = len(os.sched_getaffinity(0))
    if settings.threads > cores:
        cure = f"set threads = {cores}, or 0"
        yield warn(
            "machine", f"threads is {settings.threads}, and there are {cores} cores: they hinder each other", cure
        )
    else:
        yield ok("machine", f"{cores} cores, threads {settings.threads or 'left to the library'}")
    models = {recipe.model for station in settings.stations for recipe in station.recipes}
    weights = sum(file.stat().st_size for model in models for file in model.glob("*") if file.is_file())
    available = _available()
    found = f"{size(available)} of memory available, the models' files have {size(weights)}"
    if available < 2 * weights + SPARE:
        yield warn("machine", found, "end other programs, or give the machine more memory")
    else:
        yield ok("machine", found)


def service(settings: Settings) -> Iterator[Finding]:
    """The service manager, and whether a daemon runs."""
    program = shutil.which("systemctl")
    if program is None:
        yield ok("machine", "no systemd here; something else must start the daemon again when it ends")
    else:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout
        version = re.match(r"systemd (\d+)", said)
        if version and int(version[1]) < OLDEST_SYSTEMD:
            cure = f"use systemd {OLDEST_SYSTEMD} or later"
            yield warn("machine", f"systemd {version[1]}: the unit has options that it does not know", cure)
        else:
            yield ok("machine", f"systemd {version[1] if version else 'of an unknown version'}")
    if settings.metrics is not None and not runs(settings.state_dir):
        yield _metrics_port(settings.metrics)
    here = "a daemon runs: its cameras are left alone"
    yield ok("machine", here if runs(settings.state_dir) else f"no daemon runs with {settings.state_dir}")


def _metrics_port(metrics: Metrics) -> Finding:
    """Whether the figures can be offered where they shall be."""
    place = f"port {metrics.port} of {metrics.host}"
    try:
        at = socket.getaddrinfo(metrics.host, metrics.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(at[0]) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as whoever listens there does
            listener.bind(at[4])
    except OSError as error:
        return fail(
            "metrics", f"{place} cannot be listened at: {error.strerror}", "set another host or port in [metrics]"
        )
    return ok("metrics", f"{place} is free")


def runs(state_dir: Path, of_services: Path = OF_SERVICES) -> bool:
    """Whether a daemon holds this state folder now; while there is none yet, whether a service holds its own.

    A service is given its folder by systemd, which whoever asks outside of it does not see.
    """
    locks = [state_dir / "lock"]
    if not state_dir.exists():
        locks += [of_services / "lock", *of_services.glob("*/lock")]
    return any(map(held, locks))


def held(path: Path) -> bool:
    """Whether another process has locked a file or folder; where that cannot be seen, no."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def _available() -> int:
    """Bytes of memory that programs may still have."""
    said = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    return 1024 * int(said[1]) if said else 0
