"""Normalize an array by its moments in two launches (sums, then y), or in one where channels stay on the chip.

Sums are taken about a shift that each lane of each slot moves after every 8 values to their mean; it starts with that of the
first 8. So a float32 sum holds 8 small differences, whatever the mean, and wherever it jumps to: what the distance of a
shift costs in rounding is far below what it adds to the variance. They are added in double, about the channel's first value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evennorm.kernels.triton.channels import (
    double,
    load_statistics,
    merge_partials,
    moments_of,
    parameter,
    scale_shift,
    statistic,
    store_partials,
    store_statistics,
)
from evennorm.kernels.triton.elements import (
    DEPTH,
    activate,
    by_slot,
    channels_of,
    group_start,
    kernel,
    lines_of,
    load_tile,
    offsets_of,
    opens,
    over_lines,
    pack_bits,
    preactivation,
    relu_mask_offsets,
    store_tile,
    with_divisor,
)
from evennorm.kernels.triton.running import update_after_all


@triton.jit
def first_values(x, channel, channels, inner, ACC: tl.constexpr):
    """Load the first value of each channel in a group that begins at `x`."""
    return tl.load(x + channel * inner, mask=channel < channels, other=0.0).to(ACC)


@triton.jit
def moment_step(
    x, step, channel, outer, channels, inner, segments, lines, reference, shift, first, second,
    ACC: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    UNEVEN: tl.constexpr, TAIL: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Return the sums after one more tile, and the shift for the next."""
    line = lines_of(step, SLOTS, INT64)
    offset, mask = offsets_of(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    if TAIL:
        mask = mask & (line < lines)
    centred = load_tile(x, offset, mask, UNEVEN or TAIL, ACC) - shift[None, :, :]
    count = 8.0
    if TAIL or (UNEVEN and PLANES):  # lanes beyond the last channel of rows are not stored
        counts = by_slot(mask)
        centred = tl.where(counts, centred, 0.0)
        count = tl.sum(counts.to(tl.float32), 0).to(tl.float64)
    sums = tl.sum(centred, 0)
    squares = tl.sum(centred * centred, 0)
    distance = shift.to(tl.float64) - reference.to(tl.float64)[None, :]
    moved = distance * count
    sums64 = sums.to(tl.float64)
    first += sums64 + moved
    second += tl.fma(distance, 2.0 * sums64 + moved, squares.to(tl.float64))
    return tl.fma(sums, 0.125, shift), first, second


@kernel
def moment_sums(
    x, workspace, outer, channels, inner, segments, lines,
    PLANES: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTED: tl.constexpr, UNEVEN: tl.constexpr, UNIT: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Store one program's share, for each block and group, of the sums of x - reference and of its square."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    SLOTS: tl.constexpr = SPAN // LANES if SPAN > LANES else 1
    if PLANES:
        inner = with_divisor(inner, UNIT)
    else:
        channels = with_divisor(channels, UNIT)
    blocks = channels if PLANES else tl.cdiv(channels, LANES)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    split, splits = tl.program_id(1), tl.num_programs(1)
    channel = channels_of(block, LANES, PLANES)
    if tl.program_id(0) + split == 0:  # reset before `normalize` counts
        tl.store(workspace.to(tl.pointer_type(tl.int32), bitcast=True), 0)
    x += group_start(group, outer, channels, inner, INT64)
    reference = first_values(x, channel, channels, inner, ACC)

    line = lines_of(split, SLOTS, INT64)
    offset, mask = offsets_of(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    mask = mask & (line < lines)
    known = tl.sum(by_slot(mask).to(tl.float32), 0)
    shift = tl.sum(load_tile(x, offset, mask, True, ACC), 0) / tl.where(known > 0, known, 1.0).to(ACC)
    first = tl.zeros([SLOTS, LANES], tl.float64)
    second = tl.zeros([SLOTS, LANES], tl.float64)
    whole = lines // (DEPTH * SLOTS)
    for step in tl.range(split, whole, splits, num_stages=STAGES):
        shift, first, second = moment_step(
            x, step, channel, outer, channels, inner, segments, lines, reference, shift, first, second,
            ACC, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, False, INT64,
        )  # fmt: skip
    if (whole * DEPTH * SLOTS < lines) & (whole % splits == split):
        shift, first, second = moment_step(
            x, whole, channel, outer, channels, inner, segments, lines, reference, shift, first, second,
            ACC, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, True, INT64,
        )  # fmt: skip
    store_partials(workspace, group, split, splits, channel, channels, over_lines(first, PLANES), over_lines(second, PLANES))


@triton.jit
def normalize_tile(
    values, step, offset, mask, residual, y, relu_mask, group, octets, channel, channels, inner, mean, scale, shift, slope,
    ACC: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    MASKED: tl.constexpr, ACTIVATION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Store y of one tile of x, and the bits of the activation mask."""
    z = preactivation(values - mean[None, None, :], scale[None, None, :], shift[None, None, :])
    if residual is not None:
        z += load_tile(residual, offset, mask, MASKED, ACC)
    if relu_mask is not None:
        byte, exists = relu_mask_offsets(
            group, step, octets, channel, channels, inner, SLOTS, LANES, PLANES, SEGMENTED, INT64
        )
        tl.store(relu_mask + byte, pack_bits(opens(z, ACTIVATION)), mask=exists)
    store_tile(y, offset, activate(z, slope, ACTIVATION), mask, MASKED)


@triton.jit
def normalize_step(
    x, residual, y, relu_mask, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift,
    slope,
    ACC: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    UNEVEN: tl.constexpr, TAIL: tl.constexpr, ACTIVATION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    line = lines_of(step, SLOTS, INT64)
    offset, mask = offsets_of(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    if TAIL:
        mask = mask & (line < lines)
    normalize_tile(
        load_tile(x, offset, mask, UNEVEN or TAIL, ACC), step, offset, mask, residual, y, relu_mask, group, octets, channel,
        channels, inner, mean, scale, shift, slope, ACC, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN or TAIL, ACTIVATION, INT64,
    )  # fmt: skip


@kernel
def normalize(
    x, residual, y, relu_mask, gamma, beta, workspace, statistics, mean_in, variance_in, running_mean, running_mean_low,
    running_variance, batches, skipped, decay, decay_low, unbiased, groups, outer, channels, inner, segments, lines, splits,
    epsilon, epsilon_low, slope, slope_low,
    PLANES: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTED: tl.constexpr, UNEVEN: tl.constexpr, UNIT: tl.constexpr, INT64: tl.constexpr, MERGE: tl.constexpr,
    ACTIVATION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store y, the statistics, and the running ones. Each program merges what `moment_sums` stored for its channels.

    Without a workspace the statistics are given, or those of inference are: of one group for all.
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    SLOTS: tl.constexpr = SPAN // LANES if SPAN > LANES else 1
    if PLANES:
        inner = with_divisor(inner, UNIT)
    else:
        channels = with_divisor(channels, UNIT)
    blocks = channels if PLANES else tl.cdiv(channels, LANES)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    program, programs = tl.program_id(1), tl.num_programs(1)
    channel = channels_of(block, LANES, PLANES)
    octets = tl.cdiv(lines, DEPTH)
    start = group_start(group, outer, channels, inner, INT64)
    x += start
    y += start
    if residual is not None:
        residual += start
    count = outer.to(tl.float64) * inner.to(tl.float64)
    if mean_in is not None:
        mean = statistic(mean_in, 0, channel, channels).to(ACC)
        mean_low = tl.zeros([channel.shape[0]], ACC)
        variance = statistic(variance_in, 0, channel, channels).to(ACC)
    elif workspace is None:
        mean, mean_low, variance = load_statistics(statistics, group, groups, channel, channels)
    else:
        reference = first_values(x, channel, channels, inner, ACC)
        first, second = merge_partials(workspace, group, splits, channel, channels, MERGE)
        mean, mean_low, variance = moments_of(reference, first, second, count, ACC)
        if program == 0:
            store_statistics(statistics, group, groups, channel, channels, mean, mean_low, variance)
            if running_mean is not None:
                update_after_all(
                    workspace, tl.num_programs(0), statistics, running_mean, running_mean_low, running_variance, batches,
                    skipped, decay, decay_low, unbiased, groups, channels, count, STEP,
                )  # fmt: skip
    scale, shift = scale_shift(
        mean_low, variance, parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0),
        double(epsilon, epsilon_low), ACC,
    )  # fmt: skip
    slope_acc = double(slope, slope_low).to(ACC)

    # Backwards: what `moment_sums` read last is still in the cache.
    whole = lines // (DEPTH * SLOTS)
    if (whole * DEPTH * SLOTS < lines) & (whole % programs == program):
        normalize_step(
            x, residual, y, relu_mask, group, whole, octets, channel, outer, channels, inner, segments, lines, mean, scale,
            shift, slope_acc, ACC, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, True, ACTIVATION, INT64,
        )  # fmt: skip
    steps = tl.cdiv(whole - program, programs)
    for i in tl.range(0, steps, num_stages=STAGES):
        step = program + (steps - 1 - i) * programs
        normalize_step(
            x, residual, y, relu_mask, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale,
            shift, slope_acc, ACC, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, False, ACTIVATION, INT64,
        )  # fmt: skip


@kernel
def forward_on_chip(
    x, residual, y, relu_mask, gamma, beta, workspace, statistics, running_mean, running_mean_low, running_variance, batches,
    skipped, decay, decay_low, unbiased, groups, outer, channels, inner, segments, lines, epsilon, epsilon_low, slope,
    slope_low,
    PLANES: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SEGMENTED: tl.constexpr, UNIT: tl.constexpr,
    INT64: tl.constexpr, ACTIVATION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Store y, the statistics and the running ones for channels whose values one program holds: x is read once."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    if PLANES:
        inner = with_divisor(inner, UNIT)
    else:
        channels = with_divisor(channels, UNIT)
    blocks = channels if PLANES else tl.cdiv(channels, LANES)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = channels_of(block, LANES, PLANES)
    start = group_start(group, outer, channels, inner, INT64)
    x += start
    y += start
    if residual is not None:
        residual += start
    line = lines_of(0, SLOTS, INT64)
    offset, mask = offsets_of(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    mask = mask & (line < lines)
    values = load_tile(x, offset, mask, True, ACC)

    # The rounded mean is a close enough shift for any values; the sums about it find what rounding took.
    count = outer.to(tl.float64) * inner.to(tl.float64)
    about = (over_lines(tl.sum(values, 0).to(tl.float64), PLANES) / count).to(ACC)
    centred = tl.where(by_slot(mask), values - about[None, None, :], 0.0)
    first = over_lines(tl.sum(centred, 0).to(tl.float64), PLANES)
    second = over_lines(tl.sum(centred * centred, 0).to(tl.float64), PLANES)
    mean, mean_low, variance = moments_of(about, first, second, count, ACC)
    store_statistics(statistics, group, groups, channel, channels, mean, mean_low, variance)

    scale, shift = scale_shift(
        mean_low, variance, parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0),
        double(epsilon, epsilon_low), ACC,
    )  # fmt: skip
    normalize_tile(
        values, 0, offset, mask, residual, y, relu_mask, group, tl.cdiv(lines, DEPTH), channel, channels, inner, mean, scale,
        shift, double(slope, slope_low).to(ACC), ACC, LANES, SLOTS, PLANES, SEGMENTED, True, ACTIVATION, INT64,
    )  # fmt: skip
    if running_mean is not None:  # last, when the registers that held the values are free
        update_after_all(
            workspace, tl.num_programs(0), statistics, running_mean, running_mean_low, running_variance, batches, skipped,
            decay, decay_low, unbiased, groups, channels, count, STEP,
        )  # fmt: skip
