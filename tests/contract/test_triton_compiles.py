"""The GPU kernels compile for a Hopper GPU, to what they are written for: no spilling, wide loads, no contraction."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.contract.on_triton import on_gpu_kernels  # isort: skip, may skip all

__all__ = ["on_gpu_kernels"]


@pytest.fixture(scope="module")
def facts() -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.contract.compiled_for_a_gpu"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_compiles(facts: list[dict]) -> None:
    assert {found["kernel"] for found in facts} == {
        "moment_sums",
        "normalize",
        "gradient_sums",
        "input_gradient",
        "forward_on_chip",
        "backward_on_chip",
        "update_running_stats",
        "store_moments",
        "store_gradient_sums",
        "load_gradient_sums",
    }


def test_no_product_and_sum_is_contracted_by_chance(facts: list[dict]) -> None:
    """Else the sign that backward works out could differ from what forward saw."""
    for found in facts:
        assert found["contractible"] == 0, found
        if found["kernel"] in ("normalize", "forward_on_chip", "input_gradient") and not found["case"].endswith("float64"):
            assert found["fused"] > 0, found


def test_no_result_depends_on_who_comes_first(facts: list[dict]) -> None:
    """Nothing is added up by who comes first; who comes last is counted, to update the running statistics after all."""
    for found in facts:
        counts = found["kernel"] in ("normalize", "forward_on_chip")
        assert found["atomic"] == (["atom.global.gpu.acq_rel.add.u32"] if counts else []), found


def test_registers_do_not_spill(facts: list[dict]) -> None:
    """But for a few where lines are not aligned."""
    for found in facts:
        allowed = 40 if found["kernel"].endswith("on_chip") or found["case"].startswith("odd") else 0
        assert found.get("spilled", 0) <= allowed, found


def test_aligned_lines_are_loaded_16_bytes_at_a_time(facts: list[dict]) -> None:
    by_channel = ("store_moments", "store_gradient_sums", "load_gradient_sums")  # which read no lines
    for found in facts:
        if found["kernel"] in by_channel:
            continue
        if found["case"].startswith(("rows,", "rows of", "planes,")) and "loads" in found:
            assert found["wide loads"] >= 16, found  # of one array at least 8 in the loop, and 8 for its end


def test_shared_memory_fits_one_multiprocessor(facts: list[dict]) -> None:
    assert max(found["shared"] for found in facts) <= 227 << 10
