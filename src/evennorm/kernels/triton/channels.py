"""Compute, in double, what is needed once per channel: statistics from sums, and the factors of elements.

The formulas of core/moments.py and core/normalize.py, in the form of native/channels.cc. Vectors hold the channels of a
block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evennorm.kernels.triton import tiling

TOGETHER = tl.constexpr(tiling.TOGETHER)
COUNTER = tl.constexpr(tiling.COUNTER_BYTES)


@triton.jit
def double(high, low):
    """Return a Python float as a vector of one double: Triton passes floats as float32 only."""
    return tl.zeros([1], tl.float64) + high + low


@triton.jit
def partials_of(workspace):
    """Return where a workspace holds sums, (groups, splits, 2, channels) in double, after the counter of `running`."""
    return (workspace + COUNTER).to(tl.pointer_type(tl.float64), bitcast=True)


@triton.jit
def merge_partials(workspace, group, splits, channel, channels, MERGE: tl.constexpr):
    """Return both sums of each channel over all programs that share it, always added in the same order.

    `MERGE` is a power of two not below `splits`.
    """
    N: tl.constexpr = channel.shape[0]
    ROWS: tl.constexpr = MERGE if MERGE * N <= TOGETHER else TOGETHER // N
    partials = partials_of(workspace)
    first = tl.zeros([ROWS, N], tl.float64)
    second = tl.zeros([ROWS, N], tl.float64)
    for begin in range(0, splits, ROWS):
        split = begin + tl.arange(0, ROWS)
        offset = ((group * splits + split)[:, None] * 2) * channels + channel[None, :]
        mask = (split < splits)[:, None] & (channel < channels)[None, :]
        first += tl.load(partials + offset, mask=mask, other=0.0)
        second += tl.load(partials + offset + channels, mask=mask, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def store_partials(workspace, group, split, splits, channel, channels, first, second):
    """Store the part of one program for `merge_partials`."""
    partials = partials_of(workspace)
    offset = ((group * splits + split) * 2) * channels + channel
    tl.store(partials + offset, first, mask=channel < channels)
    tl.store(partials + offset + channels, second, mask=channel < channels)


@triton.jit
def moments_of(reference, first, second, count, ACC: tl.constexpr):
    """Compute mean, mean_low and variance from the sums of x - reference and of its square over `count` values."""
    rest = first / count
    variance = tl.fma(-rest, rest, second / count)
    variance = tl.where(variance < 0, 0.0, variance)  # NaN stays NaN
    mean = (reference.to(tl.float64) + rest).to(ACC)
    mean_low = ((reference.to(tl.float64) - mean.to(tl.float64)) + rest).to(ACC)
    return mean, mean_low, variance.to(ACC)


@triton.jit
def divided_by_std(values, variance, epsilon):
    """Compute values / sqrt(variance + epsilon) in double."""
    return values / tl.sqrt(variance.to(tl.float64) + epsilon)


@triton.jit
def scale_shift(mean_low, variance, gamma, beta, epsilon, ACC: tl.constexpr):
    """Compute scale and shift of z = (x - mean) * scale + shift."""
    scale = divided_by_std(gamma, variance, epsilon).to(ACC)
    shift = tl.fma(-mean_low.to(tl.float64), scale.to(tl.float64), beta)
    return scale, shift.to(ACC)


@triton.jit
def input_gradient_of(
    scale_acc, mean_low, variance, gamma, epsilon, sum_dz, sum_dz_centred, d_mean, d_variance, count, ACC: tl.constexpr
):  # fmt: skip
    """Compute scale, slope and offset of dx = dz * scale - ((x - mean) * slope + offset).

    A value that is alone in its channel is its own mean: its dz acts on nothing, exactly.
    """
    scale = divided_by_std(gamma, variance, epsilon)
    squared = 1.0 / (variance.to(tl.float64) + epsilon)
    slope = (scale * squared * sum_dz_centred - 2.0 * d_variance) / count
    offset = (scale * sum_dz - d_mean) / count - slope * mean_low.to(tl.float64)
    several = count > 1
    slope, offset = tl.where(several, slope, 0.0), tl.where(several, offset, -d_mean)
    return tl.where(several, scale_acc, 0.0).to(ACC), slope.to(ACC), offset.to(ACC)


@triton.jit
def centred_sum(first, second, mean_low):
    """Compute the sum of dz * (x - mean) from that of dz * (x - mean rounded)."""
    return second - first * mean_low.to(tl.float64)


@triton.jit
def parameter(pointer, channel, channels, absent: tl.constexpr):
    """Load gamma or beta of each channel in double; `absent` where there is none."""
    if pointer is None:
        return tl.full([channel.shape[0]], absent, tl.float64)
    else:
        return tl.load(pointer + channel, mask=channel < channels, other=0.0).to(tl.float64)


@triton.jit
def statistic(pointer, row, channel, channels):
    """Load a row of (rows, channels); 0 where there is no such array."""
    if pointer is None:
        return tl.zeros([channel.shape[0]], tl.float32)
    else:
        return tl.load(pointer + row * channels + channel, mask=channel < channels, other=0.0)


@triton.jit
def load_statistics(statistics, group, groups, channel, channels):
    """Load mean, mean_low and variance of a group from (3, groups, channels)."""
    mean = statistic(statistics, group, channel, channels)
    mean_low = statistic(statistics, groups + group, channel, channels)
    return mean, mean_low, statistic(statistics, 2 * groups + group, channel, channels)


@triton.jit
def store_statistics(statistics, group, groups, channel, channels, mean, mean_low, variance):
    """Store the statistics in the form that `load_statistics` reads."""
    at = statistics + group * channels + channel
    tl.store(at, mean, mask=channel < channels)
    tl.store(at + groups * channels, mean_low, mask=channel < channels)
    tl.store(at + 2 * groups * channels, variance, mask=channel < channels)
