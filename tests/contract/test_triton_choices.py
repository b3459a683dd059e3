"""How the GPU kernels cut their arrays: without a clock, and by Triton's autotuner with a clock of ours."""

from __future__ import annotations

import doctest

import pytest

from tests.contract.on_triton import DEVICE, served  # isort: skip, may skip all

import torch

from evennorm.kernels.triton import choices, launch, layout
from evennorm.torch import batch_norm, gpu_memory

__all__ = ["served"]


@pytest.mark.parametrize("module", [choices, launch])
def test_docstring_examples(module) -> None:
    failed, attempted = doctest.testmod(module)
    assert (failed, attempted > 0) == (0, True)


class Recorded:
    """A kernel that notes how it would be launched."""

    arg_names = ()

    def __init__(self, failing: int = 0):
        self.launches, self.failing = [], failing

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            if len(self.launches) < self.failing:
                self.launches.append(None)
                raise choices.OutOfResources(300_000, 232_448, "shared memory")
            self.launches.append((grid if isinstance(grid, tuple) else grid(constants), constants))

        return launch


def stream_of(view: layout.View, item: int = 2, timing: choices.Timing = "never") -> choices.Stream:
    return choices.Stream(layout.cut(view, item, 132, with_dy=False), item, 0, 132, timing)


def test_an_untimed_choice_leaves_no_multiprocessor_idle() -> None:
    """128 bytes of two-byte elements are all 64 channels: narrower lines make room for more programs."""
    for view in (layout.View(1, 1_605_632, 64, 1), layout.View(1, 401_408, 256, 1), layout.View(1, 128, 64, 12_544)):
        kernel, stream = Recorded(), stream_of(view)
        splits = stream.launch(kernel, "names", (), {})
        ((grid, constants),) = kernel.launches
        assert grid[0] * grid[1] >= 132
        assert grid[1] == splits <= stream.most_splits
        assert splits * (1 if view.inner > 1 else constants["LANES"]) <= layout.TOGETHER
        assert constants["enable_fp_fusion"] is False


def test_a_choice_for_which_the_device_has_no_room_is_passed_over() -> None:
    kernel, stream = Recorded(failing=2), stream_of(layout.View(1, 401_408, 256, 1))
    stream.launch(kernel, "names", (), {})
    assert len(kernel.launches) == 3
    with pytest.raises(choices.OutOfResources):
        stream.launch(Recorded(failing=100), "names", (), {})


def test_a_choice_is_timed_once_for_a_class_of_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner is Triton's; here its clock is ours."""
    timed, every = [], len(choices.candidates(False, 64, 4))

    def clock(call, quantiles):
        timed.append(call)
        call()
        return [float(len(timed) % every != 2), 0.0, 0.0]  # the second candidate is the fastest

    monkeypatch.setattr(choices, "_timed", clock)
    monkeypatch.setattr(choices, "WORTH_TIMING", 0)
    monkeypatch.setattr(choices, "_chosen", {})
    choices._tuner.cache_clear()
    real = gpu_memory.memory()
    monkeypatch.setattr(gpu_memory, "memory", lambda: real._replace(timing=lambda x: "now"))
    x = torch.randn(3_001, 40, device=DEVICE)
    y, _ = batch_norm(x, axis=1)
    first = len(timed)
    again, _ = batch_norm(torch.cat([x, x[:300]]), axis=1)
    assert first == 2 * every
    assert len(timed) == first
    assert len(choices._chosen) == 2
    assert {found["LANES"] for found in choices._chosen.values()} == {choices.candidates(False, 64, 4)[1].kwargs["LANES"]}
    assert abs(float(y.mean())) < 1e-6
    monkeypatch.setattr(gpu_memory, "memory", lambda: real._replace(timing=lambda x: "never"))
    untimed, _ = batch_norm(x, axis=1)
    torch.testing.assert_close(untimed, y, rtol=0, atol=1e-6)
    assert again.shape == (3_301, 40)
    choices._tuner.cache_clear()
