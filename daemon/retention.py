"""Which archived images make room for others. Pure: sizes and limits in, what has to go out.

What is worth least goes first: parts that passed and nobody looked at; those that a person has reviewed, whose decision
was there to be exported; rejects other than FAIL; and last the FAIL that nobody has looked at yet.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from daemon.messages import Outcome


@dataclass(frozen=True, slots=True, order=True)
class Kept:
    """An image in the archive with all that lies beside it. They sort by age, the oldest first.

    Attributes:
        day: of its verdict, UTC, as 2026-11-22.
        at: when its file was written, nanoseconds since 1970.
        id: its part's.
        ref: where the image is, from the archive's folder.
        bytes: of all its files.
        reviewed: whether a person has said what it shows.
    """

    day: str
    at: int
    id: str
    ref: str = field(compare=False)
    outcome: Outcome = field(compare=False)
    bytes: int = field(compare=False)
    reviewed: bool = field(default=False, compare=False)

    @property
    def rank(self) -> int:
        """How dear it is, 0 to 3."""
        if self.reviewed:
            return 1
        return {Outcome.PASS: 0, Outcome.UNCERTAIN: 2, Outcome.ERROR: 2, Outcome.FAIL: 3}[self.outcome]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may lie in an archive.

    Attributes:
        quota: bytes by outcome; none are kept where it is 0.
        days: the days that an image is kept beside its own; 0 for ever.
        floor: bytes that stay free on the disk.
    """

    quota: Mapping[Outcome, int]
    days: int = 0
    floor: int = 0


_Class = tuple[int, Outcome]
"""A rank, and one of the outcomes that have it."""

_CLASSES: Sequence[_Class] = [
    (0, Outcome.PASS),
    *((1, outcome) for outcome in Outcome),
    (2, Outcome.UNCERTAIN),
    (2, Outcome.ERROR),
    (3, Outcome.FAIL),
]


class Stock:
    """What an archive holds. Of one thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._kept: dict[str, Kept] = {}
        self._bytes = dict.fromkeys(_CLASSES, 0)
        # The oldest of each class on top; one that is gone or of another class by now is passed over.
        self._heaps: dict[_Class, list[Kept]] = {class_: [] for class_ in _CLASSES}

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, id_: str) -> Kept | None:
        """The image of a part."""
        return self._kept.get(id_)

    def used(self, outcome: Outcome) -> int:
        """Bytes."""
        return sum(self._bytes[class_] for class_ in _own(outcome))

    def add(self, kept: Kept) -> None:
        """Count an image in, in the place of an earlier one of its part."""
        self.remove(kept.id)
        self._kept[kept.id] = kept
        self._bytes[kept.rank, kept.outcome] += kept.bytes
        heapq.heappush(self._heaps[kept.rank, kept.outcome], kept)

    def remove(self, id_: str) -> None:
        """Count an image out, if there is one."""
        if kept := self._kept.pop(id_, None):
            self._bytes[kept.rank, kept.outcome] -= kept.bytes

    def review(self, id_: str) -> None:
        """A person has said what the image of a part shows."""
        if kept := self._kept.get(id_):
            self.add(replace(kept, reviewed=True))

    def purge(self, cutoff: str, most: int) -> list[Kept]:
        """Count out what is of an earlier day than that, or over its quota since that was lowered; so many at most.

        Where an outcome is not kept any more (a quota of 0), what is there stays until its days are over.
        """
        gone: list[Kept] = []
        for class_ in _CLASSES:
            while len(gone) < most and (oldest := self._oldest(class_)) and oldest.day < cutoff:
                self.remove(oldest.id)
                gone.append(oldest)
        for outcome, quota in self._limits.quota.items():
            if quota:
                gone += self._take(_own(outcome), self.used(outcome) - quota, most - len(gone))
        return gone

    def make_room(self, new: Kept, free: int, most: int) -> list[Kept] | None:
        """Count out what has to go for a new image, and that image in.

        Its outcome's quota takes from this outcome alone. The floor takes from all, but nothing dearer than what comes.
        Nothing goes in vain: where all that may go is not enough, all stays, and the new one is not counted in. Where
        more has to go than may at once, so many go, and the new one is not counted in either: the next finds more room.
        Over a quota that was lowered, as much goes as comes; the rest is for `purge`.

        Args:
            new: the image.
            free: bytes on the disk.
            most: so many may go.

        Returns:
            What has to go, which may be an earlier image of the same part, or None where there is no room to be made.
        """
        quota = self._limits.quota[new.outcome]
        if new.bytes > quota:
            return None
        most_used = max(quota, self.used(new.outcome))
        gone = self._take(_own(new.outcome), self.used(new.outcome) + new.bytes - most_used, most)
        lacking = self._limits.floor + new.bytes - free - sum(kept.bytes for kept in gone)
        cheaper = [class_ for class_ in _CLASSES if class_[0] <= new.rank]
        if lacking > sum(self._bytes[class_] for class_ in cheaper):
            for kept in gone:
                self.add(kept)
            return None
        further = self._take(cheaper, lacking, most - len(gone))
        lacking -= sum(kept.bytes for kept in further)
        if lacking <= 0 and self.used(new.outcome) + new.bytes <= most_used:
            self.add(new)
        return gone + further

    def _take(self, classes: Sequence[_Class], lacking: int, most: int) -> list[Kept]:
        """Count out, rank by rank and the oldest first, until so many bytes or images are there, or none is left."""
        gone: list[Kept] = []
        for rank in sorted({class_[0] for class_ in classes}):
            peers = [class_ for class_ in classes if class_[0] == rank]
            while (
                lacking > 0
                and len(gone) < most
                and (heads := [head for class_ in peers if (head := self._oldest(class_))])
            ):
                oldest = min(heads)
                heapq.heappop(self._heaps[oldest.rank, oldest.outcome])
                self.remove(oldest.id)
                gone.append(oldest)
                lacking -= oldest.bytes
        return gone

    def _oldest(self, class_: _Class) -> Kept | None:
        heap = self._heaps[class_]
        while heap and self._kept.get(heap[0].id) is not heap[0]:
            heapq.heappop(heap)
        return heap[0] if heap else None


def _own(outcome: Outcome) -> list[_Class]:
    return [class_ for class_ in _CLASSES if class_[1] is outcome]
