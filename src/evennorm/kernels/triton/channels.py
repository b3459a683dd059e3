"""What happens once per channel, in double: from sums to statistics, and to what the elements are multiplied by.

The formulas of core/moments.py and core/normalize.py, in the form of native/channels.cc.
Vectors hold the channels of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evennorm.kernels.triton import layout


@triton.jit
def double(high, low):
    """A Python float, of which Triton passes float32 only, as a vector of one."""
    return tl.zeros([1], tl.float64) + high + low


TOGETHER = tl.constexpr(layout.TOGETHER)


@triton.jit
def merged(partials, group, splits, channel, channels, MERGE: tl.constexpr):
    """Both sums of each channel over all programs that took part, always in the same order; `partials` is
    (groups, splits, 2, channels), `MERGE` a power of two not below `splits`.
    """
    N: tl.constexpr = channel.shape[0]
    ROWS: tl.constexpr = MERGE if MERGE * N <= TOGETHER else TOGETHER // N
    there = channel < channels
    first = tl.zeros([ROWS, N], tl.float64)
    second = tl.zeros([ROWS, N], tl.float64)
    for begin in range(0, splits, ROWS):
        split = begin + tl.arange(0, ROWS)
        offset = ((group * splits + split)[:, None] * 2) * channels + channel[None, :]
        mask = (split < splits)[:, None] & there[None, :]
        first += tl.load(partials + offset, mask=mask, other=0.0)
        second += tl.load(partials + offset + channels, mask=mask, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def share(partials, group, split, splits, channel, channels, first, second):
    """Writes what one program adds to `merged`."""
    offset = ((group * splits + split) * 2) * channels + channel
    tl.store(partials + offset, first, mask=channel < channels)
    tl.store(partials + offset + channels, second, mask=channel < channels)


@triton.jit
def moments_of(reference, first, second, count, A: tl.constexpr):
    """mean, mean_low and variance from the sums of x - reference and of its square over `count` values."""
    rest = first / count
    variance = tl.fma(-rest, rest, second / count)
    variance = tl.where(variance < 0, 0.0, variance)  # NaN stays NaN
    mean = (reference.to(tl.float64) + rest).to(A)
    mean_low = ((reference.to(tl.float64) - mean.to(tl.float64)) + rest).to(A)
    return mean, mean_low, variance.to(A)


@triton.jit
def scale_of(variance, gamma, epsilon):
    """gamma / sqrt(variance + epsilon), in double."""
    return gamma / tl.sqrt(variance.to(tl.float64) + epsilon)


@triton.jit
def linear_of(mean_low, variance, gamma, beta, epsilon, A: tl.constexpr):
    """scale and shift of z = (x - mean) * scale + shift."""
    scale = scale_of(variance, gamma, epsilon).to(A)
    shift = tl.fma(-mean_low.to(tl.float64), scale.to(tl.float64), beta)
    return scale, shift.to(A)


@triton.jit
def input_gradient_of(
    mean_low, variance, gamma, epsilon, sum_dz, sum_dz_centred, d_mean, d_variance, count, A: tl.constexpr
):  # fmt: skip
    """slope and offset of dx = dz * scale - ((x - mean) * slope + offset)."""
    scale = scale_of(variance, gamma, epsilon)
    squared = 1.0 / (variance.to(tl.float64) + epsilon)
    slope = (scale * squared * sum_dz_centred - 2.0 * d_variance) / count
    offset = (scale * sum_dz - d_mean) / count - slope * mean_low.to(tl.float64)
    return slope.to(A), offset.to(A)


@triton.jit
def centred_sum(first, second, mean_low):
    """The sum of dz * (x - mean) from that of dz * (x - mean rounded)."""
    return second - first * mean_low.to(tl.float64)


@triton.jit
def parameter(pointer, channel, channels, absent: tl.constexpr):
    """gamma or beta of each channel, in double; `absent` where there is none."""
    if pointer is None:
        return tl.full([channel.shape[0]], absent, tl.float64)
    else:
        return tl.load(pointer + channel, mask=channel < channels, other=0.0).to(tl.float64)


@triton.jit
def statistic(pointer, group, channel, channels):
    """A statistic of (groups, channels) for each channel; 0 where there is none."""
    if pointer is None:
        return tl.zeros([channel.shape[0]], tl.float32)
    else:
        return tl.load(pointer + group * channels + channel, mask=channel < channels, other=0.0)
