"""The kernels of the forward pass: sums of an array, and the array normalized by them; or both at once, on the chip.

Sums are taken about a shift that each lane of each slot moves after every 8 values to their mean; it starts with that of the
first 8. So a float32 sum holds 8 small differences, whatever the mean, and wherever it jumps to: what the distance of a
shift costs in rounding is far below what it adds to the variance. They are added in double, about the channel's first value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from evennorm.kernels.triton.channels import double, linear_of, merged, moments_of, parameter, share, statistic
from evennorm.kernels.triton.elements import (
    DEPTH,
    activated,
    aligned,
    by_slot,
    channels_of,
    fetched,
    group_start,
    kernel,
    lines_of,
    over_lines,
    packed,
    places,
    preactivation,
    put,
    sign_places,
)


@triton.jit
def first_values(x, channel, channels, inner, A: tl.constexpr):
    """Of each channel in a group that begins at `x`."""
    return tl.load(x + channel * inner, mask=channel < channels, other=0.0).to(A)


@triton.jit
def moment_step(
    x, step, channel, outer, channels, inner, segments, lines, reference, shift, first, second,
    A: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    UNEVEN: tl.constexpr, TAIL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sums after one more tile, and the shift for the next."""
    line = lines_of(step, SLOTS, WIDE)
    offset, there = places(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    if TAIL:
        there = there & (line < lines)
    centred = fetched(x, offset, there, UNEVEN or TAIL, A) - shift[None, :, :]
    count = 8.0
    if TAIL or (UNEVEN and PLANES):  # of rows, lanes beyond the last channel are sums that nobody asks for
        counts = by_slot(there)
        centred = tl.where(counts, centred, 0.0)
        count = tl.sum(counts.to(tl.float32), 0).to(tl.float64)
    sums = tl.sum(centred, 0)
    squares = tl.sum(centred * centred, 0)
    distance = shift.to(tl.float64) - reference.to(tl.float64)[None, :]
    moved = distance * count
    wide_sums = sums.to(tl.float64)
    first += wide_sums + moved
    second += tl.fma(distance, 2.0 * wide_sums + moved, squares.to(tl.float64))
    return tl.fma(sums, 0.125, shift), first, second


@kernel
def moment_sums(
    x, partials, outer, channels, inner, segments, lines, size_class,
    PLANES: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTED: tl.constexpr, UNEVEN: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of each block and group, one program's share: the sums of x - reference and of its square."""
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
    x += group_start(group, outer, channels, inner, WIDE)
    reference = first_values(x, channel, channels, inner, A)

    line = lines_of(split, SLOTS, WIDE)
    offset, there = places(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    there = there & (line < lines)
    known = tl.sum(by_slot(there).to(tl.float32), 0)
    shift = tl.sum(fetched(x, offset, there, True, A), 0) / tl.where(known > 0, known, 1.0).to(A)
    first = tl.zeros([SLOTS, LANES], tl.float64)
    second = tl.zeros([SLOTS, LANES], tl.float64)
    whole = lines // (DEPTH * SLOTS)
    for step in tl.range(split, whole, splits, num_stages=STAGES):
        shift, first, second = moment_step(
            x, step, channel, outer, channels, inner, segments, lines, reference, shift, first, second,
            A, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, False, WIDE,
        )  # fmt: skip
    if (whole * DEPTH * SLOTS < lines) & (whole % splits == split):
        shift, first, second = moment_step(
            x, whole, channel, outer, channels, inner, segments, lines, reference, shift, first, second,
            A, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, True, WIDE,
        )  # fmt: skip
    share(partials, group, split, splits, channel, channels, over_lines(first, PLANES), over_lines(second, PLANES))


@triton.jit
def normalize_tile(
    values, step, offset, there, residual, y, signs, group, octets, channel, channels, inner, mean, scale, shift, slope,
    A: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    MASKED: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes y of one tile of x, and the signs of what the activation saw."""
    z = preactivation(values - mean[None, None, :], scale[None, None, :], shift[None, None, :])
    if residual is not None:
        z += fetched(residual, offset, there, MASKED, A)
    if signs is not None:
        sign, some = sign_places(group, step, octets, channel, channels, inner, SLOTS, LANES, PLANES, SEGMENTED, WIDE)
        tl.store(signs + sign, packed((z <= 0) == 0), mask=some)
    put(y, offset, activated(z, slope, ACTIVATION), there, MASKED)


@triton.jit
def normalize_step(
    x, residual, y, signs, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift, slope,
    A: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, PLANES: tl.constexpr, SEGMENTED: tl.constexpr,
    UNEVEN: tl.constexpr, TAIL: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    line = lines_of(step, SLOTS, WIDE)
    offset, there = places(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    if TAIL:
        there = there & (line < lines)
    normalize_tile(
        fetched(x, offset, there, UNEVEN or TAIL, A), step, offset, there, residual, y, signs, group, octets, channel,
        channels, inner, mean, scale, shift, slope, A, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN or TAIL, ACTIVATION, WIDE,
    )  # fmt: skip


@kernel
def normalize(
    x, residual, y, signs, gamma, beta, partials, mean_out, mean_low_out, variance_out, outer, channels, inner, segments,
    lines, splits, epsilon, epsilon_low, slope, slope_low, size_class,
    PLANES: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTED: tl.constexpr, UNEVEN: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, MERGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y. Each program merges what `moment_sums` left for its channels, and one of a block writes their statistics.

    Without `partials` the statistics are given: of one group for all, without `mean_low_out`.
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
    x += start
    y += start
    if residual is not None:
        residual += start
    if partials is None:
        mean = statistic(mean_out, group, channel, channels).to(A)
        mean_low = statistic(mean_low_out, group, channel, channels).to(A)
        variance = statistic(variance_out, group, channel, channels).to(A)
    else:
        reference = first_values(x, channel, channels, inner, A)
        first, second = merged(partials, group, splits, channel, channels, MERGE)
        count = outer.to(tl.float64) * inner.to(tl.float64)
        mean, mean_low, variance = moments_of(reference, first, second, count, A)
        if program == 0:
            kept = group * channels + channel
            tl.store(mean_out + kept, mean, mask=channel < channels)
            tl.store(mean_low_out + kept, mean_low, mask=channel < channels)
            tl.store(variance_out + kept, variance, mask=channel < channels)
    scale, shift = linear_of(
        mean_low, variance, parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0),
        double(epsilon, epsilon_low), A,
    )  # fmt: skip
    share_below = double(slope, slope_low).to(A)

    # Backwards: what `moment_sums` read last is still in the cache.
    whole = lines // (DEPTH * SLOTS)
    if (whole * DEPTH * SLOTS < lines) & (whole % programs == program):
        normalize_step(
            x, residual, y, signs, group, whole, octets, channel, outer, channels, inner, segments, lines, mean, scale,
            shift, share_below, A, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, True, ACTIVATION, WIDE,
        )  # fmt: skip
    steps = tl.cdiv(whole - program, programs)
    for i in tl.range(0, steps, num_stages=STAGES):
        step = program + (steps - 1 - i) * programs
        normalize_step(
            x, residual, y, signs, group, step, octets, channel, outer, channels, inner, segments, lines, mean, scale, shift,
            share_below, A, LANES, SLOTS, PLANES, SEGMENTED, UNEVEN, False, ACTIVATION, WIDE,
        )  # fmt: skip


@kernel
def forward_on_chip(
    x, residual, y, signs, gamma, beta, mean_out, mean_low_out, variance_out, outer, channels, inner, segments, lines,
    epsilon, epsilon_low, slope, slope_low,
    PLANES: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, SEGMENTED: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y and statistics of the channels whose values one program holds: x is read once."""
    A: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    if PLANES:
        inner = aligned(inner, UNIT)
    else:
        channels = aligned(channels, UNIT)
    blocks = channels if PLANES else tl.cdiv(channels, LANES)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = channels_of(block, LANES, PLANES)
    start = group_start(group, outer, channels, inner, WIDE)
    x += start
    y += start
    if residual is not None:
        residual += start
    line = lines_of(0, SLOTS, WIDE)
    offset, there = places(line, channel, outer, channels, inner, segments, LANES, PLANES, SEGMENTED)
    there = there & (line < lines)
    values = fetched(x, offset, there, True, A)

    # The mean rounded is a shift near enough for any values; what rounding left is summed about it.
    count = outer.to(tl.float64) * inner.to(tl.float64)
    about = (over_lines(tl.sum(values, 0).to(tl.float64), PLANES) / count).to(A)
    centred = tl.where(by_slot(there), values - about[None, None, :], 0.0)
    first = over_lines(tl.sum(centred, 0).to(tl.float64), PLANES)
    second = over_lines(tl.sum(centred * centred, 0).to(tl.float64), PLANES)
    mean, mean_low, variance = moments_of(about, first, second, count, A)
    kept = group * channels + channel
    tl.store(mean_out + kept, mean, mask=channel < channels)
    tl.store(mean_low_out + kept, mean_low, mask=channel < channels)
    tl.store(variance_out + kept, variance, mask=channel < channels)

    scale, shift = linear_of(
        mean_low, variance, parameter(gamma, channel, channels, 1.0), parameter(beta, channel, channels, 0.0),
        double(epsilon, epsilon_low), A,
    )  # fmt: skip
    normalize_tile(
        values, 0, offset, there, residual, y, signs, group, tl.cdiv(lines, DEPTH), channel, channels, inner, mean, scale,
        shift, double(slope, slope_low).to(A), A, LANES, SLOTS, PLANES, SEGMENTED, True, ACTIVATION, WIDE,
    )  # fmt: skip
