"""Divide an array into the lines, tiles and programs of the GPU kernels, by its memory layout.

A dense array is (groups, outer, channel, inner) in memory. Its elements are seen in lines of at most `lanes`:

- rows, where inner is 1: a line is a position, its lanes are neighbouring channels;
- planes: a line is a part of one channel's plane, its lanes are neighbouring positions.

A tile is 8 lines for each of several slots. Programs divide the lines of a block: of `lanes` channels, or of one channel.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from evennorm.core.geometry import Geometry

DEPTH = 8
"""Lines that a slot takes at once: their sums stay in float32, their activation bits make one byte."""

WIDEST = 256
"""Lanes of a line at most."""

TOGETHER = 1 << 12
"""Pairs of sums that a program merges at once: 64 KB."""

COUNTER_BYTES = 16
"""Bytes at the start of a workspace, for the counter of `running`; what follows stays aligned."""

UPDATED_TOGETHER = 1 << 10
"""Channels whose running statistics a program updates at once, if it has enough threads."""

ON_CHIP = 1 << 13
"""Elements of 4 bytes, of x and dy each, that one program keeps in registers: 16 for each of 512 threads.

Forward, which keeps x alone, twice as many where lines are aligned for wide loads; else addresses need the registers.
"""

ALIGNED = 8
"""Bytes that a thread should load at once."""

SECTOR = 32
"""Bytes that memory is read in at least."""

INT32 = 1 << 31
SLACK = 1 << 24
"""Elements that the offsets of masked lanes may lie beyond the array."""


class View(NamedTuple):
    """The sizes of a dense array in memory order: offset = ((group * outer + o) * channel + c) * inner + i."""

    groups: int
    outer: int
    channel: int
    inner: int

    @property
    def elements(self) -> int:
        return self.groups * self.outer * self.channel * self.inner


@lru_cache(maxsize=4096)
def dense_view(
    geometry: Geometry, sizes: tuple[int, ...], strides: tuple[int, ...], group_size: int | None = None
) -> View | None:
    """Return the view of an array with these strides, in elements; None where it has gaps, or its axes have another order.

    Example:
        >>> dense_view(Geometry((8, 16, 7, 7), 1), (8, 16, 7, 7), (784, 49, 7, 1))
        View(groups=1, outer=8, channel=16, inner=49)
        >>> dense_view(Geometry((8, 16, 7, 7), 1), (8, 16, 7, 7), (784, 1, 112, 16))  # channels last in memory
        View(groups=1, outer=392, channel=16, inner=1)
    """
    found = geometry.in_memory(sizes, (strides,), group_size)
    if 0 in sizes:  # whatever its layout
        return View(1 if group_size is None else sizes[0] // group_size, 0, geometry.channel, 1)
    if found is None:
        return None
    (groups, outer, channel, inner), ((by_group, by_outer, by_channel, by_inner),) = found
    if inner == 1 and (channel == 1 or by_channel != 1):  # one run of positions, for each channel
        outer, by_outer, inner, by_inner = 1, 0, outer, by_outer
    expected = ((inner, by_inner), (channel, by_channel), (outer, by_outer), (groups, by_group))
    step = 1
    for size, stride in expected:
        if size > 1 and stride != step:
            return None
        step *= size
    return View(groups, outer, channel, inner)


class Tiling(NamedTuple):
    """How the kernels go through a view; the names are those of their arguments."""

    view: View
    planes: bool
    lanes: int
    """Lanes of a line; for rows at most, since a choice may use fewer."""
    segments: int
    """Lines that a plane is divided into."""
    lines: int
    """Lines of one group, for each block."""
    unit: int
    """The largest power of two, at most 16, that divides the distance between lines: loads may be aligned to it."""
    int64: bool
    """Whether offsets need 64 bits."""
    slots: int
    """Slots of the tile that holds all lines, where a program keeps them on the chip; else 0."""

    @property
    def octets(self) -> int:
        return -(-self.lines // DEPTH)

    def blocks(self, lanes: int) -> int:
        """Return the number of blocks side by side if a line has so many lanes."""
        return self.view.channel if self.planes else -(-self.view.channel // lanes)

    @property
    def mask_bytes(self) -> int:
        """Bytes of the activation mask: one bit per element, 8 lines in a byte."""
        pitch = min(self.lanes, self.view.inner) if self.planes else 1
        return self.view.groups * self.octets * self.view.channel * pitch

    def splits(self, lanes: int, slots: int, programs: int) -> int:
        """Return among how many programs the lines of a block are divided, so that there are about `programs` in all.

        All of them merge the sums of all others of their block: beyond `TOGETHER` that would take longer than it saves.
        """
        steps = -(-self.lines // (DEPTH * slots))
        together = TOGETHER if self.planes else TOGETHER // lanes
        return max(1, min(steps, together, programs // (self.blocks(lanes) * self.view.groups)))


@lru_cache(maxsize=4096)
def tiling_of(view: View, item: int, processors: int, with_dy: bool) -> Tiling:
    """Return the tiling of a view of elements of `item` bytes for a GPU with so many multiprocessors; `with_dy` is the
    backward pass.

    The activation mask has the same layout in both.

    Example:
        >>> tiling_of(View(1, 128, 2048, 49), 2, 132, with_dy=True).slots  # 6272 values of a channel
        16
        >>> tiling_of(View(1, 401408, 64, 1), 2, 132, with_dy=False).slots  # the values of 16 channels are 13 MB
        0
    """
    planes = view.inner > 1 or view.channel == 1
    limit = ON_CHIP * 4 // max(item, 4)
    if not with_dy and gcd(view.inner if planes else view.channel, 16) * item >= ALIGNED:
        limit *= 2
    if planes:
        lanes = plane_lanes(view.inner)
        segments = -(-view.inner // lanes)
        lines = view.outer * segments
        unit, slots = view.inner, power_of_two(-(-lines // DEPTH))
        slots = slots if slots * DEPTH * lanes <= limit else 0
    else:
        segments, lines, unit = 1, view.outer, view.channel
        lanes, slots = row_lanes(view, item, processors, limit)
    int64 = view.elements >= INT32 - SLACK
    return Tiling(view, planes, lanes, segments, lines, gcd(unit, 16), int64, slots)


def plane_lanes(inner: int) -> int:
    """Return the widest line, a power of two, that leaves at most a quarter of the lanes idle; else the one that wastes
    least.

    Idle lanes cost instructions, of which there are enough; narrow lines cost a division each.

    Example:
        >>> plane_lanes(3136), plane_lanes(196), plane_lanes(49), plane_lanes(5)
        (256, 256, 64, 2)
    """
    widths = [width for width in (256, 128, 64, 32, 16, 8, 4, 2, 1) if width < 2 * inner]

    def idle(width: int) -> float:
        return 1 - inner / (-(-inner // width) * width)

    return next((width for width in widths if idle(width) <= 1 / 4), min(widths, key=idle, default=1))


def row_lanes(view: View, item: int, processors: int, limit: int) -> tuple[int, int]:
    """Return lanes, and the number of slots that hold all rows on the chip, or 0.

    On the chip the fewest channels make the most programs, but a whole sector of memory is read anyway.
    """
    widest = min(WIDEST, power_of_two(view.channel))
    slots = power_of_two(-(-view.outer // DEPTH))
    lanes = widest
    least = max(1, SECTOR // item)
    while lanes > least and (slots * DEPTH * lanes > limit or -(-view.channel // lanes) * view.groups < processors):
        lanes //= 2
    return (lanes, slots) if slots * DEPTH * lanes <= limit else (widest, 0)


def power_of_two(n: int) -> int:
    """Return the least power of two that is not below `n`.

    Example:
        >>> power_of_two(1), power_of_two(49), power_of_two(64)
        (1, 64, 64)
    """
    return 1 << max(0, n - 1).bit_length()
