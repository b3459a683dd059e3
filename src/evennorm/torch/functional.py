"""The differentiable operation on torch tensors: `core`'s forward and backward under one autograd.Function."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from evennorm.core.engine import Engine
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments, count_of
from evennorm.kernels import cpu as kernel
from evennorm.kernels import reference
from evennorm.torch import cpu, gpu, op
from evennorm.torch.namespace import xp
from evennorm.torch.recompute import recomputing, remember

__all__ = ["batch_norm", "engine", "normalize"]


class _BatchNorm(torch.autograd.Function):
    """Saves x and the statistics. The statistics are outputs too, so that a second derivative passes through them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        epsilon: float,
        negative_slope: float,
    ) -> tuple[Tensor, ...]:
        y, moments = reference.forward(xp, x, gamma, beta, residual, mask, epsilon, negative_slope)
        return y, moments.mean, moments.mean_low, moments.variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, gamma, beta, residual, mask, ctx.epsilon, ctx.negative_slope = inputs
        _, mean, mean_low, variance = output
        ctx.mark_non_differentiable(mean)
        ctx.save_for_backward(x, gamma, beta, residual, mask, mean, mean_low, variance)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor, d_mean: Tensor, d_variance: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, residual, mask, *statistics = ctx.saved_tensors
        moments = Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)
        g = reference.backward(
            xp, dy, x, moments, gamma, beta, residual, mask, ctx.epsilon, ctx.negative_slope, d_mean, d_variance
        )
        return *g, None, None, None


def _train(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> tuple[Tensor, Moments]:
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        # Torch differentiates the formulas themselves, in either direction.
        return reference.forward(xp, x, gamma, beta, residual, mask, epsilon, negative_slope)
    y, *statistics = _BatchNorm.apply(x, gamma, beta, residual, mask, epsilon, negative_slope)
    return y, Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)


class _TorchEngine(Engine):
    """Takes tensors to the kernels of their device as they lie in memory, without a view of one fixed order."""

    def train(
        self,
        geometry: Geometry,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        *,
        epsilon: float,
        mask: Tensor | None = None,
        negative_slope: float = 1.0,
        residual: Tensor | None = None,
        virtual_batch_size: int | None = None,
        grouped: bool = True,
    ) -> tuple[Tensor, Moments]:
        serve = self._served_by(x, gamma, beta, residual) if mask is None and geometry.permutation is None else None
        if serve is not None:
            if residual is not None:
                self._check_residual(residual, tuple(x.shape))
            flat_gamma, flat_beta = self._flat(gamma, geometry), self._flat(beta, geometry)
            shape = geometry.parameter_shape if not grouped and virtual_batch_size is None else None
            found = serve.train(
                geometry, x, flat_gamma, flat_beta, residual, epsilon, negative_slope, virtual_batch_size, shape
            )
            if found is not None:
                y, moments = found
                if serve is not op and recomputing():

                    def again(x: Tensor, residual: Tensor | None) -> Tensor:
                        given = moments, flat_gamma, flat_beta, residual, epsilon, negative_slope, virtual_batch_size
                        return serve.again(geometry, x, *given)

                    remember(y, x, residual, (flat_gamma, flat_beta), again)
                ready = grouped or shape is not None
                return y, moments if ready else self._of_parameter_shape(moments, geometry, virtual_batch_size)
        return super().train(
            geometry,
            x,
            gamma,
            beta,
            epsilon=epsilon,
            mask=mask,
            negative_slope=negative_slope,
            residual=residual,
            virtual_batch_size=virtual_batch_size,
            grouped=grouped,
        )

    def infer(
        self,
        geometry: Geometry,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        *,
        epsilon: float,
        negative_slope: float = 1.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        given = (x, mean, variance, gamma, beta, residual)
        wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        constants = not (mean.requires_grad or variance.requires_grad)
        serve = self._served_by(*given) if geometry.permutation is None and (constants or not wants_gradient) else None
        if serve in (cpu, gpu):
            if residual is not None:
                self._check_residual(residual, tuple(x.shape))
            rows = [self._flat(row, geometry) for row in (mean, variance, gamma, beta)]
            infer = serve.infer_with_gradient if wants_gradient else serve.infer
            y = infer(geometry, x, *rows, residual, epsilon, negative_slope)
            if y is not None:
                return y
        mean, variance = mean.to(cpu.wide(x)), variance.to(cpu.wide(x))
        return super().infer(
            geometry, x, mean, variance, gamma, beta, epsilon=epsilon, negative_slope=negative_slope, residual=residual
        )

    def follow(
        self, running: tuple[Tensor, Tensor, Tensor], moments: Moments, decay: float, unbiased: bool = False
    ) -> bool | Tensor | None:
        count, *statistics = moments
        if torch.compiler.is_compiling() or not isinstance(count, int):
            return None
        dtype, channel = moments.mean.dtype, moments.mean.shape[-1]
        for tensor in (*running, *statistics):
            if tensor.dtype is not dtype or not tensor.is_contiguous():
                return None
        for tensor in running:
            if tensor.numel() != channel:
                return None
        accepted: bool | Tensor | None = None
        if cpu.serves(*running, *statistics):
            accepted = kernel.follow(cpu.memory, running, moments, decay, unbiased)
        elif gpu.serves(*running, *statistics):
            accepted = gpu.follow(running, moments, decay, unbiased)
        if accepted is not None:
            torch.autograd.graph.increment_version(running)
        return accepted

    def _flat(self, parameter: Tensor | None, geometry: Geometry) -> Any:
        fits = parameter is None or (parameter.shape == geometry.parameter_shape and len(geometry.axis) == 1)
        return parameter if fits else super()._flat(parameter, geometry)

    @staticmethod
    def _served_by(x: Tensor, *others: Tensor | None) -> Any:
        """The module whose `train` takes the kernels to these tensors, or None."""
        if torch.compiler.is_compiling():
            return op if x.dtype in _COMPILED.get(x.device.type, ()) else None
        if cpu.serves(x, *others):
            return cpu
        return gpu if gpu.serves(x, *others) else None

    def _geometry(self, x: Tensor, axis: int | Iterable[int]) -> Geometry:
        if torch.compiler.is_compiling() or type(axis) is not int:
            return super()._geometry(x, axis)
        return _geometry(tuple(x.shape), axis)


_COMPILED = {"cpu": cpu.SERVED, "cuda": gpu.COMPILED}

# Small tensors are normalized faster than their geometry is worked out.
_geometry = lru_cache(maxsize=1024)(Geometry)

engine = _TorchEngine("torch", xp, _train, partial(reference.inference, xp))
batch_norm = engine.batch_norm
normalize = engine.normalize
