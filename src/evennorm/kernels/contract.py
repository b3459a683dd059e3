"""Declare what every kernel computes and how it reaches the arrays of a library.

`kernels.reference` defines the numbers. A kernel takes a `Call` and arrays without a mask, and allocates its results itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from evennorm.core.call import Call
from evennorm.core.moments import Moments
from evennorm.core.namespace import Array


class ArrayAccess(NamedTuple):
    """The functions by which kernels read and allocate arrays of a library."""

    address: Callable[[Array], int] | None
    """The address of an array; None where the compiled kernels read the arrays of the library themselves."""
    strides: Callable[[Array], tuple[int, ...]]
    """Strides, in elements."""
    sizes: Callable[[Array], tuple[int, ...]]
    item_bytes: Callable[[Array], int]
    empty_like: Callable[[Array], Array]
    """An array like another one, dense, its axes in the order of the other's memory."""
    empty_contiguous: Callable[[Array], Array]
    empty: Callable[[tuple[int, ...], Array], Array]
    """An array of a shape, on the device of another one and in the precision that this is computed in."""
    empty_bytes: Callable[[int, Array], Array]
    """Bytes on the device of an array."""
    copy_like: Callable[[Array, Array], Array]
    """A dense copy of the first array, in the dtype and the memory order of the second."""
    from_dlpack: Callable[[Any], Array] | None = None
    """An array in memory from elsewhere; None where the library cannot take such memory, or its own is as good."""


RunningStats = tuple[Array, Array, Array, float | None, bool, Array | None, Array | None]
"""Running statistics that the forward pass updates in place, as `core.running` defines: mean, mean_low, variance, decay,
whether the variance is unbiased, batches, skipped.

`mean_low` is what rounding took from the mean. `decay` is the weight of the old statistics; None for n / (n + 1) after n
`batches`, which then counts those that changed something, and else every batch. `skipped` counts those that changed
nothing, being empty or not finite. Both are scalars of int64, or None.
"""

Saved = tuple[Array, Array | None]
"""What the backward pass needs beside x, gamma and beta: statistics, (3, groups, channel) of mean, mean_low and variance;
and, where an activation comes after a residual, the activation mask (a bit for each element, in an order of the kernel's
own), else None.
"""


Gradients = tuple[Array, Array | None, Array | None, Array | None]
"""The gradients of x, gamma, beta and residual; None where there is no such array."""


class UnfitError(Exception):
    """A parameter or statistic that a kernel cannot read as it is. Nothing was computed."""


class Kernel(Protocol):
    """Batch normalization on one kind of device. Parameters and statistics are dense, and as precise as x is computed."""

    @property
    def name(self) -> str: ...
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
        """Normalize `x` by its own moments, or by `statistics` as `Saved` has them, and update `running`.

        Raises:
            UnfitError: a parameter or statistic is not dense, of another size, dtype or device.
        """
        ...

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
        """Normalize `x` by given statistics."""
        ...

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
        """Differentiate `forward`; `d_mean` and `d_variance` are derivatives by the moments themselves."""
        ...

    def moments(self, call: Call, x: Array) -> Array:
        """Compute mean, mean_low and variance of `x`, in the form of `Saved`'s statistics."""
        ...

    def gradient_sums(
        self, call: Call, dy: Array, x: Array, gamma: Array | None, beta: Array | None, saved: Saved
    ) -> tuple[Array, Array | None, Array | None]:
        """Compute sum dz and sum dz * (x - mean), (2, groups, channel), and this device's gradients of gamma and beta."""
        ...

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
        """Compute the gradients of x and of a residual, from the sums and the count of values over all devices."""
        ...

    def open_elements(self, call: Call, x: Array, gamma: Array | None, beta: Array | None, saved: Saved) -> Array:
        """Return, as booleans of x's shape, which elements the activation let through; only if `saved` has a mask."""
        ...

    def update_running_stats(self, running: RunningStats, moments: Moments) -> Any:
        """Update `running` by moments (groups, channel) of one batch; return whether it accepted them, on their device."""
        ...
