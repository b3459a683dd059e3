"""Marks the cases that deviations.toml lists as ones that have to fail."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

DEVIATIONS = Path(__file__).with_name("deviations.toml")


def apply_deviations(items: list[pytest.Item], deviations: list[dict], engine: str) -> None:
    """Gives each item that a row names a strict expected failure; a row that names none is an error."""
    names = {item.name for item in items}
    for row in deviations:
        if row["test"] not in names:
            raise pytest.UsageError(
                f"{DEVIATIONS.name} lists {row['test']!r}, which is no case of Keras's test file; remove the row"
            )
        for item in items:
            if item.name == row["test"] and engine in row.get("engines", [engine]):
                item.add_marker(pytest.mark.xfail(reason=row["reason"], strict=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = [item for item in items if item.nodeid.startswith("tests/upstream/test_keras_layer.py")]
    if cases:
        rows = tomllib.loads(DEVIATIONS.read_text()).get("deviation", [])
        apply_deviations(cases, rows, os.environ.get("KERAS_BACKEND", "jax"))
