"""Describe what a call of batch normalization computes, in one record that is checked once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

from evennorm.core.activation import LINEAR, Activation
from evennorm.core.geometry import Geometry
from evennorm.errors import ArgumentError


class Formula(Protocol):
    """The numbers in the formula of a call: all that the mathematics needs of it."""

    @property
    def epsilon(self) -> float: ...
    @property
    def activation(self) -> Activation: ...


@dataclass(frozen=True)
class Call:
    """The settings of a call: everything that a kernel gets besides its arrays.

        y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta [+ residual])

    Args:
        geometry: which values are normalized together; its shape is that of x.
        dtype: that of x, such as "float32".
        epsilon: added to the variance; 0 or more.
        activation: applied last.
        group_size: samples of a ghost batch; None for one batch.
        fixed_stats: whether mean and variance are given, so that they do not depend on x.

    Example:
        >>> from evennorm.core.activation import RELU
        >>> from evennorm.core.geometry import Geometry
        >>> call = Call(Geometry((8, 3)), activation=RELU)
        >>> call.activation.name, call.count((8, 3))
        ('relu', 8)
    """

    geometry: Geometry
    dtype: str = "float32"
    epsilon: float = 1e-5
    activation: Activation = LINEAR
    group_size: int | None = None
    fixed_stats: bool = False
    plans: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What kernels have worked out for arrays of this shape, by their memory layout. A call belongs to one library."""

    def count(self, sizes: tuple[int, ...]) -> int:
        """Return the number of values behind each mean, for an array of these sizes."""
        sizes = sizes if self.group_size is None else (self.group_size, *sizes[1:])
        return prod(sizes[a] for a in self.geometry.reduced)

    @property
    def gradient_needs_formulas(self) -> bool:
        """Whether the gradient is left to `core.normalize`.

        The compiled kernels divide by the variance itself, which passes the range of float32 where nothing is added to one
        of 1e-40.
        """
        return self.epsilon < 1e-30


def checked_epsilon(epsilon: float) -> float:
    """Return `epsilon`, unless it could turn the square root of a variance into NaN."""
    if not epsilon >= 0:
        raise ArgumentError(f"epsilon is a small number added to the variance, 0 or more; received epsilon={epsilon}")
    return float(epsilon)


COMPLEX = (
    "batch normalization is of real numbers, since a complex variance can mean several things; {name} is of dtype {dtype}; "
    "pass real and imaginary parts as channels of their own"
)
"""The text of the error."""


def refuse_complex(**arrays: Any) -> None:
    """Raise an error for an array of complex numbers, naming the argument, whatever library the array comes from.

    Raises:
        ArgumentError: one of them is complex.
    """
    for name, array in arrays.items():
        dtype = getattr(array, "dtype", None)
        if getattr(dtype, "kind", "") == "c" or getattr(dtype, "is_complex", False):
            raise ArgumentError(COMPLEX.format(name=name, dtype=getattr(dtype, "name", dtype)))
