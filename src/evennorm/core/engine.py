"""The way of the data through one engine: array and axis in, by Geometry and a kernel, array and moments out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.core.namespace import Array, Namespace
from evennorm.errors import ArgumentError, ShapeError


@dataclass(frozen=True)
class Engine:
    """An array namespace with the two operations a framework module lends it, both on views.

    `forward` and `inference` have the arguments of `kernels.reference` without xp; `forward` is differentiable in x, gamma,
    beta and residual, and its moments in x.
    """

    name: str
    xp: Namespace
    forward: Callable[..., tuple[Array, Moments]]
    inference: Callable[..., Array]

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
        """Normalizes `x` by its own statistics: what batch normalization does in training.

            y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta [+ residual])

        Args:
            x: an array of any shape with at least one axis; float16, bfloat16, float32 or float64.
            gamma, beta: scale and offset of the parameter shape, the sizes of the channel axes; None for 1 and 0.
            axis: the channel axis, or several; all others are averaged over.
            epsilon: added to the variance; 0 or more.
            mask: true where a value counts; its axes are those that are averaged over, or it broadcasts against `x`.
            activation: None, "relu" or "leaky_relu" (of `negative_slope` below zero).
            residual: an array like `x`, added before the activation.
            virtual_batch_size: samples per ghost batch, each with statistics of its own; divides the first axis.

        Returns:
            y, of x's shape and dtype, and the `Moments` of the parameter shape (with a leading axis more for ghost batches);
            variance is the biased one, and mean + mean_low the mean.

        Raises:
            ShapeError: axis, mask, parameters or residual do not fit `x`.
            ArgumentError: an unknown activation, a negative epsilon.

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
        return self.train(
            self._geometry(x, axis),
            x,
            gamma,
            beta,
            epsilon=checked_epsilon(epsilon),
            mask=mask,
            negative_slope=slope_of(activation, negative_slope),
            residual=residual,
            virtual_batch_size=virtual_batch_size,
            grouped=False,
        )

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
        """Normalizes `x` by given statistics, of the parameter shape: what batch normalization does at inference.

        Arguments, result and errors as in `batch_norm`.

        Example:
            >>> import numpy as np
            >>> from evennorm.numpy import normalize
            >>> normalize(np.array([[1.0], [4.0]]), mean=np.array([2.0]), variance=np.array([4.0]), epsilon=0.0)
            array([[-0.5],
                   [ 1. ]])
        """
        return self.infer(
            self._geometry(x, axis),
            x,
            mean,
            variance,
            gamma,
            beta,
            epsilon=checked_epsilon(epsilon),
            negative_slope=slope_of(activation, negative_slope),
            residual=residual,
        )

    def train(
        self,
        geometry: Geometry,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        *,
        epsilon: float,
        mask: Array | None = None,
        negative_slope: float = 1.0,
        residual: Array | None = None,
        virtual_batch_size: int | None = None,
        grouped: bool = True,
    ) -> tuple[Array, Moments]:
        """`batch_norm` for a layer that knows its geometry; the moments are (groups, channel), unless `grouped` is false."""
        sizes = self.xp.shape(x)
        y, moments = self.forward(
            geometry.view(self.xp, x, virtual_batch_size),
            self._flat(gamma, geometry),
            self._flat(beta, geometry),
            self._residual_view(residual, sizes, geometry, virtual_batch_size),
            None if mask is None else geometry.mask_view(self.xp, self.xp.boolean(mask), sizes, virtual_batch_size),
            epsilon,
            negative_slope,
        )
        shaped = moments if grouped else self._of_parameter_shape(moments, geometry, virtual_batch_size)
        return geometry.restore(self.xp, y, sizes), shaped

    def infer(
        self,
        geometry: Geometry,
        x: Array,
        mean: Array,
        variance: Array,
        gamma: Array | None,
        beta: Array | None,
        *,
        epsilon: float,
        negative_slope: float = 1.0,
        residual: Array | None = None,
    ) -> Array:
        """`normalize` for a layer that knows its geometry."""
        sizes = self.xp.shape(x)
        row = (1, geometry.channel)
        mean = self.xp.reshape(self._flat(mean, geometry), row)
        variance = self.xp.reshape(self._flat(variance, geometry), row)
        y = self.inference(
            geometry.view(self.xp, x),
            Moments(1, mean, None, variance),
            self._flat(gamma, geometry),
            self._flat(beta, geometry),
            self._residual_view(residual, sizes, geometry),
            epsilon,
            negative_slope,
        )
        return geometry.restore(self.xp, y, sizes)

    def follow(
        self, running: tuple[Array, Array, Array], moments: Moments, decay: float, unbiased: bool = False
    ) -> bool | Array | None:
        """Writes running mean, its low part and running variance in place, as `core.running` has it.

        Returns:
            Whether the batch was accepted, a scalar on its device where asking would mean to wait; None where the engine
            writes nothing in place, or not now.
        """
        return None

    def _geometry(self, x: Array, axis: int | Iterable[int]) -> Geometry:
        shape = tuple(size if isinstance(size, int) else None for size in self.xp.shape(x))
        return Geometry(shape, axis)

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

    def _residual_view(
        self, residual: Array | None, sizes: tuple[Any, ...], geometry: Geometry, virtual_batch_size: int | None = None
    ) -> Array | None:
        self._check_residual(residual, sizes)
        return None if residual is None else geometry.view(self.xp, residual, virtual_batch_size)

    def _check_residual(self, residual: Array | None, sizes: tuple[Any, ...]) -> None:
        if residual is None:
            return
        received = tuple(self.xp.shape(residual))
        both_known = [(a, b) for a, b in zip(received, sizes, strict=False) if isinstance(a, int) and isinstance(b, int)]
        if len(received) != len(sizes) or any(a != b for a, b in both_known):
            raise ShapeError(
                f"residual is added to the normalized array and has its shape, {tuple(sizes)}; received shape {received}"
            )

    def _of_parameter_shape(self, moments: Moments, geometry: Geometry, virtual_batch_size: int | None) -> Moments:
        def shaped(statistic: Array) -> Array:
            groups, channel = self.xp.shape(statistic)
            lead = () if virtual_batch_size is None else (groups,)
            trail = geometry.parameter_shape if channel == geometry.channel else (1,) * len(geometry.axis)
            return self.xp.reshape(statistic, (*lead, *trail))

        count = moments.count
        if not isinstance(count, int) and self.xp.shape(count):
            count = shaped(count)
        return Moments(count, *(shaped(statistic) for statistic in moments[1:]))


def slope_of(activation: str | None, negative_slope: float = 0.01) -> float:
    """The slope below zero that the name of an activation stands for.

    Raises:
        ArgumentError: a name that no kernel fuses.
    """
    if activation is None:
        return 1.0
    slopes = {"relu": 0.0, "leaky_relu": negative_slope}
    if activation not in slopes:
        known = ", ".join(map(repr, (None, *slopes)))
        raise ArgumentError(f"activation is one of {known}; received {activation!r}; apply any other one to the result")
    return slopes[activation]


def checked_epsilon(epsilon: float) -> float:
    """`epsilon`, unless it could turn the square root of a variance into NaN."""
    if not epsilon >= 0:
        raise ArgumentError(f"epsilon is a small number added to the variance, 0 or more; received epsilon={epsilon}")
    return float(epsilon)
