"""Aravis' camera for tests: a process of its own, and one at a time on a machine."""

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

SIMULATOR = "arv-fake-gv-camera-0.8"
ADDRESS = "127.0.0.1"
DEADLINE_S = 20.0
TURN_S = 100.0
"""How long to wait for another test's camera to end."""

_UDP = Path("/proc/net/udp")
_LISTENING = "0100007F:0F74"
"""Port 3956 of that address."""
_TURN = Path(tempfile.gettempdir(), "inspectd-test-camera.lock")


def need_simulator() -> None:
    if shutil.which(SIMULATOR) is None:
        pytest.skip(f"needs Aravis' camera simulator {SIMULATOR}: apt install aravis-tools")


class Simulator:
    """The camera at the only address at which cameras are found without a network; held until `close`."""

    def __init__(self) -> None:
        self.serial = f"T{os.getpid()}"
        self._arguments: tuple[str, ...] = ()
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = _TURN.open("w")
        until = time.monotonic() + TURN_S
        while True:
            try:
                fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    self._turn.close()
                    pytest.skip(f"another test has the camera at {ADDRESS}")
                time.sleep(0.2)
            else:
                return

    def start(self, *arguments: str) -> None:
        if self._process is not None and arguments == self._arguments:
            return
        self.kill()
        self._arguments = arguments
        until = time.monotonic() + DEADLINE_S
        command = [SIMULATOR, "-i", ADDRESS, "-s", self.serial, *arguments]
        while self._process is None or self._process.poll() is not None or _LISTENING not in _UDP.read_text():
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if time.monotonic() > until:
                pytest.skip(f"another camera has UDP port 3956 of {ADDRESS}")
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        self._turn.close()
