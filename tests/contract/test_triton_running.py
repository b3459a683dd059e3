"""Test that running statistics are updated on the device as `core.running` defines, in the forward pass and alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.contract.on_triton import DEVICE, numpy, on_gpu_kernels, tensor  # isort: skip, may skip all

import torch

from evennorm.core import running
from evennorm.core.call import Call
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.kernels.contract import UnfitError
from evennorm.numpy import xp as numpy_xp
from evennorm.torch.gpu import triton_kernel
from tests.grids import pairwise

__all__ = ["on_gpu_kernels"]

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}


class Exact(NamedTuple):
    """What running statistics are after a batch, in float64, and how far each may be off."""

    mean: np.ndarray
    """Together with its low part."""
    mean_error: np.ndarray
    variance: np.ndarray
    variance_error: np.ndarray


def exact(batch: list[np.ndarray], kept: list[np.ndarray], count: int, unbiased: bool, decay: float, dtype: str) -> Exact:
    """Compute `core.running` in float64 from the very numbers that the device is given.

    The bounds are unit roundoff times the terms that are added, one for each operation. Near 0 a running mean, and its low
    part always, is the difference of much larger terms: no bound relative to the result could hold, on any device.
    """
    mean, low, variance = (np.asarray(values, np.float64) for values in batch)
    old, old_low, old_variance = (np.asarray(values, np.float64) for values in kept)
    old_low = np.where(np.abs(old_low) <= 2.0**-24 * np.abs(old), old_low, 0)
    groups, share, unit = len(mean), 1 - decay, UNIT_ROUNDOFF[dtype]
    beside = ((mean - mean[0]) + low).mean(0)
    step = ((mean[0] - old) + (beside - old_low)) * share
    terms = np.abs(mean[0] - old) + np.abs(mean - mean[0]).mean(0) + np.abs(low).mean(0) + np.abs(old_low)
    correction = count / (count - 1) if unbiased and count > 1 else 1.0
    average = (variance * correction).mean(0)
    return Exact(
        old + (old_low + step),
        unit * (np.abs(old_low) + (groups + 6) * terms * share + np.abs(old_low + step)) + 2 * unit**2 * np.abs(old),
        old_variance + (average - old_variance) * share if count > 1 else old_variance,
        unit * (groups + 8) * (np.abs(average) + np.abs(old_variance)),
    )


def check(found: list[torch.Tensor], wanted: Exact, dtype: str) -> None:
    mean, low, variance = (numpy(values) for values in found)
    assert (np.abs((mean + low) - wanted.mean) <= wanted.mean_error).all()
    most = UNIT_ROUNDOFF[dtype] * np.abs(mean) + wanted.mean_error
    assert (np.abs(low) <= most).all(), "what rounding took from the mean, no more"
    assert (np.abs(variance - wanted.variance) <= wanted.variance_error).all()


@pytest.mark.parametrize(
    *pairwise(
        of_groups=[(1, 50, False), (1, 50, True), (3, 7, True), (1, 1, False), (4, 2, True)],
        decay=[0.99, 0.3, 0.0, 1.0],
        dtype=["float32", "float64"],
        poison=[None, "mean", "variance"],
    )
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in which the interpreter computes
def test_running_statistics_are_updated_as_the_core_defines(of_groups, decay, dtype, poison) -> None:
    """On the device, and the answer stays there."""
    groups, count, unbiased = of_groups
    rng = np.random.default_rng(8)
    channel = 1500
    mean, low = rng.normal(1e4, 1, (groups, channel)), rng.normal(0, 1e-4, (groups, channel))
    variance = rng.uniform(0.5, 2, (groups, channel))
    if poison is not None:
        (mean if poison == "mean" else variance)[0, 1203] = np.nan if poison == "mean" else np.inf
    statistics = [values.astype(dtype) for values in (mean, low, variance)]
    kept = [rng.normal(1e4, 1, channel), rng.normal(0, 1e-3, channel), rng.uniform(0.5, 2, channel)]
    kept = [values.astype(dtype) for values in kept]
    with np.errstate(invalid="ignore"):
        batch = running.summary(numpy_xp, Moments(count, *statistics), unbiased)
    tensors = tuple(tensor(values, dtype) for values in kept)
    moments = Moments(count, *(tensor(s, dtype) for s in statistics))
    accepted = triton_kernel().update_running_stats((*tensors, decay, unbiased, None, None), moments)
    assert accepted.device.type == DEVICE
    assert (accepted.shape, accepted.dtype) == ((), torch.bool)
    assert accepted.item() is bool(batch.accepted)
    if not batch.accepted:
        assert all(np.array_equal(numpy(t), k) for t, k in zip(tensors, kept, strict=True))
        return
    check(tensors, exact(statistics, kept, count, unbiased, decay, dtype), dtype)


def test_an_empty_batch_changes_nothing() -> None:
    kept = tuple(torch.ones(3, device=DEVICE) for _ in range(3))
    nothing = Moments(0, *(torch.zeros(1, 3, device=DEVICE) for _ in range(3)))
    assert not triton_kernel().update_running_stats((*kept, 0.9, True, None, None), nothing).item()
    assert all(torch.equal(t, torch.ones(3, device=DEVICE)) for t in kept)


class Stats(NamedTuple):
    """Those of a module, by their names."""

    mean: torch.Tensor
    mean_low: torch.Tensor
    variance: torch.Tensor
    decay: float | None
    unbiased: bool
    batches: Any
    skipped: Any


def stats_of(channel: int, dtype: torch.dtype, decay: float | None, counted: bool = True) -> Stats:
    counters = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2)] if counted else [None, None]
    values = [start(channel, dtype=dtype, device=DEVICE) for start in (torch.zeros, torch.zeros, torch.ones)]
    return Stats(*values, decay, True, *counters)


SHAPES = {
    "rows on the chip": (61, 20),
    "rows streamed": (3_001, 40),
    "planes on the chip": (9, 5, 7, 7),
    "planes streamed": (3, 2, 81, 79),
    "many channels": (6, 2_100),
}


@pytest.mark.parametrize(
    *pairwise(shape=list(SHAPES.values()), group=[False, True], decay=[0.9, None], dtype=[torch.float32, torch.float64])
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_forward_pass_updates_them(shape, group, decay, dtype) -> None:
    """By what it computes, all or nothing, batch after batch."""
    kernel, channel = triton_kernel(), shape[1]
    name = str(dtype).removeprefix("torch.")
    whole = (2 * shape[0], *shape[1:]) if group else shape
    call = Call(Geometry(whole, 1), name, group_size=shape[0] if group else None)
    stats = stats_of(channel, dtype, decay)
    for step in range(4):
        x = 3 + torch.randn(whole, dtype=dtype, device=DEVICE)
        if step == 1:
            x[-1, channel - 1] = float("nan")
        before = [numpy(value).copy() for value in stats[:3]]
        y, saved = kernel.forward(call, x, None, None, running=stats)
        plain, plain_saved = kernel.forward(call, x, None, None)
        torch.testing.assert_close((y, saved[0]), (plain, plain_saved[0]), rtol=0, atol=0, equal_nan=True)
        counted = step + 1 if decay is not None or step < 1 else step  # the plain average counts what has a part in it
        assert (stats.batches.item(), stats.skipped.item()) == (counted, int(step >= 1))
        if step == 1:
            assert all(np.array_equal(numpy(value), kept) for value, kept in zip(stats[:3], before, strict=True))
            continue
        accepted = step if step < 1 else step - 1
        weight = accepted / (accepted + 1) if decay is None else decay
        wanted = exact([numpy(s) for s in saved[0]], before, call.count(whole), True, weight, name)
        if decay is None:  # itself rounded
            slack = 4 * UNIT_ROUNDOFF[name] * 10
            wanted = wanted._replace(mean_error=wanted.mean_error + slack, variance_error=wanted.variance_error + slack)
        check(stats[:3], wanted, name)


def test_without_counters_and_without_momentum() -> None:
    kernel, call, x = triton_kernel(), Call(Geometry((50, 4))), torch.randn(50, 4, device=DEVICE)
    stats = stats_of(4, torch.float32, None, counted=False)
    kernel.forward(call, x, None, None, running=stats)
    assert torch.equal(stats.mean, torch.zeros(4, device=DEVICE)), "without a count nothing moves, as in torch"
    kernel.forward(call, x, None, None, running=stats._replace(decay=0.0))
    torch.testing.assert_close(stats.mean, x.mean(0))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 0)])
def test_an_empty_batch_is_counted_and_skipped(shape) -> None:
    stats = stats_of(shape[1], torch.float32, 0.9)
    y, saved = triton_kernel().forward(
        Call(Geometry(shape, 1)), torch.zeros(shape, device=DEVICE), None, None, running=stats
    )
    assert (stats.batches.item(), stats.skipped.item()) == (1, 1)
    assert y.shape == shape
    assert not saved[0].any()
    assert torch.equal(stats.variance, torch.ones(shape[1], device=DEVICE))


def test_what_cannot_be_read_is_refused_before_anything_is_computed() -> None:
    """Of another size, dtype or memory, or values that a read has to negate."""
    call, x = Call(Geometry((50, 4))), torch.randn(50, 4, device=DEVICE)
    stats = stats_of(4, torch.float32, 0.9)
    negative = torch.complex(torch.ones(4), torch.ones(4)).to(DEVICE).conj().imag
    unfit = {
        "mean": [torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2]],
        "batches": [torch.zeros(2, dtype=torch.int64), torch.zeros(())],
    }
    for name, values in unfit.items():
        for value in values:
            with pytest.raises(UnfitError):
                triton_kernel().forward(call, x, None, None, running=stats._replace(**{name: value.to(DEVICE)}))
    for gamma in (torch.ones(5, device=DEVICE), torch.ones(4, dtype=torch.int32, device=DEVICE), negative):
        with pytest.raises(UnfitError):
            triton_kernel().forward(call, x, gamma, None, running=stats)
    assert stats.batches.item() == 0
