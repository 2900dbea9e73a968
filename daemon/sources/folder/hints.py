"""What the kernel tells of a folder (inotify, by way of watchdog). Hints only: events get lost, and come late."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue

import structlog
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.inotify import InotifyFullEmitter, InotifyObserver
from watchdog.observers.inotify_c import InotifyConstants, Mask

TICK_S = 0.05
"""How long to wait for a hint before looking at other things."""

log = structlog.get_logger()


class Hints(FileSystemEventHandler):
    """Names of files that something has happened to, from watchdog's thread to the one that waits.

    `expected` is False where the system refuses to watch: then it is up to the caller to look.
    """

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.expected = True
        self._wanted = wanted
        self._queue = SimpleQueue[tuple[str, bool]]()

    def on_created(self, event: FileSystemEvent) -> None:
        """A file was opened for the first time, or linked: it may be empty yet."""
        self._put(event.src_path, closed=False)

    def on_closed(self, event: FileSystemEvent) -> None:
        """A file was closed by one that could write to it."""
        self._put(event.src_path, closed=True)

    def on_moved(self, event: FileSystemEvent) -> None:
        """A file got its name by being renamed or moved, which its writer does when it is done."""
        self._put(event.dest_path, closed=True)

    def _put(self, path: bytes | str, *, closed: bool) -> None:
        name = Path(os.fsdecode(path)).name
        if self._wanted(name):
            self._queue.put((name, closed))

    def wait(self) -> Iterator[tuple[str, bool]]:
        """Wait a tick for the first, then give all there are: names, and whether their writers have closed them."""
        with suppress(Empty):
            yield self._queue.get(timeout=TICK_S)
            while True:
                yield self._queue.get_nowait()


class _Emitter(InotifyFullEmitter):
    """Asks for what comes into the folder only.

    Of a file that leaves it, as each one we claim, watchdog would hold back all later events for half a second
    to see whether it comes back under another name.
    """

    def get_event_mask_from_filter(self) -> Mask:
        wanted = InotifyConstants.IN_CREATE | InotifyConstants.IN_CLOSE_WRITE | InotifyConstants.IN_MOVED_TO
        return Mask(wanted | InotifyConstants.IN_DELETE_SELF)


class _Observer(InotifyObserver):
    def __init__(self) -> None:
        super().__init__()
        self._emitter_class = _Emitter  # watchdog's constructor offers no choice


@contextmanager
def watching(folder: Path, wanted: Callable[[str], bool]) -> Iterator[Hints]:
    """Be given hints about the wanted names in a folder while in the context; no thread and no watch outlives it."""
    hints = Hints(wanted)
    observer = None
    try:
        observer = _Observer()
        observer.schedule(hints, str(folder.resolve()))
        observer.start()
    except OSError as error:
        hints.expected = False
        cure = "raise the sysctl fs.inotify.max_user_watches or max_user_instances"
        log.warning("no file events, looking often instead", folder=str(folder), reason=str(error), cure=cure)
    try:
        yield hints
    finally:
        if observer is not None:
            observer.stop()
            if observer.is_alive():
                observer.join()
