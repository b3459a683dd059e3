"""Run the compiled CPU kernels on the arrays of a library, whatever their memory layout.

How arrays of one shape and layout are visited is worked out once and kept with the call; after that a pass allocates its
results and makes one native call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any, NamedTuple

from evennorm.core.activation import LINEAR
from evennorm.core.call import Call
from evennorm.core.geometry import Strides
from evennorm.core.moments import Moments
from evennorm.core.namespace import Array
from evennorm.kernels import parts
from evennorm.kernels.contract import ArrayAccess, Gradients, RunningStats, Saved, UnfitError

try:
    from evennorm.kernels import _cpu
except ImportError as error:  # the reference kernel computes instead
    parts.keep("_cpu", error)
    _cpu = None  # type: ignore[assignment]

AVAILABLE = _cpu is not None
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
HUGE = 4 << 20
"""Bytes from which an array is written to memory that was used before, or else to huge pages."""

__all__ = ["AVAILABLE", "DTYPES", "HUGE", "CpuKernel", "_cpu", "writable"]

_NOWHERE: Strides = (0, 0, 0, 0)
_NOT_RUNNING: RunningStats = (None, None, None, 0.0, False, None, None)
_UNFIT = 2
"""The answer of a native function that has computed nothing; any other answer means that it has."""


class _Fresh(NamedTuple):
    """How an output of a shape is allocated."""

    contiguous: bool
    """Whether its axes are in their own order, because that of the input's memory would separate channel axes."""
    buffered: bool
    """Whether it uses memory that was used before."""
    advised: int
    """Bytes to ask huge pages for, or 0."""


class _ForwardPlan(NamedTuple):
    """A forward pass over arrays of one layout. The functions are native, and answer whether they could read the arrays."""

    fresh: _Fresh | None
    """How y is allocated; None for an array like x, as the library allocates it."""
    forward: Any = None
    """The native function; None where the arrays are copied first, since no view describes them all."""
    normalize: Any = None
    normalize_again: Any = None
    moments: Any = None
    statistics: tuple[int, int, int] = (3, 0, 0)
    """The shape of mean, mean_low and variance together."""
    mask_bytes: int = 0
    address: int = 0
    """The address of the native plan, which lives as long as its functions."""


class _BackwardPlan(NamedTuple):
    """A backward pass over arrays of one layout."""

    fresh: _Fresh | None
    backward: Callable[..., int] | None = None
    gradient_sums: Any = None
    input_gradient: Any = None
    address: int = 0


@dataclass(frozen=True)
class CpuKernel:
    """The compiled kernels for arrays in CPU memory, without a mask."""

    access: ArrayAccess
    name: str = "cpu"

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
        out: Array | None = None,
    ) -> tuple[Array, Saved]:
        """Normalize `x` into new memory or `out`; otherwise as `Kernel.forward`."""
        access = self.access
        # Most calls find their plan by the strides of x alone.
        if residual is None and out is None and (plan := call.plans.get(access.strides(x))) is not None and plan.forward:
            y = access.empty_like(x) if plan.fresh is None else self._allocated(call, plan.fresh, x)
            mask = None
        else:
            masked = residual is not None and call.activation != LINEAR
            plan, x, residual, y = self._prepared(call, x, residual, out, masked)
            mask = access.empty_bytes(plan.mask_bytes, x) if masked else None
        if statistics is not None:
            fate = plan.normalize_again(x, residual, y, gamma, beta, statistics, mask)
        else:
            statistics = access.empty(plan.statistics, x)
            mean, mean_low, variance, decay, unbiased, batches, skipped = running or _NOT_RUNNING
            decay = -1.0 if decay is None else decay
            fate = plan.forward(
                x, residual, y, gamma, beta, statistics, mask, mean, mean_low, variance, decay, unbiased, batches, skipped
            )
        if fate == _UNFIT:
            raise UnfitError
        return y, (statistics, mask)

    def infer(
        self,
        call: Call,
        x: Array,
        mean: Array,
        variance: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None = None,
        *,
        mean_low: Array | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalize `x` by given statistics into new memory or `out`."""
        plan, x, residual, y = self._prepared(call, x, residual, out, False)
        if plan.normalize(x, residual, y, gamma, beta, mean, mean_low, variance, None) == _UNFIT:
            raise UnfitError
        return y

    def moments(self, call: Call, x: Array) -> Array:
        """Compute mean, mean_low and variance of `x`, in the form of `Saved.statistics`."""
        access = self.access
        key = "moments", access.strides(x)
        plan = call.plans.get(key)
        if plan is None:
            plan = call.plans[key] = self._forward_plan(call, x, None, x, False)
        if plan.forward is None:
            return self.moments(call, access.copy_like(x, access.empty_contiguous(x)))
        statistics = access.empty(plan.statistics, x)
        if plan.moments(x, statistics) == _UNFIT:
            raise UnfitError
        return statistics

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
        access = self.access
        statistics, mask = saved
        plan = self._backward_plan_of(call, dy, x, mask is not None)
        dx = access.empty_like(x) if plan.fresh is None else self._allocated(call, plan.fresh, x)
        if plan.backward is None:
            x, dy = access.copy_like(x, dx), access.copy_like(dy, dx)
            return self.backward(call, dy, x, gamma, beta, saved, has_residual, d_mean, d_variance)
        d_residual = None if mask is None else self._allocated(call, plan.fresh, x)
        d_gamma = None if gamma is None else access.empty_like(gamma)
        d_beta = None if beta is None else access.empty_like(beta)
        fate = plan.backward(dy, x, dx, d_residual, gamma, beta, statistics, mask, d_mean, d_variance, d_gamma, d_beta)
        if fate == _UNFIT:
            raise UnfitError
        return dx, d_gamma, d_beta, (dy if d_residual is None else d_residual) if has_residual else None

    def gradient_sums(
        self, call: Call, dy: Array, x: Array, gamma: Array | None, beta: Array | None, saved: Saved
    ) -> tuple[Array, Array | None, Array | None]:
        """Compute the first half of `backward`; see `Kernel.gradient_sums`."""
        access = self.access
        statistics, mask = saved
        plan = self._backward_plan_of(call, dy, x, mask is not None)
        if plan.backward is None:
            like = self._allocated(call, plan.fresh, x)
            return self.gradient_sums(call, access.copy_like(dy, like), access.copy_like(x, like), gamma, beta, saved)
        groups, channel = access.sizes(statistics)[1:]
        sums = access.empty((2, groups, channel), x)
        d_gamma, d_beta = (None if row is None else access.empty_like(row) for row in (gamma, beta))
        if plan.gradient_sums(dy, x, gamma, beta, statistics, mask, sums, d_gamma, d_beta) == _UNFIT:
            raise UnfitError
        return sums, d_gamma, d_beta

    def input_gradient(
        self,
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
        """Compute the second half of `backward`; see `Kernel.input_gradient`."""
        access = self.access
        statistics, mask = saved
        plan = self._backward_plan_of(call, dy, x, mask is not None)
        dx = self._allocated(call, plan.fresh, x)
        if plan.backward is None:
            x, dy = access.copy_like(x, dx), access.copy_like(dy, dx)
            return self.input_gradient(call, dy, x, gamma, beta, saved, sums, count, d_mean, d_variance)
        d_residual = None if mask is None else self._allocated(call, plan.fresh, x)
        given = dy, x, dx, d_residual, gamma, beta, statistics, mask, sums, d_mean, d_variance
        if plan.input_gradient(*given, float(count)) == _UNFIT:
            raise UnfitError
        return dx, dy if d_residual is None else d_residual

    def open_elements(self, call: Call, x: Array, gamma: Array | None, beta: Array | None, saved: Saved) -> Array:
        """Return which elements the activation let through: those whose residual gets the whole gradient."""
        ones = self.access.empty_like(x)
        ones[...] = 1
        _, _, _, d_residual = self.backward(call, ones, x, gamma, beta, saved, True)
        return d_residual == 1

    def update_running_stats(self, running: RunningStats, moments: Moments) -> bool:
        """Update `running` by moments (groups, channel), all dense and of one precision; return whether it accepted them."""
        mean, mean_low, variance, decay, unbiased, _, _ = running
        assert decay is not None, "the cumulative average is that of the forward pass"
        rows = [moments.mean, moments.mean_low, moments.variance, mean, mean_low, variance]
        if self.access.address is not None:
            rows = [self.access.address(row) for row in rows]
        groups, channel = self.access.sizes(moments.mean)
        dtype = DTYPES["float64" if self.access.item_bytes(moments.mean) == 8 else "float32"]
        return _cpu.update_running_stats(dtype, groups, channel, moments.count, unbiased, decay, *rows)

    def forward_layout(self, call: Call, x: Array, residual: Array | None, masked: bool) -> tuple[Any, ...] | None:
        """Describe a forward pass over arrays with these layouts, for native/bind_torch.cc; return None if they need a copy.

        Returns the address of the native plan, the strides of y, whether y is a buffer, the bytes of it to advise, the shape
        of the statistics, the bytes of the activation mask, and what keeps the plan alive.
        """
        plan = self._forward_plan(call, x, residual, None, masked)
        return plan.forward and (*self._output(call, plan, x), plan.statistics, plan.mask_bytes, plan)

    def backward_layout(self, call: Call, dy: Array, x: Array, masked: bool) -> tuple[Any, ...] | None:
        """Describe a backward pass likewise: address, strides of dx, whether it is a buffer, bytes to advise."""
        plan = self._backward_plan(call, dy, x, masked)
        return plan.backward and (*self._output(call, plan, x), plan)

    def _output(self, call: Call, plan: _ForwardPlan | _BackwardPlan, x: Array) -> tuple[int, tuple[int, ...], bool, int]:
        strides, fresh = self.access.strides(self._allocated(call, plan.fresh, x)), plan.fresh
        return plan.address, strides, fresh is not None and fresh.buffered, 0 if fresh is None else fresh.advised

    def _native(self, function: Callable[..., int]) -> Callable[..., int]:
        """Return a native function that takes arrays, or their addresses where it cannot read these itself."""
        address = self.access.address
        if address is None:
            return function

        def by_address(*given: Any) -> int:
            try:
                addresses = [v if v is None or isinstance(v, (bool, float)) else address(v) for v in given]
            except RuntimeError:  # a tensor without memory of its own
                return _UNFIT
            return function(*addresses)

        return by_address

    def _prepared(
        self, call: Call, x: Array, residual: Array | None, out: Array | None, masked: bool
    ) -> tuple[_ForwardPlan, Array, Array | None, Array]:
        """Return the plan of a forward pass, x and residual as it reads them, and y to be written."""
        strides = self.access.strides
        key: Any = strides(x)
        if residual is not None or out is not None:
            key = key, None if residual is None else strides(residual), None if out is None else strides(out), masked
        plan = call.plans.get(key)
        if plan is None:
            plan = call.plans[key] = self._forward_plan(call, x, residual, out, masked)
        y = self._allocated(call, plan.fresh, x) if out is None else out
        if plan.forward is None:
            residual = None if residual is None else self.access.copy_like(residual, y)
            return self._prepared(call, self.access.copy_like(x, y), residual, y, masked)
        return plan, x, residual, y

    def _forward_plan(self, call: Call, x: Array, residual: Array | None, out: Array | None, masked: bool) -> _ForwardPlan:
        fresh = self._fresh(call, x)
        found = self._shared_view(call, masked, self._allocated(call, fresh, x) if out is None else out, x, residual)
        if found is None:
            return _ForwardPlan(fresh)
        sizes, (y_strides, x_strides, residual_strides) = found
        groups, _, channel, _ = sizes
        numbers = call.epsilon, *call.activation
        run = _cpu.ForwardPlan(DTYPES[call.dtype], sizes, x_strides, residual_strides, y_strides, *numbers)
        return _ForwardPlan(
            fresh,
            self._native(run.forward),
            self._native(run.normalize),
            self._native(run.normalize_again),
            self._native(run.moments),
            (3, groups, channel),
            run.mask_bytes if masked else 0,
            run.address,
        )

    def _backward_plan_of(self, call: Call, dy: Array, x: Array, masked: bool) -> _BackwardPlan:
        key = self.access.strides(dy), self.access.strides(x), not masked
        plan: _BackwardPlan | None = call.plans.get(key)
        if plan is None:
            plan = call.plans[key] = self._backward_plan(call, dy, x, masked)
        return plan

    def _backward_plan(self, call: Call, dy: Array, x: Array, masked: bool) -> _BackwardPlan:
        fresh = self._fresh(call, x)
        found = self._shared_view(call, masked, self._allocated(call, fresh, x), x, dy)
        if found is None:
            return _BackwardPlan(fresh)
        sizes, (dx_strides, x_strides, dy_strides) = found
        _, outer, _, inner = sizes
        # Given statistics are those of infinitely many values: x moves no mean.
        numbers = call.epsilon, *call.activation, inf if call.fixed_stats else float(outer * inner)
        run = _cpu.BackwardPlan(DTYPES[call.dtype], sizes, dy_strides, x_strides, dx_strides, *numbers)
        native = self._native
        return _BackwardPlan(fresh, native(run.backward), native(run.gradient_sums), native(run.input_gradient), run.address)

    def _shared_view(
        self, call: Call, masked: bool, written: Array, x: Array, other: Array | None
    ) -> tuple[Strides, list[Strides]] | None:
        """Return sizes, and strides of each array, of a view that describes all three; None where there is none.

        The bits of an activation mask are counted along the written array's runs, so that `masked` asks for its sizes alone.
        """
        found = _view(call, self.access, written, x, *(() if other is None else (other,)))
        if masked and found is not None:
            alone = _view(call, self.access, written)
            found = found if alone is not None and found[0] == alone[0] else None
        if found is None:
            return None
        sizes, strides = found
        return sizes, strides if other is not None else [*strides, _NOWHERE]

    def _fresh(self, call: Call, x: Array) -> _Fresh | None:
        """Decide how outputs like x are allocated: in the order of its memory, where that keeps channel axes together."""
        access, whole = self.access, replace(call, group_size=None)
        size = prod(access.sizes(x)) * access.item_bytes(x)
        orderly = _dense(access.sizes(x), access.strides(x)) and _view(whole, access, x) is not None
        if orderly and size < HUGE:
            return None
        if orderly and access.from_dlpack is not None:
            return _Fresh(False, True, 0)
        contiguous = _view(whole, access, access.empty_like(x)) is None
        return _Fresh(contiguous, False, size if size >= HUGE else 0)

    def _allocated(self, call: Call, fresh: _Fresh | None, x: Array) -> Array:
        access = self.access
        if fresh is None:
            return access.empty_like(x)
        if fresh.buffered:
            buffer = _cpu.buffer(DTYPES[call.dtype], access.sizes(x), access.strides(x))
            return access.from_dlpack(buffer)  # type: ignore[misc]
        array = access.empty_contiguous(x) if fresh.contiguous else access.empty_like(x)
        if fresh.advised:
            _cpu.advise(array if access.address is None else access.address(array), fresh.advised)
        return array


def writable(access: ArrayAccess, call: Call, out: Array) -> bool:
    """Return whether kernels can write to an array without a copy: one view describes it, with contiguous channels or
    positions."""
    found = _view(call, access, out)
    if found is None:
        return False
    (_, outer, channel, inner), ((_, by_outer, by_channel, by_inner),) = found
    if channel > 1 and by_channel == 1:
        return True
    positions = [stride for size, stride in ((outer, by_outer), (inner, by_inner)) if size > 1]
    return not positions or 1 in positions


def _view(call: Call, access: ArrayAccess, *arrays: Array) -> tuple[Strides, list[Strides]] | None:
    return call.geometry.in_memory(access.sizes(arrays[0]), tuple(map(access.strides, arrays)), call.group_size)


def _dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
