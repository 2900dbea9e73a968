"""A machine within this one: systemd boots in namespaces of its own, over a file system whose changes vanish."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from tests.brokers import DEADLINE_S, eventually

PATIENCE_S = 90.0
"""For one program on a machine, which may have to load a model."""

_NAMESPACES = ("--mount", "--pid", "--uts", "--ipc")
_OUTER = ("setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--kill-child")
_NEEDED = ("unshare", "nsenter", "setpriv", "pivot_root", "systemctl", "/lib/systemd/systemd")

# Run as the first process of the machine. $1: an empty folder of this one; then pairs of a folder of this one and the
# place in the machine where it is seen, read-only. What the machine writes lies in memory, over this one's root.
_BOOT = r"""
set -eu
mount --make-rprivate /
mount -t tmpfs machine "$1"
cd "$1"; shift
mkdir changes work root
mount -t overlay machine -o lowerdir=/,upperdir=changes,workdir=work root
cd root
while [ $# -gt 0 ]; do
  mkdir -p "./$2"; mount --bind "$1" "./$2"; mount -o remount,bind,ro "./$2"; shift 2
done
mount --rbind /dev dev
mount -t proc proc proc
mount --bind proc/sys proc/sys; mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
# Nothing of this machine's own services, disks and settings is started or touched.
rm -rf etc/fstab etc/systemd/system var/log/journal lib/systemd/system/*.wants lib/systemd/system-generators
mkdir -p etc/systemd/system lib/systemd/system/sockets.target.wants
ln -s ../systemd-journald.socket ../systemd-journald-dev-log.socket lib/systemd/system/sockets.target.wants/
# A control group of its own, which is all the machine sees of them.
mount -t cgroup2 cgroup2 sys/fs/cgroup
mkdir "sys/fs/cgroup/$MACHINE"
echo 0 > "sys/fs/cgroup/$MACHINE/cgroup.procs"
umount sys/fs/cgroup
mkdir -p run/host
exec unshare --cgroup sh -euc '
  mount -t cgroup2 cgroup2 sys/fs/cgroup
  pivot_root . run/host
  cd /
  umount -l /run/host
  mount --make-rshared /  # as systemd expects of those who start it in a container; credentials need it
  exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=basic.target
'
"""


def obstacle() -> str | None:
    """Say why no machine can be booted here; None if one can, as far as that is known before."""
    if os.geteuid() != 0:
        return "only root can boot a machine"
    if missing := [program for program in _NEEDED if shutil.which(program) is None]:
        return f"not installed: {', '.join(missing)} (apt-get install systemd util-linux)"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlay file system"
    allowed = subprocess.run(["unshare", *_NAMESPACES, "--cgroup", "--fork", "true"], check=False, capture_output=True)
    return None if allowed.returncode == 0 else f"no namespaces may be made: {allowed.stderr.decode().strip()}"


class Machine:
    """systemd and its journal, with this machine's programs and network; to be closed, whatever happened.

    It ends with the thread that made it, too.
    """

    def __init__(self, folder: Path, shown: Mapping[str, Path]) -> None:
        """Boot.

        Args:
            folder: an empty one, which remains empty.
            shown: folders of this machine that are to be seen there, read-only, by where they are to be seen.
        """
        self._name = f"machine-{os.getpid()}"
        self._log = folder.with_name(f"{folder.name}.log")
        pairs = [str(part) for place, source in shown.items() for part in (source, place)]
        with self._log.open("wb") as log:
            self._parent = subprocess.Popen(
                [*_OUTER, "sh", "-c", _BOOT, "boot", str(folder), *pairs],
                env=os.environ | {"MACHINE": self._name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._pid = int(eventually(self._first_process, "the machine's first process"))
            eventually(self._runs, "systemd to run")
        except BaseException:
            self.close()
            raise

    @property
    def root(self) -> Path:
        """The machine's root folder, seen from here."""
        return Path(f"/proc/{self._pid}/root")

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program there as root; its output is text."""
        return subprocess.run(self._inside(command), capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        """The same, but without waiting for its end."""
        return subprocess.Popen(self._inside(command), stderr=subprocess.PIPE, text=True)

    def _inside(self, command: Sequence[str | Path]) -> list[str]:
        spaces = ("--mount", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wd")
        return ["nsenter", "--target", str(self._pid), *spaces, *map(str, command)]

    def close(self) -> None:
        """End every process there; nothing remains."""
        self._parent.kill()  # takes the first process with it, and the kernel with that all others
        self._parent.wait(DEADLINE_S)
        for mount in Path("/proc/mounts").read_text().splitlines():
            _, place, kind, *_ = mount.split()
            if kind == "cgroup2":
                _remove(Path(place, self._name))

    def _first_process(self) -> str:
        assert self._parent.poll() is None, f"the machine has ended:\n{self._log.read_text()}"
        return Path(f"/proc/{self._parent.pid}/task/{self._parent.pid}/children").read_text().strip()

    def _runs(self) -> bool:
        self._first_process()
        return self.run("systemctl", "is-active", "basic.target").returncode == 0


def _remove(group: Path) -> None:
    """Take a control group away, as soon as the last of its processes has gone."""
    for folder, _, _ in os.walk(group, topdown=False):
        eventually(partial(_gone, Path(folder)), f"{folder} to be empty")


def _gone(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        return False
    return True
