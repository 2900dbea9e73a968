"""The record: verdicts on disk until the broker has acknowledged them, and the numbering that survives a crash."""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

_TABLES = """
CREATE TABLE IF NOT EXISTS station (name TEXT PRIMARY KEY, seq INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS entry (
    station TEXT NOT NULL, seq INTEGER NOT NULL, id TEXT NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (station, seq)
);
CREATE TABLE IF NOT EXISTS unsettled (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""


class OutboxError(Exception):
    """The record cannot be written or read; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One verdict in the record."""

    station: str
    seq: int
    id: str
    payload: bytes


class Outbox:
    """SQLite in WAL mode with `synchronous=FULL`: what `keep` returned from is on the platter. Any thread may call.

    Whatever the file or the disk refuses is an `OutboxError`.

    An id is *unsettled* from the moment its verdict is kept until its source has let go of the frame, so that a crash
    in between gives a part neither a second verdict nor none.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            OutboxError: it cannot be opened, or is no outbox.
        """
        self._lock = Lock()
        self._path = path
        with self._naming("opened"):
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            with self._naming("opened"):
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.executescript(_TABLES)
        except OutboxError:
            self._db.close()
            raise

    def keep(self, entries: Sequence[Entry], settled: Iterable[str] = ()) -> None:
        """Store verdicts in one durable commit, each with the next `seq` of its station, and forget settled ids.

        Raises:
            OutboxError: nothing was stored (a full disk, say); try again.
            AssertionError: a number is not the next; nothing was stored.
        """
        with self._transaction():
            for entry in entries:
                if entry.seq != self._last_seq(entry.station) + 1:
                    raise AssertionError(f"seq {entry.seq} of {entry.station} is not the next")
                self._db.execute("INSERT OR REPLACE INTO station VALUES (?, ?)", (entry.station, entry.seq))
                self._db.execute(
                    "INSERT INTO entry VALUES (?, ?, ?, ?)", (entry.station, entry.seq, entry.id, entry.payload)
                )
                self._db.execute("INSERT OR IGNORE INTO unsettled VALUES (?)", (entry.id,))
            self._db.executemany("DELETE FROM unsettled WHERE id = ?", [(i,) for i in settled])

    def entries(self, station: str, after: int, limit: int) -> list[Entry]:
        """Verdicts of a station that wait for their acknowledgement, oldest first, behind number `after`."""
        with self._reading():
            rows = self._db.execute(
                "SELECT station, seq, id, payload FROM entry WHERE station = ? AND seq > ? ORDER BY seq LIMIT ?",
                (station, after, limit),
            ).fetchall()
        return [Entry(*row) for row in rows]

    def forget(self, station: str, seqs: Iterable[int]) -> None:
        """Drop acknowledged verdicts.

        Raises:
            OutboxError: they are still there and will be sent again.
        """
        with self._transaction():
            self._db.executemany("DELETE FROM entry WHERE station = ? AND seq = ?", [(station, seq) for seq in seqs])

    def concluded(self, capture_id: str) -> bool:
        """Whether a frame that was never let go of already has its verdict."""
        with self._reading():
            return bool(self._db.execute("SELECT 1 FROM unsettled WHERE id = ?", (capture_id,)).fetchone())

    def last_seq(self, station: str) -> int:
        """The newest number given to a verdict of this station, 0 before the first."""
        with self._reading():
            return self._last_seq(station)

    def depth(self, station: str) -> int:
        """How many verdicts of a station wait for their acknowledgement."""
        with self._reading():
            row = self._db.execute("SELECT count(*) FROM entry WHERE station = ?", (station,)).fetchone()
        return int(row[0])

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    def _last_seq(self, station: str) -> int:
        row = self._db.execute("SELECT seq FROM station WHERE name = ?", (station,)).fetchone()
        return int(row[0]) if row else 0

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, self._naming("read"):
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, self._naming("written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite has rolled back by itself where the disk failed
                    self._db.execute("ROLLBACK")
                raise

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
