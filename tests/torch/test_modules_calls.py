"""How a module's call reaches the kernel: by few functions, one native call for each pass, and plans that are made once."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from evennorm.kernels import cpu
from evennorm.torch import BatchNorm1d, BatchNorm2d, arguments
from evennorm.torch import native as extension
from evennorm.torch.kernels import cpu_kernel

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without the compiled kernels")


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """For each native call, the functions of this package that led to it, the first one called last."""
    calls: list[list[str]] = []
    monkeypatch.setattr(extension, "AVAILABLE", False)
    arguments.cached_call_of.cache_clear()  # and the plans that calls hold

    def watched(function: Any) -> Any:
        def call(*given: Any) -> Any:
            frames = [frame for frame in inspect.stack()[1:] if "/evennorm/" in frame.filename]
            calls.append([frame.function for frame in frames])
            return function(*given)

        return call

    monkeypatch.setattr(type(cpu_kernel), "_native", lambda self, function: watched(function))
    yield calls
    arguments.cached_call_of.cache_clear()


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"momentum": None}, {"affine": False}], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_each_pass_is_one_native_call(native, options, residual) -> None:
    module = BatchNorm2d(3, **options)
    x, dy = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(2, 3, 5, 7)
    y = module(x, residual=torch.randn(2, 3, 5, 7) if residual else None)
    assert len(native) == 1, "normalization, activation, running statistics and counters"
    torch.autograd.grad(y, x, dy)
    assert len(native) == 2
    assert int(module.num_batches_tracked) == 1


def test_the_way_to_the_kernel_is_short(native) -> None:
    module = BatchNorm1d(16, activation="relu")
    x = torch.randn(8, 16, requires_grad=True)
    y = module(x)
    torch.autograd.grad(y, x, torch.randn(8, 16))
    forward, backward = native
    # Of the kernel, of autograd, of the choice of a kernel and its call, of the module.
    assert forward == ["forward", "forward", "_train", "train", "forward"]
    assert backward == ["backward", "gradients", "backward"]


@pytest.mark.skipif(not extension.AVAILABLE, reason="built without the extension for this torch")
@pytest.mark.parametrize("residual", [False, True])
def test_with_the_extension_python_runs_in_the_module_alone(residual) -> None:
    module = BatchNorm2d(3, activation="relu")
    x, dy = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(2, 3, 5, 7)

    def step() -> None:
        torch.autograd.grad(module(x, residual=x if residual else None), x, dy)

    step()  # which makes the plans
    entered: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and "/evennorm/" in frame.f_code.co_filename:
            entered.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    assert entered == ["_BatchNorm.forward", "repeated"]  # which asks whether the batch was counted before


def test_plans_are_made_once(native, monkeypatch: pytest.MonkeyPatch) -> None:
    module = BatchNorm2d(3)
    made: list[str] = []
    for name in ("_forward_plan", "_backward_plan"):
        plan = getattr(type(cpu_kernel), name)

        def counted(self: Any, *given: Any, name: str = name, plan: Any = plan) -> Any:
            made.append(name)
            return plan(self, *given)

        monkeypatch.setattr(type(cpu_kernel), name, counted)
    for _ in range(3):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, 5, 7).contiguous(memory_format=memory).requires_grad_()
            module(x).sum().backward()
    assert sorted(made) == ["_backward_plan"] * 2 + ["_forward_plan"] * 2
