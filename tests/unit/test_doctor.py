"""What `inspectd check` and `inspectd doctor` make of what they see, and the page of all settings."""

import fcntl
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from config import reference
from config.load import load
from config.schema import Settings, options
from daemon.cli import app
from daemon.desk import doctor
from daemon.desk.checks import arrival, broker, disk, judging, machine
from daemon.desk.checks.finding import Finding, Mark, fail, ok, warn
from daemon.desk.doctor import Check, UnsoundError

ROOT = Path(__file__).parents[2]


def settings(folder: Path, more: str = "", at_the_top: str = "") -> Settings:
    """A station with a watched folder, and a model that nobody needs here."""
    return load(configured(folder, more, at_the_top), {})


def configured(folder: Path, more: str = "", at_the_top: str = "") -> Path:
    file = folder / "inspectd.toml"
    source = "" if "[station.source]" in more else '[station.source]\ntype = "folder"\npath = "incoming"\n'
    file.write_text(
        f'{at_the_top}\n[mqtt]\nhost = "127.0.0.1"\n[[station]]\nname = "cam1"\nmodel = "nowhere"\n{source}{more}\n'
    )
    return file


def marks(found: Iterator[Finding]) -> list[tuple[Mark, str]]:
    return [(finding.mark, finding.found) for finding in found]


# The list of checks


def test_a_check_that_breaks_is_a_finding_and_the_ones_before_stay(tmp_path: Path) -> None:
    def breaks(_: Settings) -> Iterator[Finding]:
        yield ok("it", "fine so far")
        raise KeyError("colour")

    first, second = doctor.findings(Check("it", breaks), settings(tmp_path))
    assert first == ok("it", "fine so far")
    assert second.mark is Mark.fail
    assert "the check itself failed: KeyError: 'colour'" in second.found
    assert second.cure


def test_a_check_that_hangs_is_a_finding_and_holds_nobody_up(tmp_path: Path) -> None:
    hanging = iter([0.0, 60.0])

    def hangs(_: Settings) -> Iterator[Finding]:
        for pause in hanging:
            time.sleep(pause)
            yield ok("it", "answered")

    answered, given_up = doctor.findings(Check("it", hangs, limit_s=0.3), settings(tmp_path))
    assert answered == ok("it", "answered")
    assert given_up.mark is Mark.fail
    assert "not answered within 0.3 s" in given_up.found


@pytest.mark.parametrize(
    ("looks", "status"),
    [
        ([("a", Mark.ok, 1), ("b", Mark.warn, 78)], 0),
        ([("a", Mark.fail, 1), ("b", Mark.warn, 78)], 1),
        ([("a", Mark.fail, 1), ("b", Mark.fail, 78), ("c", Mark.fail, 1)], 78),
    ],
)
def test_the_exit_status_is_that_of_the_gravest_failure_and_warnings_have_none(
    looks: list[tuple[str, Mark, int]], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finds(mark: Mark, name: str) -> Check:
        return Check(name, lambda _: iter([Finding(mark, name, "seen", "do this")]))

    checks = [Check(name, finds(mark, name).look, status) for name, mark, status in looks]
    file = configured(tmp_path)
    if status:
        with pytest.raises(UnsoundError) as caught:
            doctor.examine(file, checks, as_json=False)
        assert caught.value.status == status
        failed = [name for name, mark, _ in looks if mark is Mark.fail]
        assert str(caught.value).splitlines() == [f"{file}: {name}: seen; do this" for name in failed]
    else:
        doctor.examine(file, checks, as_json=False)
    said = capsys.readouterr().out
    assert said.count("→ do this") == len(looks)
    counts = [sum(mark is wanted for _, mark, _ in looks) + (wanted is Mark.ok) for wanted in Mark]
    assert said.splitlines()[-1] == "{} ok, {} to be minded, {} to be mended".format(*counts)


def test_every_fault_of_the_configuration_is_a_finding_and_nothing_else_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = configured(tmp_path, at_the_top='colour = "red"\nthreads = "many"')
    with pytest.raises(UnsoundError) as caught:
        doctor.examine(file, [*doctor.files(), *doctor.surroundings()], as_json=True)
    assert caught.value.status == 78
    said = json.loads(capsys.readouterr().out)
    assert [finding["mark"] for finding in said["findings"]] == ["fail", "fail"]
    assert {"colour: is not an option", 'threads: "many" is not a whole number'} <= {
        re.sub(r"^\S+: (.*?)[.] .*$", r"\1", finding["found"]) for finding in said["findings"]
    }


def test_json_has_what_the_lines_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [ok("disk", "large"), warn("disk", "slow [and] old", "buy one")]
    doctor.examine(configured(tmp_path), [Check("disk", lambda _: iter(found))], as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert (said["status"], said["ok"], said["warn"], said["fail"]) == (0, 2, 1, 0)
    assert said["findings"][1:] == [
        {"mark": "ok", "subject": "disk", "found": "large", "cure": ""},
        {"mark": "warn", "subject": "disk", "found": "slow [and] old", "cure": "buy one"},
    ]


def test_an_error_is_cut_where_its_cure_begins() -> None:
    assert fail("it", "the folder is away; mount it; or make it") == Finding(
        Mark.fail, "it", "the folder is away", "mount it; or make it"
    )


# The machine


def test_a_daemon_that_runs_is_seen_by_its_lock_and_not_hindered(tmp_path: Path) -> None:
    assert not machine.runs(tmp_path)
    with (tmp_path / "lock").open("w") as lock:
        assert not machine.runs(tmp_path)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what a daemon does
        assert machine.runs(tmp_path)
    assert not machine.runs(tmp_path)


def test_a_service_is_seen_where_systemd_keeps_its_state_while_the_configuration_names_none(tmp_path: Path) -> None:
    services, here = tmp_path / "services", tmp_path / "state"
    (services / "line1").mkdir(parents=True)
    with (services / "line1/lock").open("w") as lock:
        assert not machine.runs(here, services)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert machine.runs(here, services)
        here.mkdir()
        assert not machine.runs(here, services)


def test_a_gpu_that_is_asked_for_and_not_there_fails(tmp_path: Path) -> None:
    from detectors.devices import describe

    if describe() is not None:
        pytest.skip("there is one")
    assert [mark for mark, _ in marks(machine.accelerator(settings(tmp_path, at_the_top='device = "cuda"')))] == [
        "fail"
    ]
    assert [mark for mark, _ in marks(machine.accelerator(settings(tmp_path)))] == ["ok"]


def test_more_threads_than_cores_are_warned_of(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    more, _ = machine.capacity(settings(tmp_path, at_the_top=f"threads = {cores + 1}"))
    as_many, _ = machine.capacity(settings(tmp_path, at_the_top=f"threads = {cores}"))
    assert (more.mark, as_many.mark) == (Mark.warn, Mark.ok)
    assert more.cure == f"set threads = {cores}, or 0"


def test_a_password_that_everybody_can_read_is_warned_of(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("s")
    file = configured(tmp_path)
    file.write_text(file.read_text().replace("[[station]]", 'username = "u"\npassword_file = "password"\n[[station]]'))
    for mode, mark in ((0o644, Mark.warn), (0o640, Mark.ok)):
        secret.chmod(mode)
        assert stat.S_IMODE(secret.stat().st_mode) == mode
        found = [one for one in machine.rights(load(file, {})) if "password_file" in one.found]
        assert [one.mark for one in found] == [mark]


def test_the_clock_is_read(tmp_path: Path) -> None:
    (found,) = machine.clock(settings(tmp_path))
    assert "UTC, synchronised" in found.found


def test_the_interface_to_an_address_of_this_machine_is_the_loopback() -> None:
    assert arrival._interface("127.0.0.1") == "lo"  # noqa: SLF001 -- nothing else can be reached for sure


# The disk


@given(st.integers(min_value=0, max_value=10**15))
def test_a_size_is_short_and_right_to_its_last_digit(number: int) -> None:
    value, unit = disk.size(number).split()
    scale = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert float(value) * scale == pytest.approx(number, rel=0.005)


def test_the_kind_of_a_file_system_is_that_of_the_deepest_mount() -> None:
    assert disk.kind(Path("/proc/self/mountinfo")) == "proc"
    assert disk.kind(Path("/nowhere/at/all")) == disk.kind(Path("/"))


def test_a_state_folder_in_memory_is_warned_of(tmp_path: Path) -> None:
    shared = Path("/dev", "shm")
    if disk.kind(shared) != "tmpfs":
        pytest.skip(f"{shared} is no tmpfs")
    found = [*disk.disks(settings(tmp_path, at_the_top=f'state_dir = "{shared}"'))]
    assert "in memory (tmpfs)" in next(one.found for one in found if one.mark is Mark.warn)
    (tmp_path / "incoming").mkdir()
    found = [*disk.disks(settings(tmp_path, at_the_top=f'state_dir = "{shared}"'))]
    assert any("after a power cut a part may be judged twice" in one.found for one in found)


def test_how_long_a_durable_write_takes_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    found = [one.found for one in disk.disks(settings(tmp_path))]
    assert re.search(r"a durable write to .*/state takes [\d.]+ ms \(median of 7", found[-1])
    assert not list((tmp_path / "state").iterdir())


# The page of all settings


def test_the_page_of_all_settings_is_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    get_command(app).main(["settings"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert (ROOT / "docs/settings.md").read_text() == printed, "run: inspectd settings > docs/settings.md"


def test_every_option_is_on_the_page_with_its_description() -> None:
    page = reference.page()
    for key, option in options():
        name = key.rpartition(".")[2]
        assert re.search(rf"\| `{name}` \|.*|`\[+{re.escape(key)}\]+`", page), key
        assert option.description in page, key  # type: ignore[operator] # each has one


def test_an_option_is_under_the_last_heading_of_its_section() -> None:
    _, *parts = re.split(r"^## (.*)$", reference.page(), flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert "| `port` | whole number | `1883` | 1 to 65535 |" in sections["`[mqtt]`"]
    assert "| `rescan_s` | number | `5.0` | above 0 to 3600 |" in sections['`[station.source]`, `type = "folder"`']
    assert "| `fourcc` | text | – | 4 characters |" in sections['`[station.source]`, `type = "video"`']
    assert '| `by` | `"part_id"` or `"trigger_id"` | `"part_id"` |' in sections["`[[group]]`"]
    assert "| `crop` | list of 4 whole numbers | – |" in sections["`[station.framing]`"]


# What the daemon listens at and keeps


def test_a_port_for_figures_that_is_taken_is_found_and_a_running_daemon_s_own_is_not(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here = settings(tmp_path, at_the_top=f"[metrics]\nport = {taken.getsockname()[1]}")
        (found,) = [one for one in machine.service(here) if one.subject == "metrics"]
        assert found.mark is Mark.fail
        assert "cannot be listened at: Address already in use" in found.found
        (tmp_path / "state").mkdir()
        with (tmp_path / "state/lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert not [one for one in machine.service(here) if one.subject == "metrics"]
    (found,) = [one for one in machine.service(here) if one.subject == "metrics"]
    assert found.mark is Mark.ok


def test_a_folder_that_cannot_be_made_is_named_by_its_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    here = settings(tmp_path, at_the_top='state_dir = "file/state"\n[archive]\npath = "kept"')
    assert [(one.mark, one.subject) for one in disk.own_folders(here)] == [
        (Mark.fail, "state_dir"),
        (Mark.ok, "archive.path"),
    ]


# The page of the checks


def test_every_check_is_on_its_page_in_its_order() -> None:
    _, _, table = (ROOT / "docs/doctor.md").read_text().partition("| check | what is tried |")
    listed = re.findall(r"^\| `([\w ]+)` \|", table.partition("\n\n")[0], re.MULTILINE)
    assert listed == [check.name for check in (*doctor.files(), *doctor.surroundings())]


def test_the_limits_on_the_page_are_those_of_the_program() -> None:
    page = (ROOT / "docs/doctor.md").read_text()
    assert f"more than {judging.OLD_DAYS} days" in page
    assert f"less than {disk.size(machine.LITTLE_GPU)} free, or {machine.HOT_C} °C" in page
    assert f"less than {broker.SOON_DAYS} days, and of {broker.SLOW_MS:g} ms" in page
    assert f"within {arrival.FRAME_S:g} s" in page
    assert f"below {arrival.JUMBO} bytes, of a `net.core.rmem_max` below {disk.size(arrival.BUFFER)}" in page
    assert f"less than {disk.size(disk.TOO_LITTLE)} free" in page
    assert f"less than {disk.size(disk.LITTLE)}, of more than {disk.SLOW_MS:g} ms" in page
    assert f"{disk.size(machine.SPARE)}" in page
    assert f"before systemd {machine.OLDEST_SYSTEMD}" in page
