"""What the service manager is told; says nothing where there is none."""

import os
import socket
from contextlib import suppress


def ready(status: str) -> None:
    """Start-up is over."""
    _notify(f"READY=1\nSTATUS={status}")


def status(text: str) -> None:
    """The line that `systemctl status` shows."""
    _notify(f"STATUS={text}")


def stopping() -> None:
    """Shut-down has begun."""
    _notify("STOPPING=1")


def _notify(text: str) -> None:
    """One datagram to NOTIFY_SOCKET, as sd_notify(3) says; `@` is an abstract address."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            manager.send(text.encode())
