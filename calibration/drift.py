"""Is the stream still like the good parts of the calibration? One number a part: a score, or a brightness.

Each value becomes a p-value, the share of the values before it that are at least as high, so that a drift upwards
makes it small. The values before it are the calibration's and those that came since. That matters: against the
calibration alone p-values are biased by whatever these few good parts happened to be, for ever in one direction, and
a cumulative sum of that alarms surely in the end. Ranked among all that came before, with ties broken at random,
p-values of exchangeable values are independent and uniform, exactly, for any distribution and any number of good
parts (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005).

The price is that what lasts becomes usual, the sooner the fewer values came before. So nothing is learnt while the
CUSUM alarms, and after 10,000 values learnt everything starts afresh from the calibration. An alarm that ends may
mean that the drift has; or that it was small and has become usual. Keep a record of it.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from scipy.special import bdtr

EPOCH = 10_000
"""Values learnt until everything starts afresh. The false alarms below are for so many."""

BULK_WINDOW = 500
BULK_FALSE_ALARM = 1e-4
"""At most, of each window of values that did not drift; 0.2 % of an epoch's 20 windows."""

CUSUM_SLACK = 0.5
CUSUM_LIMIT = 12.7
CUSUM_RUN_LENGTH = 1_000_000
"""Mean number of values without drift until a false alarm of either side: about 1 % of epochs have one.

Siegmund, Sequential Analysis (1985): (exp(2kb) - 2kb - 1) / 2k² for one side, k the slack and b the limit + 1.166.
"""

MARTINGALE_FALSE_ALARM = 1e-3
"""At most, of an epoch without drift: Ville's inequality."""

FALSE_ALARM = EPOCH / BULK_WINDOW * BULK_FALSE_ALARM + EPOCH / CUSUM_RUN_LENGTH + MARTINGALE_FALSE_ALARM
"""Of an epoch without drift, by any of the three tests: 1.3 %."""

_BULK_LEAST = next(k for k in range(BULK_WINDOW) if bdtr(k, BULK_WINDOW, 0.5) >= BULK_FALSE_ALARM / 2)
_WEALTH_LIMIT = -math.log(MARTINGALE_FALSE_ALARM)
_JUMP = 0.01
_HEADROOM = 1.25
_HALF = 0.5
_TINY = 2.0**-53

Status = Literal["ok", "alarm"]
Direction = Literal["up", "down", ""]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a watch says now.

    `parts` were watched so far. `bulk_share` is the share of p-values above 1/2 in the last full window, NaN before the
    first. `cusum_up` and `cusum_down` are in standard deviations. `log_martingale` is the natural logarithm of what
    a gambler against "no drift" owns, who began with 1. `direction` is the alarm's when it was raised, or empty.
    """

    parts: int
    bulk: Status
    cusum: Status
    martingale: Status
    bulk_share: float
    cusum_up: float
    cusum_down: float
    log_martingale: float
    direction: Direction

    @property
    def alarm(self) -> bool:
        """Whether any of the tests alarms."""
        return "alarm" in {self.bulk, self.cusum, self.martingale}


class Ranks:
    """Values in order, and the randomised p-value of a further one. Called from one thread."""

    def __init__(self, values: Iterable[float], seed: int) -> None:
        self._values = sorted(values)
        self._rng = np.random.default_rng(seed)

    def p_value(self, value: float) -> float:
        """Return the share of values at least as high, itself among them, above 0 and below 1; draws once."""
        above = len(self._values) - bisect_right(self._values, value)
        ties = len(self._values) - bisect_left(self._values, value) - above
        share = (above + self._rng.random() * (ties + 1)) / (len(self._values) + 1)
        return min(max(share, _TINY), 1 - _TINY)

    def learn(self, value: float) -> None:
        """Put the value among the others."""
        insort(self._values, value)


class Watch:
    """Three tests of one number a part. Called from one thread.

    - Bulk: how many of 500 p-values exceed one half. Blind to the few highest values, so bad parts hardly move it.
    - CUSUM, both sides, of the p-values as normal deviates: the quickest to see a jump of a standard deviation.
    - Martingale: the Simple Jumper of Vovk, Petej, Nouretdinov, Ahlberg, Carlsson and Gammerman, "Retrain or not
      retrain" (2021), which finds small drifts that last. It loses 0.4 % a value while there is none, so one that
      began with everything would be broke when the drift comes; this one is given 1/10,000 with each value learnt.

    None of them looks for values that spread more to both sides alike.

    `FALSE_ALARM` and the constants it is made of say how often they are wrong. After an alarm no more than "seldom" is
    promised, for what was learnt until it stays. A bulk alarm ends with the next window that is well, the others
    when the sum, or the logarithm of the wealth, has come down to half its limit: after some 20 and some 1,000 values.

    Raises:
        ValueError: There is no reference value, or one is not finite.
    """

    def __init__(self, reference: Iterable[float], seed: int) -> None:
        self._reference = tuple(float(value) for value in reference)
        if not self._reference or not all(map(math.isfinite, self._reference)):
            raise ValueError("a watch needs at least one reference value, all finite: calibrate again")
        self._seeds = np.random.default_rng(seed)
        self._parts = 0
        self._start()

    def update(self, value: float) -> None:
        """Watch one more part. A value that is not finite tells nothing and is passed over."""
        if not math.isfinite(value):
            return
        if self._learnt == EPOCH:
            self._start()
        self._parts += 1
        p = self._ranks.p_value(value)
        self._count(p)
        self._sum(-NormalDist().inv_cdf(p))
        if not self._cusum:
            self._ranks.learn(value)
            self._learnt += 1
        self._bet(p)
        self._point()

    @property
    def reading(self) -> Reading:
        """What the tests say after the last part."""
        bulk, cusum, martingale = map(_status, (self._bulk, self._cusum, self._martingale))
        sums = (self._bulk_share, self._up, self._down, self._log_wealth())
        return Reading(self._parts, bulk, cusum, martingale, *sums, self._direction)

    def _start(self) -> None:
        self._ranks = Ranks(self._reference, int(self._seeds.integers(2**63)))
        self._learnt = self._counted = self._low = 0
        self._bulk_share = math.nan
        self._up = self._down = 0.0
        self._stakes = (0.0, 0.0, 0.0)
        self._bulk = self._cusum = self._martingale = False
        self._direction: Direction = ""

    def _count(self, p: float) -> None:
        self._counted += 1
        self._low += p > _HALF
        if self._counted == BULK_WINDOW:
            self._bulk = not _BULK_LEAST <= self._low <= BULK_WINDOW - _BULK_LEAST
            self._bulk_share = self._low / BULK_WINDOW
            self._counted = self._low = 0

    def _sum(self, deviate: float) -> None:
        ceiling = _HEADROOM * CUSUM_LIMIT
        self._up = min(max(self._up + deviate - CUSUM_SLACK, 0.0), ceiling)
        self._down = min(max(self._down - deviate - CUSUM_SLACK, 0.0), ceiling)
        self._cusum = _stands(max(self._up, self._down), CUSUM_LIMIT, was=self._cusum)

    def _bet(self, p: float) -> None:
        """Spread a little of each stake over all three, then pay them: on a drift down, on none, and up."""
        shared = _JUMP * sum(self._stakes) / 3 + (0 if self._cusum else 1 / (3 * EPOCH))
        down, none, up = ((1 - _JUMP) * stake + shared for stake in self._stakes)
        down, up = down * (1 + (p - _HALF)), up * (1 - (p - _HALF))
        scale = min(1.0, math.exp(_HEADROOM * _WEALTH_LIMIT) / (down + none + up))
        self._stakes = (down * scale, none * scale, up * scale)
        self._martingale = _stands(self._log_wealth(), _WEALTH_LIMIT, was=self._martingale)

    def _log_wealth(self) -> float:
        return math.log(sum(self._stakes) + 1 - self._learnt / EPOCH)

    def _point(self) -> None:
        """Keep the direction in which the alarm was raised: on the way back the later tests point the other way."""
        if self._cusum:
            self._direction = "up" if self._up > self._down else "down"
        elif not (self._bulk or self._martingale):
            self._direction = ""
        elif not self._direction:
            higher = self._stakes[2] > self._stakes[0] if self._martingale else self._bulk_share < _HALF
            self._direction = "up" if higher else "down"


def _stands(level: float, limit: float, *, was: bool) -> bool:
    """Raise an alarm at the limit, and let it stand until half of that."""
    return level > limit / 2 if was else level >= limit


def _status(raised: bool) -> Status:  # noqa: FBT001 -- the one thing it translates
    return "alarm" if raised else "ok"
