"""A process that is killed in the middle of a step costs the steps since the last checkpoint, and no bit of the result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.loopback import free_ports

PROGRAM = Path(__file__).with_name("elastic.py")


def trained(folder: Path, fault: str) -> tuple[dict[str, torch.Tensor], int]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=3", "--max-restarts=1"]
    command += [f"--rdzv-endpoint=127.0.0.1:{free_ports(1)[0]}", "--rdzv-backend=c10d", "--monitor-interval=0.2"]
    # The store that torch shares between attempts holds the addresses of processes that are gone.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = subprocess.run([*command, PROGRAM, folder, fault], capture_output=True, text=True, timeout=180, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "end.pt"), int((folder / "restarts").read_text())


@pytest.fixture(scope="module")
def without_a_fault(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    state, restarts = trained(tmp_path_factory.mktemp("elastic") / "none", "none")
    assert restarts == 0
    return state


@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_a_restart_reaches_the_same_bits(tmp_path: Path, without_a_fault: dict[str, torch.Tensor], fault: str) -> None:
    state, restarts = trained(tmp_path / fault, fault)
    assert restarts == 1
    assert state.keys() == without_a_fault.keys()
    for name, value in without_a_fault.items():
        assert torch.equal(state[name], value), name
