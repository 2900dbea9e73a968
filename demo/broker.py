"""An MQTT broker of the demo's own: on the loopback, on a free port, for as long as the demo lasts.

`python -m demo.broker PORT` runs amqtt, a broker in Python, for machines without Mosquitto.
"""

import asyncio
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

from demo.child import Child

HOST = "127.0.0.1"

_START_S = 30.0


class Choice(StrEnum):
    """Which broker to run: `auto` is Mosquitto where it is installed, else amqtt."""

    auto = "auto"
    mosquitto = "mosquitto"
    amqtt = "amqtt"


class BrokerError(Exception):
    """There is no broker; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker that answers on `HOST`; `name` is its program and version."""

    name: str
    port: int


@contextmanager
def broker(choice: Choice, folder: Path) -> Iterator[Broker]:
    """Run a broker while in the context, its files in `folder`.

    Raises:
        BrokerError: it is not installed, or does not start.
    """
    mosquitto = None if choice is Choice.amqtt else _mosquitto()
    if choice is Choice.mosquitto and mosquitto is None:
        raise BrokerError("mosquitto is neither on the PATH nor in /usr/sbin: install it, or use --broker amqtt")
    port = _free_port()
    if mosquitto is None:
        running = Broker(f"amqtt {version('amqtt')}", port)
        child = Child([sys.executable, "-m", "demo.broker", str(port)], folder / "broker.log")
    else:
        configuration = folder / "mosquitto.conf"
        configuration.write_text(f"listener {port} {HOST}\nallow_anonymous true\npersistence false\n")
        running = Broker(f"mosquitto {_version(mosquitto)}", port)
        child = Child([mosquitto, "-c", configuration], folder / "broker.log")
    with child:
        _await(child, running)
        yield running


def _mosquitto() -> str | None:
    # Debian puts it where only root's PATH leads.
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


def _version(mosquitto: str) -> str:
    usage = subprocess.run([mosquitto, "-h"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\S+)", usage)
    return found[1] if found else ""


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _await(child: Child, expected: Broker) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection((HOST, expected.port), timeout=1).close()
        except OSError:
            if not child.alive or time.monotonic() > deadline:
                raise BrokerError(f"{expected.name} does not start; {child.log} ends:\n{child.last_words()}") from None
            time.sleep(0.05)
        else:
            return


async def _serve(port: int) -> None:
    from amqtt.broker import Broker as Amqtt

    listener = {"type": "tcp", "bind": f"{HOST}:{port}"}
    plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    amqtt = Amqtt({"listeners": {"default": listener}, "plugins": plugins})
    await amqtt.start()
    await stop.wait()
    await amqtt.shutdown()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
