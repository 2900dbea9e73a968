"""What goes into the log, and what does not: fields, restraint, secrets, and the page about it."""

import ast
import re
import string
from pathlib import Path
from threading import Thread

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from daemon import logs
from daemon.logs import BURST, TEXTS, WINDOW_S, Entry, Restraint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/logs.md").read_text()


class Timepiece:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def passed(restraint: Restraint, text: str, level: str = "warning", **facts: str) -> Entry | None:
    """What the restraint lets through of one line."""
    try:
        return restraint(None, level, {"event": text, "level": level, **facts})
    except structlog.DropEvent:
        return None


def test_a_warning_is_let_through_some_times_and_then_tells_how_often_it_was_not() -> None:
    clock = Timepiece()
    restraint = Restraint(clock)
    said = [passed(restraint, "lost", station="cam1") for _ in range(BURST + 7)]
    assert [one is not None for one in said] == [True] * BURST + [False] * 7
    clock.now += WINDOW_S
    again = passed(restraint, "lost", station="cam1")
    assert again is not None
    assert again["suppressed"] == 7
    after = passed(restraint, "lost", station="cam1")
    assert after is not None
    assert "suppressed" not in after


@pytest.mark.parametrize("facts", [{"station": "cam2"}, {"station": "cam1", "alarm": "DISK_LOW"}, {}])
def test_another_station_or_alarm_is_counted_by_itself(facts: dict[str, str]) -> None:
    restraint = Restraint(Timepiece())
    for _ in range(BURST + 1):
        passed(restraint, "alarm", station="cam1")
    assert passed(restraint, "alarm", station="cam1") is None
    assert passed(restraint, "alarm", "warning", **facts) is not None
    assert passed(restraint, "another text", station="cam1") is not None


def test_verdicts_are_never_suppressed() -> None:
    restraint = Restraint(Timepiece())
    assert all(passed(restraint, "verdict", "info", station="cam1", verdict="FAIL") for _ in range(1000))


def test_a_text_that_is_always_another_one_does_not_fill_the_memory_nor_make_the_busy_one_forgotten() -> None:
    restraint = Restraint(Timepiece())
    for number in range(3 * TEXTS):
        passed(restraint, "busy")
        passed(restraint, f"lost {number}")
    assert passed(restraint, "busy") is None
    assert all(passed(restraint, "lost 0") for _ in range(BURST))  # forgotten meanwhile, so it begins anew
    assert passed(restraint, "lost 0") is None


def test_threads_share_one_count() -> None:
    restraint = Restraint(Timepiece())
    through: list[Entry | None] = []
    threads = [Thread(target=lambda: through.extend(passed(restraint, "lost") for _ in range(200))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(through) == 1600
    assert sum(one is not None for one in through) == BURST


PASSWORD = st.text([*string.ascii_letters, *"0123456789@/?:#%&"], min_size=1).map(lambda text: f"hunter2{text}hunter2")


@given(PASSWORD)
def test_a_password_in_a_url_is_in_no_value_however_deep(password: str) -> None:
    url = f"rtsp://admin:{password}@10.0.0.7/live"
    entry = logs.without_secrets(
        None,
        "warning",
        {
            "event": f"{url} cannot be opened",
            "reason": OSError(2, "gone", url),
            "cameras": [url, {"one": url}],
            "exception": f"Traceback\nOSError: {url}",
        },
    )
    assert "hunter2" not in str(entry)
    assert "10.0.0.7/live" in entry["event"]


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("place", "rtsp://cam/live?user=a&password=b", "rtsp://cam/live?…"),
        ("place", "rtsp://a:with space@cam/live", "rtsp://…@cam/live"),
        ("detail", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nend", "…\nend"),
        ("detail", "torn: -----BEGIN PRIVATE KEY-----\nMIIE", "torn: …"),
        ("mqtt_password", "hunter2", "…"),
        ("settings", {"username": "line1", "password": "hunter2"}, {"username": "line1", "password": "…"}),
        ("broker", "broker.plant:8883", "broker.plant:8883"),
        ("user", "anna@plant", "anna@plant"),
        ("part", "a?b=c", "a?b=c"),
        ("seq", 7, 7),
        ("score", None, None),
    ],
)
def test_secrets_are_taken_out_and_nothing_else(key: str, value: object, shown: object) -> None:
    assert logs.without_secrets(None, "info", {key: value}) == {key: shown}


def test_numbers_and_texts_become_fields_as_they_are_and_what_is_not_there_none() -> None:
    entry = {"event": "verdict", "level": "info", "part": "a 1", "seq": 7, "score": None, "ok": True, "names": ["ä"]}
    assert logs.fields(entry, "said") == {
        "EVENT": "verdict",
        "PART_ID": "a 1",
        "SEQ": 7,
        "OK": "true",
        "NAMES": '["ä"]',
        "MESSAGE": "said",
        "PRIORITY": 6,
        "SYSLOG_IDENTIFIER": "inspectd",
    }


@given(st.dictionaries(st.text(), st.text(st.characters(exclude_categories=()))))
def test_whatever_the_keys_and_texts_the_journal_takes_them_and_none_poses_as_another(facts: dict[str, str]) -> None:
    said = logs.fields({**facts, "event": "e", "level": "error"}, "said")
    assert all(re.fullmatch("[A-Z][A-Z0-9_]{0,63}", name) for name in said)
    assert (said["MESSAGE"], said["PRIORITY"], said["SYSLOG_IDENTIFIER"]) == ("said", 3, "inspectd")
    for value in said.values():
        str(value).encode()


def keys_of(event: str) -> set[str]:
    """The keys of the lines of one text, as the program's source has them."""
    found: set[str] = set()
    for path in (ROOT / "daemon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and [ast.unparse(one) for one in node.args[:1]] == [repr(event)]:
                for keyword in node.keywords:
                    optional = [one for one in ast.walk(keyword.value) if isinstance(one, ast.Dict) and one.keys]
                    more = {key.value for one in optional for key in one.keys if isinstance(key, ast.Constant)}
                    found |= {keyword.arg} if keyword.arg else {str(key) for key in more}
    return found


def test_every_field_of_a_verdict_is_in_the_page_and_no_other() -> None:
    _, _, table = PAGE.partition("## A verdict's fields")
    listed = dict(re.findall(r"^\| `([A-Z_]+)` \| `(\w+)` \|", table.partition("\n## ")[0], re.MULTILINE))
    entry = dict.fromkeys(keys_of("verdict"), "said") | {"event": "verdict", "level": "info"}
    assert set(listed) == set(logs.fields(entry, "")) - {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER"}
    assert set(listed.values()) == set(entry) - {"level"}
    for field, key in listed.items():
        assert field in logs.fields({"event": "", "level": "info", key: "said"}, "")


def test_what_the_page_says_of_restraint_and_priorities_is_so() -> None:
    assert f"{BURST} times in {WINDOW_S:g} s" in PAGE
    for level, priority in logs.PRIORITIES.items():
        assert level == "debug" or f"{priority} {level}" in PAGE
