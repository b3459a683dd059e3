"""Assertions of helpers say what they compared."""

import pytest

pytest.register_assert_rewrite("tests.migration.building")
