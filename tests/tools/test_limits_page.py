"""docs/limits.md: what `benchmarks/limits.py` measures, and the page that it writes from the results."""

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from evennorm.kernels import choose, cpu
from evennorm.tools.bench.cases import cases

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def limits() -> ModuleType:
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        import limits

        return limits


@pytest.mark.skipif(choose("torch", "float32") != "cpu", reason="the kernel is not there, or not wanted")
def test_every_stage_is_measured_with_and_without_caches_and_nothing_stays_changed(limits: ModuleType) -> None:
    threshold = cpu.HUGE
    for case in cases("4x3x2x5,4x5x3x2:first"):
        found = limits.measure(case, 0.0)
        assert set(found["repeated"]) == set(found["caches emptied"]) == set(limits.STAGES) == set(limits.ARRAYS)
        assert set(found["steps"]) == set(limits.MEMORIES)
    assert threshold == cpu.HUGE


def test_the_median_leaves_out_what_comes_between(limits: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.accumulate(itertools.cycle([0.001, 0.002]))
    monkeypatch.setattr(limits, "perf_counter", lambda: next(clock))
    found = limits.milliseconds(lambda: None, 0.0, lambda: next(clock))
    assert found.ends == [1.5, 1.0, 2.0]


def test_bandwidth_counts_what_is_read_and_written(limits: ModuleType) -> None:
    """25 MB in 1 ms: a copy moves 50 GB/s, backward, which reads x and dy twice and writes dx, 125."""
    times = dict.fromkeys(limits.STAGES, 1.0)
    row = {"case": "here", "bytes": 25_000_000, "repeated": times, "caches emptied": times}
    row["steps"] = dict.fromkeys(limits.MEMORIES, 2.5)
    row["spreads"] = {
        "caches emptied": {name: [time, time / 2, 2 * time] for name, time in times.items()},
        "steps": {name: [time, time / 2, 2 * time] for name, time in row["steps"].items()},
    }
    environment = {"device": "a processor", "versions": {"torch": "2"}}
    times = {"evennorm, Keras layer": 2.0, "Keras's layer": 5.0}
    jax = {name: {"there": times} for name in limits.FREED}
    jax["ratios"] = {name: {"there": [2.5, 2.0, 3.0]} for name in limits.FREED}
    text = limits.page({"threads": 2, "cases": [row], "jax": jax, **environment})
    assert "| here | 25 | 1 (50 GB/s) | 1 (25 GB/s) | 1 (50 GB/s) | 1 (75 GB/s) | 1 (125 GB/s) |" in text
    assert "| here | 2 | 2.5 | 2.5 | 2.5 |" in text
    assert "| there | 2 | 5 | 2.50 (2.00 to 3.00) | 2 | 5 | 2.50 (2.00 to 3.00) |" in text
    assert (
        "the forward and backward passes move 1.5 (0.38 to 6) to 2.5 (0.62 to 10) times as many bytes per second as the copy"
        in text
    )


def test_a_small_array_says_what_calls_take(limits: ModuleType) -> None:
    times = dict.fromkeys(limits.STAGES, 1.0)
    row = {"case": "here", "bytes": 1 << 20, "repeated": times, "steps": {"used": 2.5}}
    (sentence,) = limits.conclusions([row])
    assert sentence.startswith("- here: of the 2.5 ms of a repeated step, the kernels alone take 2; the other 0.5 are calls")


def test_the_page_says_what_the_result_does(limits: ModuleType) -> None:
    assert limits.PAGE.read_text() == limits.page(json.loads(limits.RESULT.read_text()))


def test_ratios_without_a_spread_are_left_out(limits: ModuleType) -> None:
    row = {"case": "here", "bytes": 25_000_000, "repeated": dict.fromkeys(limits.STAGES, 1.0)}
    row |= {"caches emptied": row["repeated"], "steps": dict.fromkeys(limits.MEMORIES, 2.5)}
    jax = {name: {"there": {"evennorm, Keras layer": 2.0, "Keras's layer": 5.0}} for name in limits.FREED}
    text = limits.page({"threads": 2, "cases": [row], "jax": jax, "device": "a processor", "versions": {"torch": "2"}})
    assert "| there | 2 | 5 | - | 2 | 5 | - |" in text
    assert "once it was measured with its spread" in text
    assert "times as" not in text.replace("four times as large as the last cache", "")
