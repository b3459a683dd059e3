"""Update running statistics on the device by those of a batch, as core/running.py defines and native/running.cc computes.

A batch with a statistic that is not finite, in any channel of any group, changes nothing but the counters. So one program
updates all channels: the last of those that have stored statistics, whoever that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evennorm.kernels.triton.channels import double
from evennorm.kernels.triton.elements import kernel


@triton.jit
def arrived_last(workspace, programs):
    """Count this program at the start of `workspace`, and return whether it is the last of so many, which resets the count.

    The barrier orders what all threads of the program have stored before the atomic operation of one of them, which
    publishes it to the GPU (release) and shows that thread what the programs counted before have published (acquire); the
    broadcast of its result orders the loads of the other threads after it. Loads of what others stored go past the first
    cache (".cg"), where a line may have been left by an earlier load.
    """
    counter = workspace.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def divide(a, b):
    """Divide, rounded correctly: in float32 `/` may be off by two units in the last place."""
    if a.dtype.is_fp64():
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def load_others(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def batch_of(mean, mean_low, variance, groups, channel, channels, correction, ACC: tl.constexpr):
    """Return the first group's mean, the average deviation of the others from it, and the average variance."""
    mask = channel < channels
    base = load_others(mean, channel, mask)
    beside = tl.zeros([channel.shape[0]], ACC)
    average = tl.zeros([channel.shape[0]], ACC)
    for group in range(groups):
        offset = group * channels + channel
        own = load_others(mean, offset, mask) - base
        beside += own + load_others(mean_low, offset, mask)
        average += load_others(variance, offset, mask) * correction
    count = tl.zeros([channel.shape[0]], ACC) + groups
    return base, divide(beside, count), divide(average, count)


@triton.jit
def update(
    mean, mean_low, variance, running_mean, running_mean_low, running_variance, batches, skipped, decay, decay_low, unbiased,
    groups, channels, count, STEP: tl.constexpr,
):  # fmt: skip
    """Update all channels and count the batch; return 1 if it was refused, else 0.

    `count` is that of the values behind each mean, in double; `decay` is below 0 for the cumulative average, whose
    `batches` are those that were not refused.
    """
    ACC: tl.constexpr = mean.dtype.element_ty
    several = tl.zeros([STEP], tl.float64) + count > 1  # one value has no variance
    values = tl.maximum(tl.zeros([1], tl.float64) + count, 2.0).to(ACC)
    correction = tl.where(unbiased != 0, divide(values, values - 1), 1.0).to(ACC)
    broken = tl.zeros([STEP], tl.int32)
    for begin in range(0, channels, STEP):
        base, beside, average = batch_of(
            mean, mean_low, variance, groups, begin + tl.arange(0, STEP), channels, correction, ACC
        )
        known = (base + beside) * 0.0 + tl.where(several, average, 0.0) * 0.0
        broken = broken | (known != known).to(tl.int32)
    nothing = (count < 1) | (groups < 1) | (channels < 1)
    refused = tl.maximum(tl.max(broken, 0), nothing.to(tl.int32))
    decay64 = double(decay, decay_low)
    new_part, old_part = (1.0 - decay64).to(ACC), decay64.to(ACC)
    to_new = decay64 < 0.5
    if batches is not None:
        batch = tl.load(batches)
        so_far = tl.zeros([1], ACC) + batch.to(ACC)
        cumulative = divide(so_far, so_far + 1)
        old_part = tl.where(decay64 < 0, cumulative, old_part)
        new_part = tl.where(decay64 < 0, 1 - cumulative, new_part)
        to_new = tl.where(decay64 < 0, cumulative < 0.5, to_new)
        tl.store(batches, batch + tl.max(tl.where(decay64 < 0, 1 - refused, 1), 0))
    if skipped is not None:
        tl.store(skipped, tl.load(skipped) + refused)
    if refused == 0:
        for begin in range(0, channels, STEP):
            channel = begin + tl.arange(0, STEP)
            mask = channel < channels
            base, beside, average = batch_of(mean, mean_low, variance, groups, channel, channels, correction, ACC)
            old = tl.load(running_mean + channel, mask=mask, other=0.0)
            # More than rounding, or NaN, is not of this mean: it was set from outside.
            before = tl.load(running_mean_low + channel, mask=mask, other=0.0)
            before = tl.where(tl.abs(before) <= tl.abs(old) * 5.9604644775390625e-08, before, 0.0)
            low = before + ((base - old) + (beside - before)) * new_part
            new = old + low
            tl.store(running_mean + channel, new, mask=mask)
            tl.store(running_mean_low + channel, low - (new - old), mask=mask)
            was = tl.load(running_variance + channel, mask=mask, other=0.0)
            # From the nearer end: with decay 0, 1 + (1e-6 - 1) * 1 would have lost most of the new 1e-6.
            nearer = tl.where(to_new, average + (was - average) * old_part, was + (average - was) * new_part)
            tl.store(running_variance + channel, nearer, mask=mask & several)
    return refused


@kernel
def update_running_stats(
    mean, mean_low, variance, running_mean, running_mean_low, running_variance, batches, skipped, accepted, decay, decay_low,
    groups, channels, count, unbiased, STEP: tl.constexpr,
):  # fmt: skip
    """Update by statistics (groups, channels) in memory, and store whether they were accepted."""
    values = tl.max(tl.zeros([1], tl.float64) + count, 0)
    refused = update(
        mean, mean_low, variance, running_mean, running_mean_low, running_variance, batches, skipped, decay, decay_low,
        unbiased, groups, channels, values, STEP,
    )  # fmt: skip
    tl.store(accepted, refused == 0)


@triton.jit
def update_after_all(
    workspace, programs, statistics, running_mean, running_mean_low, running_variance, batches, skipped, decay, decay_low,
    unbiased, groups, channels, count, STEP: tl.constexpr,
):  # fmt: skip
    """Update once all programs have stored their part of `statistics`, (3, groups, channels)."""
    if arrived_last(workspace, programs):
        mean_low = statistics + groups * channels
        update(
            statistics, mean_low, mean_low + groups * channels, running_mean, running_mean_low, running_variance, batches,
            skipped, decay, decay_low, unbiased, groups, channels, count, STEP,
        )  # fmt: skip
