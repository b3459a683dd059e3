"""How arrays are cut for the GPU kernels: every element in one line, lane and byte of its own. Needs no Triton."""

from __future__ import annotations

import numpy as np
import pytest

from evennorm.core.geometry import Geometry
from evennorm.kernels.triton import tiling
from evennorm.kernels.triton.tiling import DEPTH, View, dense_view, tiling_of

VIEWS = [
    View(1, 37, 5, 1),
    View(1, 4_001, 70, 1),
    View(3, 20, 300, 1),
    View(1, 9, 11, 49),
    View(2, 5, 3, 5_183),
    View(1, 130, 2, 196),
    View(1, 1, 1, 9_001),
    View(1, 1, 6, 1),
    View(4, 7, 3, 5),
]


@pytest.mark.parametrize("with_dy", [False, True])
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_every_element_has_its_place(view: View, with_dy: bool) -> None:
    """As `elements.offsets_of` and `relu_mask_offsets` work them out."""
    cut = tiling_of(view, 4, 132, with_dy)
    lines = np.arange(cut.octets * DEPTH)[:, None]
    if cut.planes:
        o, i = lines // cut.segments, lines % cut.segments * cut.lanes + np.arange(cut.lanes)
        inside = (lines < cut.lines) & (i < view.inner)
        offsets = o * view.channel * view.inner + i
        pitch, per_channel, per_block = min(cut.lanes, view.inner), view.inner, 1
        byte = (lines // DEPTH * view.channel) * pitch + np.arange(cut.lanes)
    else:
        channel = np.arange(cut.lanes)
        offsets, inside = lines * view.channel + channel, lines < cut.lines
        pitch, per_channel, per_block = 1, 1, cut.lanes
        byte = lines // DEPTH * view.channel + channel
    seen, bits = [], []
    for group in range(view.groups):
        for block in range(cut.blocks(cut.lanes)):
            there = inside if cut.planes else inside & (block * cut.lanes + channel < view.channel)
            start = group * view.outer * view.channel * view.inner + block * per_block * per_channel
            first_byte = group * cut.octets * view.channel * pitch + block * per_block * pitch
            seen.append((start + offsets)[there])
            bits.append((first_byte + byte)[there] * DEPTH + np.broadcast_to(lines % DEPTH, there.shape)[there])
    seen, bits = np.concatenate(seen), np.concatenate(bits)
    assert np.array_equal(np.sort(seen), np.arange(view.elements))
    assert len(np.unique(bits)) == view.elements
    assert bits.max() < cut.mask_bytes * DEPTH
    if cut.slots:
        assert cut.slots * DEPTH >= cut.lines
        assert cut.slots * DEPTH * cut.lanes <= 2 * tiling.ON_CHIP


def test_activation_bits_lie_the_same_in_both_passes() -> None:
    for view in VIEWS:
        for item in (2, 4, 8):
            forward, backward = (tiling_of(view, item, 132, with_dy) for with_dy in (False, True))
            assert (forward.planes, forward.lines, forward.segments) == (backward.planes, backward.lines, backward.segments)
            assert forward.mask_bytes == backward.mask_bytes
            assert not forward.planes or forward.lanes == backward.lanes


def strides_of(array: np.ndarray) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


@pytest.mark.parametrize(
    ("array", "axis", "group", "expected"),
    [
        (np.zeros((8, 5)), 1, None, View(1, 8, 5, 1)),
        (np.zeros((8, 5)), 0, None, View(1, 1, 8, 5)),
        (np.zeros((8, 1)), 1, None, View(1, 1, 1, 8)),
        (np.zeros((8, 3, 4, 5)), 1, None, View(1, 8, 3, 20)),
        (np.zeros((8, 4, 5, 3)).transpose(0, 3, 1, 2), 1, None, View(1, 160, 3, 1)),
        (np.zeros((8, 4, 5, 3)).transpose(0, 3, 1, 2), 1, 2, View(4, 40, 3, 1)),
        (np.zeros((8, 3, 4, 5)), 1, 4, View(2, 4, 3, 20)),
        (np.zeros((2, 3, 4, 5, 6)), 2, None, View(1, 6, 4, 30)),
        (np.zeros((6, 5, 4, 3)), (2, 3), None, View(1, 30, 12, 1)),
        (np.zeros((6, 5, 4, 3)), (0, 1), None, View(1, 1, 30, 12)),
        (np.zeros((8, 6))[:, ::2], 1, None, None),
        (np.zeros((8, 3, 4, 6))[..., :5], 1, None, None),
        (np.zeros((4, 8, 3)).transpose(1, 2, 0), 1, 2, None),  # groups inside of the planes
        (np.zeros((0, 3)), 1, None, View(1, 0, 3, 1)),
        (np.zeros((0, 3, 4)), 1, 2, View(0, 0, 3, 1)),
        (np.zeros((4, 0)), 1, None, View(1, 0, 0, 1)),
    ],
)
def test_views_of_dense_arrays(array: np.ndarray, axis, group: int | None, expected: View | None) -> None:
    found = dense_view(Geometry(array.shape, axis), array.shape, strides_of(array), group)
    assert found == expected
    if expected is not None and array.size:
        assert found.elements == array.size


def test_programs_share_the_lines_of_few_channels() -> None:
    """Up to as many sums as one of them merges at once."""
    for channel in (1, 3, 16, 64, 256, 2048):
        cut = tiling_of(View(1, 1_000_000, channel, 1), 2, 132, with_dy=False)
        for lanes in {min(cut.lanes, lanes) for lanes in (32, 64, 128)}:
            splits = cut.splits(lanes, 16, 264)
            assert 1 <= splits <= cut.lines
            assert cut.planes or splits * lanes <= tiling.TOGETHER
            assert splits * cut.blocks(lanes) <= max(264, cut.blocks(lanes))
    assert tiling_of(View(1, 5, 64, 1), 2, 132, with_dy=False).splits(64, 16, 264) == 1
