"""What the service manager is told; says nothing where there is none."""

from sdnotify import SystemdNotifier

_notifier = SystemdNotifier()


def ready(status: str) -> None:
    """Start-up is over."""
    _notifier.notify(f"READY=1\nSTATUS={status}")


def status(text: str) -> None:
    """The line that `systemctl status` shows."""
    _notifier.notify(f"STATUS={text}")


def stopping() -> None:
    """Shut-down has begun."""
    _notifier.notify("STOPPING=1")
