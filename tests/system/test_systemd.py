"""The units in a booted systemd: a user of its own, readiness, credentials, watchdog, reload, sandbox, journal."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests import brokers
from tests.brokers import Broker, Subscriber, eventually
from tests.machines import Machine, obstacle
from tests.system.conftest import write_part
from tests.system.test_daemon import left_behind, verdicts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/service.md").read_text()
UNIT = "inspectd@line1"
CONFIGURATION = """
[mqtt]
host = "127.0.0.1"
port = {port}
username = "line1"
[[station]]
name = "cam1"
model = "/srv/inspectd/models/flange"
[station.source]
type = "folder"
path = "/srv/inspectd/line1"
"""


# Stops one thread, as a driver or a lock that hangs would, until something ends it.
FREEZE = """
import ctypes, os, sys

thread, ptrace = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True).ptrace
for request in (0x4206, 0x4207):  # PTRACE_SEIZE, PTRACE_INTERRUPT
    if ptrace(request, thread, None, None):
        sys.exit(os.strerror(ctypes.get_errno()))
while True:
    _, status = os.waitpid(thread, 0x40000000)  # __WALL: a thread
    if not os.WIFSTOPPED(status):
        break
"""
# What the sandbox lets through, as the probe of a line sees it.
PROBE = """
import ctypes, json, os, socket
from pathlib import Path

def tried(what):
    try:
        return what() or "done"
    except Exception as error:
        return type(error).__name__

state = Path(os.environ["STATE_DIRECTORY"])
result = {
    "watched folder": tried(lambda: Path("/srv/inspectd/line1/mark").mkdir()),
    "models": tried(lambda: Path("/srv/inspectd/models/flange/mark").touch()),
    "program": tried(lambda: Path("/opt/inspectd/mark").touch()),
    "configuration": tried(lambda: Path("/etc/inspectd/mark").touch()),
    "home": tried(lambda: os.listdir("/home") + os.listdir("/root")),
    "key store": tried(lambda: os.listdir("/etc/credstore")),
    "outbox of others": tried(lambda: os.listdir("/var/lib/private/inspectd/line1")),
    "raw socket": tried(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()),
    "mount": ctypes.CDLL(None).mount(b"/etc", b"/mnt", None, 4096, None),
    "root": os.getuid() == 0,
}
(state / "probe.json").write_text(json.dumps(result))
"""


class Line:
    """One production line on a machine, and the broker beside it."""

    def __init__(self, machine: Machine, port: int) -> None:
        self.machine = machine
        self.port = port
        self.config = machine.root / "etc/inspectd/line1.toml"
        self.incoming = machine.root / "srv/inspectd/line1"
        self._seed = 0

    def configure(self, text: str = "") -> None:
        self.config.write_text(text or CONFIGURATION.format(port=self.port))

    def ctl(self, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
        return self.machine.run("systemctl", verb, UNIT, *more)

    def start(self) -> None:
        done = self.ctl("start")
        assert done.returncode == 0, self.journal()

    def thread(self, name: str) -> Path:
        """A stage's thread, by its folder in the machine's /proc; those that it started later have its name, too."""
        tasks = (self.machine.root / "proc" / self.pid / "task").iterdir()
        return min((task for task in tasks if (task / "comm").read_text().strip() == name), key=lambda t: int(t.name))

    def drop(self, count: int, kind: str = "good") -> None:
        for _ in range(count):
            self._seed += 1
            write_part(self.incoming / f"{self._seed:03d}.png", self._seed, kind)

    def shows(self, what: str) -> str:
        return self.ctl("show", "--value", f"--property={what}").stdout.strip()

    def journal(self, *matches: str) -> str:
        return self.machine.run("journalctl", "--no-pager", "--unit", UNIT, *matches).stdout

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal("--output=json", *matches).splitlines()]

    @property
    def restarts(self) -> int:
        """How often systemd has started it by itself."""
        return int(self.shows("NRestarts"))

    @property
    def pid(self) -> str:
        return self.shows("MainPID")


@pytest.fixture(scope="module")
def machine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with the program and its units installed, and a model; without downloading PyTorch."""
    if reason := obstacle():
        pytest.skip(reason)
    shown = {
        "/opt/inspectd/python": Path(sys.base_prefix),
        "/opt/inspectd/packages": Path(sysconfig.get_path("purelib")),
    }
    with closing(Machine(tmp_path_factory.mktemp("machine"), shown)) as machine:
        root, version = machine.root, f"python{sys.version_info.major}.{sys.version_info.minor}"
        subprocess.run(["make", "install", f"DESTDIR={root}"], cwd=ROOT, check=True, capture_output=True)
        for command in ("systemd-sysusers inspectd.conf", "systemd-tmpfiles --create inspectd.conf"):
            assert machine.run(*command.split()).returncode == 0
        site = root / f"opt/inspectd/.venv/lib/{version}/site-packages"
        site.mkdir(parents=True)
        (site / "borrowed.pth").write_text("/opt/inspectd/packages\n")
        for package in ("calibration", "config", "daemon", "detectors"):
            shutil.copytree(ROOT / package, site / package)
        programs = root / "opt/inspectd/.venv/bin"
        programs.mkdir()
        (programs / "python").symlink_to(f"/opt/inspectd/python/bin/{version}")
        (programs.parent / "pyvenv.cfg").write_text("home = /opt/inspectd/python/bin\n")
        (programs / "inspectd").write_text("#!/opt/inspectd/.venv/bin/python\nfrom daemon.cli import main\n\nmain()\n")
        (programs / "inspectd").chmod(0o755)
        shutil.copytree(model, root / "srv/inspectd/models/flange")
        for unit in ("inspectd@.service", "inspectd.service"):
            borrowed = root / f"etc/systemd/system/{unit}.d/borrowed.conf"
            borrowed.parent.mkdir()
            borrowed.write_text("[Service]\nEnvironment=LD_LIBRARY_PATH=/opt/inspectd/python/lib OMP_NUM_THREADS=1\n")
        machine.run("systemctl", "daemon-reload")
        yield machine


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker to which only line1 may publish, with its password, and all may listen."""
    if brokers.find_mosquitto() is None:
        pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
    folder = tmp_path_factory.mktemp("broker")
    subprocess.run(["mosquitto_passwd", "-b", "-c", folder / "passwords", "line1", "from the store"], check=True)
    (folder / "rights").write_text("topic read #\nuser line1\ntopic readwrite #\n")
    options = (f"password_file {folder / 'passwords'}", f"acl_file {folder / 'rights'}", "allow_anonymous true")
    made = brokers.mosquitto(folder, *options)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def line1(machine: Machine, broker: Broker) -> Line:
    machine.run("install", "-d", "-m", "2770", "-o", "root", "-g", "inspectd", "/srv/inspectd/line1")
    (machine.root / f"etc/credstore/{UNIT}.mqtt_password").write_text("from the store\n")
    return Line(machine, broker.port)


@pytest.fixture
def line(line1: Line) -> Line:
    """The line as it should be; where the test before left it running, it runs."""
    line1.configure()
    line1.ctl("reset-failed")
    return line1


def test_a_line_judges_parts_with_its_password_as_a_user_of_its_own(line: Line) -> None:
    with closing(Subscriber(line.port, "inspectd/#")) as listener:
        line.start()
        assert line.shows("ActiveState") == "active"
        assert line.shows("StatusText").startswith("cam1:")
        line.drop(3)
        listener.wait(lambda: len(verdicts(listener)) == 3, "three verdicts")
        state = (line.machine.root / "var/lib/private/inspectd/line1").stat()
        assert 61184 <= state.st_uid <= 65519  # a dynamic user's
        assert state.st_mode & 0o777 == 0o750


def test_where_the_processor_is_short_all_lines_together_are_ahead_of_other_services(line: Line) -> None:
    slices = line.machine.run("systemctl", "show", "--value", "--property=Slice", UNIT, "inspectd")
    assert slices.stdout.split() == ["inspectd.slice"] * 2
    weight = line.machine.run("systemctl", "show", "--value", "--property=CPUWeight", "inspectd.slice")
    assert weight.stdout.strip() == "1000"


def test_a_killed_line_comes_back_and_each_part_has_one_verdict(line: Line) -> None:
    with closing(Subscriber(line.port, "inspectd/#")) as listener:
        line.start()
        before = line.restarts
        line.drop(5)
        listener.wait(lambda: bool(verdicts(listener)), "a verdict")
        line.ctl("kill", "--signal=KILL")
        line.drop(5)
        listener.wait(lambda: len(verdicts(listener)) == 10, "ten verdicts")
        eventually(lambda: left_behind(line.incoming) == [], "all files to be put away")
        numbers = sorted(v["seq"] for v in verdicts(listener).values())
    assert numbers == list(range(numbers[0], numbers[0] + 10))
    assert line.restarts == before + 1


def test_the_watchdog_restarts_a_line_of_which_one_stage_hangs(line: Line) -> None:
    with closing(Subscriber(line.port, "inspectd/#")) as listener:
        line.start()
        before = line.restarts
        line.drop(1)
        listener.wait(lambda: len(verdicts(listener)) == 1, "a verdict")
        stage = line.thread("inspect")
        frozen = line.machine.start("/opt/inspectd/.venv/bin/python", "-c", FREEZE, stage.name)
        eventually(lambda: "State:\tt" in (stage / "status").read_text(), "the stage to hang")
        line.drop(2)
        assert frozen.communicate(timeout=60)[1] == ""
        listener.wait(lambda: len(verdicts(listener)) == 3, "the other verdicts")
    said = line.journal()
    assert line.restarts == before + 1, said
    assert "Failed with result 'watchdog'" in said
    assert "pipeline.py" in said, "the journal does not say where the stage hung"


def test_a_reload_keeps_the_line_going_and_a_broken_configuration_changes_nothing(line: Line) -> None:
    with closing(Subscriber(line.port, "inspectd/#")) as listener:
        line.start()
        before = line.pid
        assert line.ctl("reload").returncode == 0
        line.configure("[mqtt\n")
        line.ctl("reload")
        eventually(lambda: "is not TOML" in line.journal(), "the fault in the journal")
        line.drop(1)
        listener.wait(lambda: len(verdicts(listener)) == 1, "a verdict")
    assert (line.shows("ActiveState"), line.pid) == ("active", before)


def test_a_line_with_a_broken_configuration_ends_with_78_and_the_cure_and_is_not_restarted(line: Line) -> None:
    line.ctl("stop")
    line.configure("[mqtt\n")
    assert line.ctl("start").returncode != 0
    assert line.shows("ActiveState") == "failed"
    assert (line.shows("ExecMainStatus"), line.restarts) == ("78", 0)
    assert "/etc/inspectd/line1.toml, line 1" in line.ctl("status").stdout


def test_the_sandbox_holds(line: Line) -> None:
    places = line.machine.root / "etc/systemd/system/inspectd@probe.service.d"
    places.mkdir(parents=True)
    (line.machine.root / "var/lib/private/inspectd/line1").mkdir(parents=True, exist_ok=True)
    (line.machine.root / "srv/inspectd/probe.py").write_text(PROBE)
    (places / "probe.conf").write_text(
        "[Service]\nType=oneshot\nRestart=no\nExecStart=\n"
        "ExecStart=/opt/inspectd/.venv/bin/python /srv/inspectd/probe.py\n"
    )
    line.machine.run("systemctl", "daemon-reload")
    done = line.machine.run("systemctl", "start", "inspectd@probe")
    assert done.returncode == 0, line.machine.run("journalctl", "--no-pager", "--unit", "inspectd@probe").stdout
    assert json.loads((line.machine.root / "var/lib/private/inspectd/probe/probe.json").read_text()) == {
        "watched folder": "done",  # a folder in it, which is no part
        "models": "PermissionError",
        "program": "OSError",  # read-only
        "configuration": "OSError",
        "home": "PermissionError",
        "key store": "PermissionError",
        "outbox of others": "FileNotFoundError",
        "raw socket": "OSError",
        "mount": -1,
        "root": False,
    }


def test_the_command_of_the_page_checks_a_line_in_its_shoes(line: Line) -> None:
    if line.machine.run("systemctl", "start", "dbus.socket").returncode != 0:
        pytest.skip("systemd-run --wait needs D-Bus (apt-get install dbus)")
    shown = re.search(r"^sudo (systemd-run .*?check .*?)$", PAGE, re.MULTILINE | re.DOTALL)
    assert shown is not None
    borrowed = "--setenv=LD_LIBRARY_PATH=/opt/inspectd/python/lib --setenv=OMP_NUM_THREADS=1"
    command = shown[1].replace("\\\n", " ").replace("systemd-run", f"systemd-run {borrowed}", 1).split()
    line.machine.run("chmod", "700", "/srv/inspectd/line1")  # no fault for root, nor for those who cannot see
    done = line.machine.run(*command)
    line.machine.run("chmod", "2770", "/srv/inspectd/line1")
    assert done.returncode == 78, done.stdout + done.stderr
    assert "as user line1" in done.stdout
    assert "1 to be mended" in done.stdout
    assert "/srv/inspectd/line1" in done.stderr


def test_the_journal_finds_rejects_by_their_fields(line: Line) -> None:
    with closing(Subscriber(line.port, "inspectd/#")) as listener:
        line.start()
        line.drop(3)
        line.drop(1, "missing_hole")
        listener.wait(lambda: len(verdicts(listener)) == 4, "four verdicts")
        by_id = verdicts(listener)
    for outcome in ("PASS", "FAIL"):
        of = {v["part_id"] for v in by_id.values() if v["verdict"] == outcome}

        def found(outcome: str = outcome) -> set[str]:
            entries = line.entries("STATION=cam1", f"VERDICT={outcome}")
            return {entry["PART_ID"] for entry in entries} & {v["part_id"] for v in by_id.values()}

        def is_whole(wanted: set[str] = of, found: Callable[[], set[str]] = found) -> bool:
            return found() >= wanted

        eventually(is_whole, f"the journal to have each {outcome}")  # it hears after the broker does
        assert found() == of


def test_a_line_stops_in_order_and_one_configuration_alone_takes_over_its_folder_until_the_target_stops(
    line: Line,
) -> None:
    with closing(Subscriber(line.port, "inspectd/#")) as listener:
        line.start()
        line.drop(1)
        listener.wait(lambda: len(verdicts(listener)) == 1, "a verdict")
        assert line.ctl("stop").returncode == 0
        assert (line.shows("Result"), line.shows("ExecMainStatus")) == ("success", "0")
        assert left_behind(line.incoming) == []
        # Another user, who finds folders that line1's has made.
        (line.machine.root / "etc/credstore/inspectd.mqtt_password").write_text("from the store\n")
        (line.machine.root / "etc/inspectd/inspectd.toml").write_text(line.config.read_text())
        line.drop(1)
        done = line.machine.run("systemctl", "start", "inspectd.target", "inspectd.service")
        assert done.returncode == 0, line.machine.run("journalctl", "--no-pager").stdout
        eventually(lambda: left_behind(line.incoming) == [], "the part to be put away")
        line.machine.run("systemctl", "stop", "inspectd.target")
        eventually(lambda: line.machine.run("systemctl", "is-active", "inspectd").stdout == "inactive\n", "the stop")
