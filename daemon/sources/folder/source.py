"""Parts that arrive as image files in a folder: written slowly, by FTP, renamed, moved or linked into it.

A file-system event only says where to look; looking itself, once in a while, finds what no event told of (a network
share, an overflown queue, the time before the start). A file is taken once it is whole: at rest, and decodable. It is
claimed by renaming it (`rooms`), so that a camera which uses one name for all parts overwrites none, or, where nothing
may be changed, by remembering it (`ledger`).
"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import structlog
from ulid import ULID

from daemon import images
from daemon.messages import Capture, Frame, Unreadable
from daemon.sources.base import ALWAYS, Demand, SourceUnavailableError
from daemon.sources.folder import labels
from daemon.sources.folder.claims import UNSEEN, Claim, Keeping, State
from daemon.sources.folder.hints import watching
from daemon.sources.folder.labels import Label
from daemon.sources.folder.ledger import Ledger
from daemon.sources.folder.rooms import ROOMS, Rooms
from daemon.sources.names import is_candidate, is_foreign, natural, shortened
from detectors.base import Image

RETRY_S = 0.05
"""The first pause before a file that cannot be decoded yet is tried again; then it doubles."""

BLIND_RESCAN_S = 0.5
"""How often to look where the system grants no events."""

LEISURE = 20
"""After a look, wait so many times as long as it took: a folder of very many files must not cost the detector."""

DUPLICATES = 1000
"""Of how many parts the contents are remembered."""

log = structlog.get_logger()


class Order(StrEnum):
    """In which order files are taken that were there at one look."""

    ARRIVAL = "arrival"
    NAME = "name"


def _nobody() -> None:
    pass


class FolderSource:
    """One watched folder; its subfolders are not looked into. Satisfies `daemon.sources.base.Source`.

    Args:
        station: the name its captures carry.
        path: the folder. The daemon must be allowed to write there, unless there is a ledger.
        concluded: whether the record holds a verdict with this id; asked about files left over from an earlier run.
        ledger: a file in which to remember what was judged; files then stay where they are. None: they are moved.
        delete: whether judged files are deleted instead of being moved to done/; not beside a ledger.
        settle_ms: how long a file must be at rest if no event said that its writer has closed it.
        give_up_s: how long after its last change a file that cannot be decoded is handed over as `Unreadable`, and one
            without a sidecar as it is.
        rescan_s: how often to look without an event.
        order: oldest first, or by name with numbers in their order.
        part_id_pattern: a regular expression, searched in the name of a file: its group `part` is the part's id,
            `batch` the batch's, and other named ones go into `meta`. "": the stem is the part's id.
        sidecar: whether each image has a file of JSON beside it that says more of the part (see `labels`).
        skip_duplicates: whether to put away, without a verdict, a file whose content is that of one of the last
            `DUPLICATES` readable parts since the start.
        duplicate: is told of each such, in the thread that runs `frames`.
        shrink: at which share of their size images are decoded, 1/shrink (see `images.decode`).

    Raises:
        ValueError: the pattern is none, in words for an operator.
    """

    def __init__(
        self,
        station: str,
        path: Path,
        *,
        concluded: Callable[[str], bool],
        ledger: Path | None = None,
        delete: bool = False,
        settle_ms: int = 200,
        give_up_s: float = 10.0,
        rescan_s: float = 5.0,
        order: Order = Order.ARRIVAL,
        part_id_pattern: str = "",
        sidecar: bool = False,
        skip_duplicates: bool = False,
        duplicate: Callable[[], None] = _nobody,
        shrink: int = 1,
    ) -> None:
        self._station = station
        self._path = path
        self._writable = ledger is None
        self._keeping: Keeping = Rooms(path, delete=delete) if ledger is None else Ledger(path, ledger)
        self._concluded = concluded
        self._settle_s = settle_ms / 1000
        self._give_up_s = give_up_s
        self._rescan_s = rescan_s
        self._order = order
        self._pattern = labels.compiled(part_id_pattern) if part_id_pattern else None
        self._sidecar = sidecar
        self._skip_duplicates = skip_duplicates
        self._duplicate = duplicate
        self._shrink = shrink
        self._last_id = ULID.from_int(0)
        self._held: dict[str, Claim] = {}  # handed over and not put away, by id
        self._settled: dict[str, str | None] = {}  # the failure or None of those that are to be put away
        self._putting_away = threading.Lock()
        self._contents: dict[bytes, str] = {}  # the parts with these digests, oldest first
        self._mentioned: set[str] = set()

    def frames(self, stop: threading.Event, demand: Demand = ALWAYS) -> Iterator[Frame | Unreadable | None]:
        """Yield first what an earlier run left without a verdict, then each file once it is whole, in order.

        What comes while no part is wanted waits in the folder.

        Raises:
            SourceUnavailableError: the folder is missing or not writable; at once, before the first part. Later,
                while parts are waited for, also that it was replaced, or that the ledger cannot be written.
        """
        return self._frames(self._prepare(), stop, demand)

    def _frames(
        self, folder: tuple[int, int], stop: threading.Event, demand: Demand
    ) -> Iterator[Frame | Unreadable | None]:
        with self._keeping.alone(), watching(self._path, is_candidate) as hints:
            yield from self._left_over(stop)
            arriving: dict[str, _Arrival] = {}
            ready: deque[_Arrival] = deque()
            rescan_s = self._rescan_s if hints.expected else min(self._rescan_s, BLIND_RESCAN_S)
            look_at = 0.0
            while not stop.is_set():
                if time.monotonic() >= look_at:
                    if self._prepare() != folder:
                        raise SourceUnavailableError(f"{self._path} was replaced or mounted over: watching it anew")
                    began = time.monotonic()
                    self._look(arriving)
                    ended = time.monotonic()
                    look_at = ended + max(rescan_s, LEISURE * (ended - began))
                # Kept until all are taken: where few of many are wanted, to look at all for each would take too long.
                ready = ready or deque(self._at_rest(arriving))
                while ready and not stop.is_set() and time.monotonic() < look_at and demand.wanted():
                    arrival, since = ready.popleft(), demand.since
                    if since is None or arrival.came_since(since):
                        yield self._take(arrival, arriving)
                yield None
                for name, closed in hints.wait():
                    arriving.setdefault(name, _Arrival(self._path / name, name)).hint(closed=closed)

    def settle(self, capture: Capture, failure: str | None) -> bool:
        """Let go of a part's file: move it to done/ or failed/, delete it, or remember that it was judged.

        Any thread may call. False if that cannot be done now; then it is when the folder is next looked at.
        """
        self._settled[capture.id] = failure
        try:
            self._put_away(capture.id)
        except OSError as error:
            log.warning(
                "a judged file cannot be put away yet",
                station=self._station,
                part=capture.part_id,
                id=capture.id,
                reason=str(error),
            )
            return False
        return True

    def _prepare(self) -> tuple[int, int]:
        """See that the folder can be used; put away what `settle` could not. Returns which folder it is."""
        examine(self._path, writable=self._writable)
        try:
            self._keeping.prepare()
            here = self._path.stat()
        except OSError as error:
            raise _unavailable(self._path, error, writable=self._writable) from error
        for settled in list(self._settled):
            with suppress(OSError):
                self._put_away(settled)
        return here.st_dev, here.st_ino

    def _look(self, arriving: dict[str, "_Arrival"]) -> None:
        """Find the files in the folder that are new or overwritten, and forget those that are gone."""
        try:
            with os.scandir(self._path) as entries:
                names = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
            self._keeping.listed(names)
        except OSError as error:
            raise _unavailable(self._path, error, writable=self._writable) from error
        for name in [name for name, arrival in arriving.items() if name == arrival.name and name not in names]:
            del arriving[name]
        for name in names - arriving.keys():
            if is_candidate(name):
                path = self._path / name
                with suppress(OSError):
                    handed_over = self._keeping.handed_over(name)
                    if handed_over is None or handed_over != State.of(path):
                        arriving[name] = _Arrival(path, name)
            elif is_foreign(name) and not (self._sidecar and name.endswith(".json")):
                self._mention_foreign(Path(name).suffix.lower())

    def _mention_foreign(self, suffix: str) -> None:
        """Say once of each kind of file that it is not taken: a camera set to another format would be silence."""
        taken = " ".join(sorted(images.SUFFIXES))
        self._warn_once(suffix, "files of this kind are left alone", kind=suffix or "none", taken=taken)

    def _left_over(self, stop: threading.Event) -> Iterator[Frame | Unreadable]:
        """Put away what has verdicts of the files in hand when an earlier run ended, hand over the others again."""
        try:
            left_over = self._keeping.left_over()
        except OSError as error:
            raise _unavailable(self._path, error, writable=self._writable) from error
        for claim in left_over:
            self._last_id = max(self._last_id, ULID.from_str(claim.id))
            if stop.is_set():
                return
            if claim.id in self._held:
                continue
            self._held[claim.id] = claim
            if self._concluded(claim.id):
                self._settled[claim.id] = _failure(claim.path)
                with suppress(OSError):
                    self._put_away(claim.id)
                continue
            part = None
            try:
                state = State.of(claim.path)
                if claim.state is not None and not claim.state.is_like(state):
                    self._let_go(claim, "a file was overwritten before its verdict, so its part has none")
                elif content := self._read(claim.path, claim.name, final=True):
                    part = self._hand_over(claim, state, claim.path.lstat().st_ctime_ns, content)
            except OSError:
                del self._held[claim.id]
            if part is not None:
                yield part

    def _at_rest(self, arriving: dict[str, "_Arrival"]) -> list["_Arrival"]:
        """The files to try now, in order. Those that are gone are forgotten."""
        now = time.monotonic()
        ready = []
        for name, arrival in list(arriving.items()):
            try:
                if arrival.due <= now and arrival.rests(now, self._settle_s):
                    ready.append(arrival)
            except OSError:
                del arriving[name]
        if self._order is Order.NAME:
            return sorted(ready, key=lambda arrival: (natural(arrival.name), arrival.name))
        return sorted(ready, key=lambda arrival: (arrival.state.modified_ns, arrival.name))

    def _take(self, arrival: "_Arrival", arriving: dict[str, "_Arrival"]) -> Frame | Unreadable | None:
        """Decode a file, claim it, and hand it over if it is still the same."""
        now = time.monotonic()
        path = arrival.path
        try:
            if not arrival.rests(now, self._settle_s):
                return None
            if self._keeping.handed_over(path.name) == arrival.state:
                del arriving[path.name]
                return None
            content = self._read(path, arrival.name, final=now >= arrival.changed + self._give_up_s)
            if content is None:
                arrival.try_again(now, self._give_up_s)
                return None
            arrived_ns = path.lstat().st_ctime_ns  # when it got its place and content; claiming changes it
            claim, whole = self._keeping.claim(self._next_id(), path, arrival.state, content.sidecar)
            del arriving[path.name]
            if whole:
                self._held[claim.id] = claim
                return self._hand_over(claim, arrival.state, arrived_ns, content)
        except FileNotFoundError:
            arriving.pop(path.name, None)
        except OSError as error:
            name = _printable(arrival.name)
            log.warning("a file cannot be claimed", station=self._station, file=name, reason=str(error))
            arrival.due = now + self._give_up_s
        else:  # its writer had begun on the next part, which must come to rest first, maybe in processing/
            arriving[claim.path.name] = _Arrival(claim.path, claim.name)
        return None

    def _next_id(self) -> str:
        self._last_id = max(ULID(), ULID.from_int(int(self._last_id) + 1))  # in order, even if the clock is set back
        return str(self._last_id)

    def _read(self, path: Path, name: str, *, final: bool) -> "_Content | None":
        """The image and what is said of it; None, unless it is final, as long as they may become whole.

        Raises:
            FileNotFoundError: the image is gone.
        """
        label, matched = labels.by_name(shortened(name), self._pattern)
        if not matched:
            self._warn_once(
                "part_id_pattern",
                "part_id_pattern is not found in the name of a file; the whole name is the id of such parts",
                file=_printable(name),
            )
        sidecar = labels.sidecar_of(path) if self._sidecar else None
        if self._sidecar:
            try:
                label, fault = labels.by_sidecar(sidecar, label)
            except labels.NoSidecarError:
                if not final:
                    return None
                self._warn_once("sidecar", "a part is judged without a sidecar: none came", file=_printable(name))
            except labels.TornSidecarError as error:
                if not final:
                    return None
                self._warn_of_sidecar(name, str(error))
            else:
                if fault:
                    self._warn_of_sidecar(name, fault)
        decoded = _decode(path, self._shrink)
        if isinstance(decoded, str):
            return _Content(decoded, label, sidecar) if final else None
        return _Content(decoded, label, sidecar, _digest(path) if self._skip_duplicates else b"")

    def _hand_over(self, claim: Claim, state: State, arrived_ns: int, content: "_Content") -> Frame | Unreadable | None:
        """The part of a file that is ours, or None if its content was handed over before."""
        if content.digest:
            before = self._contents.get(content.digest)
            if before is not None:
                self._let_go(claim, "a file is left out: its content is that of an earlier part", earlier=before)
                self._duplicate()
                return None
            self._contents[content.digest] = _printable(claim.name)
            if len(self._contents) > DUPLICATES:
                del self._contents[next(iter(self._contents))]
        capture = Capture(
            id=claim.id,
            station=self._station,
            part_id=content.label.part_id,
            captured_at=_utc(state.modified_ns),
            arrived_at=_utc(arrived_ns),
            seen_at=time.monotonic(),
            origin=_printable(str(self._path / claim.name)),
            batch_id=content.label.batch_id,
            meta=content.label.meta,
        )
        decoded = content.decoded
        return Unreadable(capture, decoded) if isinstance(decoded, str) else Frame(capture, decoded)

    def _let_go(self, claim: Claim, why: str, **more: str) -> None:
        """Put away a file that gets no verdict, and say so."""
        log.warning(why, station=self._station, file=_printable(claim.name), id=claim.id, **more)
        self._settled[claim.id] = None
        with suppress(OSError):
            self._put_away(claim.id)

    def _put_away(self, claim_id: str) -> None:
        with self._putting_away:
            if claim_id not in self._held:
                self._settled.pop(claim_id, None)
                return
            # A file that is gone may come back with its network share, so it is not forgotten either.
            self._keeping.put_away(self._held[claim_id], self._settled[claim_id])
            del self._held[claim_id], self._settled[claim_id]

    def _warn_once(self, key: str, what: str, **more: str) -> None:
        if key not in self._mentioned:
            self._mentioned.add(key)
            log.warning(what, station=self._station, **more)

    def _warn_of_sidecar(self, name: str, fault: str) -> None:
        log.warning("what a sidecar says is left out", station=self._station, file=_printable(name), reason=fault)


def examine(folder: Path, *, writable: bool = True) -> None:
    """See whether a folder can be watched, and change nothing.

    Raises:
        SourceUnavailableError: it is missing, or, where it is to be writable, parts in it cannot be claimed; the
            message says how to mend it.
    """
    rights = os.R_OK | os.X_OK | (os.W_OK if writable else 0)
    for place in (folder, *(folder / room for room in ROOMS if writable)):
        there = os.access(place, os.F_OK)  # unlike `exists` it says no, too, where nobody may look
        if not there and place != folder:
            continue
        if not there or not place.is_dir():
            raise _unavailable(folder, NotADirectoryError(f"there is no folder {place}"), writable=writable)
        if not os.access(place, rights, effective_ids=True):
            done = "change" if writable else "read"
            raise _unavailable(folder, PermissionError(f"no permission to {done} {place}"), writable=writable)


def _unavailable(folder: Path, error: OSError, *, writable: bool) -> SourceUnavailableError:
    let_in = f"chgrp -R inspectd {folder}; chmod -R g+rwX {folder}"
    if not os.access(folder, os.F_OK):
        cure = f"mount it, or create it (mkdir -p {folder}) and let the daemon's group in ({let_in})"
    elif writable:
        cure = f"let the daemon's group in ({let_in}), and see to space on its disk"
    else:
        cure = f"let the daemon's user read it (chmod o+rx {folder})"
    return SourceUnavailableError(f"the folder {folder} cannot be used: {error}; {cure}")


@dataclass(frozen=True, slots=True)
class _Content:
    """What was read of a file: the image, or why there is none; what is said of it, and where."""

    decoded: Image | str
    label: Label
    sidecar: Path | None
    digest: bytes = b""


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
    name: str
    state: State = UNSEEN
    changed: float = field(default_factory=time.monotonic)
    due: float = 0.0
    tries: int = 0
    closed: bool = False

    def hint(self, *, closed: bool) -> None:
        if closed:
            self.closed, self.due = True, 0.0

    def came_since(self, since: datetime) -> bool:
        """Whether the file got its place and content since then; False if it is gone."""
        try:
            return self.path.lstat().st_ctime_ns >= since.timestamp() * 1e9
        except OSError:
            return False

    def rests(self, now: float, settle_s: float) -> bool:
        """Whether the file is as it was when last looked at, or was closed by its writer; else look again later."""
        state, closed = State.of(self.path), self.closed
        self.closed = False
        if state == self.state:
            return True
        self.state, self.changed, self.tries = state, now, 0
        self.due = now if closed else now + settle_s
        return closed

    def try_again(self, now: float, give_up_s: float) -> None:
        self.due = min(now + RETRY_S * 2**self.tries, self.changed + give_up_s)
        self.tries += 1


def _decode(path: Path, shrink: int = 1) -> Image | str:
    """The image, or why there is none.

    Raises:
        FileNotFoundError: the file is gone.
    """
    try:
        return images.read(path, shrink)
    except FileNotFoundError:
        raise
    except images.UndecodableError as error:
        return str(error)
    except OSError as error:
        return f"the file cannot be read: {error.strerror}"


def _failure(path: Path) -> str | None:
    """Why a file is no image, or None if it is one or gone."""
    try:
        decoded = _decode(path)
    except FileNotFoundError:
        return None
    return decoded if isinstance(decoded, str) else None


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _printable(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")
