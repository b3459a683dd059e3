"""Where the GPU kernels read and write in arrays of more than 2^31 elements."""

from __future__ import annotations

import numpy as np
import pytest

from tests.contract.on_triton import DEVICE, served  # isort: skip, may skip all

import torch
import triton
import triton.language as tl

from evennorm.kernels.triton import elements, layout

__all__ = ["served"]


@triton.jit
def _offsets(
    to, lines_to, there_to, sign_to, group, step, block, outer, channels, inner, segments, lines, octets,
    LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Where the kernels would read and write."""
    channel = elements.channels_of(block, LANES, PLANES)
    line = elements.lines_of(step, SLOTS, True)
    offset, there = elements.places(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    start = elements.group_start(tl.program_id(0) + group, outer, channels, inner, True)
    index = tl.arange(0, elements.DEPTH * SLOTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    tl.store(to + index, start + offset)
    tl.store(lines_to + index, line + tl.zeros([1, LANES], tl.int64))
    tl.store(there_to + index, (there & (line < lines)).to(tl.int8))
    sign, _ = elements.sign_places(
        tl.program_id(0) + group, step, octets, channel, channels, inner, SLOTS, LANES, PLANES, SEGMENTED, True
    )
    tl.store(sign_to + tl.arange(0, SLOTS)[:, None] * LANES + tl.arange(0, LANES)[None, :], sign)


@pytest.mark.parametrize(
    "view",
    [
        layout.View(1, 70_000_000, 64, 1),
        layout.View(3, 30_000_000, 70, 1),
        layout.View(1, 128, 64, 700_001),
        layout.View(2, 50_000_000, 5, 49),
        layout.View(1, 1, 1, 5_000_000_000),
    ],
    ids=str,
)
def test_offsets_beyond_32_bits(view: layout.View) -> None:
    """Of the last tile of an array of more than 2^31 elements."""
    how = layout.cut(view, 2, 132, with_dy=False)
    assert how.wide
    lanes, slots = min(64, how.lanes), 4
    step, block, group = (how.lines - 1) // (layout.DEPTH * slots), how.blocks(lanes) - 1, view.groups - 1
    tiles = [
        torch.zeros(layout.DEPTH * slots, lanes, dtype=kind, device=DEVICE)
        for kind in (torch.int64, torch.int64, torch.int8)
    ]
    sign = torch.zeros(slots, lanes, dtype=torch.int64, device=DEVICE)
    lanes = how.lanes if how.planes else lanes
    if how.planes:
        tiles = [torch.zeros(layout.DEPTH * slots, lanes, dtype=t.dtype, device=DEVICE) for t in tiles]
        sign = torch.zeros(slots, lanes, dtype=torch.int64, device=DEVICE)
    _offsets[(1,)](
        *tiles, sign, group, step, block, view.outer, view.channel, view.inner, how.segments, how.lines, how.octets,
        LANES=lanes, SLOTS=slots, PLANES=how.planes, SEGMENTED=how.segments > 1,
    )  # fmt: skip
    found, lines, there = (tile.cpu().numpy() for tile in tiles)
    line, lane = lines, np.arange(lanes)[None, :] + np.zeros_like(lines)
    if how.planes:
        o, i, channel = line // how.segments, line % how.segments * lanes + lane, block
        inside = (o < view.outer) & (i < view.inner)
    else:
        o, i, channel = line, 0, block * lanes + lane
        inside = (o < view.outer) & (channel < view.channel)
    expected = ((group * view.outer + o) * view.channel + channel) * view.inner + i
    assert (found[inside] == expected[inside]).all()
    assert (there.astype(bool) == inside).all()
    assert expected[inside].max() == view.elements - 1
    assert expected[inside].max() >= 1 << 31
    assert sorted(set(lines[:, 0] // layout.DEPTH)) == sorted({step * slots + s for s in range(slots)})
    octet = (lines[::1, :] // layout.DEPTH)[:slots]
    pitch = (lanes if how.segments > 1 else view.inner) if how.planes else 1
    place = (group * how.octets + octet) * view.channel + (channel if how.planes else (block * lanes + lane[:slots]))
    signs = place * pitch + (lane[:slots] if how.planes else 0)
    seen = inside[:slots]
    assert (sign.cpu().numpy()[seen] == signs[seen]).all()
    assert signs[seen].max() < how.sign_bytes
