"""Test that `evennorm.torch.tune` measures a model's arrays, with a clock of ours, and leaves the model as it was."""

from __future__ import annotations

import re
import sys

import pytest

from tests.contract.on_triton import DEVICE, on_gpu_kernels  # isort: skip, may skip all

import torch
from torch import nn

from evennorm.kernels.triton import choices
from evennorm.torch import BatchNorm1d, tune
from evennorm.torch.errors import UnsupportedError

__all__ = ["on_gpu_kernels"]

module_of_tune = sys.modules["evennorm.torch.tune"]  # whose name is the function's


@pytest.fixture(autouse=True)
def _as_shipped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "WORTH_MEASURING", 0)
    times = iter(range(10_000, 0, -1))
    monkeypatch.setattr(module_of_tune, "_clock", lambda: lambda run: run() or float(next(times)))  # the last is fastest
    yield
    choices.forget()


def model_of(channel: int) -> nn.Sequential:
    return nn.Sequential(BatchNorm1d(channel, activation="relu"), nn.Dropout(0.5)).to(DEVICE)


def test_a_model_is_measured_and_left_as_it_was() -> None:
    model, x = model_of(24).eval(), torch.randn(5_001, 24, device=DEVICE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    found = tune(model, x)
    assert [row.kernel for row in found.measured] == ["moment_sums", "normalize", "gradient_sums", "input_gradient"]
    assert all(row.sizes == (1, 5_001, 24, 1) for row in found.measured)
    assert found.gained > 0
    assert re.search(r"normalize +1 x 5001 x 24 x 1 .* ms .* ms +\d+ x \d+ programs, \d+ warps", str(found))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].skipped_batches.item() == 0
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not tune(model, x).measured, "once in a process"


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of(4), torch.randn(8, 4, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(
            UnsupportedError, match=re.escape("torch.use_deterministic_algorithms(True) forbids choices by time")
        ):
            tune(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(module_of_tune.triton, "_installed", lambda: False)
    with pytest.raises(UnsupportedError, match="Triton is not installed"):
        tune(model, x)
    monkeypatch.setattr(module_of_tune.gpu, "DEVICE", "xpu")
    with pytest.raises(UnsupportedError, match=f"received a model and inputs on {DEVICE}"):
        tune(model, x)
