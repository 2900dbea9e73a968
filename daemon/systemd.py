"""What the service manager is told; says nothing where there is none. sd_notify(3) has the words."""

import os
import socket
import time
from contextlib import suppress


def ready(status: str) -> None:
    """Start-up, or reading the configuration anew, is over."""
    _notify("READY=1", f"STATUS={status}")


def alive(status: str) -> None:
    """All stages move; and the line that `systemctl status` shows.

    A service that stops saying so for its WatchdogSec is started afresh.
    """
    _notify("WATCHDOG=1", f"STATUS={status}")


def hanging(status: str) -> None:
    """A stage hangs: restart the service now, and do not wait for its WatchdogSec."""
    _notify("WATCHDOG=trigger", f"STATUS={status}")


def working(for_s: float, status: str) -> None:
    """Start-up takes that many seconds more from now, and what it is at."""
    _notify(f"EXTEND_TIMEOUT_USEC={int(for_s * 1e6)}", f"STATUS={status}")


def reloading() -> None:
    """The configuration is read anew; `ready` ends it."""
    _notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def stopping() -> None:
    """Shut-down has begun."""
    _notify("STOPPING=1")


def _notify(*lines: str) -> None:
    """One datagram to NOTIFY_SOCKET; `@` is an abstract address."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            manager.send("\n".join(lines).encode())
