"""Images kept for people: each beside what was said of it, durable before its verdict says where it is.

    STATION/DAY/OUTCOME/ULID_PART.png            the image as it was judged; or .jpg
    STATION/DAY/OUTCOME/ULID_PART.json           its verdict as published
    STATION/DAY/OUTCOME/ULID_PART.overlay.jpg    of a reject, what the detector saw
    STATION/DAY/OUTCOME/ULID_PART.review.json    what a person said of it since

The image comes last and goes first: what lies there without one is what a crash has left. A file of another name is
somebody else's, and never touched.
"""

import fcntl
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import cv2
import structlog

from daemon import contract, overlay
from daemon.contract import Identity
from daemon.messages import Outcome, Verdict
from daemon.retention import Kept, Limits, Stock
from detectors.base import Image

FRAMING = "inspectd-framing"
"""What a framed image says of its framing: the keyword of a PNG's text, or what a JPEG's comment begins with."""
SIDECAR, OVERLAY, REVIEW = ".json", ".overlay.jpg", ".review.json"
REVIEWED = ".reviewed"
"""The file, in the archive's folder, with the id of each part that was reviewed, one a line."""

_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_OURS = re.compile(r"(([0-7][0-9A-HJKMNP-TV-Z]{25})_[A-Za-z0-9_-]*)(\.png|\.jpg|\.json|\.overlay\.jpg|\.review\.json)")
_TORN = re.compile(r"\.[0-7][0-9A-HJKMNP-TV-Z]{25}_[A-Za-z0-9_.-]*\.tmp")
_SUFFIX = {"png": ".png", "jpeg": ".jpg"}
_PICTURES = {*_SUFFIX.values(), OVERLAY}
_PART_CHARACTERS = 40
_JPEG_QUALITY = 95
# Of the lossless ways, a quarter of the time of zlib's usual one, and no larger files where a camera's noise is.
_PNG = [
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG),
]
_HEADER_OF_PNG = 33
_BLOCK = 4096
_WRITERS = 4
_AT_ONCE = 100
"""So many images at most are removed for their age while one batch waits."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A part that the archive may keep.

    Attributes:
        verdict: what it got.
        identity: who judged it.
        image: as it was judged; None where it could not be seen.
        overlay: draws what the detector saw; called for rejects alone, in any thread.
        framing: the fingerprint of how the image was framed, empty where it was not.
    """

    verdict: Verdict
    identity: Identity
    image: Image | None
    overlay: Callable[[], Image]
    framing: str = ""


@dataclass(frozen=True, slots=True)
class Survey:
    """What a listing found: the images, and the files that a crash has left."""

    kept: list[Kept]
    torn: list[Path]


class Archive:
    """The images of all stations. One thread keeps them; any may ask for `trouble`.

    Nothing that goes wrong here costs a verdict: its image is not kept then, and `trouble` says why. A folder that
    cannot be used is tried again with every part.

    Args:
        root: the folder; made if need be.
        limits: how much may lie there.
        image_format: "png", lossless, or "jpeg", of quality 95.
        pass_every: one in so many parts that pass is kept, chosen by the digits of their ids, so that no rhythm of the
            line decides which; 0 for none.
    """

    def __init__(
        self, root: Path, limits: Limits, image_format: Literal["png", "jpeg"] = "png", pass_every: int = 0
    ) -> None:
        self._root = root
        self._limits = limits
        self._suffix = _SUFFIX[image_format]
        self._pass_every = pass_every
        self._stock: Stock | None = None
        self._lock: int | None = None
        self._reviews = 0  # bytes of REVIEWED that were read
        self._trouble: str | None = None
        self._needed = 0  # bytes that have to be free for the trouble to be over; 0 where that is no matter of room
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="archive")
        with suppress(OSError):
            self._open()

    @property
    def trouble(self) -> str | None:
        """Why the last image that was to be kept is not; None where it is, or where there is room again."""
        trouble, needed = self._trouble, self._needed
        if trouble is not None and needed:
            with suppress(OSError):
                return None if shutil.disk_usage(self._root).free >= needed else trouble
        return trouble

    def keep(self, parts: Sequence[Exhibit]) -> list[str]:
        """Make images durable, several at once, with what belongs to them.

        Returns:
            For each part where its image is, from the archive's folder; empty where none was kept.
        """
        wanted = {part.verdict.capture.id: part for part in parts if self._wants(part)}
        kept = {}
        try:
            stock = self._open()
            self._read_reviews(stock)
            self._expire(stock)
            if wanted:
                kept = self._keep(stock, wanted)
        except Exception as error:  # noqa: BLE001 -- no image is worth a verdict
            self._fail(str(error) or type(error).__name__)
        return [kept.get(part.verdict.capture.id, "") for part in parts]

    def close(self) -> None:
        """Let go of the folder."""
        self._writers.shutdown()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = self._stock = None

    def _wants(self, part: Exhibit) -> bool:
        outcome = part.verdict.decision.outcome
        if part.image is None or not self._limits.quota[outcome]:
            return False
        if outcome is not Outcome.PASS:
            return True
        return self._pass_every > 0 and zlib.crc32(part.verdict.capture.id.encode()) % self._pass_every == 0

    def _open(self) -> Stock:
        if self._stock is None:
            self._root.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._root, os.O_RDONLY)
            try:
                _lock(lock, self._root)
                self._reviews = _size(self._root / REVIEWED)
                found = survey(self._root)
                for file in found.torn:
                    file.unlink(missing_ok=True)
            except OSError:
                os.close(lock)
                raise
            stock = Stock(self._limits)
            for kept in found.kept:
                stock.add(kept)
            self._stock, self._lock = stock, lock
        return self._stock

    def _keep(self, stock: Stock, parts: dict[str, Exhibit]) -> dict[str, str]:
        files = dict(zip(parts, self._writers.map(self._encode, parts.values()), strict=True))
        free = shutil.disk_usage(self._root).free
        planned: dict[str, Kept] = {}
        faults = 0
        for id_, part in parts.items():
            earlier = stock.find(id_)
            new = self._describe(part, files[id_], earlier)
            gone = stock.make_room(new, free)
            if gone is None:
                self._lack(new, free)
                faults += 1
                continue
            if earlier is not None and earlier.ref != new.ref and earlier not in gone:
                gone.append(earlier)
            try:
                self._remove(gone)
            except OSError as error:
                stock.remove(id_)
                for old in gone:
                    if (self._root / old.ref).exists():
                        stock.add(old)
                self._fail(str(error))
                faults += 1
                continue
            for old in gone:
                planned.pop(old.id, None)  # one of this very batch
                free += old.bytes
            planned[id_] = new
            free -= new.bytes
        written = self._write(planned, files)
        for id_ in planned.keys() - written.keys():
            stock.remove(id_)
        if faults + len(planned) - len(written) == 0:
            self._recover()
        return written

    def _encode(self, part: Exhibit) -> dict[str, bytes]:
        """The contents of a part's files by suffix but for the sidecar, which depends on where they come to lie."""
        verdict, image = part.verdict, part.image
        assert image is not None  # noqa: S101 -- else it is not wanted
        files = {self._suffix: _png(image, part.framing) if self._suffix == ".png" else _jpeg(image, part.framing)}
        if verdict.decision.outcome is not Outcome.PASS:
            files[OVERLAY] = overlay.encode_jpeg(part.overlay(), contract.encode_picture_comment(verdict))
        return files

    def _describe(self, part: Exhibit, files: dict[str, bytes], earlier: Kept | None) -> Kept:
        """What is to be written of a part, with its sidecar; one judged again comes to lie where it was."""
        verdict = part.verdict
        capture, outcome = verdict.capture, verdict.decision.outcome
        day = f"{verdict.decided_at.astimezone(UTC):%Y-%m-%d}"
        if earlier is not None and earlier.outcome is outcome:
            day = earlier.day
        called = re.sub(r"[^A-Za-z0-9_-]", "_", capture.part_id)[-_PART_CHARACTERS:]
        ref = f"{capture.station}/{day}/{outcome.name}/{capture.id}_{called}{self._suffix}"
        files[SIDECAR] = contract.encode_verdict(part.identity, replace(verdict, image_ref=ref))
        size = sum(_on_disk(len(content)) for content in files.values())
        reviewed = earlier is not None and earlier.ref == ref and earlier.reviewed
        return Kept(day, time.time_ns(), capture.id, ref, outcome, size, reviewed)

    def _write(self, planned: dict[str, Kept], files: dict[str, dict[str, bytes]]) -> dict[str, str]:
        """Give the places of those that are on the platter."""
        folders: dict[Path, list[str]] = {}
        jobs: dict[str, Future[None]] = {}
        for id_, new in planned.items():
            image = self._root / new.ref
            folders.setdefault(image.parent, []).append(id_)
            jobs[id_] = self._writers.submit(_write, image, files[id_])
        written = {}
        for folder, ids in folders.items():
            for id_ in ids:
                if error := jobs[id_].exception():
                    self._fail(str(error))
                    _clear(self._root / planned[id_].ref)
                else:
                    written[id_] = planned[id_].ref
            try:
                _sync(folder)
            except OSError as error:
                self._fail(str(error))
                for id_ in ids:
                    written.pop(id_, None)
        return written

    def _remove(self, gone: Sequence[Kept]) -> None:
        for old in gone:
            _clear(self._root / old.ref)

    def _expire(self, stock: Stock) -> None:
        """Remove what has been kept for long enough."""
        if self._limits.days:
            cutoff = f"{datetime.now(UTC) - timedelta(days=self._limits.days):%Y-%m-%d}"
            for old in stock.expire(cutoff, _AT_ONCE):
                stock.add(old)  # until its files are gone
                self._remove([old])
                stock.remove(old.id)

    def _read_reviews(self, stock: Stock) -> None:
        """Learn what was reviewed since, by another process."""
        file = self._root / REVIEWED
        if _size(file) > self._reviews:
            with file.open("rb") as lines:
                lines.seek(self._reviews)
                read = lines.read()
            whole = read[: read.rfind(b"\n") + 1]
            self._reviews += len(whole)
            for id_ in whole.decode(errors="replace").split():
                stock.review(id_)

    def _lack(self, new: Kept, free: int) -> None:
        quota = self._limits.quota[new.outcome]
        if new.bytes > quota:
            self._fail(f"an image of {new.bytes} bytes is larger than all that {new.outcome.name} may take")
        else:
            needed = self._limits.floor + new.bytes
            why = f"{self._root}: {free / 1e9:.2f} GB are free on its disk, and {needed / 1e9:.2f} have to be"
            self._fail(why, needed)

    def _fail(self, why: str, needed: int = 0) -> None:
        if self._trouble is None:
            log.warning("images are not archived; verdicts go on without", reason=why)
        self._trouble, self._needed = why, needed

    def _recover(self) -> None:
        if self._trouble is not None:
            log.info("images are archived again", folder=str(self._root))
        self._trouble = None


def survey(root: Path) -> Survey:
    """List an archive; what goes while it is listed may be missing. No file is opened.

    Raises:
        OSError: a folder may not be read.
    """
    found = Survey([], [])
    for station in _folders(root):
        for day in _folders(station):
            if _DAY.fullmatch(day.name):
                for outcome in _folders(day):
                    if outcome.name in Outcome.__members__:
                        _list(root, outcome, found)
    return found


def beside(image: Path, suffix: str) -> Path:
    """One of the files that belong to an archived image."""
    return image.with_name(image.stem + suffix)


def note_review(root: Path, id_: str) -> None:
    """Let the daemon know that a part of the archive was reviewed.

    Raises:
        OSError: it cannot be written down.
    """
    with (root / REVIEWED).open("a") as file:
        file.write(f"{id_}\n")


def write_durably(path: Path, content: bytes) -> None:
    """Put a file on the platter, whole or not at all. Its name is there for good once its folder is synchronised.

    Raises:
        OSError: it cannot be written; there is no trace of it then.
    """
    torn = path.with_name(f".{path.name}.tmp")
    try:
        with torn.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        torn.rename(path)
    except OSError:
        with suppress(OSError):
            torn.unlink(missing_ok=True)
        raise


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False))


def _list(root: Path, folder: Path, found: Survey) -> None:
    """Add what lies in the folder of one station's outcome of one day."""
    sets: dict[str, dict[str, tuple[int, int]]] = {}  # bytes, and when the file was written
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if match := _OURS.fullmatch(entry.name):
                files = sets.setdefault(match[1], {})
                files[match[3]] = _BLOCK, 0  # what is said of an image takes one, and need not be looked at
                if match[3] in _PICTURES:
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        files[match[3]] = _on_disk(status.st_size), status.st_mtime_ns
            elif _TORN.fullmatch(entry.name):
                found.torn.append(folder / entry.name)
    place = folder.relative_to(root).as_posix()
    day, outcome = folder.parent.name, Outcome[folder.name]
    for stem, files in sets.items():
        suffix = next((suffix for suffix in _SUFFIX.values() if suffix in files), None)
        if suffix is None:
            found.torn.extend(folder / f"{stem}{suffix}" for suffix in files)
            continue
        size = sum(taken for taken, _ in files.values())
        ref = f"{place}/{stem}{suffix}"
        found.kept.append(Kept(day, files[suffix][1], stem[:26], ref, outcome, size, REVIEW in files))


def _write(image: Path, files: dict[str, bytes]) -> None:
    """Write what belongs to an image, and then the image."""
    if not image.parent.is_dir():
        image.parent.mkdir(parents=True, exist_ok=True)
        for folder in list(image.parents)[1:4]:
            _sync(folder)
    for suffix, content in sorted(files.items(), key=lambda file: file[0] == image.suffix):
        write_durably(beside(image, suffix), content)


def _clear(image: Path) -> None:
    """Remove an image and then what belongs to it, and folders that are empty by that."""
    image.unlink(missing_ok=True)
    for suffix in (OVERLAY, REVIEW, SIDECAR):
        beside(image, suffix).unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        image.parent.rmdir()
        image.parent.parent.rmdir()


def _png(image: Image, framing: str) -> bytes:
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), _PNG)
    png = encoded.tobytes()
    if not framing:
        return png
    chunk = b"tEXt" + f"{FRAMING}\0{framing}".encode("latin-1")
    note = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return png[:_HEADER_OF_PNG] + note + png[_HEADER_OF_PNG:]


def _jpeg(image: Image, framing: str) -> bytes:
    return overlay.encode_jpeg(image, f"{FRAMING}={framing}".encode() if framing else b"", _JPEG_QUALITY)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(handle: int, root: Path) -> None:
    """Have a folder for one daemon alone.

    Raises:
        OSError: another one has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{root} is in use by another inspectd; give each an archive of its own") from None
    except OSError:
        pass  # a network file system that cannot lock folders


def _on_disk(size: int) -> int:
    """What a file of so many bytes takes, which is whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
