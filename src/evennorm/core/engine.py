"""Normalize the arrays of one library: check the arguments, choose a view and call the kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf
from typing import Any

from evennorm.core.activation import activation_of
from evennorm.core.call import Call, checked_epsilon, refuse_complex
from evennorm.core.geometry import Geometry, cached_geometry
from evennorm.core.moments import OUT_OF_RANGE, Moments, out_of_range
from evennorm.core.namespace import Array, Namespace, wide
from evennorm.core.normalize import normalize_by
from evennorm.errors import ShapeError


@dataclass(frozen=True)
class Engine:
    """An array namespace and the operation on views that a framework module provides.

    `forward` has the arguments of that of `kernels.reference` without xp, and is differentiable in x, gamma, beta and
    residual, and its moments in x.
    """

    name: str
    xp: Namespace
    forward: Callable[..., tuple[Array, Moments]]
    make_call: Callable[..., Call] = field(default_factory=lambda: lru_cache(maxsize=4096)(Call), init=False, compare=False)
    """Cached `Call`: checking the arguments again would take longer than normalizing a small array."""

    def batch_norm(
        self,
        x: Array,
        gamma: Array | None = None,
        beta: Array | None = None,
        *,
        axis: int | Iterable[int] = -1,
        epsilon: float = 1e-5,
        mask: Array | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: Array | None = None,
        virtual_batch_size: int | None = None,
    ) -> tuple[Array, Moments]:
        """Normalize `x` by its own statistics: what batch normalization does in training.

            y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta [+ residual])

        Args:
            x: an array of any shape with at least one axis; float16, bfloat16, float32 or float64.
            gamma, beta: scale and offset of the parameter shape, the sizes of the channel axes; None for 1 and 0.
            axis: the channel axis, or several; all others are averaged over.
            epsilon: added to the variance; 0 or more.
            mask: true where a value counts; its axes are those that are averaged over, or it broadcasts against `x`.
            activation: None, "relu", "relu6" or "leaky_relu" (of `negative_slope` below zero).
            residual: an array like `x`, added before the activation.
            virtual_batch_size: samples per ghost batch, each with statistics of its own; divides the first axis.

        Returns:
            y, of x's shape and dtype, and the `Moments` of the parameter shape (with a leading axis more for ghost batches);
            variance is the biased one, and mean + mean_low the mean.

        Raises:
            ShapeError: axis, mask, parameters or residual do not fit `x`.
            ArgumentError: an unknown activation, a negative epsilon, complex numbers.

        Warns:
            RuntimeWarning: finite values have a variance beyond the range of their precision; y is beta there. Said where
                the numbers are at hand: on the CPU, and not in a program that is traced or compiled.

        Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1.

        Example:
            >>> import numpy as np
            >>> from evennorm.numpy import batch_norm
            >>> y, moments = batch_norm(np.array([[1.0, 10.0], [3.0, 10.0]]), epsilon=0.0625)
            >>> moments.mean, moments.variance
            (array([ 2., 10.]), array([1., 0.]))
            >>> y.round(4)
            array([[-0.9701,  0.    ],
                   [ 0.9701,  0.    ]])
        """
        refuse_complex(x=x, gamma=gamma, beta=beta, residual=residual)
        call = self._call(x, axis, epsilon, activation, negative_slope, virtual_batch_size)
        y, moments = self.train(call, x, gamma, beta, mask=mask, residual=residual, grouped=False)
        self.warn_of_range(moments, stacklevel=3)
        return y, moments

    def warn_of_range(self, moments: Moments, stacklevel: int) -> None:
        """Warn as `batch_norm` documents."""
        if message := self.range_warning(moments):
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel)

    def normalize(
        self,
        x: Array,
        mean: Array,
        variance: Array,
        gamma: Array | None = None,
        beta: Array | None = None,
        *,
        axis: int | Iterable[int] = -1,
        epsilon: float = 1e-5,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: Array | None = None,
    ) -> Array:
        """Normalize `x` by given statistics, of the parameter shape: what batch normalization does at inference.

        Arguments, result and errors as in `batch_norm`.

        Example:
            >>> import numpy as np
            >>> from evennorm.numpy import normalize
            >>> normalize(np.array([[1.0], [4.0]]), mean=np.array([2.0]), variance=np.array([4.0]), epsilon=0.0)
            array([[-0.5],
                   [ 1. ]])
        """
        refuse_complex(x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, residual=residual)
        call = self._call(x, axis, epsilon, activation, negative_slope, fixed_stats=True)
        return self.infer(call, x, mean, variance, gamma, beta, residual=residual)

    def train(
        self,
        call: Call,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        *,
        mask: Array | None = None,
        residual: Array | None = None,
        grouped: bool = True,
    ) -> tuple[Array, Moments]:
        """Compute `batch_norm` for a layer that has made its call; moments are (groups, channel) if `grouped`."""
        sizes, geometry = self.xp.shape(x), call.geometry
        y, moments = self.forward(
            call,
            geometry.view(self.xp, x, call.group_size),
            self._flat(gamma, geometry),
            self._flat(beta, geometry),
            self._residual_view(residual, sizes, call),
            None if mask is None else geometry.mask_view(self.xp, self.xp.boolean(mask), sizes, call.group_size),
        )
        return geometry.restore(self.xp, y, sizes), moments if grouped else self._of_parameter_shape(moments, call)

    def infer(
        self,
        call: Call,
        x: Array,
        mean: Array,
        variance: Array,
        gamma: Array | None,
        beta: Array | None,
        *,
        residual: Array | None = None,
    ) -> Array:
        """Compute `normalize` for a layer that has made its call."""
        xp, geometry = self.xp, call.geometry
        self._check_residual(residual, xp.shape(x))
        mean, variance, gamma, beta = (self._row(row, geometry) for row in (mean, variance, gamma, beta))
        wide_residual = None if residual is None else wide(xp, residual)
        numbers = call.epsilon, call.activation
        y = normalize_by(xp, wide(xp, x), mean, variance, gamma, beta, *numbers, wide_residual)
        return xp.astype(y, xp.dtype(x))

    def update_running_stats(
        self, running: tuple[Array, Array, Array], moments: Moments, decay: float, unbiased: bool = False
    ) -> bool | Array | None:
        """Update running mean, its low part and running variance in place, as `core.running` defines.

        Returns:
            Whether the batch was accepted, a scalar on its device where asking would mean to wait; None where the engine
            writes nothing in place, or not now.
        """
        return None

    def range_warning(self, moments: Moments) -> str | None:
        """Return a warning where finite values have a variance beyond the range of their precision and this can be seen
        without waiting."""
        variance = self.at_hand(moments.variance)
        if variance is None or not variance.size or variance.max() < inf:  # which is false for NaN
            return None
        mean = self.at_hand(moments.mean)
        return OUT_OF_RANGE.format(dtype=variance.dtype) if out_of_range(mean, variance) else None

    def at_hand(self, value: Array) -> Any:
        """Return the value as a NumPy array if it can be read without waiting for a device; None otherwise, as in compiled
        code."""
        return None

    def _call(
        self,
        x: Array,
        axis: int | Iterable[int],
        epsilon: float = 1e-5,
        activation: str | None = None,
        negative_slope: float = 0.01,
        virtual_batch_size: int | None = None,
        fixed_stats: bool = False,
    ) -> Call:
        """Check the arguments of `batch_norm` and `normalize`."""
        shape = tuple(size if isinstance(size, int) else None for size in self.xp.shape(x))
        axis = tuple(axis) if isinstance(axis, Iterable) else axis
        numbers = checked_epsilon(epsilon), activation_of(activation, negative_slope), virtual_batch_size
        return self.make_call(cached_geometry(shape, axis), self._dtype_name(x), *numbers, fixed_stats)

    def _dtype_name(self, x: Array) -> str:
        dtype = self.xp.dtype(x)
        return getattr(dtype, "name", None) or str(dtype)

    def _flat(self, parameter: Array | None, geometry: Geometry) -> Any:
        if parameter is None:
            return None
        received = tuple(self.xp.shape(parameter))
        if received != geometry.parameter_shape:
            raise ShapeError(
                f"gamma, beta, mean and variance have one value per channel, shape {geometry.parameter_shape} for an array "
                f"of shape {geometry.shape} with axis={geometry.axis}; received shape {received}"
            )
        return parameter if len(received) == 1 else self.xp.reshape(parameter, (geometry.channel,))

    def _row(self, parameter: Array | None, geometry: Geometry) -> Any:
        """Return a parameter in the shape that broadcasts against x."""
        flat = self._flat(parameter, geometry)
        return (
            flat
            if flat is None or geometry.axis == (geometry.rank - 1,)
            else self.xp.reshape(flat, geometry.broadcast_shape)
        )

    def _residual_view(self, residual: Array | None, sizes: tuple[Any, ...], call: Call) -> Array | None:
        self._check_residual(residual, sizes)
        return None if residual is None else call.geometry.view(self.xp, residual, call.group_size)

    def _check_residual(self, residual: Array | None, sizes: tuple[Any, ...]) -> None:
        if residual is None:
            return
        received = tuple(self.xp.shape(residual))
        both_known = [(a, b) for a, b in zip(received, sizes, strict=False) if isinstance(a, int) and isinstance(b, int)]
        if len(received) != len(sizes) or any(a != b for a, b in both_known):
            raise ShapeError(
                f"residual is added to the normalized array and has its shape, {tuple(sizes)}; received shape {received}"
            )

    def _of_parameter_shape(self, moments: Moments, call: Call) -> Moments:
        geometry = call.geometry

        def shaped(statistic: Array) -> Array:
            groups, channel = self.xp.shape(statistic)
            lead = () if call.group_size is None else (groups,)
            trail = geometry.parameter_shape if channel == geometry.channel else (1,) * len(geometry.axis)
            return self.xp.reshape(statistic, (*lead, *trail))

        count = moments.count
        if not isinstance(count, int) and self.xp.shape(count):
            count = shaped(count)
        return Moments(count, *(shaped(statistic) for statistic in moments[1:]))
