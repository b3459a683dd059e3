"""Choose from a grid of parameters the rows that `make test` runs; `make test-all` runs the others too.

The others carry the mark `exhaustive`, which pyproject.toml leaves out where `-m` does not ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

EXHAUSTIVE = pytest.mark.exhaustive


def pairwise(**values: Sequence[Any]) -> tuple[tuple[str, ...], list[Any]]:
    """Arguments for parametrize: the rows of a grid; a few have every pair of values, the others are exhaustive."""
    rows = list(product(*(range(len(some)) for some in values.values())))
    kept = _cover(rows)
    named = [[some[i] for some, i in zip(values.values(), row, strict=True)] for row in rows]
    return tuple(values), [_parameter(given, run=row in kept) for given, row in zip(named, rows, strict=True)]


def mostly(chosen: Callable[..., bool], names: str, rows: Iterable[Sequence[Any]]) -> tuple[str, list[Any]]:
    """Arguments for parametrize: the rows of which `chosen(*row)` is true, and the others as exhaustive."""
    return names, [_parameter(row, run=chosen(*row)) for row in rows]


def _parameter(row: Sequence[Any], run: bool) -> Any:
    return pytest.param(*row, id="-".join(map(_name, row)), marks=() if run else EXHAUSTIVE)


def _name(value: Any) -> str:
    return str(getattr(value, "__name__", value))


def _cover(rows: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Rows, greedily chosen, that have every pair of values that any row has."""
    pairs = {row: {*combinations(enumerate(row), 2)} for row in rows}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(rows, key=lambda row: len(pairs[row] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen
