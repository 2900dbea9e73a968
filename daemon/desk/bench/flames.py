"""A flame graph of where a frame's time goes, by py-spy; what a library does in one call is one block."""

import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

from daemon.desk.bench.contest import CALLS
from daemon.desk.bench.rival import Rival

SECONDS = 15
RATE = 200


def draw(rival: Rival, file: Path) -> None:
    """Look at a contender while it judges files, and write the SVG.

    Raises:
        FallenError: the contender has ended.
        OSError: py-spy is missing, or may not look.
    """
    beside = str(Path(sys.executable).parent)
    program = shutil.which("py-spy") or shutil.which("py-spy", path=beside)
    if program is None:
        raise FileNotFoundError("py-spy is not installed: pip install py-spy")
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [program, "record", "--pid", str(rival.pid), "--output", str(file)]
    command += ["--duration", str(SECONDS), "--rate", str(RATE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as spy:
        while spy.poll() is None:
            rival.measure("file", CALLS)
        said = spy.stdout.read() if spy.stdout else ""
    if spy.returncode or not file.exists():
        cure = "run it as root, or `sysctl kernel.yama.ptrace_scope=0`"
        raise PermissionError(f"py-spy could not look ({said.strip()[-200:]}); {cure}")
    title = f"{rival.name}: an image from its file to its map"
    drawn = file.read_text(encoding="utf-8").replace(escape(" ".join(command)), title)
    file.write_text(drawn, encoding="utf-8")
