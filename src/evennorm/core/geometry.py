"""Reduce a shape and an axis to (outer, channel, inner), with the shapes of parameters and masks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

from evennorm.core.namespace import Array, Namespace
from evennorm.errors import ArgumentError, ShapeError

Size = int | None
Strides = tuple[int, int, int, int]


@dataclass(frozen=True, init=False)
class Geometry:
    """Which values are normalized together: all that agree in their position along `axis`.

    Every array of the project is seen through this record as `(groups, outer, channel, inner)`: statistics are taken
    over `outer` and `inner`, once per channel and group. `groups` is 1 but for ghost batches.

    Args:
        shape: sizes of the array; None where unknown, allowed everywhere but on `axis`.
        axis: the channel axis, or several; negative counts from the end. The axes that are *kept*, as in Keras and
            Flax (Haiku's `axis` names the reduced ones instead).

    Raises:
        ShapeError: an empty shape, an axis out of range or given twice, a channel of unknown size.

    Example:
        >>> from evennorm import Geometry
        >>> images = Geometry((32, 28, 28, 3), axis=-1)
        >>> images.outer, images.channel, images.inner
        (25088, 3, 1)
        >>> images.count, images.reduced, images.parameter_shape
        (25088, (0, 1, 2), (3,))
    """

    shape: tuple[Size, ...]
    axis: tuple[int, ...]
    # Derived values that every call reads.
    parameter_shape: tuple[int, ...] = field(compare=False, repr=False)
    """Shape of gamma, beta, mean and variance: the sizes of the channel axes, in the order of the array."""
    channel: int = field(compare=False, repr=False)
    """How many groups of values are normalized, each by its own mean and variance."""
    permutation: tuple[int, ...] | None = field(compare=False, repr=False)
    """The transposition that brings the channel axes together, or None where they already are."""

    def __init__(self, shape: Iterable[Size], axis: int | Iterable[int] = -1):
        sizes = tuple(None if size is None else _whole(size, "a size") for size in shape)
        _check_shape(sizes)
        object.__setattr__(self, "shape", sizes)
        axes = _normalized_axes(sizes, axis)
        together = axes[-1] - axes[0] + 1 == len(axes)
        object.__setattr__(self, "axis", axes)
        object.__setattr__(self, "parameter_shape", tuple(sizes[a] for a in axes))
        object.__setattr__(self, "channel", prod(self.parameter_shape))
        object.__setattr__(self, "permutation", None if together else self.reduced + axes)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes that mean and variance are taken over."""
        return tuple(a for a in range(self.rank) if a not in self.axis)

    @property
    def broadcast_shape(self) -> tuple[int, ...]:
        """`parameter_shape` with ones on the reduced axes, so that a parameter broadcasts against the array."""
        return tuple(self.shape[a] if a in self.axis else 1 for a in range(self.rank))  # type: ignore[misc]

    @property
    def outer(self) -> Size:
        """Product of the sizes before the channel; None where one of them is unknown."""
        return _product(self.shape[a] for a in self._outer_axes)

    @property
    def inner(self) -> Size:
        """Product of the sizes after the channel; None where one of them is unknown."""
        return _product(self.shape[a] for a in self._inner_axes)

    @property
    def count(self) -> Size:
        """Number of values behind each mean; None where a reduced size is unknown."""
        return _product(self.shape[a] for a in self.reduced)

    @property
    def _outer_axes(self) -> tuple[int, ...]:
        return self.reduced if self.permutation else tuple(range(self.axis[0]))

    @property
    def _inner_axes(self) -> tuple[int, ...]:
        return () if self.permutation else tuple(range(self.axis[-1] + 1, self.rank))

    def view(self, xp: Namespace, x: Array, group_size: int | None = None) -> Array:
        """Return `x` as (groups, outer, channel, inner), without a copy where `x` is contiguous and its channel axes
        adjacent.

        `group_size` cuts the first axis into ghost batches of that many samples.

        Raises:
            ShapeError: the batch is no multiple of `group_size`, or the first axis is a channel axis.
            ArgumentError: `group_size` is less than 1.
        """
        sizes = xp.shape(x)
        groups = self._groups(sizes[0], group_size)
        if self.permutation:
            x = xp.transpose(x, self.permutation)
        # Not outer // groups: an empty batch has no ghost batches to divide by.
        outer = _product(sizes[a] if a or group_size is None else group_size for a in self._outer_axes)
        inner = _product(sizes[a] for a in self._inner_axes)
        return xp.reshape(x, (groups, outer, self.channel, inner))

    def restore(self, xp: Namespace, view: Array, sizes: tuple[Any, ...]) -> Array:
        """Undo `view`: return an array of the original `sizes`."""
        if self.permutation is None:
            return xp.reshape(view, sizes)
        x = xp.reshape(view, tuple(sizes[a] for a in self.permutation))
        return xp.transpose(x, tuple(self.permutation.index(a) for a in range(self.rank)))

    def in_memory(
        self, sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...], group_size: int | None = None
    ) -> tuple[Strides, list[Strides]] | None:
        """Return sizes and strides of a four-axis view of arrays that have these `strides`, counted in elements.

        No array is copied: whichever reduced axes merge in all of them become outer and inner, in the order of the first
        array's memory. None where more than two of them remain, or the channel axes do not merge.
        """
        groups = self._groups(sizes[0], group_size)
        rows = [list(stride) for stride in strides]
        lead = [row[0] * (group_size or 0) for row in rows]
        left = (sizes[0] if group_size is None else group_size, *sizes[1:])
        channel = _merged([a for a in self.axis if left[a] != 1], left, rows)
        order = sorted((a for a in self.reduced if left[a] != 1), key=lambda a: -rows[0][a])
        reduced = _merged(order, left, rows)
        if len(channel) > 1 or len(reduced) > 2:
            return None
        one = (1, [0] * len(rows))
        outer, inner = (*reduced, one, one)[:2]
        (kept,) = channel or [one]
        four = zip(lead, outer[1], kept[1], inner[1], strict=True)
        return (groups, outer[0], kept[0], inner[0]), list(four)

    def _groups(self, batch: Any, group_size: int | None) -> Any:
        if group_size is None:
            return 1
        if group_size < 1:
            raise ArgumentError(
                f"virtual_batch_size is a number of samples, 1 or more; received virtual_batch_size={group_size}"
            )
        if 0 in self.axis:
            raise ShapeError(
                f"ghost batches divide the first axis, which axis={_text_axis(self.axis)} of shape {_text(self.shape)} "
                "declares a channel; drop virtual_batch_size or choose another axis"
            )
        if isinstance(batch, int) and batch % group_size:
            raise ShapeError(
                f"virtual_batch_size must divide the batch: received {batch} samples and virtual_batch_size={group_size}; "
                "drop the remainder of the data set or choose a divisor"
            )
        return batch // group_size

    def mask_axes(self, mask_shape: Iterable[Size]) -> tuple[int, ...]:
        """Return the axes of the array that the axes of a mask stand for.

        A mask of the array's rank must broadcast against it. A shorter one holds a value per position, so its axes are
        the first of the *reduced* ones: (N, T) for an array (N, C, T) with axis 1. Only where that cannot fit, but the
        leading axes do, channel included, are those taken (what Keras's `Masking` makes of such an array).

        Raises:
            ShapeError: the mask fits neither way.
        """
        mask = tuple(mask_shape)
        choices = [tuple(range(self.rank))] if len(mask) == self.rank else [self.reduced, tuple(range(self.rank))]
        for axes in choices:
            if 0 < len(mask) <= len(axes) and all(_fits(m, self.shape[a]) for m, a in zip(mask, axes, strict=False)):
                return axes[: len(mask)]
        positions = tuple(self.shape[a] for a in self.reduced)
        raise ShapeError(
            f"a mask holds one value per position, {_text(positions)} here, or broadcasts against the array "
            f"{_text(self.shape)} (axis={_text_axis(self.axis)}); received a mask of shape {_text(mask)}"
        )

    def mask_view(self, xp: Namespace, mask: Array, sizes: tuple[Any, ...], group_size: int | None = None) -> Array:
        """Return `mask` as (groups, outer, 1 or channel, inner), to go with `view` of an array of these `sizes`."""
        mask_sizes = xp.shape(mask)
        axes = self.mask_axes(None if not isinstance(size, int) else size for size in mask_sizes)
        full = xp.reshape(mask, tuple(mask_sizes[axes.index(a)] if a in axes else 1 for a in range(self.rank)))
        if set(axes) & set(self.axis):
            return self.view(xp, xp.broadcast_to(full, sizes), group_size)
        ones = tuple(1 if a in self.axis else size for a, size in enumerate(sizes))
        positions = Geometry((1 if a in self.axis else s for a, s in enumerate(self.shape)), self.axis)
        return positions.view(xp, xp.broadcast_to(full, ones), group_size)

    def explain(self) -> str:
        """Return an explanation of what is averaged, what looks wrong and what to do: `evennorm explain` without its worked
        example."""
        from evennorm.explanation import Explanation

        return Explanation.of(self).text()


cached_geometry = lru_cache(maxsize=4096)(Geometry)
"""Cached `Geometry`: working it out again would take longer than normalizing a small array."""


def _check_shape(shape: tuple[Size, ...]) -> None:
    if not shape:
        raise ShapeError(
            "batch normalization needs an array with at least one axis; received the empty shape (), a single number"
        )
    if any(size is not None and size < 0 for size in shape):
        raise ShapeError(f"sizes are positive, 0 for an empty batch, or None where unknown; received shape {_text(shape)}")


def _normalized_axes(shape: tuple[Size, ...], axis: int | Iterable[int]) -> tuple[int, ...]:
    rank = len(shape)
    asked = tuple(_whole(a, "an axis") for a in (axis if isinstance(axis, Iterable) else (axis,)))
    if not asked:
        raise ShapeError(
            f"at least one channel axis is needed; received axis=() for shape {_text(shape)}; channels-last is -1"
        )
    for a in asked:
        if not -rank <= a < rank:
            raise ShapeError(
                f"axis {a} was asked of a shape of rank {rank}, {_text(shape)}; valid axes are {-rank} to {rank - 1}; "
                "channels-last is -1, channels-first is 1"
            )
    axes = tuple(sorted(a % rank for a in asked))
    if len(set(axes)) < len(axes):
        raise ShapeError(f"each axis may be named once; received axis={asked} for shape {_text(shape)}, which is {axes}")
    for a in axes:
        if shape[a] is None:
            raise ShapeError(
                f"the channel axis needs a known size, since gamma and beta have one value per channel; axis {a} of shape "
                f"{_text(shape)} is unknown; give its size or choose another axis"
            )
    return axes


def _whole(value: Any, what: str) -> int:
    """Return `value` as an int, unless that would change it."""
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != value:
        raise ShapeError(f"{what} is a whole number; received {value!r}; give an int")
    return whole


def _product(sizes: Iterable[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        if size is None:
            return None
        product = product * size
    return product


def _merged(axes: list[int], sizes: tuple[int, ...], strides: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Return size and strides of what is left when neighbours among `axes` become one axis, wherever they can in every
    array."""
    merged: list[tuple[int, list[int]]] = []
    for a in axes:
        size, here = sizes[a], [row[a] for row in strides]
        if merged and merged[-1][1] == [stride * size for stride in here]:
            size *= merged.pop()[0]
        merged.append((size, here))
    return merged


def _fits(mask: Size, size: Size) -> bool:
    return mask is None or size is None or mask in (1, size)


def _text(shape: tuple[Size, ...]) -> str:
    inside = ", ".join("?" if size is None else str(size) for size in shape)
    return f"({inside},)" if len(shape) == 1 else f"({inside})"


def _text_axis(axis: tuple[int, ...]) -> str:
    return str(axis[0]) if len(axis) == 1 else str(axis)
