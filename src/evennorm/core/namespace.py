"""List what the mathematics needs from an array library: some twenty functions, under NumPy's names."""

from __future__ import annotations

from typing import Any, Literal, Protocol

Array = Any


Summation = Literal["tree", "wide", "blocks"]
"""How an engine sums: as `sum` does it, pairwise or in a tree; in the widest precision at once; or in blocks first
(`core.summation`)."""


class Namespace(Protocol):
    """The functions that `core` calls. `numpy` and `jax.numpy` have most of them; each framework module adds the rest.

    All work under the engine's compiler. Sizes may be tensors where a graph does not know them yet.
    """

    float32: Any
    float64: Any
    widest: Any
    """The widest float that sums may be merged in: float64, or float32 where the engine has no other."""

    @property
    def summation(self) -> Summation:
        """How long axes are summed without losing more than short ones."""
        ...

    def shape(self, x: Array) -> tuple[Any, ...]:
        """Return the sizes of `x`: an int where known, else a scalar tensor of the engine."""
        ...

    def dtype(self, x: Array) -> Any:
        """Return the dtype of `x`, comparable with `float64`."""
        ...

    def astype(self, x: Array, dtype: Any) -> Array: ...
    def asarray(self, value: Any, like: Array) -> Array:
        """Return a number or array as an array of `like`'s dtype, on its device."""
        ...

    def boolean(self, x: Any) -> Array:
        """Return a mask in any form, from this library or a list of numbers, as an array of booleans."""
        ...

    def reshape(self, x: Array, shape: tuple[Any, ...]) -> Array: ...
    def transpose(self, x: Array, axes: tuple[int, ...]) -> Array: ...
    def broadcast_to(self, x: Array, shape: tuple[Any, ...]) -> Array: ...
    def concatenate(self, arrays: list[Array], axis: int) -> Array: ...
    def sum(self, x: Array, axis: tuple[int, ...]) -> Array: ...
    def all(self, x: Array) -> Array: ...
    def any(self, x: Array) -> Array: ...
    def where(self, condition: Array, a: Any, b: Any) -> Array: ...
    def maximum(self, a: Array, b: Any) -> Array: ...
    def minimum(self, a: Array, b: Any) -> Array: ...
    def sqrt(self, x: Array) -> Array: ...
    def isfinite(self, x: Array) -> Array: ...
    def leaky_relu(self, x: Array, slope: float) -> Array:
        """Return `x` where it is positive, else `slope * x`; NaN stays NaN, and the derivative at 0 is the slope.

        The engine's own operation where it has one, since converters of programs look for that.
        """
        ...

    def relu6(self, x: Array) -> Array:
        """Return `x` between 0 and 6, else the nearer of them; NaN stays NaN, and the derivative at both ends is 0."""
        ...

    def stop_gradient(self, x: Array) -> Array: ...
    def rounded(self, x: Array) -> Array:
        """Return `x`, without derivative, rounded to within a unit in the last place, so that no compiler can simplify it.

        Compilers contract x - sum * (1 / n) into one operation that never rounds the shift, which then differs from the one
        that is kept (by 1e-4 at mean 1e4 under XLA). Clearing the last bit by integer arithmetic prevents it.
        """
        ...


def wide(xp: Namespace, x: Array) -> Array:
    """Convert `x` to the precision that it is computed in: float64 stays, everything else becomes float32."""
    return x if xp.dtype(x) == xp.float64 else xp.astype(x, xp.float32)
