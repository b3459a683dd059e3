"""Summarize the times of one contestant in one case: median, quartiles and interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from evennorm.tools.bench.cases import Case

IN_TURNS, ALONE = "in turns", "alone"
"""Protocols: all contestants in one process, one after the other in each round; or each in a process of its own."""


@dataclass(frozen=True)
class Row:
    """One contestant in one case and pass.

    `milliseconds` has one sample per round; empty where the contestant could not take the case, which `reason` tells.
    `saved_bytes` are kept between the passes; None where the engine does not let one look.
    """

    protocol: str
    case: Case
    passes: str
    contestant: str
    family: str
    ours: str | None
    milliseconds: tuple[float, ...] = ()
    saved_bytes: int | None = None
    reason: str | None = None

    @property
    def median(self) -> float:
        return median(self.milliseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.milliseconds)

    @property
    def bandwidth(self) -> float:
        """Bytes that have to be moved, per time: GB/s."""
        return self.case.necessary_bytes(self.passes) / self.median / 1e6

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        if self.milliseconds:
            low, high = self.quartiles
            found["median"], found["quartiles"] = round(self.median, 5), [round(low, 5), round(high, 5)]
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Make a row from what `as_dict` gave, perhaps read from JSON; median and quartiles are computed from the
        samples."""
        known = {name: values[name] for name in cls.__dataclass_fields__}
        case = Case(**{**known["case"], "shape": tuple(known["case"]["shape"])})
        return cls(**{**known, "case": case, "milliseconds": tuple(known["milliseconds"])})


def quartiles(samples: tuple[float, ...]) -> tuple[float, float]:
    """Return the two numbers between which the middle half of the samples lies.

    Example:
        >>> quartiles((1.0, 2.0, 3.0, 4.0, 9.0)), quartiles((1.0,))
        ((2.0, 4.0), (1.0, 1.0))
    """
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return low, high
