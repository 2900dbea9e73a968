"""Keeping by remembering: files stay where they are, and SQLite holds which of them were judged, over restarts."""

import os
import sqlite3
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock

from daemon.sources.base import SourceUnavailableError
from daemon.sources.folder import claims
from daemon.sources.folder.claims import Claim, State

REMEMBERED = 100_000
"""How many files that are gone are remembered: those of a share that is away come back, and were judged."""

_TABLE = """
CREATE TABLE IF NOT EXISTS file (
    id TEXT PRIMARY KEY, name BLOB NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL,
    modified_ns INTEGER NOT NULL, settled INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID
"""
_INDEX = "CREATE INDEX IF NOT EXISTS file_name ON file (name)"


class LedgerError(OSError):
    """The ledger cannot be written or read; the message says where, why, and what to do."""


class Ledger:
    """The files of one folder, which may be read-only. Satisfies `daemon.sources.folder.claims.Keeping`.

    A file is known by its name, inode, size and time of change. The inode counts only while the folder is watched:
    shares that are mounted anew may number their files anew.

    What `claim` and `put_away` returned from is on the platter.
    """

    def __init__(self, folder: Path, file: Path) -> None:
        self._folder = folder
        self._file = file
        self._lock = Lock()
        self._db: sqlite3.Connection | None = None
        self._known: dict[str, State] = {}  # the newest of each name, in the order of the ids

    def prepare(self) -> None:
        """Nothing is needed in the folder."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the folder for one daemon alone, and the ledger open."""
        with claims.alone(self._folder):
            try:
                self._load()
            except LedgerError as error:
                raise SourceUnavailableError(str(error)) from error
            try:
                yield
            finally:
                with self._lock:
                    self._close()

    def left_over(self) -> list[Claim]:
        """The files handed over without a verdict that was settled; some may be gone or overwritten."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT id, name, inode, size, modified_ns FROM file WHERE NOT settled ORDER BY id"
            ).fetchall()
        named = [(claim_id, os.fsdecode(name), State(*state)) for claim_id, name, *state in rows]
        return [Claim(claim_id, self._folder / name, name, state) for claim_id, name, state in named]

    def handed_over(self, name: str) -> State | None:
        """In which state the file of that name was claimed last."""
        return self._known.get(name)

    def claim(self, claim_id: str, path: Path, state: State, sidecar: Path | None) -> tuple[Claim, bool]:  # noqa: ARG002 -- the protocol's signature
        """Remember a file if it is still the same; of its name, what was judged before is forgotten."""
        claim = Claim(claim_id, path, path.name, state)
        if State.of(path) != state:
            return claim, False
        name = os.fsencode(path.name)
        try:
            with self._transaction() as db:
                db.execute("DELETE FROM file WHERE name = ? AND settled", (name,))
                db.execute(
                    "INSERT INTO file (id, name, inode, size, modified_ns) VALUES (?, ?, ?, ?, ?)",
                    (claim_id, name, *state),
                )
        except LedgerError as error:
            raise SourceUnavailableError(str(error)) from error
        self._known.pop(path.name, None)
        self._known[path.name] = state
        return claim, True

    def put_away(self, claim: Claim, failure: str | None) -> None:  # noqa: ARG002 -- the protocol's signature
        """Remember that a file has its verdict, or forget it if there is a newer one of its name."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM file WHERE id = ?1 AND EXISTS "
                "(SELECT 1 FROM file AS newer WHERE newer.name = file.name AND newer.id > ?1)",
                (claim.id,),
            )
            db.execute("UPDATE file SET settled = 1 WHERE id = ?", (claim.id,))

    def listed(self, names: AbstractSet[str]) -> None:
        """Forget those that went first of too many that are gone."""
        if len(self._known) <= len(names) + REMEMBERED:
            return
        gone = [name for name in self._known if name not in names]
        forgotten = gone[: len(gone) - REMEMBERED]
        with self._transaction() as db:
            db.executemany("DELETE FROM file WHERE name = ?", [(os.fsencode(name),) for name in forgotten])
        for name in forgotten:
            del self._known[name]

    def _load(self) -> None:
        with self._lock, self._naming():
            self._close()
            self._db = self._open()
            rows = self._db.execute("SELECT name, inode, size, modified_ns FROM file ORDER BY id").fetchall()
        self._known = {}
        for name, *then in rows:
            self._known.pop(os.fsdecode(name), None)
            self._known[os.fsdecode(name)] = State(*then)
        for name, state in self._known.items():
            try:
                now = State.of(self._folder / name)
            except OSError:
                continue
            if now.is_like(state):
                self._known[name] = now

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._file, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute(_TABLE)
            db.execute(_INDEX)
        except sqlite3.Error:
            db.close()
            raise
        return db

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One durable change. Verdicts come in for a while after the watching has ended: then it is opened for each."""
        with self._lock, self._naming():
            if self._db is not None:
                with self._db:
                    yield self._db
            else:
                with closing(self._open()) as db, db:
                    yield db

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Make of SQLite's error one that names the file and the cure."""
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(
                f"the ledger {self._file} cannot be used: {error}; check its rights and the disk, and if the file is "
                f"damaged, move it away (all that lies in {self._folder} is judged again then)"
            ) from error
