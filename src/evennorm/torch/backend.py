"""Normalize torch tensors by the kernels of their device, or by the formulas themselves where no kernel can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from evennorm.core.activation import LINEAR, activation_of
from evennorm.core.call import Call, checked_epsilon
from evennorm.core.engine import Engine
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments, count_of
from evennorm.core.moments import moments as moments_of
from evennorm.kernels import reference
from evennorm.kernels.contract import Kernel, RunningStats, UnfitError
from evennorm.torch import autograd, compiled, distributed, native, recompute
from evennorm.torch.kernels import kernel_for
from evennorm.torch.namespace import xp
from evennorm.torch.refusal import refuse_after
from evennorm.torch.tensors import NAMES, acc_dtype, dense

__all__ = ["batch_norm", "engine", "normalize", "train"]


class _Composed(torch.autograd.Function):
    """The reference kernel. The statistics are outputs too, so that a second derivative passes through them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        call: Call,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        y, moments = reference.forward(xp, call, x, gamma, beta, residual, mask)
        return y, moments.mean, moments.mean_low, moments.variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, x, gamma, beta, residual, mask = inputs
        _, mean, mean_low, variance = output
        ctx.mark_non_differentiable(mean)
        ctx.save_for_backward(x, gamma, beta, residual, mask, mean, mean_low, variance)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor, d_mean: Tensor, d_variance: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, residual, mask, *statistics = ctx.saved_tensors
        moments = Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)
        g = reference.backward(xp, ctx.call, dy, x, moments, gamma, beta, residual, mask, d_mean, d_variance)
        return None, *g, None


def _composed(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Moments]:
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        # Torch differentiates the formulas themselves, in either direction.
        statistics = moments_of(xp, reference.wide(xp, x), mask)
        return reference.infer(xp, call, x, statistics, gamma, beta, residual, mask), statistics
    y, *statistics = _Composed.apply(call, x, gamma, beta, residual, mask)
    return y, Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)


class _TorchEngine(Engine):
    """An engine that passes tensors to the kernels of their device in any memory layout."""

    def train(
        self,
        call: Call,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        *,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        grouped: bool = True,
    ) -> tuple[Tensor, Moments]:
        if type(x) is not Tensor and distributed.is_distributed(x):
            given = map(distributed.local, (x, gamma, beta, mask, residual))
            whole_x, gamma, beta, mask, residual = given
            y, moments = self.train(call, whole_x, gamma, beta, mask=mask, residual=residual, grouped=grouped)
            return distributed.like(y, x), moments
        compiling = torch.compiler.is_compiling()
        if native.AVAILABLE and mask is None and not (compiling or recompute.active) and _is_common(call):
            masked = residual is not None and call.activation != LINEAR
            found = native.extension.batch_norm(call, x, gamma, beta, residual, masked, grouped)
            if found is not None:
                y, *statistics = found
                return y, Moments(y.numel() // statistics[0].numel(), *statistics)
        if mask is None and call.geometry.permutation is None:
            self._check_residual(residual, tuple(x.shape))
            flat_gamma, flat_beta = self._flat(gamma, call.geometry), self._flat(beta, call.geometry)
            found = None
            if compiling:
                if compiled.supports(x, call.geometry.axis):
                    call.geometry._groups(x.shape[0], call.group_size)  # checks the size of ghost batches
                    found = compiled.train(call, x, flat_gamma, flat_beta, residual)
            elif (kernel := kernel_for(x, flat_gamma, flat_beta, residual)) is not None:
                found = _by_kernel(kernel, call, x, flat_gamma, flat_beta, residual)
            if found is not None:
                y, moments = found
                return y, moments if grouped else self._of_parameter_shape(moments, call)
        return super().train(call, x, gamma, beta, mask=mask, residual=residual, grouped=grouped)

    def infer(
        self,
        call: Call,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        given = (x, mean, variance, gamma, beta, residual)
        if type(x) is not Tensor and distributed.is_distributed(x):
            *arrays, residual = map(distributed.local, given)
            return distributed.like(self.infer(call, *arrays, residual=residual), x)
        differentiates = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        constants = not (mean.requires_grad or variance.requires_grad)
        if not torch.compiler.is_compiling() and call.geometry.permutation is None and (constants or not differentiates):
            kernel = kernel_for(*given)
            if kernel is not None:
                self._check_residual(residual, tuple(x.shape))
                rows = [dense(self._flat(row, call.geometry), acc_dtype(x)) for row in (mean, variance, gamma, beta)]
                y = _infer(kernel, call, x, rows, residual, differentiates)
                if y is not None:
                    return y
        mean, variance = mean.to(acc_dtype(x)), variance.to(acc_dtype(x))
        return super().infer(call, x, mean, variance, gamma, beta, residual=residual)

    def update_running_stats(
        self, running: tuple[Tensor, Tensor, Tensor], moments: Moments, decay: float, unbiased: bool = False
    ) -> bool | Tensor | None:
        count, *statistics = moments
        if torch.compiler.is_compiling() or not isinstance(count, int):
            return None
        dtype, channel = moments.mean.dtype, moments.mean.shape[-1]
        if any(tensor.dtype is not dtype or not tensor.is_contiguous() for tensor in (*running, *statistics)):
            return None
        if any(tensor.numel() != channel for tensor in running):
            return None
        kernel = kernel_for(*running, *statistics)
        if kernel is None:
            return None
        try:
            accepted = kernel.update_running_stats((*running, decay, unbiased, None, None), moments)
        except Exception as error:
            refuse_after(kernel, error, dtype)
            return None
        torch.autograd.graph.increment_version(running)
        return accepted

    def range_warning(self, moments: Moments) -> str | None:
        # The answer that most batches get, without NumPy.
        if native.AVAILABLE and not torch.compiler.is_compiling() and native.extension.is_finite(moments.variance):
            return None
        return super().range_warning(moments)

    def at_hand(self, value: Tensor) -> Any:
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
        return value.detach().numpy() if type(value) is Tensor and value.device.type == "cpu" and not recorded else None

    def _flat(self, parameter: Tensor | None, geometry: Geometry) -> Any:
        fits = parameter is None or (len(geometry.axis) == 1 and parameter.shape == geometry.parameter_shape)
        return parameter if fits else super()._flat(parameter, geometry)

    def _call(
        self,
        x: Tensor,
        axis: int | Iterable[int],
        epsilon: float = 1e-5,
        activation: str | None = None,
        negative_slope: float = 0.01,
        virtual_batch_size: int | None = None,
        fixed_stats: bool = False,
    ) -> Call:
        if not torch.compiler.is_compiling():
            return super()._call(x, axis, epsilon, activation, negative_slope, virtual_batch_size, fixed_stats)
        # Compilers bypass a cache, with a warning.
        shape = tuple(size if isinstance(size, int) else None for size in x.shape)
        numbers = checked_epsilon(epsilon), activation_of(activation, negative_slope), virtual_batch_size
        return Call(Geometry(shape, axis), self._dtype_name(x), *numbers, fixed_stats)

    def _dtype_name(self, x: Tensor) -> str:
        return NAMES.get(x.dtype) or str(x.dtype)


def _is_common(call: Call) -> bool:
    """Return whether `native` takes such calls: of one channel axis, without ghost batches."""
    return call.group_size is None and len(call.geometry.axis) == 1


def train(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
) -> Tensor | None:
    """Normalize a batch and update the running statistics in one pass of a kernel; return None where no kernel can."""
    kernel = kernel_for(x) if residual is None else kernel_for(x, residual)
    if kernel is None or (recompute.active and recompute.recomputing()):
        return None
    try:
        return _train(kernel, call, x, gamma, beta, residual, running)
    except UnfitError:
        dtype = acc_dtype(x)
        gamma, beta = (dense(engine._flat(row, call.geometry), dtype) for row in (gamma, beta))
        try:
            return _train(kernel, call, x, gamma, beta, residual, running)
        except UnfitError:
            return None
    except Exception as error:
        refuse_after(kernel, error, x.dtype)
        return None


def _train(
    kernel: Kernel,
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
) -> Tensor:
    if torch.is_grad_enabled():
        y = autograd.batch_norm(x, gamma, beta, residual, (kernel, call, running, None, False))
    else:
        y, _ = kernel.forward(call, x, gamma, beta, residual, running=running)
    if running is not None:
        mean, mean_low, variance, _, _, batches, skipped = running
        written = (mean, mean_low, variance, batches, skipped)
        torch._C._increment_version([tensor for tensor in written if tensor is not None])
    return y


def _by_kernel(
    kernel: Kernel, call: Call, x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Moments] | None:
    """Compute `Engine.train`; return None where a GPU kernel failed."""
    dtype = acc_dtype(x)
    gamma, beta = dense(gamma, dtype), dense(beta, dtype)
    residual = None if residual is None else residual.to(x.dtype)
    try:
        y, *statistics = autograd.batch_norm(x, gamma, beta, residual, (kernel, call, None, None, True))
    except Exception as error:
        refuse_after(kernel, error, x.dtype)
        return None
    if recompute.recomputing():
        recompute.remember(y, kernel, call, x, gamma, beta, residual, statistics)
    return y, Moments(call.count(tuple(x.shape)), *statistics)


def _infer(
    kernel: Kernel,
    call: Call,
    x: Tensor,
    rows: Sequence[Any],
    residual: Tensor | None,
    differentiates: bool,
) -> Tensor | None:
    """Compute `Engine.infer` from mean, variance, gamma and beta; return None where a GPU kernel failed."""
    mean, variance, gamma, beta = rows
    residual = None if residual is None else residual.to(x.dtype)
    try:
        if not differentiates:
            return kernel.infer(call, x, mean, variance, gamma, beta, residual)
        # A copy: running statistics may change before the backward pass.
        statistics = torch.stack((mean, torch.zeros_like(mean), variance)).unsqueeze(1)
        return autograd.batch_norm(x, gamma, beta, residual, (kernel, call, None, statistics, False))
    except Exception as error:
        refuse_after(kernel, error, x.dtype)
        return None


engine = _TorchEngine("torch", xp, _composed)
batch_norm = engine.batch_norm
normalize = engine.normalize
