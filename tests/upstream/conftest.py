"""Marks the cases that deviations.toml lists as ones that have to fail."""

from __future__ import annotations

import os
import unittest
from pathlib import Path

import pytest

from tests.upstream.deviations import expect_failures, read

HERE = Path(__file__).parent

# Of pytest and Keras's file alone: it says the same on every backend.
collect_ignore = [] if os.environ["KERAS_BACKEND"] == "jax" else ["test_harness.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = [item for item in items if item.path == HERE / "test_keras_layer.py"]
    if cases:
        # From the class, not from the items: a run of a single case must not take the rows of the others for stale.
        names = unittest.defaultTestLoader.getTestCaseNames(cases[0].cls)
        expect_failures(cases, read(HERE / "deviations.toml", names), os.environ["KERAS_BACKEND"])
