"""The machine that figures come from, as /proc and the driver tell it."""

import os
import platform
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

TELLING = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "bf16",
    "i8mm",
)
"""Instructions that decide how fast networks are, as /proc/cpuinfo calls them on x86 and on ARM."""
BUSY = 0.05
"""Of all cores; from here on the machine does something else beside."""
LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides how fast a model is. `busy` is the share of all cores that others used just before, 0…1."""

    cpu: str
    cores: int
    usable_cores: int
    instructions: tuple[str, ...]
    governor: str | None
    gpus: tuple[str, ...]
    ram_gb: float
    kernel: str
    python: str
    load: float
    busy: float

    @property
    def warning(self) -> str | None:
        """What casts doubt on figures, None if nothing does."""
        if self.busy > BUSY:
            return (
                f"the machine is not idle: others used {self.busy:.0%} of its cores (load {self.load:.2f}); "
                "trust the ratios more than the milliseconds, and measure again when it is quiet"
            )
        return None


def look() -> Machine:
    """See what machine this is, and for a second what it does."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    name = re.search(r"^(?:model name|Model|Hardware)\s*: (.*)$", told, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", told, re.MULTILINE)
    known = flags[1].split() if flags else []
    return Machine(
        cpu=name[1] if name else platform.machine(),
        cores=os.cpu_count() or 0,
        usable_cores=len(os.sched_getaffinity(0)),
        instructions=tuple(each for each in TELLING if each in known),
        governor=_governor(),
        gpus=_gpus(),
        ram_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        kernel=platform.release(),
        python=platform.python_version(),
        load=os.getloadavg()[0],
        busy=_busy(),
    )


def _governor() -> str | None:
    """What sets the clock of the first core, where the kernel does."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _gpus() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    asked = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(
        f"{name}, driver {driver}, {memory}" for name, driver, memory in re.findall("(.*), (.*), (.*)", answer)
    )


def _busy() -> float:
    def ticks() -> tuple[int, int]:
        line = Path("/proc/stat").read_text(encoding="utf-8").partition("\n")[0]
        each = [int(word) for word in line.split()[1:9]]
        return sum(each), each[3] + each[4]  # idle, and waiting for a disk

    total, idle = ticks()
    time.sleep(LOOK_S)
    later, still_idle = ticks()
    return 1 - (still_idle - idle) / max(1, later - total)
