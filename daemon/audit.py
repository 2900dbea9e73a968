"""The audit trail: what happened, in a file where each line is chained to the one before by its SHA-256.

Whoever changes, removes, adds or moves a line breaks the chain from there on. Who writes the whole chain anew, or cuts
off its end, is convicted by any hash that somebody else has kept: each goes out with its event.

A chain that was found broken goes on behind an entry that says so, and whose `prev` is the SHA-256 of all before it, so
that what was found cannot be changed again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from datetime import datetime
from enum import StrEnum
from functools import partial
from pathlib import Path

from daemon.wire import encode, iso, text

FILE = "audit.jsonl"
"""Its name in the state folder."""
GENESIS = "0" * 64
"""What stands for the hash before the first entry."""
BROKEN = "chain_broken"
"""The kind of the entry behind which a broken chain goes on."""
MENDED = "chain_mended"
"""The kind of the entry that tells of an unfinished line."""

_KEYS = ("number", "ts", "station", "kind", "subject", "detail", "user", "event", "prev", "hash")
_SUBJECT, _DETAIL, _USER = 128, 1024, 64
"""The most bytes that a text takes as it stands in the JSON."""
_SHOWN = 60


class AuditError(Exception):
    """The trail cannot be written or read; the message says where and why."""


class Damage(StrEnum):
    """What was done to a trail, as far as that can be seen."""

    EDITED = "edited"
    REMOVED = "removed"
    INSERTED = "inserted"
    REORDERED = "reordered"
    TORN = "torn"
    SAID = "broken before, as this entry says"
    UNWITNESSED = "not as it was witnessed"


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that happened at a station, at a time in UTC; `event` is the ULID of its event."""

    at: datetime
    station: str
    kind: str
    subject: str
    detail: str
    user: str
    event: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the trail. `number` counts them from 1, `prev` is the hash of the line before, `hash` its own."""

    number: int
    ts: str
    station: str
    kind: str
    subject: str
    detail: str
    user: str
    event: str
    prev: str
    hash: str


@dataclass(frozen=True, slots=True)
class Fault:
    """The first thing that is wrong from somewhere on: in which line, from 1, and the rest in words."""

    line: int
    damage: Damage
    detail: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.damage}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Trail:
    """What a file holds.

    Attributes:
        entries: all that can be read.
        fault: the first; None where the chain is whole.
        unsaid: the first behind the last entry that says of an earlier one; None where there is none.
        lines: how many there are, without an unfinished last one.
        torn: that one.
        head: what the next entry is chained to.
        digest: SHA-256 of all finished lines.
    """

    entries: Sequence[Entry] = ()
    fault: Fault | None = None
    unsaid: Fault | None = None
    lines: int = 0
    torn: bytes = b""
    head: str = GENESIS
    digest: str = field(default_factory=lambda: hashlib.sha256().hexdigest())


def encode_entry(number: int, prev: str, fact: Fact) -> tuple[bytes, str]:
    """A line with its end, and its hash: the SHA-256 of all that stands before `,"hash":`."""
    content = {
        "number": number,
        "ts": iso(fact.at),
        "station": fact.station,
        "kind": fact.kind,
        "subject": text(fact.subject, _SUBJECT),
        "detail": text(fact.detail, _DETAIL),
        "user": text(fact.user, _USER),
        "event": fact.event,
        "prev": prev,
    }
    said = encode(content).removesuffix(b"}")
    own = hashlib.sha256(said).hexdigest()
    return said + _end(own), own


def examine(content: bytes) -> Trail:
    """Read a whole file, and find what is wrong with it. Takes time in proportion to its lines, whatever is wrong."""
    *lines, torn = content.split(b"\n")
    read = [_read(line) for line in lines]
    # Behind one line that is gone all seem wrong: which fault the first of them has is worked out once, at the end.
    first: Callable[[], Fault] | None = None
    latest: Callable[[], Fault] | None = None
    head, digest = GENESIS, hashlib.sha256()
    for place, (line, entry) in enumerate(zip(lines, read, strict=True)):
        if entry is not None and entry.kind == BROKEN and (entry.number, entry.prev) == (place + 1, digest.hexdigest()):
            latest = None
            first = first or partial(Fault, place + 1, Damage.SAID, entry.detail)
        elif entry is None or (entry.number, entry.prev) != (place + 1, head):
            found = partial(_fault, read, place, head)
            first, latest = first or found, latest or found
        digest.update(line + b"\n")
        head = entry.hash if entry is not None else hashlib.sha256(line).hexdigest()
    if torn:
        first = first or partial(Fault, len(lines) + 1, Damage.TORN, f"an unfinished line: {_shown(torn)}")
    fault, unsaid = first and first(), latest and latest()
    entries = [entry for entry in read if entry is not None]
    return Trail(entries, fault, unsaid, len(lines), torn, head, digest.hexdigest())


def witness(trail: Trail, expected: str) -> Fault | None:
    """What is wrong with a trail, given a hash that somebody else has kept."""
    if trail.fault is None and expected not in {entry.hash for entry in trail.entries}:
        why = f"no entry has the hash {expected}: its end was cut off, or all of it was written anew"
        return Fault(trail.lines, Damage.UNWITNESSED, why)
    return trail.fault


class Audit:
    """The trail in its file; append only. One thread at a time.

    Args:
        path: the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = -1
        self._torn = 0
        self._lines = 0
        self._head = self._digest = GENESIS
        self._unsaid: list[tuple[str, str]] = []

    def unsaid(self) -> tuple[str, str] | None:
        """What the next entry must say: its kind, and what is wrong with the file; None where nothing is.

        Looks at the file the first time, and when it is not as long as it was left. An unfinished last line, which was
        never told to anybody, is cut off.

        Raises:
            AuditError: the file cannot be read or mended.
        """
        with self._naming("read"):
            if self._size_now() != self._size:
                self._look()
            if self._torn:
                os.truncate(self._path, self._size - self._torn)
                self._size, self._torn = self._size - self._torn, 0
        return self._unsaid[0] if self._unsaid else None

    def append(self, fact: Fact) -> str:
        """Add an entry, and give its hash when it is on the platter.

        Raises:
            AuditError: it was not added; try again.
        """
        said = self.unsaid()
        prev = self._digest if fact.kind == BROKEN else self._head
        line, own = encode_entry(self._lines + 1, prev, fact)
        with self._naming("written"):
            self._write(line)
        self._size, self._lines, self._head = self._size + len(line), self._lines + 1, own
        if said is not None and said[0] == fact.kind:
            del self._unsaid[0]
        return own

    def _size_now(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _look(self) -> None:
        content = self._path.read_bytes() if self._path.exists() else b""
        trail = examine(content)
        gone = self._lines and self._head not in {entry.hash for entry in trail.entries}
        unsaid = []
        if trail.unsaid or gone:
            what = str(trail.unsaid or f"entry {self._lines} is gone, which was the last")
            unsaid.append((BROKEN, f"the audit trail was changed by another hand; {what}"))
        if trail.torn:
            unsaid.append((MENDED, f"an unfinished last line was cut off: {_shown(trail.torn)}"))
        self._unsaid = unsaid
        self._size, self._torn = len(content), len(trail.torn)
        self._lines, self._head, self._digest = trail.lines, trail.head, trail.digest

    def _write(self, line: bytes) -> None:
        """Add a line whole or not at all."""
        is_new = not self._path.exists()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            try:
                left = line
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
            except OSError:
                with suppress(OSError):  # what stays is an unfinished line, and found as such
                    os.ftruncate(file, self._size)
                raise
        finally:
            os.close(file)
        if is_new:
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextmanager
    def _naming(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise AuditError(
                f"the audit trail {self._path} cannot be {done}: {error.strerror}; check its rights and the disk"
            ) from error


def _read(line: bytes) -> Entry | None:
    """One entry that bears its own hash; None if it is none."""
    said, mark, _ = line.rpartition(b',"hash":')
    try:
        content = json.loads(line)
        own = hashlib.sha256(said).hexdigest()
        if not mark or line != said + _end(own).rstrip() or tuple(content) != _KEYS:
            return None
        entry = Entry(**content)
    except (ValueError, TypeError, RecursionError):
        return None
    return entry if type(entry.number) is int and all(isinstance(each, str) for each in astuple(entry)[1:]) else None


def _end(own: str) -> bytes:
    return b',"hash":"%s"}\n' % own.encode()


def _fault(read: Sequence[Entry | None], place: int, head: str) -> Fault:
    """What seems to have been done, where a line does not follow the one before."""
    number, entry = place + 1, read[place]
    if entry is None:
        following = read[number] if number < len(read) else None
        if following is not None and following.prev == head:
            return Fault(number, Damage.INSERTED, "the line after it follows the one before it")
        return Fault(number, Damage.EDITED, "it is no entry that bears its own hash")
    return _misplaced(read, number, entry)


def _misplaced(read: Sequence[Entry | None], number: int, entry: Entry) -> Fault:
    """The same of an entry that is as it was written."""
    earlier = {one.hash for one in read[: number - 1] if one is not None}
    later = {one.hash for one in read[number:] if one is not None}
    if entry.hash in earlier | later:
        return Fault(number, Damage.INSERTED, f"entry {entry.number} is there twice")
    if entry.prev in later:
        return Fault(number, Damage.REORDERED, f"entry {entry.number} stands here, before the one that it follows")
    if entry.number > number:
        return Fault(number, Damage.REMOVED, f"entry {entry.number} stands here; what was between is gone")
    before = max(1, number - 1)
    if entry.prev in {GENESIS, *earlier} and entry.number < number:
        return Fault(before, Damage.INSERTED, f"line {number} does not follow it")
    return Fault(before, Damage.EDITED, f"line {number} follows another one than stands before it")


def _shown(line: bytes) -> str:
    return f"{len(line)} bytes, {line[:_SHOWN]!r}"
