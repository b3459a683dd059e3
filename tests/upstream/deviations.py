"""The rows of deviations.toml and the cases of Keras's test file go in; a strict expected failure for each row comes out."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ENGINES = ("jax", "torch", "tensorflow")


@dataclass(frozen=True)
class Deviation:
    """A case of Keras's file that our layer fails on purpose."""

    test: str
    reason: str
    engines: tuple[str, ...] = ENGINES


def read(path: Path, cases: Collection[str]) -> list[Deviation]:
    """The rows of the file at `path`.

    Raises:
        pytest.UsageError: a row that names no case, gives no reason, or says something else than test, reason and engines.
    """
    rows = []
    for row in tomllib.loads(path.read_text()).get("deviation", []):
        test, engines = row.get("test"), row.get("engines", list(ENGINES))
        if set(row) - {"test", "reason", "engines"} or not row.get("reason"):
            raise pytest.UsageError(f"{path.name}: a row has test, reason and, if not for all, engines; received {row}")
        if test not in cases:
            raise pytest.UsageError(f"{path.name} lists {test!r}, which is no case of Keras's test file; remove the row")
        if not engines or set(engines) - set(ENGINES):
            raise pytest.UsageError(
                f"{path.name}: engines are some of {', '.join(ENGINES)}; received {engines} for {test!r}"
            )
        rows.append(Deviation(test, row["reason"], tuple(engines)))
    return rows


def expect_failures(items: Iterable[pytest.Item], rows: Iterable[Deviation], engine: str) -> None:
    """Marks what is listed for `engine`: such a case has to fail, and where it passes, the run fails."""
    reasons = {row.test: row.reason for row in rows if engine in row.engines}
    for item in items:
        if item.name in reasons:
            item.add_marker(pytest.mark.xfail(reason=reasons[item.name], strict=True))
