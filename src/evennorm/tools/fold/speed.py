"""Measure two models on a batch, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from evennorm.tools.fold.difference import Run
from evennorm.tools.spread import FEWEST, Median, ratio

WARM_UP = 2
"""Rounds that do not count, in which programs are compiled."""
TURN = 5e-4
"""The least seconds of a turn, so that clocks and caches do not decide."""
PATIENCE = 30.0
"""Seconds after which no more rounds begin, even if there are too few for a spread."""


@dataclass(frozen=True)
class Speed:
    """Medians with their 95 % intervals, in milliseconds."""

    before: Median
    after: Median
    ratio: Median
    """How many times as fast, as the median over the rounds."""
    rounds: int
    samples: int

    @classmethod
    def of(cls, times: Sequence[tuple[float, float]], samples: int) -> Speed:
        """Compute the record from the seconds of both models in each round."""
        before, after = ([1000 * each for each in column] for column in zip(*times, strict=True))
        return cls(Median.of(before), Median.of(after), ratio(before, after), len(times), samples)

    @property
    def factor(self) -> float | None:
        """How many times as fast; None where no difference is shown, since the intervals overlap."""
        low, high = self.ratio.low, self.ratio.high
        if low is None or high is None or low <= 1 <= high or self.before.overlaps(self.after):
            return None
        return self.ratio.value

    def as_dict(self) -> dict[str, Any]:
        """Return the record for programs; an interval is null where there were too few rounds."""

        def interval(found: Median) -> list[float] | None:
            return None if found.low is None or found.high is None else [found.low, found.high]

        return {
            "before": self.before.value,
            "before_interval": interval(self.before),
            "after": self.after.value,
            "after_interval": interval(self.after),
            "factor": self.factor,
            "factor_interval": None if self.factor is None else interval(self.ratio),
            "rounds": self.rounds,
            "samples": self.samples,
        }

    def text(self) -> str:
        """Return the record for people.

        Example:
            >>> print(Speed.of([(0.002, 0.001)] * 6, 5).text())
            2.00 times as fast (2.00 to 2.00): 2 ms (2 to 2) before, 1 ms (1 to 1) after, medians and 95 % intervals of 6 ...
            >>> print(Speed.of([(0.002, 0.001)], 5).text())
            the speed is not known: 1 round of 2 ms before and 1 ms after, and 6 are needed to tell how far they vary
        """
        if not self.ratio.is_known:
            return (
                f"the speed is not known: {self.rounds} round{'s' * (self.rounds != 1)} of {self.before.value:.3g} ms "
                f"before and {self.after.value:.3g} ms after, and {FEWEST} are needed to tell how far they vary"
            )
        how = (
            f"{self.before.text(unit=' ms')} before, {self.after.text(unit=' ms')} after, medians and 95 % intervals of "
            f"{self.rounds} rounds in turns, {self.samples} samples"
        )
        if self.factor is None:
            return f"no difference in speed is shown: {how}"
        if self.factor > 1:
            return f"{self.factor:.2f} times as fast ({self.ratio.low:.2f} to {self.ratio.high:.2f}): {how}"
        assert self.ratio.low is not None
        assert self.ratio.high is not None
        return f"slower, {1 / self.factor:.2f} times as long ({1 / self.ratio.high:.2f} to {1 / self.ratio.low:.2f}): {how}"


def speed(
    before: Run,
    after: Run,
    batch: Sequence[np.ndarray],
    seconds: float = 2.0,
    most: int = 51,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Measure both models in turns, so that a busy machine slows both; each round begins with the other one.

    At least as many rounds as a spread needs, if they take less than half a minute.
    """

    def timed(run: Run, times: int) -> float:
        start = clock()
        for _ in range(times):
            run(batch)
        return (clock() - start) / times

    begin = clock()
    last = min(min(timed(before, 1), timed(after, 1)) for _ in range(WARM_UP))
    repeats = ceil(TURN / last) if 0 < last < TURN else 1
    times: list[tuple[float, float]] = []
    measured = clock()
    while len(times) < most:
        spent = clock() - (begin if len(times) < FEWEST else measured)
        if times and spent > (PATIENCE if len(times) < FEWEST else seconds):
            break
        order = (before, after) if len(times) % 2 == 0 else (after, before)
        taken = {run: timed(run, repeats) for run in order}
        times.append((taken[before], taken[after]))
    return Speed.of(times, len(batch[0]))
