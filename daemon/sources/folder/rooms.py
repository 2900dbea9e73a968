"""Keeping by renaming: folder/NAME → processing/ULID~NAME → done/DATE/NAME, or failed/DATE/NAME beside its reason.

Where judged files are not wanted, they are deleted instead of going to done/.

A sidecar goes along, from its image's claim on as the image's name with `.json` after it. It goes first, so that an
image in a room never lacks the one it had.
"""

import os
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from daemon.sources.folder import claims
from daemon.sources.folder.claims import Claim, State
from daemon.sources.names import free_path, shortened

ROOMS = ("processing", "done", "failed")

_CLAIM = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}~.+", re.DOTALL)
_SIDECAR = ".json"


class Rooms:
    """The rooms of one folder. Satisfies `daemon.sources.folder.claims.Keeping`.

    Args:
        folder: which.
        delete: whether files that were judged are deleted; those without an image in them go to failed/ all the same.
    """

    def __init__(self, folder: Path, *, delete: bool = False) -> None:
        self._folder = folder
        self._delete = delete
        self._processing = folder / "processing"

    def prepare(self) -> None:
        """Make the rooms that are missing."""
        for room in ROOMS:
            (self._folder / room).mkdir(exist_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have processing/ for one daemon alone."""
        with claims.alone(self._processing):
            yield

    def left_over(self) -> list[Claim]:
        """The files in processing/. A sidecar that was claimed ahead of its image goes back."""
        with os.scandir(self._processing) as entries:
            names = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        claimed = []
        for name in sorted(filter(_CLAIM.fullmatch, names)):
            path = self._processing / name
            if not name.endswith(_SIDECAR):
                claimed.append(Claim(name[:26], path, name[27:]))
            elif name.removesuffix(_SIDECAR) not in names:
                with suppress(OSError):
                    path.rename(free_path(self._folder, name[27:]))
        return claimed

    def handed_over(self, name: str) -> State | None:  # noqa: ARG002 -- the protocol's signature
        """None: what was handed over is no more in the folder."""
        return None

    def claim(self, claim_id: str, path: Path, state: State, sidecar: Path | None) -> tuple[Claim, bool]:
        """Move a file, and its sidecar before it, to processing/."""
        if path.parent == self._processing:
            claim = Claim(path.name[:26], path, path.name[27:])
        else:
            target = self._processing / f"{claim_id}~{shortened(path.name)}"
            moved = None if sidecar is None else sidecar.rename(_sidecar(target))
            try:
                claim = Claim(claim_id, path.rename(target), target.name[27:])
            except OSError:
                if moved is not None and sidecar is not None:
                    with suppress(OSError):
                        moved.rename(sidecar)
                raise
        return claim, State.of(claim.path) == state

    def put_away(self, claim: Claim, failure: str | None) -> None:
        """Delete a file or move it to done/ or, beside its failure, to failed/, under today's date in UTC."""
        if self._delete and failure is None:
            _sidecar(claim.path).unlink(missing_ok=True)
            claim.path.unlink()
            return
        room = self._folder / ("done" if failure is None else "failed") / f"{datetime.now(UTC):%Y-%m-%d}"
        room.mkdir(exist_ok=True)
        target = free_path(room, claim.name)
        with suppress(FileNotFoundError):  # few parts have one
            _sidecar(claim.path).rename(_sidecar(target))
        claim.path.rename(target)
        if failure is not None:
            with suppress(OSError):  # a full disk; the verdict says it too
                target.with_name(f"{target.name}.reason.txt").write_text(f"{failure}\n", encoding="utf-8")

    def listed(self, names: AbstractSet[str]) -> None:
        """Nothing is remembered that could be forgotten."""


def _sidecar(image: Path) -> Path:
    return image.with_name(image.name + _SIDECAR)
