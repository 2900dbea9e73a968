"""Parts that arrive as image files in a folder: written slowly, by FTP, renamed, moved or linked into it.

    folder/NAME → processing/ULID~NAME → done/DATE/NAME, or failed/DATE/NAME beside NAME.reason.txt

A file-system event only says where to look; looking itself, once in a while, finds what no event told of (a network
share, an overflown queue, the time before the start). A file is taken once it is whole: at rest, and decodable.
Renaming it into processing/ claims it, so that a camera which uses one name for all parts overwrites none.
"""

import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import structlog
from ulid import ULID

from daemon import images
from daemon.messages import Capture, Frame, Unreadable
from daemon.sources.base import ALWAYS, Demand, SourceUnavailableError
from daemon.sources.hints import watching
from daemon.sources.names import free_path, is_candidate, is_foreign, part_id, shortened
from detectors.base import Image

RETRY_S = 0.05
"""The first pause before a file that cannot be decoded yet is tried again; then it doubles."""

ROOMS = ("processing", "done", "failed")

BLIND_RESCAN_S = 0.5
"""How often to look where the system grants no events."""

_CLAIM = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}~.+", re.DOTALL)

log = structlog.get_logger()


class FolderSource:
    """One watched folder; its subfolders are not looked into. Satisfies `daemon.sources.base.Source`.

    Args:
        station: the name its captures carry.
        path: the folder. The daemon must be allowed to write there, for claiming means renaming.
        concluded: whether the record holds a verdict with this id; asked about files left in processing/.
        settle_ms: how long a file must be at rest if no event said that its writer has closed it.
        give_up_s: how long after its last change a file that cannot be decoded is handed over as `Unreadable`.
        rescan_s: how often to look without an event.
    """

    def __init__(
        self,
        station: str,
        path: Path,
        *,
        concluded: Callable[[str], bool],
        settle_ms: int = 200,
        give_up_s: float = 10.0,
        rescan_s: float = 5.0,
    ) -> None:
        self._station = station
        self._path = path
        self._processing = path / "processing"
        self._concluded = concluded
        self._settle_s = settle_ms / 1000
        self._give_up_s = give_up_s
        self._rescan_s = rescan_s
        self._last_id = ULID.from_int(0)
        self._held: dict[str, Path] = {}  # handed over and still in processing/, by id
        self._settled: dict[str, str | None] = {}  # the failure or None of those that are to be put away
        self._putting_away = threading.Lock()
        self._mentioned: set[str] = set()

    def frames(self, stop: threading.Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:
        """Yield first what was left in processing/ without a verdict, then each file once it is whole, oldest first.

        What comes while no part is wanted waits in the folder.

        Raises:
            SourceUnavailableError: the folder is missing or not writable; at once, before the first part. Later,
                while parts are waited for, also that it was replaced.
        """
        return self._frames(self._prepare(), stop, demand)

    def _frames(
        self, folder: tuple[int, int], stop: threading.Event, demand: Demand
    ) -> Iterator[Frame | Unreadable | None]:
        with _alone(self._processing), watching(self._path, is_candidate) as hints:
            yield from self._left_over(stop)
            arriving: dict[str, _Arrival] = {}
            rescan_s = self._rescan_s if hints.expected else min(self._rescan_s, BLIND_RESCAN_S)
            scan_at = 0.0
            while not stop.is_set():
                if time.monotonic() >= scan_at:
                    if self._prepare() != folder:
                        raise SourceUnavailableError(f"{self._path} was replaced or mounted over: watching it anew")
                    names = self._files(self._path)
                    for name in filter(is_candidate, names):
                        arriving.setdefault(name, _Arrival(self._path / name))
                    self._mention_foreign(names)
                    scan_at = time.monotonic() + rescan_s
                for arrival in self._at_rest(arriving) if demand.wanted() else ():
                    if stop.is_set():
                        return
                    if not demand.wanted():
                        break
                    part = self._take(arrival, arriving)
                    if part is not None:
                        yield part
                yield None
                for name, closed in hints.wait():
                    arriving.setdefault(name, _Arrival(self._path / name)).hint(closed=closed)

    def settle(self, capture: Capture, failure: str | None) -> bool:
        """Move a part's file from processing/ to done/ or, beside its failure, to failed/, under today's date in UTC.

        Any thread may call. False if it cannot be moved now; then it is moved when the folder is next looked at.
        """
        self._settled[capture.id] = failure
        try:
            self._put_away(capture.id)
        except OSError as error:
            log.warning("a judged file stays in processing for now", station=self._station, reason=str(error))
            return False
        return True

    def _prepare(self) -> tuple[int, int]:
        """See that the folder and its rooms are there; put away what `settle` could not. Returns which folder it is."""
        examine(self._path)
        try:
            for room in ROOMS:
                (self._path / room).mkdir(exist_ok=True)
            here = self._path.stat()
        except OSError as error:
            raise _unavailable(self._path, error) from error
        for settled in list(self._settled):
            with suppress(OSError):
                self._put_away(settled)
        return here.st_dev, here.st_ino

    def _files(self, folder: Path) -> list[str]:
        try:
            with os.scandir(folder) as entries:
                return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        except OSError as error:
            raise _unavailable(folder, error) from error

    def _mention_foreign(self, names: list[str]) -> None:
        """Say once of each kind of file that it is not taken: a camera set to another format would be silence."""
        for suffix in {Path(name).suffix.lower() for name in names if is_foreign(name)} - self._mentioned:
            self._mentioned.add(suffix)
            taken = " ".join(sorted(images.SUFFIXES))
            log.warning("files of this kind are left alone", station=self._station, kind=suffix or "none", taken=taken)

    def _left_over(self, stop: threading.Event) -> Iterator[Frame | Unreadable]:
        """Put away the files in processing/ that have verdicts, hand over the others again, as they were claimed."""
        for claim in sorted(filter(_CLAIM.fullmatch, self._files(self._processing))):
            path, claim_id = self._processing / claim, claim[:26]
            self._last_id = max(self._last_id, ULID.from_str(claim_id))
            if stop.is_set():
                return
            if claim_id in self._held:
                continue
            self._held[claim_id] = path
            if self._concluded(claim_id):
                with suppress(OSError):
                    decoded = _decode(path)
                    self._settled[claim_id] = decoded if isinstance(decoded, str) else None
                    self._put_away(claim_id)
                continue
            try:
                part = self._part(path, _State.of(path), path.lstat().st_ctime_ns, _decode(path))
            except OSError:
                del self._held[claim_id]
                continue
            yield part

    def _at_rest(self, arriving: dict[str, "_Arrival"]) -> list["_Arrival"]:
        """The files to try now, oldest first. Those that are gone are forgotten."""
        now = time.monotonic()
        ready = []
        for name, arrival in list(arriving.items()):
            try:
                if arrival.due <= now and arrival.rests(now, self._settle_s):
                    ready.append(arrival)
            except OSError:
                del arriving[name]
        return sorted(ready, key=lambda arrival: (arrival.state.modified_ns, arrival.path.name))

    def _take(self, arrival: "_Arrival", arriving: dict[str, "_Arrival"]) -> Frame | Unreadable | None:
        """Decode a file, claim it, and hand it over if it is still the same."""
        now = time.monotonic()
        try:
            if not arrival.rests(now, self._settle_s):
                return None
            decoded = _decode(arrival.path)
            if isinstance(decoded, str) and now < arrival.changed + self._give_up_s:
                arrival.try_again(now, self._give_up_s)
                return None
            arrived_ns = arrival.path.lstat().st_ctime_ns  # when it got its place and content; claiming changes it
            path = self._claim(arrival.path)
            del arriving[arrival.path.name]
            if _State.of(path) == arrival.state:
                self._held[path.name[:26]] = path
                return self._part(path, arrival.state, arrived_ns, decoded)
        except FileNotFoundError:
            arriving.pop(arrival.path.name, None)
        except OSError as error:
            log.warning("a file cannot be claimed", station=self._station, reason=str(error))
            arrival.due = now + self._give_up_s
        else:  # its writer had begun on the next part; the file is ours now, and comes to rest in processing/
            arriving[path.name] = _Arrival(path)
        return None

    def _claim(self, path: Path) -> Path:
        if path.parent == self._processing:
            return path
        self._last_id = max(ULID(), ULID.from_int(int(self._last_id) + 1))  # in order, even if the clock is set back
        return path.rename(self._processing / f"{self._last_id}~{shortened(path.name)}")

    def _part(self, path: Path, state: "_State", arrived_ns: int, decoded: Image | str) -> Frame | Unreadable:
        claim_id, name = path.name[:26], path.name[27:]
        capture = Capture(
            id=claim_id,
            station=self._station,
            part_id=part_id(name),
            captured_at=_utc(state.modified_ns),
            arrived_at=_utc(arrived_ns),
            seen_at=time.monotonic(),
            origin=os.fsencode(self._path / name).decode(errors="backslashreplace"),
        )
        return Unreadable(capture, decoded) if isinstance(decoded, str) else Frame(capture, decoded)

    def _put_away(self, claim_id: str) -> None:
        with self._putting_away:
            if claim_id not in self._held:
                self._settled.pop(claim_id, None)
                return
            path, failure = self._held[claim_id], self._settled[claim_id]
            room = self._path / ("done" if failure is None else "failed") / f"{datetime.now(UTC):%Y-%m-%d}"
            room.mkdir(exist_ok=True)
            target = free_path(room, path.name[27:])
            # A file that is gone may come back with its network share, so it is not forgotten either.
            path.rename(target)
            if failure is not None:
                with suppress(OSError):  # a full disk; the verdict says it too
                    target.with_name(f"{target.name}.reason.txt").write_text(f"{failure}\n", encoding="utf-8")
            del self._held[claim_id], self._settled[claim_id]


def examine(folder: Path) -> None:
    """See whether a folder can be watched, and change nothing.

    Raises:
        SourceUnavailableError: it is missing, or parts in it cannot be claimed; the message says how to mend it.
    """
    for place in (folder, *(folder / room for room in ROOMS if (folder / room).exists())):
        if not place.is_dir():
            raise _unavailable(folder, NotADirectoryError(f"there is no folder {place}"))
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise _unavailable(folder, PermissionError(f"no permission to change {place}"))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
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


def _unavailable(folder: Path, error: OSError) -> SourceUnavailableError:
    if folder.is_dir():
        cure = f"give it to the daemon's user (chown -R inspectd {folder}), and see to space on its disk"
    else:
        cure = f"mount it, or create it (mkdir -p {folder}) and give it to the daemon's user (chown)"
    return SourceUnavailableError(f"the folder {folder} cannot be used: {error}; {cure}")


class _State(NamedTuple):
    """What changes when a file is written to or replaced."""

    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> "_State":
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"{path} is not a file")
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


_UNSEEN = _State(0, 0, 0)


def _utc(nanoseconds: int) -> datetime:
    """A file's time, or now where it is beyond what dates can say."""
    try:
        return datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.now(UTC)


@dataclass(slots=True)
class _Arrival:
    """A file on its way to being whole; times are `time.monotonic()` seconds."""

    path: Path
    state: _State = _UNSEEN
    changed: float = field(default_factory=time.monotonic)
    due: float = 0.0
    tries: int = 0
    closed: bool = False

    def hint(self, *, closed: bool) -> None:
        if closed:
            self.closed, self.due = True, 0.0

    def rests(self, now: float, settle_s: float) -> bool:
        """Whether the file is as it was when last looked at, or was closed by its writer; else look again later."""
        state, closed = _State.of(self.path), self.closed
        self.closed = False
        if state == self.state:
            return True
        self.state, self.changed, self.tries = state, now, 0
        self.due = now if closed else now + settle_s
        return closed

    def try_again(self, now: float, give_up_s: float) -> None:
        self.due = min(now + RETRY_S * 2**self.tries, self.changed + give_up_s)
        self.tries += 1


def _decode(path: Path) -> Image | str:
    """The image, or why there is none.

    Raises:
        FileNotFoundError: the file is gone.
    """
    try:
        return images.read(path)
    except FileNotFoundError:
        raise
    except images.UndecodableError as error:
        return str(error)
    except OSError as error:
        return f"the file cannot be read: {error.strerror}"
