"""Run the GPU kernels on arrays of any memory layout, by as few launches as their size allows.

One launch where a program keeps all values of its channels on the chip; else two, of which the second begins with merging
the sums of the first, and updates the running statistics. What arrays of one shape and layout need is worked out once and
kept with the call; after that a pass allocates its results and launches. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from evennorm.core.activation import LINEAR
from evennorm.core.call import Call
from evennorm.core.moments import Moments
from evennorm.core.namespace import Array
from evennorm.kernels.contract import ArrayAccess, Gradients, RunningStats, Saved, UnfitError
from evennorm.kernels.triton import backward, choices, forward, in_halves
from evennorm.kernels.triton.choices import Option
from evennorm.kernels.triton.launch import Launch
from evennorm.kernels.triton.names import BACKWARD, FORWARD, READ, UPDATE, UPDATED
from evennorm.kernels.triton.running import update_running_stats
from evennorm.kernels.triton.scalars import decay_of, numbers_of
from evennorm.kernels.triton.tiling import (
    COUNTER_BYTES,
    DEPTH,
    UPDATED_TOGETHER,
    Tiling,
    dense_view,
    power_of_two,
    tiling_of,
)


class GpuAccess(NamedTuple):
    """What kernels need to know about GPUs, and about arrays beyond `ArrayAccess`."""

    device: Callable[[Array], int]
    """The number of an array's device."""
    dtype: Callable[[Array], Hashable]
    row: Callable[[Array], Hashable]
    """A key for how a parameter or statistic lies in memory: layout, dtype, size and device."""
    fits: Callable[[Hashable, tuple[str, ...], int, int], bool]
    """Whether kernels can read a row: one of these dtypes, a size, on a device, dense."""
    processors: Callable[[int], int]
    """The number of multiprocessors of a device."""
    stream: Callable[[int], int]
    """The handle of a device's current stream."""
    current_device: Callable[[], int]
    on_device: Callable[[int], AbstractContextManager[Any]]
    """Makes a device the current one, on which kernels are launched."""
    is_recording: Callable[[], bool]
    """Whether launches are recorded in a graph, which may run later beside others."""
    is_deterministic: Callable[[], bool]
    """Whether bits must not depend on measurements."""
    clear: Callable[[Array], Array]
    """Fills an array with 0."""
    empty_flag: Callable[[Array], Array]
    """A boolean scalar on the device of an array."""


@dataclass
class _Plan:
    """How to compute on arrays of one layout."""

    tiling: Tiling
    workspace_bytes: int
    statistics: tuple[int, int, int] | None = None
    """The shape of the statistics that the pass computes."""
    mask_bytes: int = 0
    launches: list[Launch] | None = None
    """The launches; None before the first call."""


class _Copied(NamedTuple):
    """Used in place of a plan where one array is copied first, since it has gaps, or another layout than x."""

    is_x: bool
    contiguous: bool = False
    """Whether the copy has its axes in their own order, because no view describes one in the order of x's memory."""


_updates: dict[Hashable, Launch] = {}
_counters: dict[tuple[int, int], Array] = {}
"""Counters of each device and stream. They are 0 between launches: the program that arrives last resets them."""


@dataclass(frozen=True)
class TritonKernel:
    """The Triton kernels for arrays on a GPU, without a mask. Parameters are contiguous, of any float dtype."""

    access: ArrayAccess
    gpu: GpuAccess
    name: str = "triton"

    def forward(
        self,
        call: Call,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None = None,
        *,
        running: RunningStats | None = None,
        statistics: Array | None = None,
    ) -> tuple[Array, Saved]:
        """Normalize `x`; see `Kernel.forward`."""
        return self._forward(call, x, gamma, beta, residual, running, statistics, None, None)

    def infer(
        self,
        call: Call,
        x: Array,
        mean: Array,
        variance: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None = None,
    ) -> Array:
        """Normalize `x` by given statistics, contiguous and of any float dtype."""
        return self._forward(call, x, gamma, beta, residual, None, None, mean, variance)[0]

    def _forward(
        self,
        call: Call,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None,
        running: RunningStats | None,
        statistics: Any,
        mean_in: Array | None,
        variance_in: Array | None,
    ) -> tuple[Array, Saved]:
        access, gpu = self.access, self.gpu
        address: Any = access.address
        device = gpu.device(x)
        if device != gpu.current_device():
            with gpu.on_device(device):
                return self._forward(call, x, gamma, beta, residual, running, statistics, mean_in, variance_in)
        given: tuple[Any, ...]
        if running is None or statistics is not None:
            given = x, residual, gamma, beta, mean_in, variance_in, None, None, None, None, None
            decay, unbiased = (0.0, 0.0), False
        else:
            mean, mean_low, variance, weight, unbiased, batches, skipped = running
            given = x, residual, gamma, beta, None, None, mean, mean_low, variance, batches, skipped
            decay = decay_of(weight, batches)
        row = gpu.row
        rows = [None if array is None else row(array) for array in given[2:]]
        addresses, alignment = self._addresses(given)
        key = (
            *("triton", device, "forward", choices.generation(gpu.is_deterministic), unbiased, alignment),
            *(access.sizes(x), access.strides(x)),
            None if residual is None else (access.strides(residual), gpu.dtype(residual)),
            None if statistics is None else address(statistics) % 16,
            *rows,
        )
        plan = call.plans.get(key)
        if plan is None:
            self._check_rows(call, device, rows)
            by_batch, trains = statistics is None and mean_in is None, mean_in is None
            plan = call.plans[key] = self._forward_plan(call, x, residual, by_batch, trains, running is not None)
        if isinstance(plan, _Copied):
            if plan.is_x:
                x = self._dense(x, plan)
            else:
                residual = access.copy_like(residual, x)
            return self._forward(call, x, gamma, beta, residual, running, statistics, mean_in, variance_in)
        y = access.empty_like(x)
        mask = access.empty_bytes(plan.mask_bytes, x) if plan.mask_bytes else None
        if plan.statistics is not None:
            statistics = access.empty(plan.statistics, x)
        if plan.tiling.view.elements == 0:
            if plan.statistics is not None:
                gpu.clear(statistics)
                if running is not None:
                    self.update_running_stats(running, Moments(0, statistics[0], statistics[1], statistics[2]))
            return y, (statistics, mask)
        stream = gpu.stream(device)
        workspace = self._workspace(plan, device, stream, x)
        fresh = statistics, y, mask, workspace
        arrays = *given, *fresh, *decay
        if plan.launches is None:
            plan.launches = self._launch_forward(call, plan, arrays, unbiased)
        else:
            everywhere = *addresses, *[0 if array is None else address(array) for array in fresh], *decay
            for launch in plan.launches:
                launch(stream, everywhere, arrays)
        return y, (statistics, mask)

    def backward(
        self,
        call: Call,
        dy: Array,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        saved: Saved,
        has_residual: bool,
        d_mean: Array | None = None,
        d_variance: Array | None = None,
    ) -> Gradients:
        """Differentiate `forward`; see `Kernel.backward`."""
        access, gpu = self.access, self.gpu
        address: Any = access.address
        device = gpu.device(x)
        if device != gpu.current_device():
            with gpu.on_device(device):
                return self.backward(call, dy, x, gamma, beta, saved, has_residual, d_mean, d_variance)
        statistics, mask = saved
        given = dy, x, mask, gamma, beta, statistics, d_mean, d_variance
        addresses, alignment = self._addresses(given)
        key = (
            *("triton", device, "backward", choices.generation(gpu.is_deterministic), alignment),
            *(access.sizes(x), access.strides(x), access.strides(dy)),
            *[None if array is None else gpu.dtype(array) for array in given],
        )
        plan = call.plans.get(key)
        if plan is None:
            plan = call.plans[key] = self._backward_plan(call, dy, x)
        if isinstance(plan, _Copied):
            if plan.is_x:
                x = self._dense(x, plan)
            else:
                dy = access.copy_like(dy, x)
            return self.backward(call, dy, x, gamma, beta, saved, has_residual, d_mean, d_variance)
        dx = access.empty_like(x)
        d_residual = None if mask is None else access.empty_like(x)
        d_gamma = None if gamma is None else access.empty_like(gamma)
        d_beta = None if beta is None else access.empty_like(beta)
        if plan.tiling.view.elements == 0:
            for gradient in (d_gamma, d_beta):
                if gradient is not None:
                    gpu.clear(gradient)
            return dx, d_gamma, d_beta, (dy if d_residual is None else d_residual) if has_residual else None
        stream = gpu.stream(device)
        fresh = dx, d_residual, d_gamma, d_beta, self._workspace(plan, device, stream, x)
        arrays = *given, *fresh
        if plan.launches is None:
            plan.launches = self._launch_backward(call, plan, arrays)
        else:
            everywhere = *addresses, *[0 if array is None else address(array) for array in fresh]
            for launch in plan.launches:
                launch(stream, everywhere, arrays)
        return dx, d_gamma, d_beta, (dy if d_residual is None else d_residual) if has_residual else None

    def update_running_stats(self, running: RunningStats, moments: Moments) -> Array:
        """Update `running` by moments (groups, channel), all dense and of one precision; return on the device whether it
        accepted them.
        """
        access, gpu = self.access, self.gpu
        device = gpu.device(moments.mean)
        if device != gpu.current_device():
            with gpu.on_device(device):
                return self.update_running_stats(running, moments)
        count, *statistics = moments
        groups, channels = access.sizes(moments.mean)
        mean, mean_low, variance, weight, unbiased, batches, skipped = running
        accepted = gpu.empty_flag(mean)
        given = *statistics, mean, mean_low, variance, batches, skipped, accepted
        addresses, alignment = self._addresses(given)
        numbers = *decay_of(weight, batches), groups, channels, int(count)
        key = device, gpu.dtype(mean), batches is None, skipped is None, unbiased, alignment, count >= 1 << 31
        launch = _updates.get(key)
        if launch is None:
            launch = Launch(update_running_stats, UPDATE, {"unbiased": int(unbiased), "STEP": UPDATED_TOGETHER})
            launch.first([Option((1, 1), {}, 4)], (*given, *numbers))
            _updates[key] = launch
        else:
            launch(gpu.stream(device), (*addresses, *numbers), (*given, *numbers))
        return accepted

    moments = in_halves.moments
    gradient_sums = in_halves.gradient_sums
    input_gradient = in_halves.input_gradient

    def open_elements(self, call: Call, x: Array, gamma: Array | None, beta: Array | None, saved: Saved) -> Array:
        """Return which elements the activation let through, in x's shape, by operations of the array library."""
        access = self.access
        mask: Any = saved[1]
        x, tiling = self._dense_and_tiling(call, x, with_dy=True)
        groups, outer, channel, inner = tiling.view
        rows = groups, tiling.octets, channel, -1
        bits = access.empty_bytes(DEPTH * mask.shape[0], x).reshape(groups, tiling.octets, DEPTH, channel, -1)
        for depth in range(DEPTH):
            bits[:, :, depth] = (mask.reshape(rows) >> depth) & 1
        lines = bits.reshape(groups, tiling.octets * DEPTH, channel, -1)[:, : tiling.lines]
        planes = (
            lines.reshape(groups, outer, tiling.segments, channel, -1).swapaxes(2, 3).reshape(groups, outer, channel, -1)
        )
        return planes[..., :inner].reshape(-1).as_strided(x.shape, x.stride()) != 0

    def _addresses(self, arrays: Iterable[Array | None]) -> tuple[list[int], Any]:
        """Return addresses, and a key for compilation: which addresses are multiples of 16, as those of results are."""
        address: Any = self.access.address
        addresses = [0 if array is None else address(array) for array in arrays]
        together = 0
        for at in addresses:
            together |= at
        return addresses, None if together % 16 == 0 else tuple([at % 16 == 0 for at in addresses])

    def _dense_and_tiling(self, call: Call, x: Array, with_dy: bool) -> tuple[Array, Tiling]:
        """Return `x`, or a copy of it that kernels can read, and its tiling."""
        tiling = self._tiling(call, x, with_dy)
        if isinstance(tiling, _Copied):
            x = self._dense(x, tiling)
            tiling = self._tiling(call, x, with_dy)
        assert isinstance(tiling, Tiling), "a copy is dense"
        return x, tiling

    def _like(self, array: Array, x: Array) -> Array:
        return array if self._lie_alike(array, x) else self.access.copy_like(array, x)

    def _dense(self, x: Array, copied: _Copied) -> Array:
        access = self.access
        return access.copy_like(x, access.empty_contiguous(x) if copied.contiguous else access.empty_like(x))

    def _lie_alike(self, array: Array, x: Array) -> bool:
        """Return whether kernels that read x can read `array` too: the same dtype, and the same strides except on axes of
        one element."""
        access = self.access
        if self.gpu.dtype(array) != self.gpu.dtype(x):
            return False
        strides = zip(access.strides(array), access.strides(x), access.sizes(x), strict=True)
        return all(own == other or size == 1 for own, other, size in strides)

    def _workspace(self, plan: _Plan, device: int, stream: int, x: Array) -> Array | None:
        if not plan.workspace_bytes:
            return None
        if plan.workspace_bytes > COUNTER_BYTES:
            return self.access.empty_bytes(plan.workspace_bytes, x)
        if self.gpu.is_recording():  # the stream's own counter may be in use when the graph runs
            return self.gpu.clear(self.access.empty_bytes(COUNTER_BYTES, x))
        key = device, stream
        if key not in _counters:
            _counters[key] = self.gpu.clear(self.access.empty_bytes(COUNTER_BYTES, x))
        return _counters[key]

    def _tiling(self, call: Call, x: Array, with_dy: bool) -> Tiling | _Copied:
        access = self.access
        sizes = access.sizes(x)
        view = dense_view(call.geometry, sizes, access.strides(x), call.group_size)
        if view is None:
            copy = access.empty_like(x)  # without gaps, its axes in their order
            return _Copied(True, dense_view(call.geometry, sizes, access.strides(copy), call.group_size) is None)
        return tiling_of(view, access.item_bytes(x), self.gpu.processors(self.gpu.device(x)), with_dy)

    def _forward_plan(
        self, call: Call, x: Array, residual: Array | None, by_batch: bool, trains: bool, updates: bool
    ) -> _Plan | _Copied:
        tiling = self._tiling(call, x, with_dy=False)
        if isinstance(tiling, _Copied):
            return tiling
        if residual is not None and tiling.view.elements and not self._lie_alike(residual, x):
            return _Copied(False)
        mask_bytes = tiling.mask_bytes if trains and residual is not None and call.activation != LINEAR else 0
        if not by_batch:
            return _Plan(tiling, 0, None, mask_bytes)
        counter = COUNTER_BYTES if updates else 0
        statistics = 3, tiling.view.groups, tiling.view.channel
        return _Plan(tiling, counter if tiling.slots else self._room(tiling, x), statistics, mask_bytes)

    def _backward_plan(self, call: Call, dy: Array, x: Array) -> _Plan | _Copied:
        tiling = self._tiling(call, x, with_dy=True)
        if isinstance(tiling, _Copied):
            return tiling
        if tiling.view.elements and not self._lie_alike(dy, x):
            return _Copied(False)
        if not tiling.slots:
            return _Plan(tiling, self._room(tiling, x))
        groups, _, channel, _ = tiling.view
        return _Plan(tiling, COUNTER_BYTES + groups * PAIR * channel if groups > 1 else 0)

    def _room(self, tiling: Tiling, x: Array) -> int:
        """Return the bytes of a counter and of two sums per channel, in as many parts as an option may use."""
        if tiling.view.elements == 0:
            return 0
        splits = max(option.grid[1] for option in self._options(tiling, x))
        return COUNTER_BYTES + tiling.view.groups * splits * PAIR * tiling.view.channel

    def _options(self, tiling: Tiling, x: Array, arrays: int = 1) -> list[Option]:
        return choices.options(tiling, self.access.item_bytes(x), self.gpu.processors(self.gpu.device(x)), arrays)

    def _check_rows(self, call: Call, device: int, rows: Sequence[Hashable]) -> None:
        """Check that kernels can read gamma, beta and all statistics.

        Raises:
            UnfitError: gamma, beta, a given mean or variance, running statistics or counters cannot be read as they are.
        """
        acc, channel = ("float64" if call.dtype == "float64" else "float32",), call.geometry.channel
        wanted = [(_FLOATS, channel)] * 4 + [(acc, channel)] * 3 + [(("int64",), 1)] * 2
        for row, (dtypes, size) in zip(rows, wanted, strict=True):
            if row is not None and not self.gpu.fits(row, dtypes, size, device):
                raise UnfitError(f"{size} dense values of {' or '.join(dtypes)} on device {device} are read; received {row}")

    def _launch_forward(self, call: Call, plan: _Plan, arrays: tuple[Any, ...], unbiased: bool) -> list[Launch]:
        """Launch for the first time, which shows which options a device has room for."""
        tiling = plan.tiling
        numbers = {**numbers_of(call, tiling), "unbiased": int(unbiased)}
        if plan.statistics is not None and tiling.slots:
            return [self._on_chip(forward.forward_on_chip, FORWARD, numbers, tiling, arrays)]
        launches, splits = [], 1
        if plan.statistics is not None:
            launches.append(self._streamed(forward.moment_sums, FORWARD, numbers, tiling, arrays))
            splits = launches[0].option.grid[1]
        numbers |= {"splits": splits, "MERGE": power_of_two(splits)}
        return [*launches, self._streamed(forward.normalize, FORWARD, numbers, tiling, arrays)]

    def _launch_backward(self, call: Call, plan: _Plan, arrays: tuple[Any, ...]) -> list[Launch]:
        tiling = plan.tiling
        numbers = {**numbers_of(call, tiling), "fixed_stats": int(call.fixed_stats)}
        if not tiling.slots:
            sums = self._streamed(backward.gradient_sums, BACKWARD, numbers, tiling, arrays)
            splits = sums.option.grid[1]
            numbers |= {"splits": splits, "MERGE": power_of_two(splits)}
            return [sums, self._streamed(backward.input_gradient, BACKWARD, numbers, tiling, arrays)]
        launches = [self._on_chip(backward.backward_on_chip, BACKWARD, numbers, tiling, arrays)]
        at = dict(zip(BACKWARD, arrays, strict=True))
        if tiling.view.groups > 1 and not (at["d_gamma"] is None and at["d_beta"] is None):
            lanes = min(128, power_of_two(tiling.view.channel))
            launch = Launch(backward.parameter_gradients_of_groups, BACKWARD, numbers)
            launch.first([Option((-(-tiling.view.channel // lanes), 1), {"LANES": lanes}, 4)], arrays)
            launches.append(launch)
        return launches

    def _on_chip(
        self, kernel: Any, names: list[str], numbers: dict[str, Any], tiling: Tiling, arrays: tuple[Any, ...]
    ) -> Launch:
        """Launch with 16 elements for each thread, or 32 for the largest tile."""
        warps = min(16, max(1, DEPTH * tiling.slots * tiling.lanes // 512))
        constants = {"LANES": tiling.lanes, "SLOTS": tiling.slots, "STEP": min(UPDATED_TOGETHER, 512 * warps)}
        launch = Launch(kernel, names, numbers)
        launch.first([Option((tiling.blocks(tiling.lanes) * tiling.view.groups, 1), constants, warps)], arrays)
        return launch

    def _streamed(
        self, kernel: Any, names: list[str], numbers: dict[str, Any], tiling: Tiling, arrays: tuple[Any, ...]
    ) -> Launch:
        access, dtype = self.access, self.gpu.dtype
        at = dict(zip(names, arrays, strict=True))
        x = at["x"]
        launch = Launch(kernel, names, {**numbers, "STEP": UPDATED_TOGETHER})
        given = [name for name in kernel.arg_names if name in at]
        # Measuring launches repeatedly, which must not update real running statistics.
        on = arrays
        if choices.is_measuring():
            kept = {name: at[name] for name in UPDATED if at.get(name) is not None}
            on = tuple((at | {name: access.copy_like(array, array) for name, array in kept.items()}).values())
        options = choices.chosen(
            kernel.fn.__name__,
            (
                numbers["ACTIVATION"],
                self.gpu.device(x),
                *(dtype(at[name]) if hasattr(at[name], "dtype") else None for name in given),
            ),
            tiling,
            self._options(tiling, x, sum(at.get(name) is not None for name in given if name in READ)),
            lambda option: launch.through_triton(option, on),
            tiling.view.elements * access.item_bytes(x) >= choices.WORTH_MEASURING,
        )
        launch.first(options, arrays)
        return launch


_FLOATS = "float32", "float64", "bfloat16", "float16"

PAIR = 16
"""Bytes of two sums."""
