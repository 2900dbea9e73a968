"""The record: what must reach the broker, on disk until it has been acknowledged, and the numbering of verdicts."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Lock

import structlog

from daemon.messages import Outcome, Reply
from daemon.stats import Counters, Figures, Part, Shift, Tally, begun, unpack

MAX_ROWS = 1_000_000
"""Verdicts that an outbox holds unless told otherwise: some 1.3 GB."""

ANSWERS_KEPT_S = 24 * 3600
"""Seconds for which answers to commands are remembered."""

EVENT = "event"
"""The leaf of what happened."""

ANSWER = "answer"
"""Stands for the leaf of a message that goes elsewhere."""

REMEMBERED = 4096
"""Of how many parts that may be sent again the verdicts are remembered: some 6 MB."""

log = structlog.get_logger()

_TABLES = """
CREATE TABLE IF NOT EXISTS station (name TEXT PRIMARY KEY, seq INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS entry (
    station TEXT NOT NULL, seq INTEGER NOT NULL, id TEXT NOT NULL, payload BLOB NOT NULL,
    outcome TEXT NOT NULL DEFAULT 'ERROR',
    PRIMARY KEY (station, seq)
);
CREATE TABLE IF NOT EXISTS note (
    number INTEGER PRIMARY KEY AUTOINCREMENT, station TEXT NOT NULL, leaf TEXT NOT NULL, payload BLOB NOT NULL,
    topic TEXT, correlation BLOB
);
CREATE TABLE IF NOT EXISTS remembered (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, payload BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS gap (
    station TEXT PRIMARY KEY, first_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL, count INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS quarantined (
    station TEXT NOT NULL, kind TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (station, kind, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unsettled (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS promise (id TEXT PRIMARY KEY, station TEXT NOT NULL, content BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answer (
    station TEXT NOT NULL, cmd_id TEXT NOT NULL, at_ms INTEGER NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (station, cmd_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS answer_age ON answer (at_ms);
CREATE TABLE IF NOT EXISTS recipe (station TEXT PRIMARY KEY, name TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS mode (station TEXT PRIMARY KEY, name TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS figures (station TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID;
"""
# A verdict that an earlier version kept without its outcome counts as ERROR: what may not have passed is kept longest.
_OUTCOME = "ALTER TABLE entry ADD COLUMN outcome TEXT NOT NULL DEFAULT 'ERROR'"
# Notes of an earlier version all go to a leaf.
_REPLY = ("ALTER TABLE note ADD COLUMN topic TEXT", "ALTER TABLE note ADD COLUMN correlation BLOB")
_INDEX = "CREATE INDEX IF NOT EXISTS entry_outcome ON entry (outcome)"


class OutboxError(Exception):
    """The record cannot be written or read; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One verdict in the record; when it is kept, with where else it is to go, and as what it counts, if it does."""

    station: str
    seq: int
    id: str
    payload: bytes
    outcome: Outcome
    reply: Reply | None = None
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """One message besides the verdicts that must arrive; `number` counts those of all stations, with gaps.

    It goes to the station's `leaf`, or, if it is an answer, where `reply` says.
    """

    station: str
    number: int
    leaf: str
    payload: bytes
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """Verdicts that were dropped for want of room: `count` of those from `first_seq` to `last_seq`."""

    first_seq: int
    last_seq: int
    count: int


@dataclass(frozen=True, slots=True)
class Promise:
    """A verdict that was promised to a trigger: the trigger's ULID, and what is to be known of it after a restart."""

    id: str
    station: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command was answered. `at_ms` is milliseconds since 1970 UTC."""

    station: str
    cmd_id: str
    at_ms: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Change:
    """What a transaction adds to the counts of each station once it is committed, and what is `then` to be done."""

    entries: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    gaps: Counter[str] = field(default_factory=Counter)
    then: list[Callable[[], None]] = field(default_factory=list)


class Outbox:
    """SQLite in WAL mode with `synchronous=FULL`: what `keep` returned from is on the platter. Any thread may call.

    Whatever the file or the disk refuses is an `OutboxError`.

    An id is *unsettled* from the moment its verdict is kept until its source has let go of the frame, so that a crash
    in between gives a part neither a second verdict nor none.

    A message that no broker takes is *quarantined*: kept, but handed out no more until `release`.

    What a station counts is saved with its verdicts, so that each is in the figures exactly when it is in the record.
    """

    def __init__(self, path: Path, *, max_rows: int = MAX_ROWS) -> None:
        """Open the file, or make it; one of an earlier version is brought up to date.

        Of more verdicts than `max_rows`, quarantined ones and those of all stations together, the oldest that passed
        are dropped, and where none of those is left, the oldest. So are notes beyond as many.

        Raises:
            OutboxError: it cannot be opened, or is no outbox.
        """
        self._lock = Lock()
        self._path = path
        self._max_rows = max_rows
        self._counters: dict[str, Counters] = {}
        self._saved: dict[str, Figures] = {}
        with self._naming("opened"):
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            with self._naming("opened"):
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.executescript(_TABLES)
                if "outcome" not in [column[1] for column in self._db.execute("PRAGMA table_info(entry)")]:
                    self._db.execute(_OUTCOME)
                if "topic" not in [column[1] for column in self._db.execute("PRAGMA table_info(note)")]:
                    for change in _REPLY:
                        self._db.execute(change)
                self._db.execute(_INDEX)
                # Counted once, since it is asked several times a second.
                self._waiting = _Change(
                    entries=self._count("entry"),
                    notes=self._count("note"),
                    quarantined=self._count("quarantined WHERE kind = 'entry'"),
                    gaps=self._count("gap"),
                )
        except OutboxError:
            self._db.close()
            raise

    def keep(self, entries: Sequence[Entry], settled: Iterable[str] = (), promised: Iterable[str] = ()) -> None:
        """Store verdicts in one durable commit, each with the next `seq` of its station.

        With it, those that are to be answered are, those that count are counted, and settled ids and promises that the
        verdicts fulfil are forgotten.

        Raises:
            OutboxError: nothing was stored (a full disk, say); try again.
            AssertionError: a number is not the next; nothing was stored.
        """
        with self._transaction() as change:
            self._count_in(entries, change)
            for entry in entries:
                if entry.seq != self._last_seq(entry.station) + 1:
                    raise AssertionError(f"seq {entry.seq} of {entry.station} is not the next")
                self._db.execute("INSERT OR REPLACE INTO station VALUES (?, ?)", (entry.station, entry.seq))
                self._db.execute(
                    "INSERT INTO entry (station, seq, id, payload, outcome) VALUES (?, ?, ?, ?, ?)",
                    (entry.station, entry.seq, entry.id, entry.payload, entry.outcome.name),
                )
                self._db.execute("INSERT OR IGNORE INTO unsettled VALUES (?)", (entry.id,))
                change.entries[entry.station] += 1
                if entry.reply is not None:
                    self._remember(entry.id, entry.payload)
                    self._answer(entry.station, entry.payload, entry.reply, change)
            self._db.executemany("DELETE FROM unsettled WHERE id = ?", [(i,) for i in settled])
            self._db.executemany("DELETE FROM promise WHERE id = ?", [(i,) for i in promised])
            self._make_room(self._waiting.entries.total() + len(entries) - self._max_rows, change)
        for station in change.gaps:
            log.warning(
                "the outbox is full: its oldest passed verdicts are dropped, and if there are none, its oldest; mend "
                "the way to the broker, or raise outbox_max_rows",
                station=station,
                outbox_max_rows=self._max_rows,
            )

    def tell(self, station: str, leaf: str, payload: bytes) -> None:
        """Store a message besides the verdicts that must arrive on a station's leaf, in one durable commit.

        Raises:
            OutboxError: it was not stored; try again.
        """
        with self._transaction() as change:
            self._tell(station, leaf, payload, change)

    def tell_again(self, station: str, capture_id: str, reply: Reply) -> bool:
        """Answer a part once more with the verdict that is remembered; False if none of this id is.

        Raises:
            OutboxError: it was not stored; try again.
        """
        with self._reading():
            row = self._db.execute("SELECT payload FROM remembered WHERE id = ?", (capture_id,)).fetchone()
        if row is not None:
            with self._transaction() as change:
                self._answer(station, row[0], reply, change)
        return row is not None

    def tell_gap(self, station: str, leaf: str, encode: Callable[[Gap], bytes]) -> bool:
        """Store the message that says what was dropped of a station since the last such; False if nothing was.

        Raises:
            OutboxError: it was not stored; try again.
        """
        if not self._waiting.gaps[station]:
            return False
        with self._transaction() as change:
            (row,) = self._db.execute(
                "DELETE FROM gap WHERE station = ? RETURNING first_seq, last_seq, count", (station,)
            ).fetchall()
            change.gaps[station] -= 1
            self._tell(station, leaf, encode(Gap(*row)), change)
        return True

    def counters(self, station: str) -> Counters:
        """What a station counts, always the same; one that has counted nothing yet begins now.

        Raises:
            OutboxError: it cannot be read.
        """
        with self._reading():
            return self._counters_of(station)

    def checkpoint(self) -> None:
        """Save what was counted since the last commit: parts that were dropped or came too late.

        It outlives the process at once, and a power cut from the next durable commit on.

        Raises:
            OutboxError: it was not saved; try again.
        """
        counting = dict(self._counters)
        changed = [station for station, one in counting.items() if one.figures != self._saved.get(station)]
        if changed:
            with self._transaction(durable=False) as change:
                for station in changed:
                    self._save(station, counting[station].figures, change)

    def close_shift(self, station: str, at: datetime, encode: Callable[[Shift], bytes]) -> None:
        """End a station's shift at a time in UTC: store the event that tells its figures, and count a new one.

        Raises:
            OutboxError: the shift goes on.
        """
        with self._transaction() as change:
            self._close(station, at, encode, change)

    def answer(
        self,
        answer: Answer,
        promise: Promise | None = None,
        *,
        recipe: str | None = None,
        mode: str | None = None,
        closing: tuple[datetime, Callable[[Shift], bytes]] | None = None,
    ) -> None:
        """Store what a command is answered and what that promises, prepares and leads to, in one durable commit.

        `closing` ends the shift with it, as `close_shift` does.

        Raises:
            OutboxError: nothing was stored.
        """
        with self._transaction() as change:
            if closing is not None:
                self._close(answer.station, *closing, change)
            self._db.execute(
                "INSERT OR REPLACE INTO answer VALUES (?, ?, ?, ?)",
                (answer.station, answer.cmd_id, answer.at_ms, answer.payload),
            )
            # Also those from the future, which a clock that was set back has left.
            age_ms = 1000 * ANSWERS_KEPT_S
            self._db.execute(
                "DELETE FROM answer WHERE at_ms NOT BETWEEN ? AND ?", (answer.at_ms - age_ms, answer.at_ms + age_ms)
            )
            if promise is not None:
                self._db.execute("INSERT INTO promise VALUES (?, ?, ?)", (promise.id, promise.station, promise.content))
            if recipe is not None:
                self._db.execute("INSERT OR REPLACE INTO recipe VALUES (?, ?)", (answer.station, recipe))
            if mode is not None:
                self._db.execute("INSERT OR REPLACE INTO mode VALUES (?, ?)", (answer.station, mode))

    def answered(self, station: str, cmd_id: str, now_ms: int) -> bytes | None:
        """What a command of this id was answered in the last day; None if it is new."""
        age_ms = 1000 * ANSWERS_KEPT_S
        with self._reading():
            row = self._db.execute(
                "SELECT payload FROM answer WHERE station = ? AND cmd_id = ? AND at_ms BETWEEN ? AND ?",
                (station, cmd_id, now_ms - age_ms, now_ms + age_ms),
            ).fetchone()
        return None if row is None else bytes(row[0])

    def promises(self, station: str) -> list[bytes]:
        """What is known of promises that have no verdict yet, oldest first."""
        with self._reading():
            rows = self._db.execute("SELECT content FROM promise WHERE station = ? ORDER BY id", (station,)).fetchall()
        return [row[0] for row in rows]

    def prepared(self, station: str) -> str | None:
        """The recipe that a station has prepared; None if none ever was."""
        return self._standing("recipe", station)

    def mode(self, station: str) -> str | None:
        """What a command has told a station to do; None if none ever did."""
        return self._standing("mode", station)

    def entries(self, station: str, after: int, limit: int) -> list[Entry]:
        """Verdicts of a station that wait for their acknowledgement, oldest first, behind number `after`."""
        with self._reading():
            rows = self._db.execute(
                "SELECT seq, id, payload, outcome FROM entry WHERE station = ? AND seq > ? AND NOT EXISTS "
                "(SELECT 1 FROM quarantined AS q WHERE q.station = entry.station AND kind = 'entry' AND number = seq) "
                "ORDER BY seq LIMIT ?",
                (station, after, limit),
            ).fetchall()
        return [Entry(station, seq, id_, payload, Outcome[outcome]) for seq, id_, payload, outcome in rows]

    def notes(self, station: str, after: int, limit: int) -> list[Note]:
        """Other messages of a station that wait for their acknowledgement, oldest first, behind number `after`."""
        if not self._waiting.notes[station]:
            return []
        with self._reading():
            rows = self._db.execute(
                "SELECT station, number, leaf, payload, topic, correlation FROM note "
                "WHERE station = ? AND number > ? AND NOT EXISTS (SELECT 1 FROM quarantined AS q "
                "WHERE q.station = note.station AND kind = 'note' AND q.number = note.number) "
                "ORDER BY number LIMIT ?",
                (station, after, limit),
            ).fetchall()
        return [
            Note(name, number, leaf, payload, None if topic is None else Reply(topic, correlation))
            for name, number, leaf, payload, topic, correlation in rows
        ]

    def forget(self, station: str, seqs: Iterable[int] = (), notes: Iterable[int] = ()) -> None:
        """Drop acknowledged verdicts and notes. After a power cut some may be there again, and are then sent twice.

        Raises:
            OutboxError: they are still there and will be sent again.
        """
        with self._transaction(durable=False) as change:
            for seq in seqs:
                change.entries[station] -= self._delete("entry", station, "seq", seq)
            for number in notes:
                change.notes[station] -= self._delete("note", station, "number", number)

    def quarantine(self, message: Entry | Note, leaf: str = "", told: bytes = b"") -> None:
        """Hand out a message no more, and store one on `leaf` that says so, if given, in one durable commit.

        Raises:
            OutboxError: nothing has changed.
        """
        kind, number = ("entry", message.seq) if isinstance(message, Entry) else ("note", message.number)
        with self._transaction() as change:
            added = self._db.execute(
                "INSERT OR IGNORE INTO quarantined VALUES (?, ?, ?)", (message.station, kind, number)
            ).rowcount
            if kind == "entry":
                change.quarantined[message.station] += added
            if told:
                self._tell(message.station, leaf, told, change)

    def release(self, station: str) -> None:
        """Hand out again what was quarantined: the broker may take it by now.

        Raises:
            OutboxError: nothing has changed.
        """
        with self._transaction() as change:
            self._db.execute("DELETE FROM quarantined WHERE station = ?", (station,))
            change.quarantined[station] -= self._waiting.quarantined[station]

    def concluded(self, capture_id: str) -> bool:
        """Whether a frame that was never let go of already has its verdict."""
        with self._reading():
            return bool(self._db.execute("SELECT 1 FROM unsettled WHERE id = ?", (capture_id,)).fetchone())

    def last_seq(self, station: str) -> int:
        """The newest number given to a verdict of this station, 0 before the first."""
        with self._reading():
            return self._last_seq(station)

    def depth(self, station: str) -> int:
        """How many verdicts of a station wait for their acknowledgement. Never waits for the disk."""
        return self._waiting.entries[station] - self._waiting.quarantined[station]

    def quarantined(self, station: str) -> int:
        """How many verdicts of a station are kept although no broker takes them. Never waits for the disk."""
        return self._waiting.quarantined[station]

    def close(self) -> None:
        """Save the figures, if the disk takes them, and let go of the file."""
        with suppress(OutboxError):
            self.checkpoint()
        with self._lock:
            self._db.close()

    def _counters_of(self, station: str) -> Counters:
        if station not in self._counters:
            row = self._db.execute("SELECT content FROM figures WHERE station = ?", (station,)).fetchone()
            figures = unpack(row[0]) if row else begun(datetime.now(UTC), self._last_seq(station))
            self._counters[station] = Counters(figures)
        return self._counters[station]

    def _count_in(self, entries: Sequence[Entry], change: _Change) -> None:
        """Save the figures of each station as they are with these verdicts."""
        parts: dict[str, list[Part]] = {}
        for entry in entries:
            if entry.part is not None:
                parts.setdefault(entry.station, []).append(entry.part)
        for station, several in parts.items():
            counters = self._counters_of(station)
            self._save(station, counters.figures.concluding(several), change)
            change.then.append(partial(counters.concluded, several))

    def _close(self, station: str, at: datetime, encode: Callable[[Shift], bytes], change: _Change) -> None:
        counters, last = self._counters_of(station), self._last_seq(station)
        figures, new = counters.figures, Tally(at, last)
        closed = figures.shift
        first_seq, last_seq = (closed.after + 1, last) if last > closed.after else (0, 0)
        self._tell(station, EVENT, encode(Shift(closed.stats(), at, first_seq, last_seq)), change)
        self._save(station, Figures(new, figures.total), change)
        change.then.append(partial(counters.begin, new, closed))

    def _save(self, station: str, figures: Figures, change: _Change) -> None:
        self._db.execute("INSERT OR REPLACE INTO figures VALUES (?, ?)", (station, figures.pack()))
        change.then.append(partial(self._saved.__setitem__, station, figures))

    def _standing(self, what: str, station: str) -> str | None:
        with self._reading():
            row = self._db.execute(f"SELECT name FROM {what} WHERE station = ?", (station,)).fetchone()  # noqa: S608 -- our words
        return None if row is None else str(row[0])

    def _last_seq(self, station: str) -> int:
        row = self._db.execute("SELECT seq FROM station WHERE name = ?", (station,)).fetchone()
        return int(row[0]) if row else 0

    def _count(self, rows: str) -> Counter[str]:
        return Counter(dict(self._db.execute(f"SELECT station, count(*) FROM {rows} GROUP BY station")))  # noqa: S608 -- our words

    def _delete(self, table: str, station: str, column: str, number: int) -> int:
        deleted = self._db.execute(f"DELETE FROM {table} WHERE station = ? AND {column} = ?", (station, number))  # noqa: S608 -- our words
        return deleted.rowcount

    def _remember(self, capture_id: str, payload: bytes) -> None:
        cursor = self._db.execute(
            "INSERT OR REPLACE INTO remembered (id, payload) VALUES (?, ?)", (capture_id, payload)
        )
        self._db.execute("DELETE FROM remembered WHERE number <= ?", ((cursor.lastrowid or 0) - REMEMBERED,))

    def _answer(self, station: str, payload: bytes, reply: Reply, change: _Change) -> None:
        if reply.topic:
            self._tell(station, ANSWER, payload, change, reply)

    def _tell(self, station: str, leaf: str, payload: bytes, change: _Change, reply: Reply | None = None) -> None:
        topic, correlation = (None, None) if reply is None else (reply.topic, reply.correlation)
        self._db.execute(
            "INSERT INTO note (station, leaf, payload, topic, correlation) VALUES (?, ?, ?, ?, ?)",
            (station, leaf, payload, topic, correlation),
        )
        change.notes[station] += 1
        if self._waiting.notes.total() >= self._max_rows:
            ((loser,),) = self._db.execute(
                "DELETE FROM note WHERE number = (SELECT min(number) FROM note) RETURNING station"
            ).fetchall()
            change.notes[loser] -= 1

    def _make_room(self, excess: int, change: _Change) -> None:
        """Drop verdicts beyond the bound: first those that passed, then all, the oldest first."""
        for which in ("outcome = 'PASS'", "outcome != 'PASS'"):
            if excess <= 0:
                return
            losers = self._db.execute(
                f"SELECT station, seq FROM entry WHERE {which} ORDER BY rowid LIMIT ?",  # noqa: S608 -- our words
                (excess,),
            ).fetchall()
            excess -= len(losers)
            for station, seq in losers:
                change.entries[station] -= self._delete("entry", station, "seq", seq)
                change.quarantined[station] -= self._delete("quarantined", station, "kind = 'entry' AND number", seq)
                self._db.execute(
                    "INSERT INTO gap VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET first_seq = min(first_seq, "
                    "excluded.first_seq), last_seq = max(last_seq, excluded.last_seq), count = count + 1",
                    (station, seq, seq),
                )
                if not self._waiting.gaps[station]:
                    change.gaps[station] = 1

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, self._naming("read"):
            yield

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[_Change]:
        with self._lock, self._naming("written"):
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            change = _Change()
            try:
                yield change
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite has rolled back by itself where the disk failed
                    self._db.execute("ROLLBACK")
                raise
            self._waiting.entries.update(change.entries)
            self._waiting.notes.update(change.notes)
            self._waiting.quarantined.update(change.quarantined)
            self._waiting.gaps.update(change.gaps)
            for action in change.then:
                action()

    @contextmanager
    def _naming(self, done: str) -> Iterator[None]:
        """Make of SQLite's error one that names the file and the cure."""
        try:
            yield
        except sqlite3.Error as error:
            raise OutboxError(
                f"the outbox {self._path} cannot be {done}: {error}; check its rights and the disk, and if the file is "
                "damaged, move it away (what it still held is not sent then, and seq starts again at 1)"
            ) from error
