"""The kernels of the gradient: two sums per channel, and the input's gradient, which follows; or both at once, on the chip.

Where no signs were kept, whether the activation was open is worked out again from x, by the function that forward used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evennorm.kernels.triton.channels import (
    centred_sum,
    double,
    input_gradient_of,
    linear_of,
    merged,
    parameter,
    scale_of,
    share,
    statistic,
)
from evennorm.kernels.triton.elements import (
    DEPTH,
    aligned,
    channels_of,
    fetched,
    gated,
    group_start,
    kernel,
    lines_of,
    over_lines,
    places,
    preactivation,
    put,
    sign_places,
    unpacked,
)


@triton.jit
def gate_tile(
    g, values, step, signs, group, octets, channel, channels, inner, mean, scale, shift, slope,
    LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr, ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dz and x - mean of one tile of dy and x."""
    centred = values - mean[None, None, :]
    if ACTIVATION == "none":
        return g, centred
    if signs is None:
        is_open = (preactivation(centred, scale[None, None, :], shift[None, None, :]) <= 0) == 0
    else:
        sign, some = sign_places(group, step, octets, channel, channels, inner, SLOTS, LANES, PLANES, SEGMENTED, WIDE)
        is_open = unpacked(tl.load(signs + sign, mask=some, other=0))
    return gated(g, is_open, slope, ACTIVATION), centred


@triton.jit
def gradient_step(
    dy, x, signs, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift, slope,
    first, second,
    A: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    UNEVEN: tl.constexpr, TAIL: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums after one more tile; where nothing is, dy is 0."""
    line = lines_of(step, SLOTS, WIDE)
    offset, there = places(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    if TAIL:
        there = there & (line < lines)
    g = fetched(dy, offset, there, UNEVEN or TAIL, A)
    values = fetched(x, offset, there, UNEVEN or TAIL, A)
    dz, centred = gate_tile(
        g, values, step, signs, group, octets, channel, channels, inner, mean, scale, shift, slope,
        LANES, SLOTS, PLANES, SEGMENTED, ACTIVATION, WIDE,
    )  # fmt: skip
    first += tl.sum(dz, 0).to(tl.float64)
    second += tl.sum(dz * centred, 0).to(tl.float64)
    return first, second


@kernel
def gradient_sums(
    dy, x, signs, gamma, beta, mean_in, mean_low_in, variance_in, partials, outer, channels, inner, segments, lines,
    epsilon, epsilon_low, slope, slope_low, size_class,
    PLANES: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTED: tl.constexpr, UNEVEN: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Of each block and group, one program's share: the sums of dz and of dz * (x - mean rounded)."""
    A: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    SLOTS: tl.constexpr = SPAN // LANES if SPAN > LANES else 1
    if PLANES:
        inner = aligned(inner, UNIT)
    else:
        channels = aligned(channels, UNIT)
    blocks = channels if PLANES else tl.cdiv(channels, LANES)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    split, splits = tl.program_id(1), tl.num_programs(1)
    channel = channels_of(block, LANES, PLANES)
    octets = tl.cdiv(lines, DEPTH)
    start = group_start(group, outer, channels, inner, WIDE)
    dy += start
    x += start
    mean = statistic(mean_in, group, channel, channels)
    scale, shift = linear_of(
        statistic(mean_low_in, group, channel, channels), statistic(variance_in, group, channel, channels),
        parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0), double(epsilon, epsilon_low), A,
    )  # fmt: skip
    share_below = double(slope, slope_low).to(A)
    first = tl.zeros([SLOTS, LANES], tl.float64)
    second = tl.zeros([SLOTS, LANES], tl.float64)
    whole = lines // (DEPTH * SLOTS)
    for step in tl.range(split, whole, splits, num_stages=STAGES):
        first, second = gradient_step(
            dy, x, signs, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift,
            share_below, first, second, A, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, False, ACTIVATION, WIDE,
        )  # fmt: skip
    if (whole * DEPTH * SLOTS < lines) & (whole % splits == split):
        first, second = gradient_step(
            dy, x, signs, group, whole, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift,
            share_below, first, second, A, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, True, ACTIVATION, WIDE,
        )  # fmt: skip
    share(partials, group, split, splits, channel, channels, over_lines(first, PLANES), over_lines(second, PLANES))


@triton.jit
def count_of(outer, inner, frozen):
    """Values behind a mean. Given statistics are as those of infinitely many, none of which moves a mean."""
    return tl.where(frozen != 0, float("inf"), outer.to(tl.float64) * inner.to(tl.float64))


@triton.jit
def gradient_tile(
    dz, centred, offset, there, dx, d_residual, scale, slope_of, offset_of, MASKED: tl.constexpr
):  # fmt: skip
    """Writes dx of one tile, and the residual's gradient."""
    of_statistics = tl.fma(centred, slope_of[None, None, :], offset_of[None, None, :])
    put(dx, offset, tl.fma(dz, scale[None, None, :], -of_statistics), there, MASKED)
    if d_residual is not None:
        put(d_residual, offset, dz, there, MASKED)


@triton.jit
def input_gradient_step(
    dy, x, dx, d_residual, signs, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift,
    slope, slope_of, offset_of,
    A: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    UNEVEN: tl.constexpr, TAIL: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    line = lines_of(step, SLOTS, WIDE)
    offset, there = places(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    if TAIL:
        there = there & (line < lines)
    g = fetched(dy, offset, there, UNEVEN or TAIL, A)
    values = fetched(x, offset, there, UNEVEN or TAIL, A)
    dz, centred = gate_tile(
        g, values, step, signs, group, octets, channel, channels, inner, mean, scale, shift, slope,
        LANES, SLOTS, PLANES, SEGMENTED, ACTIVATION, WIDE,
    )  # fmt: skip
    gradient_tile(dz, centred, offset, there, dx, d_residual, scale, slope_of, offset_of, UNEVEN or TAIL)


@triton.jit
def parameter_gradients(
    d_gamma, d_beta, partials, mean_low_in, variance_in, groups, splits, channel, channels, epsilon, MERGE: tl.constexpr
):  # fmt: skip
    """Over groups: dgamma = sum dz * (x - mean) / sqrt(variance + epsilon), dbeta = sum dz."""
    of_gamma = tl.zeros([channel.shape[0]], tl.float64)
    of_beta = tl.zeros([channel.shape[0]], tl.float64)
    for group in range(groups):
        first, second = merged(partials, group, splits, channel, channels, MERGE)
        variance = statistic(variance_in, group, channel, channels)
        sum_dz_centred = centred_sum(first, second, statistic(mean_low_in, group, channel, channels))
        of_gamma += scale_of(variance, sum_dz_centred, epsilon)
        of_beta += first
    if d_gamma is not None:
        tl.store(d_gamma + channel, of_gamma.to(d_gamma.dtype.element_ty), mask=channel < channels)
    if d_beta is not None:
        tl.store(d_beta + channel, of_beta.to(d_beta.dtype.element_ty), mask=channel < channels)


@kernel
def input_gradient(
    dy, x, signs, gamma, beta, mean_in, mean_low_in, variance_in, dx, d_residual, d_gamma, d_beta, d_mean, d_variance,
    partials, groups, outer, channels, inner, segments, lines, splits, frozen, epsilon, epsilon_low, slope, slope_low,
    size_class,
    PLANES: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTED: tl.constexpr, UNEVEN: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, MERGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """dx and the residual's gradient. Each program merges what `gradient_sums` left for its channels.

    Of each block one writes the gradients of gamma and beta.
    """
    A: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    SLOTS: tl.constexpr = SPAN // LANES if SPAN > LANES else 1
    if PLANES:
        inner = aligned(inner, UNIT)
    else:
        channels = aligned(channels, UNIT)
    blocks = channels if PLANES else tl.cdiv(channels, LANES)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    program, programs = tl.program_id(1), tl.num_programs(1)
    channel = channels_of(block, LANES, PLANES)
    octets = tl.cdiv(lines, DEPTH)
    start = group_start(group, outer, channels, inner, WIDE)
    dy += start
    x += start
    dx += start
    if d_residual is not None:
        d_residual += start
    wide_epsilon = double(epsilon, epsilon_low)
    if (group == 0) & (program == 0):
        parameter_gradients(
            d_gamma, d_beta, partials, mean_low_in, variance_in, groups, splits, channel, channels, wide_epsilon, MERGE
        )
    mean = statistic(mean_in, group, channel, channels)
    mean_low = statistic(mean_low_in, group, channel, channels)
    variance = statistic(variance_in, group, channel, channels)
    factor, addend = parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0)
    scale, shift = linear_of(mean_low, variance, factor, addend, wide_epsilon, A)
    first, second = merged(partials, group, splits, channel, channels, MERGE)
    slope_of, offset_of = input_gradient_of(
        mean_low, variance, factor, wide_epsilon, first, centred_sum(first, second, mean_low),
        statistic(d_mean, group, channel, channels).to(tl.float64),
        statistic(d_variance, group, channel, channels).to(tl.float64),
        count_of(outer, inner, frozen), A,
    )  # fmt: skip
    share_below = double(slope, slope_low).to(A)

    whole = lines // (DEPTH * SLOTS)
    if (whole * DEPTH * SLOTS < lines) & (whole % programs == program):
        input_gradient_step(
            dy, x, dx, d_residual, signs, group, whole, octets, channel, outer, channels, inner, segments, lines, mean,
            scale, shift, share_below, slope_of, offset_of, A, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, True, ACTIVATION,
            WIDE,
        )  # fmt: skip
    steps = tl.cdiv(whole - program, programs)
    for i in tl.range(0, steps, num_stages=STAGES):
        step = program + (steps - 1 - i) * programs
        input_gradient_step(
            dy, x, dx, d_residual, signs, group, step, octets, channel, outer, channels, inner, segments, lines, mean,
            scale, shift, share_below, slope_of, offset_of, A, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, False, ACTIVATION,
            WIDE,
        )  # fmt: skip


@kernel
def backward_on_chip(
    dy, x, signs, gamma, beta, mean_in, mean_low_in, variance_in, dx, d_residual, d_gamma, d_beta, d_mean, d_variance,
    partials, groups, outer, channels, inner, segments, lines, frozen, epsilon, epsilon_low, slope, slope_low,
    PLANES: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SEGMENTED: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """All gradients of the channels whose values one program holds: dy and x are read once. Of several groups the sums go to
    `partials`, and those of gamma and beta are added up afterwards.
    """
    A: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    if PLANES:
        inner = aligned(inner, UNIT)
    else:
        channels = aligned(channels, UNIT)
    blocks = channels if PLANES else tl.cdiv(channels, LANES)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = channels_of(block, LANES, PLANES)
    start = group_start(group, outer, channels, inner, WIDE)
    dy += start
    x += start
    dx += start
    if d_residual is not None:
        d_residual += start
    line = lines_of(0, SLOTS, WIDE)
    offset, there = places(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    there = there & (line < lines)
    g = fetched(dy, offset, there, True, A)
    values = fetched(x, offset, there, True, A)

    wide_epsilon = double(epsilon, epsilon_low)
    mean = statistic(mean_in, group, channel, channels)
    mean_low = statistic(mean_low_in, group, channel, channels)
    variance = statistic(variance_in, group, channel, channels)
    factor, addend = parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0)
    scale, shift = linear_of(mean_low, variance, factor, addend, wide_epsilon, A)
    dz, centred = gate_tile(
        g, values, 0, signs, group, tl.cdiv(lines, DEPTH), channel, channels, inner, mean, scale, shift,
        double(slope, slope_low).to(A), LANES, SLOTS, PLANES, SEGMENTED, ACTIVATION, WIDE,
    )  # fmt: skip
    first = over_lines(tl.sum(dz, 0).to(tl.float64), PLANES)
    second = over_lines(tl.sum(dz * centred, 0).to(tl.float64), PLANES)
    sum_dz_centred = centred_sum(first, second, mean_low)
    slope_of, offset_of = input_gradient_of(
        mean_low, variance, factor, wide_epsilon, first, sum_dz_centred,
        statistic(d_mean, group, channel, channels).to(tl.float64),
        statistic(d_variance, group, channel, channels).to(tl.float64),
        count_of(outer, inner, frozen), A,
    )  # fmt: skip
    gradient_tile(dz, centred, offset, there, dx, d_residual, scale, slope_of, offset_of, True)
    if partials is not None:
        share(partials, group, 0, 1, channel, channels, first, second)
    else:
        if d_gamma is not None:
            of_gamma = scale_of(variance, sum_dz_centred, wide_epsilon)
            tl.store(d_gamma + channel, of_gamma.to(d_gamma.dtype.element_ty), mask=channel < channels)
        if d_beta is not None:
            tl.store(d_beta + channel, first.to(d_beta.dtype.element_ty), mask=channel < channels)


@kernel
def parameter_gradients_of_groups(
    d_gamma, d_beta, partials, mean_low_in, variance_in, groups, channels, epsilon, epsilon_low, LANES: tl.constexpr
):  # fmt: skip
    """What `backward_on_chip` left, added up."""
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    parameter_gradients(
        d_gamma, d_beta, partials, mean_low_in, variance_in, groups, 1, channel, channels, double(epsilon, epsilon_low), 1
    )
