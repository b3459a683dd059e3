"""Prepare the statistics that devices exchange between the two launches of a pass: one program per block of channels."""

from __future__ import annotations

import triton.language as tl

from evennorm.kernels.triton.backward import parameter_gradients
from evennorm.kernels.triton.channels import (
    centred_sum,
    double,
    load_statistics,
    merge_partials,
    moments_of,
    store_partials,
    store_statistics,
)
from evennorm.kernels.triton.elements import group_start, kernel
from evennorm.kernels.triton.forward import first_values


@kernel
def store_moments(
    x, statistics, workspace, groups, outer, channels, inner, splits,
    LANES: tl.constexpr, MERGE: tl.constexpr, INT64: tl.constexpr,
):  # fmt: skip
    """Store the moments that follow from the sums of `moment_sums`."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    group = tl.program_id(1)
    reference = first_values(x + group_start(group, outer, channels, inner, INT64), channel, channels, inner, ACC)
    first, second = merge_partials(workspace, group, splits, channel, channels, MERGE)
    count = outer.to(tl.float64) * inner.to(tl.float64)
    mean, mean_low, variance = moments_of(reference, first, second, count, ACC)
    store_statistics(statistics, group, groups, channel, channels, mean, mean_low, variance)


@kernel
def store_gradient_sums(
    statistics, d_gamma, d_beta, workspace, sums, groups, channels, splits, epsilon, epsilon_low,
    LANES: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Store sum dz and sum dz * (x - mean), (2, groups, channels), and this device's gradients of gamma and beta."""
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = channel < channels
    parameter_gradients(
        d_gamma, d_beta, workspace, statistics, groups, splits, channel, channels, double(epsilon, epsilon_low), MERGE
    )
    ACC: tl.constexpr = sums.dtype.element_ty
    for group in range(groups):
        first, second = merge_partials(workspace, group, splits, channel, channels, MERGE)
        _, mean_low, _ = load_statistics(statistics, group, groups, channel, channels)
        tl.store(sums + group * channels + channel, first.to(ACC), mask=mask)
        centred = centred_sum(first, second, mean_low).to(ACC)
        tl.store(sums + (groups + group) * channels + channel, centred, mask=mask)


@kernel
def load_gradient_sums(statistics, workspace, sums, count, groups, channels, LANES: tl.constexpr):
    """Store the sums over all devices where `input_gradient` reads them, scaled to those of two values: it divides by 2."""
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = channel < channels
    for group in range(groups):
        _, mean_low, _ = load_statistics(statistics, group, groups, channel, channels)
        share = 2.0 / tl.maximum(tl.load(count + group + channel * 0, mask=mask, other=1.0).to(tl.float64), 1.0)
        first = tl.load(sums + group * channels + channel, mask=mask, other=0.0).to(tl.float64)
        centred = tl.load(sums + (groups + group) * channels + channel, mask=mask, other=0.0).to(tl.float64)
        second = centred + first * mean_low.to(tl.float64)
        store_partials(workspace, group, 0, 1, channel, channels, first * share, second * share)
