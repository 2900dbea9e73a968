"""The log under systemd: datagrams of the journal's native protocol, sent by a process to a socket that plays it."""

import json
import os
import pty
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, structlog
from pathlib import Path
from daemon import logs
logs.configure(Path(sys.argv[1]))
log = structlog.get_logger()
"""


class Journald:
    """The journal's socket, and standard error as systemd connects it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ear.bind(str(path))
        self.ear.settimeout(10)
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(10)

    def close(self) -> None:
        for one in (self.ear, self.ours, self.theirs):
            one.close()

    def run(self, script: str) -> int:
        """Run a program to its end that logs what `script` says; returns its exit status."""
        named = os.fstat(self.theirs.fileno())
        environ = os.environ | {"JOURNAL_STREAM": f"{named.st_dev}:{named.st_ino}", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROGRAM + script, str(self.path)]
        return subprocess.run(command, stderr=self.theirs.fileno(), env=environ, check=False, timeout=60).returncode

    def entry(self) -> dict[str, str]:
        """The next entry, parsed as the protocol has it."""
        content, files, _, _ = socket.recv_fds(self.ear, 1 << 20, 1)
        if files:
            assert content == b""
            with os.fdopen(files[0], "rb") as memory:
                memory.seek(0)
                content = memory.read()
        return parse(content)

    def entries(self, count: int) -> list[dict[str, str]]:
        return [self.entry() for _ in range(count)]

    def said(self) -> str:
        """What is on standard error by now."""
        self.ours.setblocking(False)  # noqa: FBT003 -- the library's own
        parts = []
        try:
            while part := self.ours.recv(1 << 16):
                parts.append(part)
        except BlockingIOError:
            pass
        return b"".join(parts).decode()


def parse(content: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    while content:
        line, _, content = content.partition(b"\n")
        name, sign, value = line.partition(b"=")
        if not sign:
            (size,) = struct.unpack("<Q", content[:8])
            value, content = content[8 : 8 + size], content[8 + size :]
            assert content[:1] == b"\n"
            content = content[1:]
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]*", name)
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Journald]:
    playing = Journald(tmp_path / "socket")
    yield playing
    playing.close()


def test_a_verdict_can_be_found_by_its_fields_and_read_on_one_line(journald: Journald) -> None:
    assert (
        journald.run('log.info("verdict", station="cam1", part="a-7", id="01K", seq=7, verdict="FAIL", score=1.25)')
        == 0
    )
    assert journald.entry() == {
        "MESSAGE": "cam1 verdict FAIL part=a-7 id=01K seq=7 score=1.25",
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "inspectd",
        "EVENT": "verdict",
        "STATION": "cam1",
        "PART_ID": "a-7",
        "ID": "01K",
        "SEQ": "7",
        "VERDICT": "FAIL",
        "SCORE": "1.25",
    }
    assert journald.said() == ""


def test_each_level_has_its_priority(journald: Journald) -> None:
    journald.run('for level in ("critical", "error", "warning", "info"): getattr(log, level)("said")')
    assert [entry["PRIORITY"] for entry in journald.entries(4)] == ["2", "3", "4", "6"]


def test_a_part_id_of_several_lines_is_one_value_and_forges_neither_a_field_nor_a_line(journald: Journald) -> None:
    journald.run(r'log.info("verdict", part="a\nPRIORITY=0\n\x1b[2J", verdict="PASS")')
    entry = journald.entry()
    assert entry["PART_ID"] == "a\nPRIORITY=0\n\x1b[2J"
    assert entry["PRIORITY"] == "6"
    assert entry["MESSAGE"] == r"verdict PASS part='a\nPRIORITY=0\n\x1b[2J'"


def test_a_traceback_is_in_the_entry_of_its_event(journald: Journald) -> None:
    journald.run('try: 1 / 0\nexcept ZeroDivisionError: log.exception("failed", station="cam1")')
    entry = journald.entry()
    assert entry["PRIORITY"] == "3"
    assert entry["MESSAGE"].startswith("cam1 failed\nTraceback (most recent call last):")
    assert entry["EXCEPTION"].endswith("ZeroDivisionError: division by zero")


def test_what_ends_the_program_is_one_entry(journald: Journald) -> None:
    assert journald.run('password = "hunter2"\nraise RuntimeError("rtsp://admin:hunter3@cam/live")') == 1
    entry = journald.entry()
    assert (entry["PRIORITY"], entry["EVENT"]) == ("2", "ended by a fault in the program")
    assert "RuntimeError: rtsp://…@cam/live" in entry["MESSAGE"]
    assert "hunter" not in re.sub(r'File "<string>".*', "", str(entry))
    assert journald.said() == ""


def test_a_value_too_large_for_a_datagram_comes_in_a_sealed_file(journald: Journald) -> None:
    journald.run('log.info("large", detail="x" * 3_000_000)\nlog.info("small")')
    assert len(journald.entry()["DETAIL"]) == 3_000_000
    assert journald.entry()["EVENT"] == "small"


def test_a_text_that_is_no_utf_8_is_written_out(journald: Journald) -> None:
    journald.run(r'log.warning("odd", file="a\udcff.png")')
    assert journald.entry()["FILE"] == r"a\udcff.png"


@pytest.mark.parametrize("away", ["missing", "refusing"])
def test_while_the_journal_is_away_standard_error_gets_the_lines_with_their_priority(
    journald: Journald, away: str
) -> None:
    if away == "missing":
        journald.path.unlink()
    else:
        journald.ear.close()
    assert journald.run('log.warning("lost", station="cam1")\nlog.info("verdict", verdict="PASS")') == 0
    assert journald.said() == "<4>cam1 lost\n<6>verdict PASS\n"


def test_a_journal_that_comes_back_gets_what_is_said_then(journald: Journald) -> None:
    journald.path.rename(journald.path.with_suffix(".away"))
    back = f"import os; os.rename({str(journald.path.with_suffix('.away'))!r}, sys.argv[1])"
    journald.run(f'log.info("first")\n{back}\nlog.info("second")')
    assert journald.said() == "<6>first\n"
    assert journald.entry()["EVENT"] == "second"


def test_a_journal_that_hangs_and_a_full_standard_error_hold_nobody_up(journald: Journald) -> None:
    assert journald.run("for number in range(20_000): log.info('verdict', seq=number, detail='x' * 100)") == 0
    assert journald.entry()["SEQ"] == "0"
    assert journald.said().startswith("<6>verdict seq=")


def test_many_threads_write_whole_entries(journald: Journald) -> None:
    script = """
from threading import Thread
def talk(station):
    for seq in range(20):
        log.info("verdict", station=station, seq=seq)
threads = [Thread(target=talk, args=(f"cam{number}",)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    journald.ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    journald.run(script)
    journald.ear.settimeout(0.2)
    said = [line.removeprefix("<6>") for line in journald.said().splitlines()]  # what the queue did not take
    said += [entry["MESSAGE"] for entry in journald.entries(80 - len(said))]
    assert sorted(said) == sorted(f"cam{n} verdict seq={i}" for n in range(4) for i in range(20))


def test_without_systemd_there_are_json_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM + 'log.info("verdict", part="ä", seq=7, score=None)', str(tmp_path)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JOURNAL_STREAM": "1:1"}
    done = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    said = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", said.pop("timestamp"))
    assert said == {"event": "verdict", "level": "info", "part": "ä", "seq": 7, "score": None}


@pytest.mark.parametrize(("no_colour", "shown"), [("", "\x1b[1m\x1b[31mFAIL\x1b[0m"), ("1", " FAIL ")])
def test_a_terminal_shows_a_reject_in_red_unless_colours_are_not_wanted(
    tmp_path: Path, no_colour: str, shown: str
) -> None:
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-c",
        PROGRAM + 'log.info("verdict", station="cam1", verdict="FAIL", seq=7)',
        str(tmp_path),
    ]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": no_colour}
    subprocess.run(command, env=environ, check=True, stderr=theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    os.close(theirs)
    assert shown in said
    assert ("\x1b" in said) is not bool(no_colour)
