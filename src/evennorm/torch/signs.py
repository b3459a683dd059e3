"""The bytes of signs that a GPU kernel kept go in; for each element of x, whether its activation was open, comes out."""

from __future__ import annotations

import torch
from torch import Tensor

from evennorm.core.geometry import Geometry
from evennorm.kernels.triton.layout import DEPTH, cut, dense_view


def opened(geometry: Geometry, x: Tensor, signs: Tensor, group_size: int | None) -> Tensor:
    """Of x's shape, dense as x; lines and lanes are those of `kernels.triton.layout`."""
    view = dense_view(geometry, tuple(x.shape), x.stride(), group_size)
    assert view is not None, "the kernel was given a dense tensor"
    how = cut(view, x.element_size(), 1, with_dy=True)
    groups, outer, channel, inner = view
    line = torch.arange(DEPTH, dtype=torch.uint8, device=x.device).reshape(1, 1, DEPTH, 1, 1)
    bits = (signs.reshape(groups, how.octets, 1, channel, -1) >> line) & 1
    lines = bits.bool().reshape(groups, how.octets * DEPTH, channel, -1)[:, : how.lines]
    planes = lines.reshape(groups, outer, how.segments, channel, -1).transpose(2, 3).reshape(groups, outer, channel, -1)
    return planes[..., :inner].reshape(-1).as_strided(x.shape, x.stride())
