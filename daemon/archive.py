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

from calibration.store import synchronise, write_whole
from daemon import contract, overlay
from daemon.contract import Identity
from daemon.framing import FRAMING
from daemon.messages import Outcome, Verdict
from daemon.pulse import Beat, unwatched
from daemon.retention import Kept, Limits, Stock
from detectors.base import Image

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
"""So many images at most are removed while one batch waits, for their age or a lower quota, and two more a new one."""
_LISTED = 1000
"""Files that are listed from one sign of life to the next."""
_PROBE_S = 60.0

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
        beat: called while the folder is listed, which may take minutes on a slow disk.
        probe_s: seconds after which it is tried out whether a folder that refused an image takes one again.
    """

    def __init__(
        self,
        root: Path,
        limits: Limits,
        image_format: Literal["png", "jpeg"] = "png",
        pass_every: int = 0,
        *,
        beat: Beat = unwatched,
        probe_s: float = _PROBE_S,
    ) -> None:
        self._root = root
        self._limits = limits
        self._suffix = _SUFFIX[image_format]
        self._pass_every = pass_every
        self._stock: Stock | None = None
        self._lock: int | None = None
        self._reviews = 0  # bytes of REVIEWED that were read
        self._trouble: str | None = None
        self._cured: Callable[[], bool] = _cured  # whether the trouble is over, in so far as no new image tells
        self._stuck = False  # something that is due to go cannot be removed
        self._probe_s = probe_s
        self._probe_at = 0.0
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="archive")
        with suppress(OSError):
            self._open(beat)

    @property
    def trouble(self) -> str | None:
        """What an image was not kept for, or cannot be removed for; None once `keep` has seen that it is over.

        Does not touch the disk.
        """
        return self._trouble

    def keep(self, parts: Sequence[Exhibit], beat: Beat = unwatched) -> list[str]:
        """Make images durable, several at once, with what belongs to them.

        Calls `beat` after each piece of work.

        Returns:
            For each part where its image is, from the archive's folder; empty where none was kept.
        """
        wanted = {part.verdict.capture.id: part for part in parts if self._wants(part)}
        kept = {}
        cured: Callable[[], bool] = _cured
        try:
            stock = self._open(beat)
            self._read_reviews(stock)
            self._purge(stock, beat)
            if self._trouble is not None and not self._stuck and self._cured():
                self._recover()
            if wanted:
                cured = self._takes_files
                kept = self._keep(stock, wanted, beat)
        except Exception as error:  # noqa: BLE001 -- no image is worth a verdict
            self._fail(str(error) or type(error).__name__, cured)
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

    def _open(self, beat: Beat) -> Stock:
        if self._stock is None:
            self._root.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._root, os.O_RDONLY)
            try:
                _lock(lock, self._root)
                self._reviews = _size(self._root / REVIEWED)
                found = survey(self._root, beat)
                for file in found.torn:
                    file.unlink(missing_ok=True)
                    beat()
            except OSError:
                os.close(lock)
                raise
            stock = Stock(self._limits)
            for kept in found.kept:
                stock.add(kept)
            self._stock, self._lock = stock, lock
        return self._stock

    def _keep(self, stock: Stock, parts: dict[str, Exhibit], beat: Beat) -> dict[str, str]:
        files = {}
        for id_, encoded in zip(parts, self._writers.map(self._encode, parts.values()), strict=True):
            files[id_] = encoded
            beat()
        free = shutil.disk_usage(self._root).free
        most = _AT_ONCE + 2 * len(parts)
        planned: dict[str, Kept] = {}
        faults = 0
        for id_, part in parts.items():
            new = self._describe(part, files[id_], stock.find(id_))
            taken, gone = self._make_room(stock, new, free, most, beat)
            most -= len(gone)
            for old in gone:
                planned.pop(old.id, None)  # one of this very batch
                free += old.bytes
            if taken:
                planned[id_] = new
                free -= new.bytes
            else:
                faults += 1
        written = self._write(planned, files, beat)
        for id_ in planned.keys() - written.keys():
            stock.remove(id_)
        if faults + len(planned) - len(written) == 0 and not self._stuck:
            self._recover()
        return written

    def _make_room(self, stock: Stock, new: Kept, free: int, most: int, beat: Beat) -> tuple[bool, list[Kept]]:
        """Remove what goes for a new image; give whether there is room for it now, and what is gone."""
        earlier = stock.find(new.id)
        gone = stock.make_room(new, free, most)
        if gone is None:
            self._lack(new, free)
            return False, []
        taken = stock.find(new.id) is new
        if taken and earlier is not None and earlier.ref != new.ref and earlier not in gone:
            gone.append(earlier)
        try:
            self._remove(gone, beat)
        except OSError as error:
            if taken:
                stock.remove(new.id)
            there = [old for old in gone if (self._root / old.ref).exists()]
            for old in there:
                stock.add(old)
            self._fail(str(error), self._takes_files)
            return False, [old for old in gone if old not in there]
        if not taken:
            self._lack(new, free + sum(old.bytes for old in gone))
        return taken, gone

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

    def _write(self, planned: dict[str, Kept], files: dict[str, dict[str, bytes]], beat: Beat) -> dict[str, str]:
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
                    self._fail(str(error), self._takes_files)
                    _clear(self._root / planned[id_].ref)
                else:
                    written[id_] = planned[id_].ref
                beat()
            try:
                synchronise(folder)
            except OSError as error:
                self._fail(str(error), self._takes_files)
                for id_ in ids:
                    written.pop(id_, None)
        return written

    def _remove(self, gone: Sequence[Kept], beat: Beat) -> None:
        for old in gone:
            _clear(self._root / old.ref)
            beat()

    def _purge(self, stock: Stock, beat: Beat) -> None:
        """Remove what has been kept for long enough, and what is over a quota; what cannot be removed still counts."""
        days = self._limits.days
        cutoff = f"{datetime.now(UTC) - timedelta(days=days):%Y-%m-%d}" if days else ""
        self._stuck = False
        for old in stock.purge(cutoff, _AT_ONCE):
            try:
                self._remove([old], beat)
            except OSError as error:
                stock.add(old)
                self._stuck = True
                self._fail(str(error), _cured)

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
            why = f"an image of {new.bytes} bytes is larger than all that {new.outcome.name} may take"
            self._fail(why, _incurable)
        else:
            needed = self._limits.floor + new.bytes
            why = f"{self._root}: {free / 1e9:.2f} GB are free on its disk, and {needed / 1e9:.2f} have to be"
            self._fail(why, lambda: shutil.disk_usage(self._root).free >= needed)

    def _takes_files(self) -> bool:
        """Whether a file can be written, which is tried once in a while; False in between."""
        if time.monotonic() < self._probe_at:
            return False
        self._probe_at = time.monotonic() + self._probe_s
        probe = self._root / ".probe"
        try:
            write_whole(probe, bytes(_BLOCK), lasting=False)
            probe.unlink()
        except OSError:
            return False
        return True

    def _fail(self, why: str, cured: Callable[[], bool]) -> None:
        if self._trouble is None:
            log.warning("images are not archived, or not removed; verdicts go on without", reason=why)
        self._trouble, self._cured = why, cured
        self._probe_at = time.monotonic() + self._probe_s

    def _recover(self) -> None:
        if self._trouble is not None:
            log.info("images are archived again", folder=str(self._root))
        self._trouble = None


def survey(root: Path, beat: Beat = unwatched) -> Survey:
    """List an archive; what goes while it is listed may be missing. No file is opened.

    Calls `beat` with each folder, and now and then in between.

    Raises:
        OSError: a folder may not be read.
    """
    found = Survey([], [])
    for station in _folders(root):
        for day in _folders(station):
            if _DAY.fullmatch(day.name):
                for outcome in _folders(day):
                    if outcome.name in Outcome.__members__:
                        _list(root, outcome, found, beat)
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


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False))


def _list(root: Path, folder: Path, found: Survey, beat: Beat) -> None:
    """Add what lies in the folder of one station's outcome of one day."""
    sets: dict[str, dict[str, tuple[int, int]]] = {}  # bytes, and when the file was written
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number % _LISTED == 0:
                beat()
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
            synchronise(folder)
    for suffix, content in sorted(files.items(), key=lambda file: file[0] == image.suffix):
        write_whole(beside(image, suffix), content, lasting=False)


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


def _cured() -> bool:
    """Of what is over as soon as it has been tried again."""
    return True


def _incurable() -> bool:
    """Of what only a kept image shows to be over."""
    return False


def _on_disk(size: int) -> int:
    """What a file of so many bytes takes, which is whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
