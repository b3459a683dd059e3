"""Explain batch normalization of a shape and an axis, with a worked example."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np

from evennorm.core.geometry import Geometry, Size
from evennorm.explanation import Explanation, WorkedExample

__all__ = ["Explanation", "explain"]

_EXAMPLE_EPSILON = 1e-3
"""Keras's default."""
_MOST_NUMPY_AXES = 32


def explain(shape: Iterable[Size], axis: int | Iterable[int] = -1) -> Explanation:
    """Explain what batch normalization of an array of this shape averages, how many parameters it has, and what looks wrong.

    Args:
        shape: sizes of the array, batch axis first; None where unknown.
        axis: the channel axis, or several; negative counts from the end.

    Returns:
        A record with `findings`, `parameters`, `data_format`, `count_text` and more; `text()` gives it to people,
        `as_dict()` to programs.

    Raises:
        ShapeError: an empty shape, an axis out of range or given twice, a channel of unknown size.

    Example:
        >>> from evennorm.tools.explain import explain
        >>> images = explain((32, 3, 28, 28), axis=-1)
        >>> [finding.code for finding in images.findings]
        ['spatial-axis']
        >>> images.data_format.name
        'channels-first images'
        >>> images.example.values, images.example.mean, images.example.variance
        ((3.0, 7.0, 1.0, 5.0, 9.0, 3.0, 7.0, 1.0), 4.5, 7.75)
    """
    geometry = Geometry(shape, axis)
    return Explanation.of(geometry, _worked_example(geometry))


def _worked_example(geometry: Geometry) -> WorkedExample | None:
    """Make `geometry` small and normalize it by the code for a layer's input; None where NumPy has no such array."""
    from evennorm.numpy import batch_norm

    if 0 in geometry.shape or geometry.rank > _MOST_NUMPY_AXES:
        return None
    shape = _small(geometry)
    x = ((7 * np.arange(float(prod(shape))) + 3) % 10).reshape(shape)
    y, moments = batch_norm(x, axis=geometry.axis, epsilon=_EXAMPLE_EPSILON)
    first = tuple(0 if a in geometry.axis else slice(None) for a in range(geometry.rank))
    corner = (0,) * len(geometry.axis)
    return WorkedExample(
        shape=shape,
        axis=geometry.axis,
        epsilon=_EXAMPLE_EPSILON,
        code=f"((7 * np.arange({float(prod(shape))}) + 3) % 10).reshape({', '.join(map(str, shape))})",
        values=tuple(x[first].ravel().tolist()),
        mean=float((moments.mean + moments.mean_low)[corner]),
        variance=float(moments.variance[corner]),
        normalized=tuple(y[first].ravel().tolist()),
    )


def _small(geometry: Geometry) -> tuple[int, ...]:
    """Return the shape reduced to two channels and about eight values for each."""
    wanted = {0: 1, 1: 6, 2: 3}.get(len(geometry.reduced), 2)
    sizes, values = [], 1
    for a, size in enumerate(geometry.shape):
        if a in geometry.axis:
            sizes.append(min(size or 1, 2))
            continue
        sizes.append(min(wanted if size is None else size, wanted if values < 8 else 1))
        values *= sizes[-1]
    return tuple(sizes)
