"""Implement `batch_norm` and `normalize` on NumPy arrays: checks, the choice of the kernel, and output memory that the
caller gives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from evennorm.core.call import Call, refuse_complex
from evennorm.core.engine import Engine
from evennorm.core.moments import Moments
from evennorm.kernels import reference
from evennorm.numpy import cpu
from evennorm.numpy.arrays import checked_out, copy, exact, floats, parameter, wide
from evennorm.numpy.namespace import xp

__all__ = ["batch_norm", "engine", "normalize"]


class _NumPyEngine(Engine):
    """An engine that passes arrays to the compiled kernels without copies, and masks and ghost batches of separated axes to
    the reference."""

    def batch_norm(
        self,
        x: np.ndarray,
        gamma: np.ndarray | None = None,
        beta: np.ndarray | None = None,
        *,
        axis: int | Iterable[int] = -1,
        epsilon: float = 1e-5,
        mask: np.ndarray | None = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: np.ndarray | None = None,
        virtual_batch_size: int | None = None,
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Moments]:
        """Normalize `x` by its own statistics: what batch normalization does in training.

            y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta [+ residual])

        Args:
            x: an array of any shape with at least one axis; float16, float32, float64, or bfloat16 of ml_dtypes.
            gamma, beta: scale and offset of the parameter shape, the sizes of the channel axes; None for 1 and 0.
            axis: the channel axis, or several; all others are averaged over.
            epsilon: added to the variance; 0 or more.
            mask: true where a value counts; its axes are those that are averaged over, or it broadcasts against `x`.
            activation: None, "relu", "relu6" or "leaky_relu" (of `negative_slope` below zero).
            residual: an array like `x`, added before the activation.
            virtual_batch_size: samples per ghost batch, each with statistics of its own; divides the first axis.
            out: an array like `x`, a memmap too, that y is written to; it may be `x` itself.

        Returns:
            y, of x's shape and dtype, and the `Moments` of the parameter shape (with a leading axis more for ghost batches);
            variance is the biased one, and mean + mean_low the mean. Their dtype is float64 for float64, else float32.

        Raises:
            ShapeError: axis, mask, parameters, residual or out do not fit `x`.
            ArgumentError: a dtype that is not a float's, an unknown activation, a negative epsilon, a read-only out.

        Warns:
            RuntimeWarning: finite values have a variance beyond the range of their precision; y is beta there.

        Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1.

        Example:
            >>> import numpy as np
            >>> from evennorm.numpy import batch_norm
            >>> x = np.array([[1.0, 10.0], [3.0, 10.0]])
            >>> y, moments = batch_norm(x, epsilon=0.0625, out=x)
            >>> moments.mean, moments.variance
            (array([ 2., 10.]), array([1., 0.]))
            >>> x.round(4)
            array([[-0.9701,  0.    ],
                   [ 0.9701,  0.    ]])
        """
        refuse_complex(x=x, gamma=gamma, beta=beta, residual=residual)
        x = floats("x", x)
        call = self._call(x, axis, epsilon, activation, negative_slope, virtual_batch_size)
        y, moments = self.train(call, x, gamma, beta, mask=mask, residual=residual, grouped=False, out=out)
        if message := self.range_warning(moments):
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return y, moments

    def normalize(
        self,
        x: np.ndarray,
        mean: np.ndarray,
        variance: np.ndarray,
        gamma: np.ndarray | None = None,
        beta: np.ndarray | None = None,
        *,
        axis: int | Iterable[int] = -1,
        epsilon: float = 1e-5,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Normalize `x` by given statistics, of the parameter shape: what batch normalization does at inference.

        Arguments, result and errors as in `batch_norm`. A mean in float64 is used as exactly as it is given, for float32
        data too.

        Example:
            >>> import numpy as np
            >>> from evennorm.numpy import normalize
            >>> normalize(np.array([[1.0], [4.0]]), mean=np.array([2.0]), variance=np.array([4.0]), epsilon=0.0)
            array([[-0.5],
                   [ 1. ]])
        """
        refuse_complex(x=x, mean=mean, variance=variance, gamma=gamma, beta=beta, residual=residual)
        x = floats("x", x)
        call = self._call(x, axis, epsilon, activation, negative_slope, fixed_stats=True)
        return self.infer(call, x, mean, variance, gamma, beta, residual=residual, out=out)

    def train(
        self,
        call: Call,
        x: np.ndarray,
        gamma: np.ndarray | None,
        beta: np.ndarray | None,
        *,
        mask: np.ndarray | None = None,
        residual: np.ndarray | None = None,
        grouped: bool = True,
        out: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Moments]:
        x, residual, target = self._arrays(x, residual, out)
        gamma, beta = (parameter(value, wide(x), own=out is not None) for value in (gamma, beta))
        if supports(call, x, mask):
            gamma, beta = self._flat(gamma, call.geometry), self._flat(beta, call.geometry)
            y, moments = cpu.train(call, x, gamma, beta, residual, target)
        else:
            with np.errstate(invalid="ignore"):  # do not warn about values that are not finite, like the compiled kernels
                y, moments = super().train(call, x, gamma, beta, mask=mask, residual=residual)
            copy(y, target)
        if not grouped:
            moments = self._of_parameter_shape(moments, call)
        return y if out is None else out, moments

    def infer(
        self,
        call: Call,
        x: np.ndarray,
        mean: np.ndarray,
        variance: np.ndarray,
        gamma: np.ndarray | None,
        beta: np.ndarray | None,
        *,
        residual: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        x, residual, target = self._arrays(x, residual, out)
        own = out is not None
        mean = parameter(mean, exact(mean, x), own=own)
        variance, gamma, beta = (parameter(value, wide(x), own=own) for value in (variance, gamma, beta))
        if supports(call, x):
            mean, variance, gamma, beta = (self._flat(value, call.geometry) for value in (mean, variance, gamma, beta))
            y = cpu.infer(call, x, mean, variance, gamma, beta, residual, target)
        else:
            with np.errstate(invalid="ignore"):
                y = super().infer(call, x, mean, variance, gamma, beta, residual=residual)
            copy(y, target)
        return y if out is None else out

    def at_hand(self, value: np.ndarray) -> np.ndarray:
        return value

    def _arrays(self, x: Any, residual: Any, out: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        x = floats("x", x)
        if residual is not None:
            residual = floats("residual", residual)
            self._check_residual(residual, x.shape)
            residual = residual.astype(x.dtype, copy=False)
        return x, residual, checked_out(out, x)


def supports(call: Call, x: np.ndarray, mask: Any = None) -> bool:
    """Return whether the compiled kernels support a call; the reference takes all others."""
    return mask is None and cpu.supports(x.dtype) and (call.geometry.permutation is None or call.group_size is None)


engine = _NumPyEngine("numpy", xp, partial(reference.forward, xp))
batch_norm = engine.batch_norm
normalize = engine.normalize
