"""Collect the numbers that kernels get besides arrays: sizes, and Python floats as two of float32."""

from __future__ import annotations

from functools import lru_cache
from struct import pack, unpack
from typing import Any

from evennorm.core.call import Call
from evennorm.core.namespace import Array
from evennorm.kernels.triton.tiling import Tiling


def numbers_of(call: Call, tiling: Tiling) -> dict[str, Any]:
    """Return the numbers that kernels get besides arrays and tiles."""
    view = tiling.view
    epsilon, slope = halves(call.epsilon), halves(call.activation.slope)
    return {
        "groups": view.groups,
        "outer": view.outer,
        "channels": view.channel,
        "inner": view.inner,
        "segments": tiling.segments,
        "lines": tiling.lines,
        "epsilon": epsilon[0],
        "epsilon_low": epsilon[1],
        "slope": slope[0],
        "slope_low": slope[1],
        "PLANES": tiling.planes,
        "SEGMENTED": tiling.segments > 1,
        "UNIT": tiling.unit,
        "INT64": tiling.int64,
        "UNEVEN": (view.inner if tiling.planes else view.channel) % tiling.lanes != 0,
        "ACTIVATION": call.activation.name,
    }


def decay_of(decay: float | None, batches: Array | None) -> tuple[float, float]:
    """Return the weight of the old statistics, below 0 for the cumulative average. Without a count nothing is updated."""
    if decay is None:
        return (1.0, 0.0) if batches is None else (-1.0, 0.0)
    return halves(decay)


@lru_cache(maxsize=256)
def halves(value: float) -> tuple[float, float]:
    """Split `value` into the sum of two float32, the only floats that a kernel takes.

    Example:
        >>> high, low = halves(0.1)
        >>> high + low == 0.1, abs(low) < 1e-8
        (True, True)
    """
    (high,) = unpack("f", pack("f", value))
    return high, value - high
