"""A view goes in; pieces of it that stay in cache, along its outer axis, come out, and one view of them again.

An operation on a whole large array writes to pages that nobody has used yet, which cost more than the arithmetic, and the
next one reads it back from memory. Between pieces the allocator hands the same warm memory round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from evennorm.core.geometry import Geometry
from evennorm.core.summation import BLOCK, channel_sum
from evennorm.tensorflow.namespace import Tensor, under_xla, xp

LEAST = 1 << 22
"""Elements of an array that is worth it. Below 16 MB, a graph's operations cost more than the memory."""
ELEMENTS = 1 << 19
"""In one piece: 2 MB of float32."""
MOST = 8
"""Pieces of one array, however large, half of them where sizes are unknown: each takes a tenth of a second to trace."""
EXPECTED = 64
"""Samples, or values along an axis, where a graph does not know their number."""


class Piece(NamedTuple):
    """Rows of a view (1, outer, channel, inner)."""

    begin: Any
    end: Any
    blocks: bool
    """Whether the rows are a multiple of `BLOCK`."""


Pieces = tuple[Piece | None, ...]
"""None is the whole view."""


def number(geometry: Geometry) -> int:
    """How many pieces an array is worked on in: a matter of its sizes, and one where XLA fuses the operations."""
    if under_xla():
        return 1
    expected = Geometry((EXPECTED if size is None else size for size in geometry.shape), geometry.axis)
    elements = expected.outer * expected.channel * expected.inner  # type: ignore[operator]
    if elements < LEAST:
        return 1
    most = MOST if None not in geometry.shape else MOST // 2
    return max(1, min(most, elements // ELEMENTS, expected.outer // _step(geometry.inner)))  # type: ignore[operator]


def pieces(view: Tensor, number: int) -> Pieces:
    """Rows that are vectors go in blocks, but for the last piece: what is aligned, TensorFlow takes without a copy."""
    if number == 1:
        return (None,)
    _, outer, _, inner = xp.shape(view)
    step = _step(inner)
    size = outer // (number * step) * step
    last = number - 1
    return (*(Piece(i * size, (i + 1) * size, step == BLOCK) for i in range(last)), Piece(last * size, outer, False))


def _step(inner: Any) -> int:
    """Of how many rows a piece is a multiple: with an inner axis, each is an image or the like."""
    return BLOCK if isinstance(inner, int) and inner == 1 else 1


def cut(view: Tensor, piece: Piece | None) -> Tensor:
    """One piece of a view."""
    if piece is None:
        return view
    _, outer, channel, inner = xp.shape(view)
    rows = tf.reshape(view, (outer, channel, inner))[piece.begin : piece.end]
    return tf.reshape(rows, (1, piece.end - piece.begin, channel, inner))


def later(tensors: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, used again after others are there.

    Of several pieces, Grappler would else keep the first use for the second; of one, what follows can write in its place.
    """
    with tf.control_dependencies(after):
        return [tf.identity(tensor) for tensor in tensors]


def joined(parts: Iterable[Tensor]) -> Tensor:
    """Pieces as one view."""
    first, *more = parts
    return tf.concat([first, *more], 1) if more else first


def total(parts: Iterable[Tensor], where: Pieces) -> Tensor:
    """The sum per channel of values that are there for every piece, as `channel_sum` has it: (1, channel), float64."""
    sums = [_sum(values, piece) for values, piece in zip(parts, where, strict=True)]
    return sums[0] if len(sums) == 1 else tf.add_n(sums)


def total_product(parts: Iterable[tuple[Tensor, Tensor]], where: Pieces) -> Tensor:
    """`total` of the products of two tensors, both float32."""
    sums = [_sum_product(a, b, piece) for (a, b), piece in zip(parts, where, strict=True)]
    return sums[0] if len(sums) == 1 else tf.add_n(sums)


def _sum_product(a: Tensor, b: Tensor, piece: Piece | None) -> Tensor:
    _, outer, _, inner = xp.shape(a)
    if not isinstance(inner, int) or inner != 1 or under_xla():
        return _sum(a * b, piece)
    if piece is not None and piece.blocks:
        return _sum_product_of_blocks(a, b)
    if not isinstance(outer, int) or outer < BLOCK:
        return _sum(a * b, piece)
    blocks = Piece(0, outer // BLOCK * BLOCK, True)
    rest = Piece(blocks.end, outer, False)
    whole = _sum_product_of_blocks(cut(a, blocks), cut(b, blocks))
    return whole if outer == blocks.end else whole + _sum(cut(a, rest) * cut(b, rest), rest)


def _sum_product_of_blocks(a: Tensor, b: Tensor) -> Tensor:
    """The gradient by the filter of a 1 x 1 depthwise convolution is this sum, and takes no memory for the product.

    It adds in float32, position by position. There are `BLOCK` of them: what remains of the outer axis goes to the channels.
    """
    _, outer, channel, _ = xp.shape(a)
    lanes = outer // BLOCK * channel
    partial = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
        input=tf.reshape(a, (1, BLOCK, 1, lanes)),
        filter_sizes=(1, 1, lanes, 1),
        out_backprop=tf.reshape(b, (1, BLOCK, 1, lanes)),
        strides=(1, 1, 1, 1),
        padding="VALID",
    )
    return tf.reduce_sum(tf.cast(tf.reshape(partial, (-1, channel)), tf.float64), 0, keepdims=True)


def _sum(values: Tensor, piece: Piece | None) -> Tensor:
    _, _, channel, inner = xp.shape(values)
    if piece is None or not piece.blocks or not isinstance(inner, int) or inner != 1:
        return channel_sum(xp, values)
    # The same sums without looking for a rest.
    partial = tf.reduce_sum(tf.reshape(values, (-1, BLOCK, channel)), 1)
    return tf.reduce_sum(tf.cast(partial, tf.float64), 0, keepdims=True)
