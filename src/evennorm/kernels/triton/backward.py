"""Differentiate normalization in two launches (sums, then the input's gradient), or in one where channels stay on the chip.

Without a saved mask, the activation mask is recomputed from x, by the function that the forward pass used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evennorm.kernels.triton.channels import (
    centred_sum,
    divided_by_std,
    double,
    input_gradient_of,
    load_statistics,
    merge_partials,
    parameter,
    scale_shift,
    statistic,
    store_partials,
)
from evennorm.kernels.triton.elements import (
    DEPTH,
    channels_of,
    gate,
    group_start,
    kernel,
    lines_of,
    load_tile,
    offsets_of,
    opens,
    over_lines,
    preactivation,
    relu_mask_offsets,
    store_tile,
    unpack_bits,
    with_divisor,
)


@triton.jit
def gate_tile(
    g, values, step, relu_mask, group, octets, channel, channels, inner, mean, scale, shift, slope,
    LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr, ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """Return dz and x - mean of one tile of dy and x."""
    centred = values - mean[None, None, :]
    if ACTIVATION == "none":
        return g, centred
    if relu_mask is None:
        is_open = opens(preactivation(centred, scale[None, None, :], shift[None, None, :]), ACTIVATION)
    else:
        byte, exists = relu_mask_offsets(
            group, step, octets, channel, channels, inner, SLOTS, LANES, PLANES, SEGMENTED, INT64
        )
        is_open = unpack_bits(tl.load(relu_mask + byte, mask=exists, other=0))
    return gate(g, is_open, slope, ACTIVATION), centred


@triton.jit
def gradient_step(
    dy, x, relu_mask, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift, slope,
    first, second,
    ACC: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    UNEVEN: tl.constexpr, TAIL: tl.constexpr, ACTIVATION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Return the sums after one more tile; dy is 0 where there are no elements."""
    line = lines_of(step, SLOTS, INT64)
    offset, mask = offsets_of(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    if TAIL:
        mask = mask & (line < lines)
    g = load_tile(dy, offset, mask, UNEVEN or TAIL, ACC)
    values = load_tile(x, offset, mask, UNEVEN or TAIL, ACC)
    dz, centred = gate_tile(
        g, values, step, relu_mask, group, octets, channel, channels, inner, mean, scale, shift, slope,
        LANES, SLOTS, PLANES, SEGMENTED, ACTIVATION, INT64,
    )  # fmt: skip
    first += tl.sum(dz, 0).to(tl.float64)
    second += tl.sum(dz * centred, 0).to(tl.float64)
    return first, second


@kernel
def gradient_sums(
    dy, x, relu_mask, gamma, beta, statistics, workspace, groups, outer, channels, inner, segments, lines, epsilon,
    epsilon_low, slope, slope_low,
    PLANES: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTED: tl.constexpr, UNEVEN: tl.constexpr, UNIT: tl.constexpr, INT64: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store one program's share, for each block and group, of the sums of dz and of dz * (x - mean rounded)."""
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
    octets = tl.cdiv(lines, DEPTH)
    start = group_start(group, outer, channels, inner, INT64)
    dy += start
    x += start
    mean, mean_low, variance = load_statistics(statistics, group, groups, channel, channels)
    scale, shift = scale_shift(
        mean_low, variance, parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0),
        double(epsilon, epsilon_low), ACC,
    )  # fmt: skip
    slope_acc = double(slope, slope_low).to(ACC)
    first = tl.zeros([SLOTS, LANES], tl.float64)
    second = tl.zeros([SLOTS, LANES], tl.float64)
    whole = lines // (DEPTH * SLOTS)
    for step in tl.range(split, whole, splits, num_stages=STAGES):
        first, second = gradient_step(
            dy, x, relu_mask, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift,
            slope_acc, first, second, ACC, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, False, ACTIVATION, INT64,
        )  # fmt: skip
    if (whole * DEPTH * SLOTS < lines) & (whole % splits == split):
        first, second = gradient_step(
            dy, x, relu_mask, group, whole, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift,
            slope_acc, first, second, ACC, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, True, ACTIVATION, INT64,
        )  # fmt: skip
    store_partials(workspace, group, split, splits, channel, channels, over_lines(first, PLANES), over_lines(second, PLANES))


@triton.jit
def count_of(outer, inner, fixed_stats):
    """Return the number of values behind each mean. Fixed statistics (1) count as those of infinitely many values; sums of
    all devices (2) were scaled to those of two.
    """
    own = outer.to(tl.float64) * inner.to(tl.float64)
    return tl.where(fixed_stats == 0, own, tl.where(fixed_stats == 1, float("inf"), 2.0))


@triton.jit
def gradient_tile(
    dz, centred, offset, mask, dx, d_residual, scale, dx_slope, dx_offset, MASKED: tl.constexpr
):  # fmt: skip
    """Store dx of one tile, and the residual's gradient."""
    of_statistics = tl.fma(centred, dx_slope[None, None, :], dx_offset[None, None, :])
    store_tile(dx, offset, tl.fma(dz, scale[None, None, :], -of_statistics), mask, MASKED)
    if d_residual is not None:
        store_tile(d_residual, offset, dz, mask, MASKED)


@triton.jit
def input_gradient_step(
    dy, x, dx, d_residual, relu_mask, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale,
    shift, slope, dx_slope, dx_offset,
    ACC: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    UNEVEN: tl.constexpr, TAIL: tl.constexpr, ACTIVATION: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    line = lines_of(step, SLOTS, INT64)
    offset, mask = offsets_of(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    if TAIL:
        mask = mask & (line < lines)
    g = load_tile(dy, offset, mask, UNEVEN or TAIL, ACC)
    values = load_tile(x, offset, mask, UNEVEN or TAIL, ACC)
    dz, centred = gate_tile(
        g, values, step, relu_mask, group, octets, channel, channels, inner, mean, scale, shift, slope,
        LANES, SLOTS, PLANES, SEGMENTED, ACTIVATION, INT64,
    )  # fmt: skip
    gradient_tile(dz, centred, offset, mask, dx, d_residual, scale, dx_slope, dx_offset, UNEVEN or TAIL)


@triton.jit
def store_row(pointer, channel, channels, values):
    """Store doubles for each channel, if they are wanted. Not every version of Triton converts them to half precision
    directly."""
    if pointer is not None:
        if pointer.dtype.element_ty != tl.float64:
            values = values.to(tl.float32)
        tl.store(pointer + channel, values.to(pointer.dtype.element_ty), mask=channel < channels)


@triton.jit
def parameter_gradients(
    d_gamma, d_beta, workspace, statistics, groups, splits, channel, channels, epsilon, MERGE: tl.constexpr
):  # fmt: skip
    """Store dgamma = sum dz * (x - mean) / sqrt(variance + epsilon) and dbeta = sum dz, summed over groups."""
    of_gamma = tl.zeros([channel.shape[0]], tl.float64)
    of_beta = tl.zeros([channel.shape[0]], tl.float64)
    for group in range(groups):
        first, second = merge_partials(workspace, group, splits, channel, channels, MERGE)
        _, mean_low, variance = load_statistics(statistics, group, groups, channel, channels)
        of_gamma += divided_by_std(centred_sum(first, second, mean_low), variance, epsilon)
        of_beta += first
    store_row(d_gamma, channel, channels, of_gamma)
    store_row(d_beta, channel, channels, of_beta)


@kernel
def input_gradient(
    dy, x, relu_mask, gamma, beta, statistics, dx, d_residual, d_gamma, d_beta, d_mean, d_variance, workspace, groups, outer,
    channels, inner, segments, lines, splits, fixed_stats, epsilon, epsilon_low, slope, slope_low,
    PLANES: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTED: tl.constexpr, UNEVEN: tl.constexpr, UNIT: tl.constexpr, INT64: tl.constexpr, MERGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store dx and the residual's gradient. Each program merges what `gradient_sums` stored for its channels.

    One program of each block stores the gradients of gamma and beta.
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
    dy += start
    x += start
    dx += start
    if d_residual is not None:
        d_residual += start
    epsilon64 = double(epsilon, epsilon_low)
    if (group == 0) & (program == 0):
        parameter_gradients(d_gamma, d_beta, workspace, statistics, groups, splits, channel, channels, epsilon64, MERGE)
    mean, mean_low, variance = load_statistics(statistics, group, groups, channel, channels)
    factor, addend = parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0)
    scale, shift = scale_shift(mean_low, variance, factor, addend, epsilon64, ACC)
    first, second = merge_partials(workspace, group, splits, channel, channels, MERGE)
    scale, dx_slope, dx_offset = input_gradient_of(
        scale, mean_low, variance, factor, epsilon64, first, centred_sum(first, second, mean_low),
        statistic(d_mean, group, channel, channels).to(tl.float64),
        statistic(d_variance, group, channel, channels).to(tl.float64),
        count_of(outer, inner, fixed_stats), ACC,
    )  # fmt: skip
    slope_acc = double(slope, slope_low).to(ACC)

    whole = lines // (DEPTH * SLOTS)
    if (whole * DEPTH * SLOTS < lines) & (whole % programs == program):
        input_gradient_step(
            dy, x, dx, d_residual, relu_mask, group, whole, octets, channel, outer, channels, inner, segments, lines, mean,
            scale, shift, slope_acc, dx_slope, dx_offset, ACC, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, True, ACTIVATION,
            INT64,
        )  # fmt: skip
    steps = tl.cdiv(whole - program, programs)
    for i in tl.range(0, steps, num_stages=STAGES):
        step = program + (steps - 1 - i) * programs
        input_gradient_step(
            dy, x, dx, d_residual, relu_mask, group, step, octets, channel, outer, channels, inner, segments, lines, mean,
            scale, shift, slope_acc, dx_slope, dx_offset, ACC, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, False, ACTIVATION,
            INT64,
        )  # fmt: skip


@kernel
def backward_on_chip(
    dy, x, relu_mask, gamma, beta, statistics, dx, d_residual, d_gamma, d_beta, d_mean, d_variance, workspace, groups, outer,
    channels, inner, segments, lines, fixed_stats, epsilon, epsilon_low, slope, slope_low,
    PLANES: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SEGMENTED: tl.constexpr, UNIT: tl.constexpr,
    INT64: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Store all gradients of the channels whose values one program holds: dy and x are read once.

    With several groups their sums go to the workspace, and `parameter_gradients_of_groups` adds them up.
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    if PLANES:
        inner = with_divisor(inner, UNIT)
    else:
        channels = with_divisor(channels, UNIT)
    blocks = channels if PLANES else tl.cdiv(channels, LANES)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = channels_of(block, LANES, PLANES)
    start = group_start(group, outer, channels, inner, INT64)
    dy += start
    x += start
    dx += start
    if d_residual is not None:
        d_residual += start
    line = lines_of(0, SLOTS, INT64)
    offset, mask = offsets_of(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    mask = mask & (line < lines)
    g = load_tile(dy, offset, mask, True, ACC)
    values = load_tile(x, offset, mask, True, ACC)

    epsilon64 = double(epsilon, epsilon_low)
    mean, mean_low, variance = load_statistics(statistics, group, groups, channel, channels)
    factor, addend = parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0)
    scale, shift = scale_shift(mean_low, variance, factor, addend, epsilon64, ACC)
    dz, centred = gate_tile(
        g, values, 0, relu_mask, group, tl.cdiv(lines, DEPTH), channel, channels, inner, mean, scale, shift,
        double(slope, slope_low).to(ACC), LANES, SLOTS, PLANES, SEGMENTED, ACTIVATION, INT64,
    )  # fmt: skip
    first = over_lines(tl.sum(dz, 0).to(tl.float64), PLANES)
    second = over_lines(tl.sum(dz * centred, 0).to(tl.float64), PLANES)
    sum_dz_centred = centred_sum(first, second, mean_low)
    scale, dx_slope, dx_offset = input_gradient_of(
        scale, mean_low, variance, factor, epsilon64, first, sum_dz_centred,
        statistic(d_mean, group, channel, channels).to(tl.float64),
        statistic(d_variance, group, channel, channels).to(tl.float64),
        count_of(outer, inner, fixed_stats), ACC,
    )  # fmt: skip
    gradient_tile(dz, centred, offset, mask, dx, d_residual, scale, dx_slope, dx_offset, True)
    if workspace is not None:
        store_partials(workspace, group, 0, 1, channel, channels, first, second)
    else:
        store_row(d_gamma, channel, channels, divided_by_std(sum_dz_centred, variance, epsilon64))
        store_row(d_beta, channel, channels, first)


@kernel
def parameter_gradients_of_groups(
    d_gamma, d_beta, workspace, statistics, groups, channels, epsilon, epsilon_low, LANES: tl.constexpr
):  # fmt: skip
    """Store the gradients of gamma and beta from the sums that `backward_on_chip` stored."""
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    epsilon64 = double(epsilon, epsilon_low)
    parameter_gradients(d_gamma, d_beta, workspace, statistics, groups, 1, channel, channels, epsilon64, 1)
