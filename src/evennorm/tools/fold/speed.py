"""Two models and a batch go in; how long each takes comes out, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from evennorm.tools.fold.difference import Run


@dataclass(frozen=True)
class Speed:
    """Medians, in milliseconds."""

    before: float
    after: float
    rounds: int
    samples: int

    @property
    def factor(self) -> float:
        """How many times as fast."""
        return self.before / self.after


def speed(before: Run, after: Run, batch: Sequence[np.ndarray], seconds: float = 2.0, most: int = 50) -> Speed:
    """In turns, so that a busy machine is slow for both; each turn begins with the other one. Both have run before."""
    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin + sum(times[-1]) < seconds and len(times) < most):
        order = (before, after) if len(times) % 2 == 0 else (after, before)
        taken = {}
        for run in order:
            start = time.perf_counter()
            run(batch)
            taken[run] = time.perf_counter() - start
        times.append((taken[before], taken[after]))
    return Speed(
        1000 * median(old for old, _ in times),
        1000 * median(new for _, new in times),
        len(times),
        len(batch[0]),
    )
