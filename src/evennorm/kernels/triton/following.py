"""Running statistics and the moments of a batch go in; the running ones are written after it, on the device.

What core/running.py defines, as native/channels.cc has it: a batch with statistics that are not finite changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evennorm.kernels.triton.channels import double
from evennorm.kernels.triton.elements import kernel


@triton.jit
def magnitude(values):
    return tl.where(values < 0, -values, values)


@triton.jit
def batch_of(mean, mean_low, variance, groups, channel, channels, correction, A: tl.constexpr):
    """The first group's mean, what the average of all lies beside it, and the average variance."""
    there = channel < channels
    base = tl.load(mean + channel, mask=there, other=0.0)
    beside = tl.zeros([channel.shape[0]], A)
    average = tl.zeros([channel.shape[0]], A)
    for group in range(groups):
        offset = group * channels + channel
        own = tl.load(mean + offset, mask=there, other=0.0) - base
        beside += own + tl.load(mean_low + offset, mask=there, other=0.0)
        average += tl.load(variance + offset, mask=there, other=0.0) * correction
    count = groups.to(A)
    return base, beside / count, average / count


@kernel
def follow(
    mean, mean_low, variance, running_mean, running_mean_low, running_variance, accepted, groups, channels, count, decay,
    decay_low, unbiased, LANES: tl.constexpr,
):  # fmt: skip
    """One program for all channels, since one that is not finite refuses the batch for all of them."""
    A: tl.constexpr = mean.dtype.element_ty
    wide_decay = double(decay, decay_low)
    several = tl.zeros([LANES], tl.int32) + count > 1  # of one value there is no variance
    values = tl.maximum(count, 2).to(A)
    correction = tl.where((unbiased != 0) & several, values / (values - 1), 1.0).to(A)
    broken = tl.zeros([LANES], tl.int32)
    for begin in range(0, channels, LANES):
        channel = begin + tl.arange(0, LANES)
        base, beside, average = batch_of(mean, mean_low, variance, groups, channel, channels, correction, A)
        known = (base + beside) * 0.0 + tl.where(several, average, 0.0) * 0.0
        broken = broken | (known != known).to(tl.int32)
    refused = tl.max(broken, 0)
    tl.store(accepted, refused == 0)
    sound = tl.zeros([LANES], tl.int32) + refused == 0
    part, old_part = (1.0 - wide_decay).to(A), wide_decay.to(A)
    for begin in range(0, channels, LANES):
        channel = begin + tl.arange(0, LANES)
        there = (channel < channels) & sound
        base, beside, average = batch_of(mean, mean_low, variance, groups, channel, channels, correction, A)
        old = tl.load(running_mean + channel, mask=there, other=0.0)
        # A mean set from outside leaves a low part behind that belongs to another value; it is then at most rounding.
        limit = magnitude(old) * 5.9604644775390625e-08
        before = tl.load(running_mean_low + channel, mask=there, other=0.0)
        before = tl.minimum(tl.maximum(before, -limit), limit)
        low = before + ((base - old) + (beside - before)) * part
        new = old + low
        tl.store(running_mean + channel, new, mask=there)
        tl.store(running_mean_low + channel, low - (new - old), mask=there)
        was = tl.load(running_variance + channel, mask=there, other=0.0)
        # From the nearer end: with decay 0, 1 + (1e-6 - 1) * 1 would have lost most of the new 1e-6.
        nearer = tl.where(wide_decay < 0.5, average + (was - average) * old_part, was + (average - was) * part)
        tl.store(running_variance + channel, nearer, mask=there & several)
