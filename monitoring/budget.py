"""The false-alarm budget as people state it, in samples or as a time, and as the bets keep it, in samples.

Bets see no clock: what is proven is that on average at least A samples are tested before a false alarm. A time becomes such an A
only with a bound on how many samples are tested in it. With versions v that have the shares s_v of the budget, sum s_v R_v less
sum s_v n_v is a supermartingale over the n_v samples of each, so at the first alarm E[sum s_v n_v] >= A. Where no version tests
more than `rate` samples a second, sum s_v n_v <= rate t, as the shares sum to 1 at most: on average at least A / rate seconds.
Which samples are left out depends on when they come, not on what they are, so those that are left are drawn as before.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

DAY = 86_400.0
UNITS = {"hour": DAY / 24, "day": DAY, "week": 7 * DAY, "month": 30 * DAY, "year": 365 * DAY}
"""Seconds. The first letter stands for the unit, too, but for that of month, which might as well be a minute's."""
RATE = 1000.0
"""Samples a second that a time is counted at, if nobody says another rate: a month is then 2.592e9 samples."""
CREDIT = 10.0
"""Seconds' worth of samples that may be tested at once. A time is kept but for these: E[time] >= A / rate - CREDIT after an alarm."""
MOST = 1e100  # samples: far above what anybody waits for, far below where evidence is capped

_TIME = re.compile(r"([0-9]*\.?[0-9]+)?\s*(hour|day|week|month|year)s?|([0-9]*\.?[0-9]+)\s*([hdwy])")
_EXPECTED = "a number of samples, such as 2.6e9, or a time, such as month, week, 30d, 12h or '2 years'"


@dataclass(frozen=True)
class Budget:
    """At least `samples` to a false alarm, on average. rate: samples a second of each version that are tested at most, None: all.

    Raises ValueError where samples are no finite number above 1, or the rate is not positive and finite.
    """

    samples: float
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate <= MOST:
            raise ValueError(f"test_rate is {self.rate}; it must be a positive number of samples a second")
        if not 1 < self.samples <= MOST:
            raise ValueError(f"arl is {self.samples} samples; it must be more than 1 and at most 1e100 (2.6e9: one a month at 1,000 samples/s)")

    @property
    def seconds(self) -> float | None:
        """The least mean time to a false alarm, whatever the traffic; None where it depends on the traffic."""
        return None if self.rate is None else self.samples / self.rate

    @classmethod
    def stated(cls, arl: float | str, rate: float | None = None) -> Budget:
        """`arl` in samples, or as a time at `rate` samples a second, RATE where none is said.

        Raises ValueError for what is neither, and where the budget would be none.
        """
        try:
            samples = float(arl)
        except ValueError:
            found = _TIME.fullmatch(str(arl).strip().lower())
            if found is None:
                raise ValueError(f"arl is {arl!r}; expected {_EXPECTED}") from None
            rate = RATE if rate is None else rate
            unit = found[2] or next(name for name in UNITS if name[0] == found[4])
            samples = float(found[1] or found[3] or 1) * UNITS[unit] * rate
        return cls(samples, rate)


@dataclass
class Allowance:
    """Of the samples that come, those that may be tested: at most `rate` a second, CREDIT's worth at once, none on credit."""

    credit: float = 0.0
    at: float = math.inf

    def take(self, count: int, rate: float | None, at: float) -> int:
        """How many of `count` samples that come at `at` (Unix seconds, which may be set back) may be tested; None: all."""
        if rate is None:
            return count
        self.credit = min(CREDIT * rate, self.credit + rate * max(0.0, at - self.at))
        taken = min(count, int(self.credit))
        self.credit, self.at = self.credit - taken, at
        return taken
