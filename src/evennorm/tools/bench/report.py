"""Summarize measured rows in ratios and plain sentences, and write the file that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import exp, fsum, log
from pathlib import Path
from typing import Any

from evennorm.errors import InputError
from evennorm.tools.atomic import write_text
from evennorm.tools.bench.cases import PASSES, Case
from evennorm.tools.bench.contestants import LIMIT
from evennorm.tools.bench.rows import ALONE, IN_TURNS, Row
from evennorm.tools.bench.settings import Settings
from evennorm.tools.spread import Median, ratio, ratio_apart, together, told

FORMAT = "evennorm bench 1"
"""Format of the JSON file."""


@dataclass(frozen=True)
class Ratio:
    """How many times as long as ours the best of a family takes in one case: above 1 we are faster.

    By rounds where its interval is known, else by the medians.
    """

    case: Case
    other: str
    """The fastest of the family."""
    ratio: float
    spread: Median | None = None
    """The ratio with its interval; None where that is not known."""

    @property
    def is_undecided(self) -> bool:
        """Whether no difference is shown."""
        return self.spread is not None and self.spread.holds_one


@dataclass(frozen=True)
class Summary:
    """Ratios of medians of one family of other layers, in one protocol, variant (dtype, activation, residual) and pass.

    `mean` is the geometric mean over the large cases (x of 1 MB or more), None without any; `small` are the others.
    """

    protocol: str
    variant: str
    passes: str
    family: str
    ours: str
    mean: float | None
    large: tuple[Ratio, ...]
    small: tuple[Ratio, ...]

    @property
    def worst(self) -> Ratio | None:
        """The large case in which we are least ahead."""
        return min(self.large, key=lambda found: found.ratio, default=None)

    @property
    def spread(self) -> Median | None:
        """`mean` with its interval."""
        return together([found.spread or Median(found.ratio, None, None) for found in self.large]) if self.large else None

    @property
    def slower(self) -> tuple[Ratio, ...]:
        """The cases of any size in which we lose."""
        return tuple(found for found in (*self.large, *self.small) if found.ratio < 1)

    def undecided(self) -> str | None:
        """Say in one sentence where no difference is shown; return None if there is no such case.

        Example:
            >>> close = Ratio(Case((8, 16)), "them", 0.98, Median(0.98, 0.9, 1.1))
            >>> summary = Summary("in turns", "", "both", "theirs", "evennorm", None, (), (close,))
            >>> summary.undecided(), summary.lost(decided=True)
            ('No difference between evennorm and theirs is shown, forward + backward: at 8x16.', None)
        """
        cases = [str(found.case) for found in (*self.large, *self.small) if found.is_undecided]
        if not cases:
            return None
        return f"No difference between {self.ours} and {self.family} is shown, {PASSES[self.passes]}: at {'; '.join(cases)}."

    def lost(self, decided: bool = False) -> str | None:
        """Say in one sentence where evennorm is slower; return None if it is not.

        With `decided`, name only cases where a difference is shown.

        Example:
            >>> tiny = Ratio(Case((8, 16)), "them", 0.8)
            >>> Summary("in turns", "", "both", "theirs", "evennorm", None, (), (tiny,)).lost()
            'evennorm is slower than theirs, forward + backward: 1.25 times as long at 8x16.'
        """
        slower = [found for found in self.slower if not (decided and found.is_undecided)]
        if not slower:
            return None
        where = "; ".join(f"{_longer(found)} times as long at {found.case}" for found in slower)
        return f"{self.ours} is slower than {self.family}, {PASSES[self.passes]}: {where}."


def _ratio(row: Row, other: Row) -> Median:
    """Compute the ratio by rounds where both took turns in one pass, else by the intervals of both medians."""
    in_turns = row.protocol == IN_TURNS and row.passes == other.passes and len(row.milliseconds) == len(other.milliseconds)
    return (ratio if in_turns else ratio_apart)(row.milliseconds, other.milliseconds)


@dataclass(frozen=True)
class Benchmark:
    """What was measured, where, and what it shows."""

    settings: Settings
    environment: Mapping[str, Any]
    kernels: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def protocols(self) -> list[str]:
        return [protocol for protocol in (IN_TURNS, ALONE) if any(row.protocol == protocol for row in self.rows)]

    def measured(self, protocol: str, case: Case, passes: str) -> list[Row]:
        """Return the rows of one case that have samples."""
        return [
            row for row in self.rows if (row.protocol, row.case, row.passes) == (protocol, case, passes) and row.milliseconds
        ]

    def limit(self, protocol: str, case: Case) -> Row | None:
        """Return the fastest copy, in whichever pass it was timed."""
        copies = [row for passes in PASSES for row in self.measured(protocol, case, passes) if row.family == LIMIT]
        return min(copies, key=lambda row: row.median, default=None)

    def ratio(self, row: Row) -> float | None:
        """Return the ratio of another layer's median to ours that it is compared with; None for ours and the limit."""
        by_name = {other.contestant: other for other in self.measured(row.protocol, row.case, row.passes)}
        ours = by_name.get(row.ours or "")
        return row.median / ours.median if ours and row.milliseconds else None

    def spread(self, row: Row) -> Median | None:
        """Return the same ratio with its interval; the limit has none."""
        by_name = {other.contestant: other for other in self.measured(row.protocol, row.case, row.passes)}
        ours = by_name.get(row.ours or "")
        return _ratio(row, ours) if ours and row.milliseconds else None

    def beside_limit(self, row: Row) -> Median | None:
        """Return how many times as long as the fastest copy a row takes; None without a copy, and for that copy itself."""
        limit = self.limit(row.protocol, row.case)
        return None if limit is None or limit is row or not row.milliseconds else _ratio(row, limit)

    def summaries(self) -> list[Summary]:
        """Summarize protocol by protocol, variant by variant and pass by pass, families in the order they were measured
        in."""
        families = dict.fromkeys((row.family, row.ours) for row in self.rows if row.ours is not None)
        variants = dict.fromkeys(case.variant for case in self.settings.cases)
        found = []
        for protocol, variant, passes, (family, ours) in product(self.protocols, variants, self.settings.passes, families):
            cases = [case for case in self.settings.cases if case.variant == variant]
            ratios = [best for case in cases if (best := self._best(protocol, passes, family, case))]
            if ratios:
                large = tuple(each for each in ratios if each.case.large)
                small = tuple(each for each in ratios if not each.case.large)
                mean = geometric_mean([each.ratio for each in large]) if large else None
                found.append(Summary(protocol, variant, passes, family, str(ours), mean, large, small))
        return found

    def _best(self, protocol: str, passes: str, family: str, case: Case) -> Ratio | None:
        others = [row for row in self.measured(protocol, case, passes) if row.family == family and row.ours is not None]
        if not others:
            return None
        best = min(others, key=lambda row: row.median)
        found = self.ratio(best)
        spread = self.spread(best)
        value = spread.value if spread is not None and spread.is_known else found
        return None if value is None else Ratio(case, best.contestant, value, spread)

    def as_dict(self) -> dict[str, Any]:
        """Return the benchmark as JSON data."""
        return {
            "format": FORMAT,
            "settings": self.settings.as_dict(),
            "environment": dict(self.environment),
            "kernels": dict(self.kernels),
            "summaries": [
                {
                    "protocol": summary.protocol,
                    "variant": summary.variant,
                    "passes": summary.passes,
                    "family": summary.family,
                    "ours": summary.ours,
                    "geometric mean": None if summary.mean is None else round(summary.mean, 3),
                    "ratios": {str(r.case): round(r.ratio, 3) for r in (*summary.large, *summary.small)},
                }
                for summary in self.summaries()
            ],
            "rows": [row.as_dict() for row in self.rows],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Benchmark:
        """Make a benchmark from what `as_dict` gave, perhaps read from JSON; summaries are computed from the rows.

        Raises:
            InputError: it is something else.
        """
        if values.get("format") != FORMAT:
            raise InputError(f"a file of evennorm bench has the format {FORMAT!r}; received {values.get('format')!r}")
        return cls(
            Settings.from_dict(values["settings"]),
            values["environment"],
            values["kernels"],
            tuple(Row.from_dict(row) for row in values["rows"]),
        )

    def to_json(self) -> str:
        """Return the text of a file that `read` reads; each row is on one line."""
        values = self.as_dict()
        rows = ",\n".join(f"  {json.dumps(row)}" for row in values.pop("rows"))
        head = json.dumps(values, indent=1)
        return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the benchmark to a JSON file.

        Raises:
            InputError: the file cannot be written.
        """
        write_text(path, self.to_json())


def read(path: str | os.PathLike[str]) -> Benchmark:
    """Read the benchmark that `Benchmark.write` wrote.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return Benchmark.from_dict(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no result of evennorm bench: {error}") from error


def _longer(found: Ratio) -> str:
    """Return how many times as long as the other ours takes."""
    known = found.spread is not None and found.spread.is_known
    return told(1 / found.ratio, found.spread.inverse) if known and found.spread else f"{1 / found.ratio:.2f}"


def geometric_mean(values: list[float]) -> float:
    """
    Example:
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    return exp(fsum(map(log, values)) / len(values))
