"""Launch the halves of a pass between which devices exchange statistics: `TritonKernel`'s launches, and one more in
between."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from evennorm.core.call import Call
from evennorm.core.namespace import Array
from evennorm.kernels.contract import Saved
from evennorm.kernels.triton import backward, exchange, forward
from evennorm.kernels.triton.choices import Option
from evennorm.kernels.triton.launch import Launch
from evennorm.kernels.triton.names import BACKWARD, FORWARD
from evennorm.kernels.triton.scalars import numbers_of
from evennorm.kernels.triton.tiling import COUNTER_BYTES, power_of_two

if TYPE_CHECKING:
    from evennorm.kernels.triton.kernel import TritonKernel

SUMS = [*BACKWARD, "sums", "count"]
"""What differs between the calls of one half of a backward pass."""

_TOGETHER = 2
"""In place of `fixed_stats`: the sums are those of all devices, scaled to those of two values."""


def moments(kernel: TritonKernel, call: Call, x: Array) -> Array:
    """Compute the moments of `x` as `forward` does."""
    access = kernel.access
    x, tiling = kernel._dense_and_tiling(call, x, with_dy=False)
    groups, _, channel, _ = tiling.view
    statistics = access.empty((3, groups, channel), x)
    if tiling.view.elements == 0:
        return kernel.gpu.clear(statistics)
    workspace = access.empty_bytes(kernel._room(tiling, x), x)
    given = {"x": x, "statistics": statistics, "workspace": workspace}
    arrays = tuple(given.get(name) for name in FORWARD)

    def launched() -> list[Launch]:
        numbers = numbers_of(call, tiling)
        sums = kernel._streamed(forward.moment_sums, FORWARD, numbers, tiling, arrays)
        return [sums, _after(exchange.store_moments, FORWARD, numbers, sums.option.grid[1], groups, arrays)]

    _launch(kernel, call, "moments", arrays, x, launched)
    return statistics


def gradient_sums(
    kernel: TritonKernel, call: Call, dy: Array, x: Array, gamma: Array | None, beta: Array | None, saved: Saved
) -> tuple[Array, Array | None, Array | None]:
    """Compute the first half of `backward`."""
    access, gpu = kernel.access, kernel.gpu
    x, tiling = kernel._dense_and_tiling(call, x, with_dy=True)
    dy = kernel._like(dy, x)
    statistics, bits = saved
    groups, _, channel, _ = tiling.view
    sums = access.empty((2, groups, channel), x)
    d_gamma, d_beta = (None if row is None else access.empty_like(row) for row in (gamma, beta))
    if tiling.view.elements == 0:
        for array in (sums, d_gamma, d_beta):
            if array is not None:
                gpu.clear(array)
        return sums, d_gamma, d_beta
    given: dict[str, Any] = {"dy": dy, "x": x, "relu_mask": bits, "gamma": gamma, "beta": beta, "statistics": statistics}
    given |= {"d_gamma": d_gamma, "d_beta": d_beta, "sums": sums}
    given["workspace"] = access.empty_bytes(kernel._room(tiling, x), x)
    arrays = tuple(given.get(name) for name in SUMS)

    def launched() -> list[Launch]:
        numbers = numbers_of(call, tiling)
        partial = kernel._streamed(backward.gradient_sums, SUMS, numbers, tiling, arrays)
        return [partial, _after(exchange.store_gradient_sums, SUMS, numbers, partial.option.grid[1], 1, arrays)]

    _launch(kernel, call, "gradient sums", arrays, x, launched)
    return sums, d_gamma, d_beta


def input_gradient(
    kernel: TritonKernel,
    call: Call,
    dy: Array,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    saved: Saved,
    sums: Array,
    count: Any,
    d_mean: Array | None = None,
    d_variance: Array | None = None,
) -> tuple[Array, Array]:
    """Compute the second half of `backward`; `count` is an array, of one number or of one per group."""
    access = kernel.access
    x, tiling = kernel._dense_and_tiling(call, x, with_dy=True)
    dy = kernel._like(dy, x)
    statistics, bits = saved
    dx, d_residual = access.empty_like(x), None if bits is None else access.empty_like(x)
    if tiling.view.elements == 0:
        return dx, dy if d_residual is None else d_residual
    groups, _, channel, _ = tiling.view
    beside = [None if d is None else d * (2.0 / count) for d in (d_mean, d_variance)]
    given: dict[str, Any] = {"dy": dy, "x": x, "relu_mask": bits, "gamma": gamma, "beta": beta, "statistics": statistics}
    given |= {"dx": dx, "d_residual": d_residual, "d_mean": beside[0], "d_variance": beside[1]}
    given |= {"sums": sums, "count": count}
    given["workspace"] = access.empty_bytes(COUNTER_BYTES + groups * 16 * channel, x)
    arrays = tuple(given.get(name) for name in SUMS)

    def launched() -> list[Launch]:
        numbers = {**numbers_of(call, tiling), "fixed_stats": _TOGETHER, "splits": 1, "MERGE": 1}
        before = _after(exchange.load_gradient_sums, SUMS, numbers, 1, 1, arrays)
        return [before, kernel._streamed(backward.input_gradient, SUMS, numbers, tiling, arrays)]

    _launch(kernel, call, "input gradient", arrays, x, launched)
    return dx, dy if d_residual is None else d_residual


def _after(
    kernel: Any, names: list[str], numbers: dict[str, Any], splits: int, rows: int, arrays: tuple[Any, ...]
) -> Launch:
    """Launch one program per block of channels, and per group where there are `rows` of them."""
    lanes = min(32, power_of_two(numbers["channels"]))
    merge = power_of_two(splits)
    warps = min(16, max(1, merge * lanes // 256))  # 8 sums of each kind in a thread
    launch = Launch(kernel, names, {**numbers, "splits": splits, "MERGE": merge})
    launch.first([Option((-(-numbers["channels"] // lanes), rows), {"LANES": lanes}, warps)], arrays)
    return launch


def _launch(
    kernel: TritonKernel,
    call: Call,
    half: str,
    arrays: tuple[Any, ...],
    x: Array,
    launched: Callable[[], list[Launch]],
) -> None:
    """Launch again as before for arrays of these dtypes, strides and alignments, or for the first time."""
    access, gpu = kernel.access, kernel.gpu
    device = gpu.device(x)
    addresses, alignment = kernel._addresses(arrays)
    dtypes = tuple(None if array is None else gpu.dtype(array) for array in arrays)
    key = "triton", device, half, access.sizes(x), access.strides(x), alignment, dtypes
    with gpu.on_device(device):
        if key not in call.plans:
            call.plans[key] = launched()
            return
        for launch in call.plans[key]:
            launch(gpu.stream(device), tuple(addresses), arrays)
