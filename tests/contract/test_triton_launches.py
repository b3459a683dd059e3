"""Test the launches of the GPU kernels on a stub of a GPU, in a process without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.contract.on_triton import on_gpu_kernels  # isort: skip, may skip all

__all__ = ["on_gpu_kernels"]


def test_launches_on_a_stub() -> None:
    pytest.importorskip("hypothesis", reason="draws the arrays")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "tests/contract/launches_on_a_stub.py"]
    run = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
