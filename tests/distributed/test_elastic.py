"""A process that is killed in the middle of a step costs the steps since the last checkpoint, and no bit of the result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("elastic.py")
FAULTS = ["forward", "backward"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, torch.Tensor], int]]:
    """The end and the number of restarts of a training without a fault, and of one with each."""
    folder = tmp_path_factory.mktemp("elastic")
    run = subprocess.run([sys.executable, PROGRAM, folder, "none", *FAULTS], capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr[-3000:]
    ends = {fault: folder / fault for fault in ("none", *FAULTS)}
    return {fault: (torch.load(end / "end.pt"), int((end / "restarts").read_text())) for fault, end in ends.items()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_restart_reaches_the_same_bits(trained: dict[str, tuple[dict[str, torch.Tensor], int]], fault: str) -> None:
    without_a_fault, none = trained["none"]
    state, restarts = trained[fault]
    assert (none, restarts) == (0, 1)
    assert state.keys() == without_a_fault.keys()
    for name, value in without_a_fault.items():
        assert torch.equal(state[name], value), name
