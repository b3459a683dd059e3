"""Test where the GPU kernels read and write in arrays of more than 2^31 elements."""

from __future__ import annotations

import numpy as np
import pytest

from tests.contract.on_triton import DEVICE, on_gpu_kernels  # isort: skip, may skip all

import torch
import triton
import triton.language as tl

from evennorm.kernels.triton import elements, tiling

__all__ = ["on_gpu_kernels"]


@triton.jit
def _offsets(
    to, lines_to, there_to, byte_to, group, step, block, outer, channels, inner, segments, lines, octets,
    LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Where the kernels would read and write."""
    channel = elements.channels_of(block, LANES, PLANES)
    line = elements.lines_of(step, SLOTS, True)
    offset, there = elements.offsets_of(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    start = elements.group_start(tl.program_id(0) + group, outer, channels, inner, True)
    index = tl.arange(0, elements.DEPTH * SLOTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    tl.store(to + index, start + offset)
    tl.store(lines_to + index, line + tl.zeros([1, LANES], tl.int64))
    tl.store(there_to + index, (there & (line < lines)).to(tl.int8))
    byte, _ = elements.relu_mask_offsets(
        tl.program_id(0) + group, step, octets, channel, channels, inner, SLOTS, LANES, PLANES, SEGMENTED, True
    )
    tl.store(byte_to + tl.arange(0, SLOTS)[:, None] * LANES + tl.arange(0, LANES)[None, :], byte)


@pytest.mark.parametrize(
    "view",
    [
        tiling.View(1, 70_000_000, 64, 1),
        tiling.View(3, 30_000_000, 70, 1),
        tiling.View(1, 128, 64, 700_001),
        tiling.View(2, 50_000_000, 5, 49),
        tiling.View(1, 1, 1, 5_000_000_000),
    ],
    ids=str,
)
def test_offsets_beyond_32_bits(view: tiling.View) -> None:
    """Of the last tile of an array of more than 2^31 elements."""
    cut = tiling.tiling_of(view, 2, 132, with_dy=False)
    assert cut.int64
    lanes, slots = min(64, cut.lanes), 4
    step, block, group = (cut.lines - 1) // (tiling.DEPTH * slots), cut.blocks(lanes) - 1, view.groups - 1
    tiles = [
        torch.zeros(tiling.DEPTH * slots, lanes, dtype=kind, device=DEVICE)
        for kind in (torch.int64, torch.int64, torch.int8)
    ]
    byte = torch.zeros(slots, lanes, dtype=torch.int64, device=DEVICE)
    lanes = cut.lanes if cut.planes else lanes
    if cut.planes:
        tiles = [torch.zeros(tiling.DEPTH * slots, lanes, dtype=t.dtype, device=DEVICE) for t in tiles]
        byte = torch.zeros(slots, lanes, dtype=torch.int64, device=DEVICE)
    _offsets[(1,)](
        *tiles, byte, group, step, block, view.outer, view.channel, view.inner, cut.segments, cut.lines, cut.octets,
        LANES=lanes, SLOTS=slots, PLANES=cut.planes, SEGMENTED=cut.segments > 1,
    )  # fmt: skip
    found, lines, there = (tile.cpu().numpy() for tile in tiles)
    line, lane = lines, np.arange(lanes)[None, :] + np.zeros_like(lines)
    if cut.planes:
        o, i, channel = line // cut.segments, line % cut.segments * lanes + lane, block
        inside = (o < view.outer) & (i < view.inner)
    else:
        o, i, channel = line, 0, block * lanes + lane
        inside = (o < view.outer) & (channel < view.channel)
    expected = ((group * view.outer + o) * view.channel + channel) * view.inner + i
    assert (found[inside] == expected[inside]).all()
    assert (there.astype(bool) == inside).all()
    assert expected[inside].max() == view.elements - 1
    assert expected[inside].max() >= 1 << 31
    assert sorted(set(lines[:, 0] // tiling.DEPTH)) == sorted({step * slots + s for s in range(slots)})
    octet = (lines[::1, :] // tiling.DEPTH)[:slots]
    pitch = (lanes if cut.segments > 1 else view.inner) if cut.planes else 1
    place = (group * cut.octets + octet) * view.channel + (channel if cut.planes else (block * lanes + lane[:slots]))
    bytes_ = place * pitch + (lane[:slots] if cut.planes else 0)
    seen = inside[:slots]
    assert (byte.cpu().numpy()[seen] == bytes_[seen]).all()
    assert bytes_[seen].max() < cut.mask_bytes
