"""Normalize under torch.compile by plain torch operations, which Inductor fuses with the operations around them.

Dynamo records two operators per layer, `evennorm::batch_norm` and `evennorm::update_running_stats`, without tracing their
Python. AOTAutograd takes them apart into the formulas below, so that nothing but kernels runs in a compiled step. On the CPU
the second one is an operator of the extension, where that is there: Inductor takes a second to compile the formulas.
"""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from evennorm.core.activation import LINEAR, RELU6, Activation, activation_of
from evennorm.core.call import Call
from evennorm.core.moments import Moments
from evennorm.torch import native
from evennorm.torch.namespace import WITHOUT_FLOAT64
from evennorm.torch.tensors import acc_dtype

if TYPE_CHECKING:
    from evennorm.torch.modules import _BatchNorm

HALF = (torch.float16, torch.bfloat16)


class _Standardize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta in float32 or float64, and the statistics of x.

    Saves x and three numbers per channel. The statistics are outputs too, so that a second derivative passes through them.
    """

    @staticmethod
    def forward(
        x: Tensor, gamma: Tensor | None, beta: Tensor | None, reduced: tuple[int, ...], epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shift, rest, variance = _statistics(x, reduced)
        centred = _wide(x) - shift
        scale = torch.rsqrt(variance + epsilon)
        y = (centred - rest) * (scale if gamma is None else scale * gamma)
        return (y if beta is None else y + beta), shift, rest, variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, gamma, beta, ctx.reduced, ctx.epsilon = inputs
        _, shift, rest, variance = output
        ctx.has_beta = beta is not None
        ctx.mark_non_differentiable(shift)  # a constant: rest carries the derivative of the mean
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gamma, shift, rest, variance)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _: None, d_rest: Tensor | None, d_variance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, gamma, shift, rest, variance = ctx.saved_tensors
        centred = (_wide(x) - shift) - rest
        dy = torch.zeros_like(centred) if dy is None else dy
        count = _count(x, ctx.reduced)
        inverse = torch.rsqrt(variance + ctx.epsilon)
        scale = inverse if gamma is None else inverse * gamma
        d_beta = dy.sum(ctx.reduced, keepdim=True)
        d_gamma = (dy * centred).sum(ctx.reduced, keepdim=True) * inverse
        # By (x - mean) / deviation: the square of 1 / deviation is beyond float32 for values of scale 1e-20.
        offset = scale * d_beta / count
        if d_rest is not None:
            offset = offset - d_rest / count
        dx = dy * scale - (centred * inverse) * (scale * d_gamma / count) - offset
        if d_variance is not None:
            dx = dx + centred * (2 * d_variance / count)
        return dx.to(x.dtype), None if gamma is None else d_gamma, d_beta if ctx.has_beta else None, None, None


def _statistics(x: Tensor, reduced: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a shift, mean - shift and the variance of each channel, exact at any mean, by one pass over x.

    Differences are taken from the first value of each channel, which lies within sqrt(count) standard deviations of the
    mean, whatever the values are. So float64 sums of differences and squares lose no bit that float32 would show. Float32
    sums would: squares of numbers that a large mean has left few bits of are 0 or 1 modulo 4, and their sum is rounded down
    again and again, by 4e-5 for 4096 values at mean 1e5.

    Half precision is content with Welford's method in float32, as torch has it, and devices without float64 have to be. Its
    error, a rounding of mean - shift, is below a rounding of y for up to 2**26 values. Without the shift, one outlier in a
    constant channel would exceed that.
    """
    shift = x
    for axis in reduced:
        shift = shift.narrow(axis, 0, 1)
    if x.dtype != torch.float32 or x.device.type in WITHOUT_FLOAT64:
        shift = _wide(shift)
        variance, rest = torch.var_mean(_wide(x) - shift, reduced, correction=0, keepdim=True)
        return shift, rest, variance
    shift = shift.double()
    centred = x.double() - shift
    rest = centred.mean(reduced, keepdim=True)
    variance = (centred * centred).mean(reduced, keepdim=True) - rest * rest
    mean = shift + rest
    rounded = mean.float()
    return rounded, (mean - rounded).float(), variance.float().clamp(min=0.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _count(x: Tensor, reduced: tuple[int, ...]) -> Any:
    count: Any = 1
    for axis in reduced:
        count = count * x.shape[axis]
    return count


def _batch_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: list[int],
    epsilon: float,
    negative_slope: float,
    limit: float,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, and of each (group, channel) a shift, mean - shift and the variance."""
    reduced = tuple(a for a in range(x.dim()) if a not in axis)
    broadcast = [size if a in axis else 1 for a, size in enumerate(x.shape)]
    gamma, beta = (None if row is None else _wide(row).reshape(broadcast) for row in (gamma, beta))
    values, groups = x, 1
    if group_size is not None:
        groups = x.shape[0] // group_size
        values = x.reshape(groups, group_size, *x.shape[1:])
        reduced = tuple(a + 1 for a in reduced)
        gamma, beta = (None if row is None else row.expand(groups, *broadcast) for row in (gamma, beta))
    y, *statistics = _Standardize.apply(values, gamma, beta, reduced, epsilon)
    if group_size is not None:
        y = y.reshape(x.shape)
    if residual is not None:
        y = y + residual
    y = activate(y, Activation(negative_slope, limit), x.dtype)
    return y, *(statistic.reshape(groups, -1) for statistic in statistics)


def activate(z: Tensor, activation: Activation, dtype: torch.dtype) -> Tensor:
    """Compute the activation by torch's own operations, whose backward pass reads the output that the next layer keeps
    anyway. That of relu6 reads its input, which must not be rounded to 6 then."""
    if activation == RELU6:
        return F.relu6(z).to(dtype)
    z = z.to(dtype)
    if activation == LINEAR:
        return z
    return F.leaky_relu(z, activation.slope) if activation.slope else F.relu(z)


@torch.no_grad()
def _update_running_stats(
    running_mean: Tensor,
    running_low: Tensor,
    running_variance: Tensor,
    refused: Tensor,
    batches: Tensor | None,
    shift: Tensor,
    rest: Tensor,
    variance: Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Compute `core.running` for one batch of `count` values, in fewer operations."""
    shift, rest, variance = (statistic.view(-1) for statistic in (shift, rest, variance))
    accepted = variance.amax() < inf  # false for NaN; the mean is infinite only if the variance is
    weight: Any = momentum
    if momentum is None:
        weight = 0.0 if batches is None else 1 / (batches + 1).to(variance.dtype)
    mean, low = running_mean.to(variance.dtype), running_low.to(variance.dtype)
    # A mean set from outside leaves the low part of another value, which is larger than a rounding error.
    low = torch.where(mean + low == mean, low, 0.0)
    low = low + torch.where(accepted, (shift - mean) + (rest - low), 0.0) * weight
    new = mean + low
    running_low.copy_(low - (new - mean))
    running_mean.copy_(new)
    if count != 1:
        # lerp starts from the nearer end: with weight 1, 1 + (1e-6 - 1) * 1 would have lost most of the new 1e-6.
        old = running_variance.to(variance.dtype)
        moved = torch.lerp(old, variance * (count / (count - 1)), weight)
        running_variance.copy_(torch.where(accepted, moved, old))
    refused.add_(~accepted)
    if batches is not None:
        # The plain average weighs by its count, so only accepted batches are counted.
        batches.add_(1 if momentum is not None else accepted)


# Part of the operators' names: torch keeps compiled programs on disk by these, and would not notice other formulas.
_FORMULAS = f"v{crc32(Path(__file__).read_bytes()):08x}"

_library = torch.library.Library("evennorm", "DEF")
_library.define(
    f"batch_norm.{_FORMULAS}(Tensor x, Tensor? gamma, Tensor? beta, Tensor? residual, int[] axis, float epsilon, "
    "float negative_slope, float limit, int? group_size) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"update_running_stats.{_FORMULAS}(Tensor(a!) running_mean, Tensor(b!) running_low, Tensor(c!) running_variance, "
    "Tensor(d!) refused, Tensor(e!)? batches, Tensor shift, Tensor rest, Tensor variance, SymInt count, float? momentum) "
    "-> ()"
)
_library.impl(f"batch_norm.{_FORMULAS}", _batch_norm, "CompositeImplicitAutograd")
_library.impl(f"update_running_stats.{_FORMULAS}", _update_running_stats, "CompositeImplicitAutograd")
batch_norm = getattr(torch.ops.evennorm.batch_norm, _FORMULAS)
update_running_stats = getattr(torch.ops.evennorm.update_running_stats, _FORMULAS)


def supports(x: Tensor, axis: tuple[int, ...]) -> bool:
    """Return whether x holds values, and some axes are averaged over; otherwise there is no value to take as the shift."""
    return x.dim() > len(axis) and all(size != 0 for size in x.shape)


def train(
    call: Call, x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Moments]:
    """Compute `Engine.train` for an x that `supports` accepts, without a mask; moments are (groups, channel)."""
    # An exported program has to run without this package.
    normalize = _batch_norm if torch.compiler.is_exporting() else batch_norm
    settings = list(call.geometry.axis), call.epsilon, *call.activation, call.group_size
    y, shift, rest, variance = normalize(x, gamma, beta, residual, *settings)
    mean = (shift + rest).detach()
    return y, Moments(x.numel() // mean.numel(), mean, rest - (mean - shift), variance)


def takes(module: _BatchNorm, input: Tensor, residual: Tensor | None, given: Activation | None) -> bool:
    """Return whether `forward` computes this call in training; eager mode's formulas take the others, or raise an error.

    One expression of little else than attributes, since Dynamo traces it for each module of a network.
    """
    mean, low, variance = module.running_mean, module.running_mean_low, module.running_var
    parameter = module.weight if mean is None else mean
    sizes = input.shape
    return (
        len(sizes) in module.ranks
        and (low is None if mean is None else low is not None and low.shape == mean.shape)
        and (variance is None if mean is None else variance is not None and variance.shape == mean.shape)
        and (mean is not None or module.num_batches_tracked is None)
        and all(row is None or parameter is None or row.shape == parameter.shape for row in (module.weight, module.bias))
        and (parameter is None or (sizes[1] == parameter.shape[0] and _fits(input.dtype, parameter.dtype)))
        and (module.momentum is None or 0 <= module.momentum <= 1)
        and module.eps > 0
        and module.memory == "save"
        and module.virtual_batch_size is None
        and module.activation != "elu"
        and (given is None or module.activation is None)
        and (residual is None or (residual.shape == sizes and residual.dtype == input.dtype))
        and input.dtype.is_floating_point
        and 0 not in sizes
        and (sizes[0] > 1 or any(size > 1 for size in sizes[2:]))
    )


def _fits(dtype: torch.dtype, parameter: torch.dtype) -> bool:
    return parameter == dtype or (parameter == torch.float32 and dtype in HALF)


def forward(module: _BatchNorm, input: Tensor, residual: Tensor | None, given: Activation | None, updates: bool) -> Tensor:
    """Normalize by the batch for a module, and update its running statistics if `updates`."""
    numbers = activation_of(module.activation, module.negative_slope) if given is None else given
    exporting = torch.compiler.is_exporting()
    normalize = _batch_norm if exporting else batch_norm
    y, shift, rest, variance = normalize(input, module.weight, module.bias, residual, [1], module.eps, *numbers, None)
    if updates:
        buffers = module.running_mean, module.running_mean_low, module.running_var, module.skipped_batches
        count = input.numel() // input.shape[1]
        # By the device's type: `is_cpu` would be a node of the graph.
        on_cpu = native.AVAILABLE and not exporting and input.device.type == "cpu"
        if on_cpu and all(row.is_contiguous() and row.dtype == acc_dtype(input) for row in buffers[:3]):
            # Inductor joins neighbouring loops into one kernel, and this call would part them. Between dense layers a kernel
            # more is felt; images have longer loops, and joined kernels take longer to compile. Without an activation here,
            # y may be a value between two steps that is not to be written to memory.
            after = y.detach() if len(input.shape) == 2 and numbers != LINEAR else None
            rows = shift.detach(), rest.detach(), variance.detach()
            native.update_running_stats(*buffers, module.num_batches_tracked, *rows, count, module.momentum, after)
        else:
            update = _update_running_stats if exporting else update_running_stats
            update(*buffers, module.num_batches_tracked, shift, rest, variance, count, module.momentum)
    return y
