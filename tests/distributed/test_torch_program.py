"""The program of docs/distributed.md trains over two processes to what one process comes to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.loopback import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = "examples/distributed/on_torch.py"

OUTLIVED = "terminate called without an active exception"
"""What is said of Gloo's threads where they outlive the interpreter, which happens now and then: pytorch/pytorch#179291."""


def printed(*launcher: str) -> dict[str, np.ndarray]:
    command = [sys.executable, *launcher, PROGRAM]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
        if OUTLIVED not in run.stderr:
            break
    assert run.returncode == 0, run.stderr[-3000:]
    lines = (line.split() for line in run.stdout.splitlines())
    return {name: np.array(values, float) for name, *values in lines}


def test_two_processes_train_as_one() -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_ports(1)[0]}"]
    alone, two = printed(), printed(*torchrun)
    assert alone.keys() == two.keys() == {"loss", "weight", "running_mean", "running_var"}
    for name, value in alone.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, err_msg=name)
