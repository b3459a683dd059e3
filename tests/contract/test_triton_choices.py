"""Test how the GPU kernels go through their arrays: as shipped, and as measured with a clock of ours."""

from __future__ import annotations

import doctest

import pytest

from tests.contract.on_triton import DEVICE, on_gpu_kernels  # isort: skip, may skip all

import torch

from evennorm.kernels.triton import choices, launch, scalars, tiling
from evennorm.torch import batch_norm

__all__ = ["on_gpu_kernels"]


@pytest.fixture(autouse=True)
def _as_shipped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choices, "WORTH_MEASURING", 0)
    yield
    choices.forget()


@pytest.mark.parametrize("module", [choices, scalars, tiling])
def test_docstring_examples(module) -> None:
    failed, attempted = doctest.testmod(module)
    assert (failed, attempted > 0) == (0, True)


VIEWS = [
    *(
        tiling.View(1, 128 * side * side, channel, 1)
        for side, channel in ((112, 64), (56, 256), (28, 128), (14, 1024), (7, 512))
    ),
    *(tiling.View(1, 128, channel, side * side) for side, channel in ((112, 64), (56, 256), (28, 128))),
    tiling.View(3, 70_000, 5, 1),
    tiling.View(1, 2, 1, 1_000_000),
]


@pytest.mark.parametrize("item", [2, 4, 8])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_shipped_choice_leaves_no_multiprocessor_idle(view: tiling.View, item: int) -> None:
    for arrays in (1, 2, 3):
        cut = tiling.tiling_of(view, item, 132, with_dy=arrays > 1)
        if cut.slots:
            continue
        best = choices.options(cut, item, 132, arrays)[0]
        lanes, slots = best.constants["LANES"], max(1, best.constants["SPAN"] // best.constants["LANES"])
        blocks, splits = best.grid
        steps = -(-cut.lines // (tiling.DEPTH * slots))
        assert blocks == cut.blocks(lanes) * view.groups
        assert 1 <= splits <= steps
        assert cut.planes or splits * lanes <= tiling.TOGETHER
        staged = (best.constants["STAGES"] - 1) * arrays * best.constants["SPAN"] * item * tiling.DEPTH
        assert staged * best.programs <= choices.SHARED
        if view.elements * item >= 16 << 20 and blocks < 132:
            assert blocks * splits >= 0.9 * 132


class Recorded:
    """A kernel that notes how it would be launched, on a device that has no room for the first options."""

    def __init__(self, failing: int = 0):
        self.arg_names = ["x", "y", "LANES", "SPAN", "STAGES"]
        self.launches, self.failing = [], failing

    def __getitem__(self, grid):
        def run(*arguments, **settings):
            self.launches.append((grid, arguments, settings))
            if len(self.launches) <= self.failing:
                raise launch.OutOfResources(300_000, 232_448, "shared memory")

        return run


def test_a_choice_for_which_the_device_has_no_room_is_passed_over() -> None:
    options = choices.options(tiling.tiling_of(tiling.View(1, 401_408, 256, 1), 2, 132, with_dy=False), 2, 132)
    for failing in (0, 2):
        recorded = Recorded(failing)
        kept = launch.Launch(recorded, ["x", "y"], {})
        assert kept.first(options, ("an array", "another")) == options[failing]
        assert kept.option == options[failing]
        grid, arguments, settings = recorded.launches[failing]
        assert grid == options[failing].grid
        assert arguments == ("an array", "another", *options[failing].constants.values())
        assert settings == {"num_warps": options[failing].warps, "enable_fp_fusion": False}
        kept(0, (1, 2), ("later", "arrays"))
        assert recorded.launches[-1][1][:2] == ("later", "arrays")
    with pytest.raises(launch.OutOfResources):
        launch.Launch(Recorded(failing=100), ["x", "y"], {}).first(options, (1, 2))


def test_a_choice_is_measured_once_for_a_class_of_arrays() -> None:
    """The second option is the fastest by this clock; running statistics move once for all that."""
    x = torch.randn(3_001, 40, device=DEVICE)
    layer = torch.nn.BatchNorm1d(40).to(DEVICE)
    expected = layer(x)
    timed, every = [], len(choices.options(tiling.tiling_of(tiling.View(1, 3_001, 40, 1), 4, 2, False), 4, 2))

    def clock(run):
        run()
        timed.append(run)
        return float(len(timed) % every != 2)

    with choices.measuring(clock) as report:
        y, _ = batch_norm(x, axis=1)
        assert len(timed) == 2 * every
        batch_norm(torch.cat([x, x[:300]]), axis=1)
    assert len(timed) == 2 * every
    assert [found.kernel for found in report] == ["moment_sums", "normalize"]
    assert all((found.milliseconds, found.shipped_milliseconds) == (0.0, 1.0) for found in report)
    assert all(found.sizes == (1, 3_001, 40, 1) and found.chosen != found.shipped for found in report)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    again, _ = batch_norm(x, axis=1)
    assert torch.equal(again, y), "by the same choice"
    assert len(timed) == 2 * every


def test_nothing_measured_acts_on_deterministic_programs() -> None:
    with choices.measuring(lambda run: run() or 0.0):
        assert choices.generation(lambda: False) > 0
    assert choices.generation(lambda: True) == 0
    assert choices.generation(lambda: False) > 0
    choices.forget()
    assert choices.generation(lambda: False) == 0
