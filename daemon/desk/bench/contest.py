"""Rounds, in which contenders take turns, and what they show.

Machines are noisy, and slow all who run in the same second: so ratios within a round are the
result. All contenders live at the same time, and all but the one whose turn it is sleep.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from daemon.desk.bench.rival import FallenError, Rival, Start, Turn, What

CALLS = 5
"""Calls in a turn; with a batch fewer, so that turns stay short."""
PAUSE_S = 0.3
"""Between two turns, until threads that wait by spinning have gone to sleep."""


@dataclass(frozen=True, slots=True)
class Heat:
    """What is measured in one turn."""

    what: What
    batch: int = 1

    @property
    def calls(self) -> int:
        """How often in a turn."""
        return max(1, CALLS // self.batch)


@dataclass(slots=True)
class Record:
    """What is known of one contender: how it started, or why it fell, and its turns by heat and round."""

    name: str
    start: Start | None = None
    fault: str | None = None
    turns: dict[Heat, dict[int, Turn]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figures:
    """What many turns come to. Milliseconds are of a call, `cpu_ms` and `per_second` of a frame."""

    calls: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    per_second: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median over rounds, and what a tenth of the rounds is below and above."""

    median: float
    low: float
    high: float
    rounds: int


def figures(turns: Iterable[Turn]) -> Figures:
    """Sum up the turns of one contender in one heat."""
    listed = list(turns)
    calls = [ms for turn in listed for ms in turn.ms]
    frames = sum(turn.batch * len(turn.ms) for turn in listed)
    p50, p95, p99 = map(float, np.percentile(calls, [50, 95, 99]))
    cpu_ms = 1000 * sum(turn.cpu_s for turn in listed) / frames
    return Figures(len(calls), p50, p95, p99, frames / sum(calls) * 1000, cpu_ms)


def ratio(dividends: Mapping[int, Turn], divisors: Mapping[int, Turn]) -> Ratio | None:
    """Time of a frame, the first by the second, round by round; None if they never met."""
    met = sorted(dividends.keys() & divisors.keys())
    return of_rounds([frame_ms(dividends[number]) / frame_ms(divisors[number]) for number in met])


def of_rounds(each: Sequence[float]) -> Ratio | None:
    """Sum up one ratio a round; None without any."""
    if not each:
        return None
    low, high = map(float, np.percentile(each, [10, 90]))
    return Ratio(statistics.median(each), low, high, len(each))


def frame_ms(turn: Turn) -> float:
    """What a frame took in the middle of a turn."""
    return statistics.median(turn.ms) / turn.batch


def hold(
    rivals: Sequence[Rival], records: Mapping[str, Record], heats: Mapping[str, Sequence[Heat]], rounds: int
) -> Iterator[str]:
    """Let contenders take turns, forth in one round and back in the next; yields who has had one.

    One that falls is out, and its record says why.

    Args:
        rivals: ready contenders.
        records: by contender's name; turns are put there.
        heats: what each contender takes part in, by its name.
        rounds: how many turns each has in each heat.
    """
    order = list(rivals)
    for number in range(rounds):
        for heat in dict.fromkeys(heat for some in heats.values() for heat in some):
            for rival in order:
                record = records[rival.name]
                if heat not in heats[rival.name]:
                    continue
                if record.fault is None:
                    time.sleep(PAUSE_S)
                    try:
                        turn = rival.measure(heat.what, heat.calls, heat.batch)
                        record.turns.setdefault(heat, {})[number] = turn
                    except FallenError as error:
                        record.fault = str(error)
                yield rival.name
        order.reverse()
