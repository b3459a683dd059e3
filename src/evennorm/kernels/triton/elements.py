"""What happens to one element, and where it lies: the parts that forward and backward share, so that they agree to the bit.

Kernels are compiled without contraction (`launch`): where a product and a sum are rounded once, `tl.fma` says so.
The formulas are those of core/normalize.py; `layout` describes lines, lanes and slots.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import triton
import triton.language as tl

from evennorm.kernels.triton import layout

DEPTH = tl.constexpr(layout.DEPTH)

NUMBERS = [
    "groups", "outer", "channels", "inner", "segments", "lines", "splits", "frozen", "size_class", "count", "unbiased",
]  # fmt: skip
"""Arguments for whose values nothing is compiled anew; `aligned` tells what is known of them."""


def kernel(function: Callable[..., Any]) -> Any:
    """A function to launch."""
    numbers = [name for name in NUMBERS if name in signature(function).parameters]
    return triton.jit(function, do_not_specialize=numbers)


@triton.jit
def channels_of(block, LANES: tl.constexpr, PLANES: tl.constexpr):
    """The channels of a block: as many as it has lanes, or one."""
    if PLANES:
        return block + tl.arange(0, 1)
    else:
        return block * LANES + tl.arange(0, LANES)


@triton.jit
def aligned(pitch, UNIT: tl.constexpr):
    """`pitch`, of which the compiler then knows what divides it."""
    return pitch // UNIT * UNIT


@triton.jit
def group_start(group, outer, channels, inner, WIDE: tl.constexpr):
    """Where the elements of a group begin."""
    if WIDE:
        return group.to(tl.int64) * outer * channels * inner
    else:
        return group * outer * channels * inner


@triton.jit
def lines_of(step, SLOTS: tl.constexpr, WIDE: tl.constexpr):
    """The lines of a step, (DEPTH * SLOTS, 1), all slots of one depth before the next.

    A slot takes neighbours, which share a byte of signs. For loads a tile has two axes, so that there is one way only in
    which the compiler divides it among threads: slot by slot. Seen as (DEPTH, SLOTS, LANES), each thread then holds its
    slots at all depths, and sums over depth need no other thread. A load of three axes leaves it to the version of Triton.
    """
    index = tl.arange(0, DEPTH * SLOTS)[:, None]
    line = (step * SLOTS + index % SLOTS) * DEPTH + index // SLOTS
    return line.to(tl.int64) if WIDE else line


@triton.jit
def places(
    line, channel, outer, channels, inner, segments, LANES: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr
):
    """Offsets from the start of the group of all lanes of `line`, (..., 1), and which lanes there are."""
    if PLANES:
        lane = tl.arange(0, LANES)
        if SEGMENTED:
            o = line // segments
            first = (line - o * segments) * LANES
            position = first + lane
            offset = (o * channels + channel) * inner + first + lane
        else:
            position = lane + line * 0
            offset = (line * channels + channel) * inner + lane
        return offset, position < inner
    else:
        return line * channels + channel, (channel < channels) & (line >= 0)


@triton.jit
def sign_places(
    group, step, octets, channel, channels, inner, SLOTS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr,
    SEGMENTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of the bytes, (SLOTS, LANES), that hold the signs of a step's tile, and which of them there are."""
    octet = (step * SLOTS + tl.arange(0, SLOTS))[:, None]
    if WIDE:
        octet = octet.to(tl.int64)
    if PLANES:
        pitch = LANES if SEGMENTED else inner
        lane = tl.arange(0, LANES)[None, :]
        offset = ((group * octets + octet) * channels + channel) * pitch + lane
        return offset, (octet < octets) & (lane < pitch)
    else:
        return (group * octets + octet) * channels + channel[None, :], (octet < octets) & (channel < channels)[None, :]


@triton.jit
def fetched(pointer, offset, there, MASKED: tl.constexpr, A: tl.constexpr):
    """A tile, (DEPTH, SLOTS, LANES), in the precision that is computed in; 0 where nothing is."""
    if MASKED:
        return by_slot(tl.load(pointer + offset, mask=there, other=0.0)).to(A)
    else:
        return by_slot(tl.load(pointer + offset)).to(A)


@triton.jit
def by_slot(tile):
    """(DEPTH * SLOTS, LANES) -> (DEPTH, SLOTS, LANES)."""
    return tl.reshape(tile, (DEPTH, tile.shape[0] // DEPTH, tile.shape[1]))


@triton.jit
def put(pointer, offset, values, there, MASKED: tl.constexpr):
    """Writes a tile, rounded once."""
    rounded = tl.reshape(values.to(pointer.dtype.element_ty), (DEPTH * values.shape[1], values.shape[2]))
    if MASKED:
        tl.store(pointer + offset, rounded, mask=there)
    else:
        tl.store(pointer + offset, rounded)


@triton.jit
def preactivation(centred, scale, shift):
    """z = (x - mean) * scale + shift, rounded once."""
    return tl.fma(centred, scale, shift)


@triton.jit
def activated(z, slope, ACTIVATION: tl.constexpr):
    """z where it is positive, the slope's share of it elsewhere; NaN stays NaN."""
    if ACTIVATION == "none":
        return z
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    else:
        return tl.where(z <= 0, z * slope, z)


@triton.jit
def gated(dy, is_open, slope, ACTIVATION: tl.constexpr):
    """dz, where the activation was open, and the slope's share elsewhere."""
    if ACTIVATION == "none":
        return dy
    elif ACTIVATION == "relu":
        return tl.where(is_open, dy, 0.0)
    else:
        return tl.where(is_open, dy, dy * slope)


@triton.jit
def packed(is_open):
    """(DEPTH, SLOTS, LANES) -> a byte for each slot and lane, of which line d has bit d."""
    bits = is_open.to(tl.int32) << tl.arange(0, DEPTH)[:, None, None]
    return tl.sum(bits, 0).to(tl.uint8)


@triton.jit
def unpacked(signs):
    """The inverse of `packed`."""
    return (signs.to(tl.int32)[None, :, :] >> tl.arange(0, DEPTH)[:, None, None]) & 1 != 0


@triton.jit
def over_lines(values, PLANES: tl.constexpr):
    """The sum over (SLOTS, LANES), for each channel of the block, in a fixed order."""
    total = tl.sum(values, 0)
    if PLANES:
        return tl.sum(total, 0, keep_dims=True)
    else:
        return total
