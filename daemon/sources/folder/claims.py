"""What there is to keeping a part from being judged twice, however it is done: by renaming or by remembering."""

import fcntl
import os
import stat
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from daemon.sources.base import SourceUnavailableError


class State(NamedTuple):
    """What changes when a file is written to or replaced."""

    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "State":
        """The state of a file now.

        Raises:
            FileNotFoundError: there is none, or it is no regular file.
        """
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"{path} is not a file")
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)

    def is_like(self, other: "State") -> bool:
        """Whether it may be the same file, on a share that was mounted anew and numbers its files otherwise."""
        return self[1:] == other[1:]


UNSEEN = State(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Claim:
    """A file that is ours to judge.

    `path` is where it is now, `name` what its writer called it, and `state` the one in which it was handed over, or
    None where nobody can have changed it since.
    """

    id: str
    path: Path
    name: str
    state: State | None = None


class Keeping(Protocol):
    """One folder's way of keeping. `put_away` may be called from another thread than the rest."""

    def prepare(self) -> None:
        """See that what it needs in the folder is there; often called. Raises OSError."""

    def alone(self) -> AbstractContextManager[None]:
        """Have the folder for one daemon alone. Raises SourceUnavailableError."""

    def left_over(self) -> list[Claim]:
        """What was claimed and not put away, in the order of the ids. Raises OSError."""

    def handed_over(self, name: str) -> State | None:
        """In which state a file was claimed that is still under that name; None if there is none."""

    def claim(self, claim_id: str, path: Path, state: State, sidecar: Path | None) -> tuple[Claim, bool]:
        """Make a file and its sidecar ours; False: it had changed by then, and must come to rest again.

        Raises:
            OSError: this file cannot be claimed.
            SourceUnavailableError: none can.
        """

    def put_away(self, claim: Claim, failure: str | None) -> None:
        """Let go of a file that has its verdict, or a failure in its place. Raises OSError."""

    def listed(self, names: AbstractSet[str]) -> None:
        """Be told which files are in the folder, to forget others."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for one daemon alone, whatever their state folders.

    Raises:
        SourceUnavailableError: another one holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise SourceUnavailableError(f"{folder} is in use by another inspectd; stop one of the two") from None
    except OSError:
        pass  # a network file system that cannot lock folders
    try:
        yield
    finally:
        os.close(handle)
