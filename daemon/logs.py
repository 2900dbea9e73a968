"""The log of the daemon: for people on a terminal, fields for the journal under systemd, JSON lines elsewhere."""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import structlog
from logging_journald import JournaldTransport, check_journal_stream
from structlog.dev import Column, ColumnFormatter, ConsoleRenderer, plain_traceback

Entry = MutableMapping[str, Any]
"""One line of the log on its way: its text under `event`, its level, and the facts by their keys."""

IDENTIFIER = "inspectd"
BURST, WINDOW_S = 5, 30.0
"""So many warnings or errors of one text and station are let through in so many seconds."""
TEXTS = 1000
"""So many texts of warnings are counted at once; the one that was longest silent is forgotten."""

PRIORITIES: Final = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
FIELDS: Final = {"part": "PART_ID"}
"""Keys whose field in the journal has another name than theirs in upper case."""

log = structlog.get_logger()

_LOGIN = re.compile(r"(?<=://)(?:\S*|[^/\n]*)@")
_QUERY = re.compile(r"(://[^\s?]*\?)\S+")
_PRIVATE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_SECRET = re.compile("passw|passphrase|secret|token|credential|private_key", re.IGNORECASE)


def configure(journal: Path = JournaldTransport.SOCKET_PATH) -> None:
    """Set this process's log up by where standard error goes; `journal` is the socket where the journal listens.

    What ends the main thread unforeseen is logged too. Call it once, before the first line.
    """
    terminal = sys.stderr.isatty()
    output: list[structlog.typing.Processor]
    if terminal:
        times = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        output = [times, _lines(coloured=not os.environ.get("NO_COLOR"))]
    elif check_journal_stream():
        output = [_Journal(journal)]  # which notes the time itself
    else:
        times = structlog.processors.TimeStamper(fmt="iso", utc=True)
        output = [times, structlog.processors.JSONRenderer(ensure_ascii=False)]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            Restraint(),
            structlog.processors.format_exc_info,
            without_secrets,
            *output,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    sys.excepthook = lambda *failure: log.critical("ended by a fault in the program", exc_info=failure)


@dataclass(slots=True)
class _Window:
    """How often a text was let through, and how often not, until a time."""

    until: float
    said: int = 0
    suppressed: int = 0


class Restraint:
    """Lets a warning or error of one text, station and alarm through BURST times in WINDOW_S; any thread may log.

    The first that is let through again says in `suppressed` how many were not. Verdicts, and all else of the level
    info, always go through. `clock` gives seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[tuple[object, ...], _Window] = {}
        self._counting = threading.Lock()

    def __call__(self, _logger: object, _method: str, entry: Entry) -> Entry:
        """Pass the entry on.

        Raises:
            structlog.DropEvent: it was said often enough of late.
        """
        if PRIORITIES[entry["level"]] > PRIORITIES["warning"]:
            return entry
        key = entry["event"], entry.get("station"), entry.get("alarm")
        with self._counting:
            now = self._clock()
            window = self._windows.pop(key, None)
            if window is None or now >= window.until:
                before, window = window, _Window(now + WINDOW_S)
                if before is not None and before.suppressed:
                    entry["suppressed"] = before.suppressed
            self._windows[key] = window
            if len(self._windows) > TEXTS:
                del self._windows[next(iter(self._windows))]
            if window.said == BURST:
                window.suppressed += 1
                raise structlog.DropEvent
            window.said += 1
        return entry


def without_secrets(_logger: object, _method: str, entry: Entry) -> Entry:
    """Take out names and passwords in URLs, their queries, private keys, and what a key calls a secret.

    Nothing that is logged should hold any; this is for the day when an error's text does.
    """
    return {key: _shown(key, value) for key, value in entry.items()}


def redacted(text: str) -> str:
    """A text without names and passwords in URLs, their queries, and private keys."""
    return _PRIVATE.sub("…", _QUERY.sub(r"\1…", _LOGIN.sub("…@", text)))


def fields(entry: Entry, message: str) -> dict[str, str | int]:
    """An entry as the journal's fields: `message`, its priority, and each fact that there is.

    Numbers and texts are as they are, so that journalctl finds them; true, false, lists and tables are JSON.
    """
    facts = {_field(key): value for key, value in entry.items() if value is not None and key != "level"}
    facts.pop("", None)
    return {name: value if type(value) is int else _encodable(value) for name, value in facts.items()} | {
        "MESSAGE": _encodable(message),
        "PRIORITY": PRIORITIES[entry["level"]],
        "SYSLOG_IDENTIFIER": IDENTIFIER,
    }


class _Journal:
    """The last step under systemd: sends entries to the journal, and never waits for it.

    A journal that is away or full gets the text on standard error, which systemd keeps for it; when that is full too,
    a line is lost rather than the line on the floor held up.
    """

    def __init__(self, path: Path) -> None:
        self._transport = JournaldTransport(path, connected=False)
        self._transport.socket.setblocking(False)  # noqa: FBT003 -- the library's socket
        self._stderr = socket.socket(fileno=os.dup(sys.stderr.fileno()))  # JOURNAL_STREAM says that it is one
        self._line = _lines(coloured=False)

    def __call__(self, logger: object, method: str, entry: Entry) -> NoReturn:
        message = self._line(logger, method, {key: value for key, value in entry.items() if key != "level"})
        said = fields(entry, message)
        try:
            self._transport.send(said.items())
        except OSError:
            prefixed = "".join(f"<{said['PRIORITY']}>{line}\n" for line in message.splitlines())
            self._complain(prefixed.encode(errors="backslashreplace"))
        raise structlog.DropEvent

    def _complain(self, text: bytes) -> None:
        try:
            self._stderr.send(text, socket.MSG_DONTWAIT)
        except OSError:
            return  # nobody can be told


def _lines(*, coloured: bool) -> ConsoleRenderer:
    """Entries as lines to read: time, level, station, what happened, the verdict, and the other facts by name."""
    style = ConsoleRenderer.get_default_column_styles(coloured)
    levels = ConsoleRenderer.get_default_level_styles(coloured) | {"info": style.timestamp, "debug": style.timestamp}
    good, bad, unsure = structlog.dev.GREEN if coloured else "", levels["error"], levels["warning"]
    outcomes = {"PASS": good, "FAIL": bad, "UNCERTAIN": unsure, "ERROR": bad}

    def paint(styles: str | Mapping[str, str], width: int = 0, *, named: bool = False) -> ColumnFormatter:
        def show(key: str, value: object) -> str:
            if value is None:
                return ""
            text = _legible(value, quoted=named)
            painted = styles if isinstance(styles, str) else styles.get(text, "")
            name = f"{style.timestamp}{key}={style.reset}" if named else ""
            return f"{name}{painted}{text:{width}}{style.reset if painted else ''}"

        return show

    return ConsoleRenderer(
        columns=[
            Column("timestamp", paint(style.timestamp)),
            Column("level", paint(levels, len("warning"))),
            Column("station", paint(style.kv_key)),
            Column("event", paint("")),
            Column("verdict", paint({name: style.bright + colour for name, colour in outcomes.items()})),
            Column("", paint("", named=True)),
        ],
        sort_keys=False,
        exception_formatter=plain_traceback,  # the others show the values of variables, and so secrets
    )


def _legible(value: object, *, quoted: bool) -> str:
    """A value on a line: nothing in it breaks the line or moves the cursor."""
    text = value if isinstance(value, str) else _json(value)
    apart = quoted and isinstance(value, str) and (not text or set(text) & set(" ='\""))
    return repr(text) if apart or not text.isprintable() else text


def _shown(key: str, value: Any) -> Any:
    """A value without secrets, of the kinds that JSON knows."""
    if _SECRET.search(key) and value is not None:
        return "…"
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(inner): _shown(str(inner), one) for inner, one in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(key, one) for one in value]
    return redacted(str(value))


def _field(key: str) -> str:
    """A key as the journal takes it: A to Z, digits and underscores, 64 at most, a letter first."""
    return FIELDS.get(key) or re.sub("[^A-Z0-9_]", "_", key.upper()).lstrip("_0123456789")[:64]


def _encodable(value: object) -> str:
    """A value as text that UTF-8 has."""
    text = value if isinstance(value, str) else _json(value)
    return text.encode(errors="backslashreplace").decode()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
