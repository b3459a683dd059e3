"""`make bench-door`: every part of a call is measured, and the table shows it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def door() -> ModuleType:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        import door

        return door


@pytest.mark.parametrize("shape", [(8, 16), (2, 3, 4, 4)], ids=str)
def test_all_calls_compute_the_same(door: ModuleType, shape: tuple[int, ...]) -> None:
    calls = door.calls_of(shape)
    expected = calls["nn.BatchNorm, relu_, forward"]()
    for name in ("nn.BatchNorm, relu_, no_grad", "evennorm, forward", "evennorm, no_grad"):
        torch.testing.assert_close(calls[name](), expected)
    assert not calls["evennorm, no_grad"]().requires_grad
    torch.testing.assert_close(calls["evennorm, both"](), calls["nn.BatchNorm, relu_, both"]())
    torch.testing.assert_close(calls["evennorm, eval"](), calls["nn.BatchNorm, relu_, eval"]())
    for name, call in calls.items():
        if name.startswith("the kernel"):
            assert call() is None


def test_the_table_has_a_line_for_each_call(door: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "TURN", 1e-6)
    rows = door.measure(((4, 3),), 1, 0.0)
    names = list(dict.fromkeys(row["call"] for row in rows))
    assert names == list(door.calls_of((4, 3)))
    assert all(row["us"] > 0 for row in rows)
    lines = door.table(rows).splitlines()
    assert lines[0].split() == ["us", "4x3"]
    assert [line[: -len(line.split()[-1])].strip() for line in lines[1:]] == names
