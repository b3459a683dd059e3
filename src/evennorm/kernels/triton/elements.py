"""Locate, load, normalize and store elements, by functions that forward and backward share, so that bits agree.

Kernels are compiled without contraction (`choices.SETTINGS`): where a product and a sum are rounded once, `tl.fma` says so.
The formulas are those of core/normalize.py; `tiling` describes lines, lanes and slots.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import triton
import triton.language as tl

from evennorm.kernels.triton import tiling

DEPTH = tl.constexpr(tiling.DEPTH)

NUMBERS = [
    "groups", "outer", "channels", "inner", "segments", "lines", "splits", "fixed_stats", "count", "unbiased"
]  # fmt: skip
"""Arguments whose values cause no recompilation; `with_divisor` says what is known of them."""


def kernel(function: Callable[..., Any]) -> Any:
    """Decorate a function that is launched. Its pointers come first, then its numbers, then constants."""
    numbers = [name for name in NUMBERS if name in signature(function).parameters]
    return triton.jit(function, do_not_specialize=numbers)


@triton.jit
def channels_of(block, LANES: tl.constexpr, PLANES: tl.constexpr):
    """Return the channels of a block: as many as it has lanes, or one."""
    if PLANES:
        return block + tl.arange(0, 1)
    else:
        return block * LANES + tl.arange(0, LANES)


@triton.jit
def with_divisor(pitch, UNIT: tl.constexpr):
    """Return `pitch`, marked with what divides it for the compiler."""
    return pitch // UNIT * UNIT


@triton.jit
def group_start(group, outer, channels, inner, INT64: tl.constexpr):
    """Return the offset at which the elements of a group begin."""
    if INT64:
        return group.to(tl.int64) * outer * channels * inner
    else:
        return group * outer * channels * inner


@triton.jit
def lines_of(step, SLOTS: tl.constexpr, INT64: tl.constexpr):
    """Return the lines of a step, (DEPTH * SLOTS, 1), all slots of one depth before the next.

    A slot takes neighbours, whose activation bits share a byte. For loads a tile has two axes, so that the compiler
    divides it among threads in one way only: slot by slot. Seen as (DEPTH, SLOTS, LANES), each thread then holds its
    slots at all depths, and sums over depth need no other thread. A load of three axes leaves it to the version of Triton.
    """
    index = tl.arange(0, DEPTH * SLOTS)[:, None]
    line = (step * SLOTS + index % SLOTS) * DEPTH + index // SLOTS
    return line.to(tl.int64) if INT64 else line


@triton.jit
def offsets_of(
    line, channel, outer, channels, inner, segments, LANES: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr
):
    """Return the offsets of all lanes of `line`, (..., 1), from the start of the group, and which lanes exist."""
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
def relu_mask_offsets(
    group, step, octets, channel, channels, inner, SLOTS: tl.constexpr, LANES: tl.constexpr, PLANES: tl.constexpr,
    SEGMENTED: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Return the offsets of the bytes, (SLOTS, LANES), of a step's activation bits, and which of them exist."""
    octet = (step * SLOTS + tl.arange(0, SLOTS))[:, None]
    if INT64:
        octet = octet.to(tl.int64)
    if PLANES:
        pitch = LANES if SEGMENTED else inner
        lane = tl.arange(0, LANES)[None, :]
        offset = ((group * octets + octet) * channels + channel) * pitch + lane
        return offset, (octet < octets) & (lane < pitch)
    else:
        return (group * octets + octet) * channels + channel[None, :], (octet < octets) & (channel < channels)[None, :]


@triton.jit
def load_tile(pointer, offset, mask, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Load a tile, (DEPTH, SLOTS, LANES), in the precision that is computed in; 0 where nothing is."""
    if MASKED:
        return by_slot(tl.load(pointer + offset, mask=mask, other=0.0)).to(ACC)
    else:
        return by_slot(tl.load(pointer + offset)).to(ACC)


@triton.jit
def by_slot(tile):
    """Reshape (DEPTH * SLOTS, LANES) to (DEPTH, SLOTS, LANES)."""
    return tl.reshape(tile, (DEPTH, tile.shape[0] // DEPTH, tile.shape[1]))


@triton.jit
def store_tile(pointer, offset, values, mask, MASKED: tl.constexpr):
    """Store a tile, rounded once."""
    rounded = tl.reshape(values.to(pointer.dtype.element_ty), (DEPTH * values.shape[1], values.shape[2]))
    if MASKED:
        tl.store(pointer + offset, rounded, mask=mask)
    else:
        tl.store(pointer + offset, rounded)


@triton.jit
def preactivation(centred, scale, shift):
    """Compute z = (x - mean) * scale + shift, rounded once."""
    return tl.fma(centred, scale, shift)


@triton.jit
def activate(z, slope, ACTIVATION: tl.constexpr):
    """Return z where it is positive, at most 6 for relu6, and slope * z elsewhere; NaN stays NaN."""
    if ACTIVATION == "none":
        return z
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "relu6":
        return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    else:
        return tl.where(z <= 0, z * slope, z)


@triton.jit
def opens(z, ACTIVATION: tl.constexpr):
    """Return whether the activation lets its argument through; it does if that is NaN."""
    if ACTIVATION == "relu6":
        return ((z <= 0) | (z >= 6)) == 0
    else:
        return (z <= 0) == 0


@triton.jit
def gate(dy, is_open, slope, ACTIVATION: tl.constexpr):
    """Return dy where the activation let its argument through, slope * dy elsewhere."""
    if ACTIVATION == "none":
        return dy
    elif ACTIVATION == "relu" or ACTIVATION == "relu6":
        return tl.where(is_open, dy, 0.0)
    else:
        return tl.where(is_open, dy, dy * slope)


@triton.jit
def pack_bits(is_open):
    """Pack (DEPTH, SLOTS, LANES) booleans into a byte for each slot and lane; line d is bit d."""
    bits = is_open.to(tl.int32) << tl.arange(0, DEPTH)[:, None, None]
    return tl.sum(bits, 0).to(tl.uint8)


@triton.jit
def unpack_bits(packed):
    """Undo `pack_bits`."""
    return (packed.to(tl.int32)[None, :, :] >> tl.arange(0, DEPTH)[:, None, None]) & 1 != 0


@triton.jit
def over_lines(values, PLANES: tl.constexpr):
    """Sum over (SLOTS, LANES), or over slots alone, for each channel of the block, in a fixed order."""
    total = tl.sum(values, 0)
    if PLANES:
        return tl.sum(total, 0, keep_dims=True)
    else:
        return total
