"""Express batch normalization at inference as a scale and a shift of each channel, and fold it into the linear map beside
it.

    gamma * (x - mean) / sqrt(variance + epsilon) + beta  =  scale * x + shift

    scale = gamma / sqrt(variance + epsilon)          shift = beta - scale * mean

A linear map with kernel W and bias b, of which a convolution has one per tap t:

    after it:   scale * (sum_t W_t x_t + b) + shift  =  sum_t (scale * W_t) x_t + (scale * b + shift)
    before it:  sum_t W_t (scale * x_t + shift) + b  =  sum_t (W_t * scale) x_t + (b + sum_t W_t shift)

The second holds where every output sees all taps: zeros that a convolution puts around its input were not shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evennorm.models.state import BatchNormState

Array = Any
"""NumPy's, float64."""


@dataclass(frozen=True)
class ScaleShift:
    """scale * x + shift, one value each per channel."""

    scale: Array
    shift: Array

    @classmethod
    def of(cls, state: BatchNormState) -> ScaleShift:
        """Return what a layer with running statistics computes at inference.

        Example:
            >>> import numpy as np
            >>> one, state = np.ones(1), BatchNormState
            >>> found = ScaleShift.of(state("bn", 0.0, 0.9, gamma=6 * one, beta=one, mean=2 * one, variance=9 * one))
            >>> float(found.scale[0]), float(found.shift[0])
            (2.0, -3.0)
        """
        scale = (state.variance.astype("float64") + state.epsilon) ** -0.5
        if state.gamma is not None:
            scale = scale * state.gamma.astype("float64")
        shift = -scale * state.mean.astype("float64")
        return cls(scale, shift if state.beta is None else shift + state.beta.astype("float64"))

    @property
    def is_finite(self) -> bool:
        """Whether no channel is NaN or infinite."""
        return all(bool(((values - values) == 0).all()) for values in (self.scale, self.shift))

    @property
    def keeps_order(self) -> bool:
        """Whether larger values stay larger, so that a maximum may be taken before or after."""
        return bool((self.scale >= 0).all())

    @property
    def keeps_zero(self) -> bool:
        """Whether zeros stay zeros, including those that a convolution puts around its input."""
        return bool((self.shift == 0).all())

    def of_elements(self, before: int, after: int) -> ScaleShift:
        """Return the scale and shift for the elements of (before, channels, after) in one row."""
        return ScaleShift(_spread(self.scale, before, after), _spread(self.shift, before, after))


def _spread(values: Array, before: int, after: int) -> Array:
    return values.reshape(1, -1, 1).repeat(before, 0).repeat(after, 2).reshape(-1)


@dataclass(frozen=True)
class Layout:
    """The memory layout of a framework's kernel: its axes' letters in order, and their sizes.

    t taps, g groups, o outputs and i inputs of one group; channels count group by group.

    Example:
        >>> import numpy as np
        >>> layout = Layout("tigo", {"t": 9, "i": 2, "g": 3, "o": 4})  # of Keras's grouped convolutions
        >>> layout.canonical(np.zeros((3, 3, 2, 12))).shape
        (3, 4, 2, 9)
    """

    letters: str
    sizes: dict[str, int]

    def canonical(self, kernel: Array) -> Array:
        """Return the kernel as (g, o, i, t), float64."""
        split = kernel.astype("float64").reshape([self.sizes[letter] for letter in self.letters])
        return split.transpose([self.letters.index(letter) for letter in "goit"])

    def restored(self, kernel: Array, shape: Sequence[int]) -> Array:
        """Undo `canonical`: return the kernel in the framework's layout."""
        return kernel.transpose(["goit".index(letter) for letter in self.letters]).reshape(shape)


@dataclass(frozen=True)
class Linear:
    """A linear map: a convolution, or with one tap a dense layer, or one row per word of an embedding."""

    kernel: Array
    """(groups, outputs of a group, inputs of a group, taps)."""
    bias: Array | None = None
    """(outputs,)"""

    @property
    def inputs(self) -> int:
        return int(self.kernel.shape[0] * self.kernel.shape[2])

    @property
    def outputs(self) -> int:
        return int(self.kernel.shape[0] * self.kernel.shape[1])

    def then(self, affine: ScaleShift) -> Linear:
        """Return the map followed by a scale and shift of its outputs."""
        groups, outputs = self.kernel.shape[:2]
        bias = affine.shift if self.bias is None else self.bias * affine.scale + affine.shift
        return Linear(self.kernel * affine.scale.reshape(groups, outputs, 1, 1), bias)

    def after(self, affine: ScaleShift) -> Linear:
        """Return the map preceded by a scale and shift of its inputs."""
        per_input = (self.kernel.shape[0], 1, self.kernel.shape[2], 1)
        added = (self.kernel * affine.shift.reshape(per_input)).sum(axis=(2, 3)).reshape(-1)
        bias = added if self.bias is None else self.bias + added
        return Linear(self.kernel * affine.scale.reshape(per_input), bias)


def then(maps: Sequence[Linear], affine: ScaleShift) -> tuple[Linear, ...]:
    """Return maps applied in turn, such as the two of a separable convolution, followed by a scale and shift."""
    *first, last = maps
    return (*first, last.then(affine))


def after(maps: Sequence[Linear], affine: ScaleShift) -> tuple[Linear, ...]:
    """Return maps applied in turn, preceded by a scale and shift; only the last map has a bias, which takes the shift."""
    scaled = maps[0].after(affine)
    if len(maps) == 1:
        return (scaled,)
    shift: Array = scaled.bias
    moved = ScaleShift(1 + 0 * shift, shift)
    return (Linear(scaled.kernel), *after(maps[1:], moved))
