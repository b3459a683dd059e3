"""Normalize a batch that lies in parts on several devices by the statistics of the whole: one collective in each direction.

Each device takes the moments of its part and gathers those of all (`core.exchange`); backward, the two sums of
`core.normalize.gradient_sums` are added over devices. In between compute the kernels of the device, or the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evennorm.core.call import Call
from evennorm.core.exchange import merged, packed
from evennorm.core.moments import Moments
from evennorm.core.moments import moments as moments_of
from evennorm.core.normalize import dz_of, gradient_sums, input_gradient, parameter_gradients
from evennorm.kernels import reference
from evennorm.kernels.contract import Kernel
from evennorm.torch import backend, collectives
from evennorm.torch.collectives import Group
from evennorm.torch.kernels import kernel_for
from evennorm.torch.namespace import xp
from evennorm.torch.tensors import acc_dtype, dense

__all__ = ["engine", "train"]


class Exchange(NamedTuple):
    """The processes that a layer exchanges with, and its name for error messages."""

    group: Group
    layer: Callable[[], str]

    def gather(self, local: Moments, differentiates: bool) -> tuple[Moments, list[int] | None]:
        """Return the moments of the whole batch, and the ranks that differentiate, or None if all or none do or this is
        unknown.

        A count says by its sign whether its process will take part in the backward pass.
        """
        groups, channel = local.mean.shape
        count = xp.asarray(local.count, like=local.mean)
        row = packed(xp, local._replace(count=count if differentiates else -1.0 - count))
        with self._named("the statistics"):
            rows = collectives.gathered(row, self.group).reshape(-1, groups, row.shape[0] // groups)
        counts = rows[:, :, 3 * channel :]
        silent = counts < 0
        rows = torch.cat((rows[:, :, : 3 * channel], torch.where(silent, -1.0 - counts, counts)), 2)
        participants = None
        if differentiates and row.is_cpu and not torch.compiler.is_compiling() and bool(silent.any()):
            participants = [rank for rank, quiet in enumerate(silent[:, 0, 0].tolist()) if not quiet]
        return merged(xp, rows, groups, channel), participants

    def add(self, sums: Tensor, participants: list[int] | None) -> Tensor:
        with self._named("the gradients"):
            return collectives.added(sums, self.group, participants)

    def _named(self, doing: str) -> Any:
        return (
            nullcontext()
            if torch.compiler.is_compiling()
            else collectives.named(self.layer, f"{doing} of the other", self.group)
        )


class _ByKernel(NamedTuple):
    """The halves of a pass by a kernel of the device. `x`, `residual` and `dy` are tensors in any layout."""

    kernel: Kernel
    call: Call

    def moments(self, x: Tensor, mask: None) -> Moments:
        return Moments(self.call.count(tuple(x.shape)), *self.kernel.moments(self.call, x))

    def normalize(
        self, x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, whole: Moments, mask: None
    ) -> tuple[Tensor, Tensor | None]:
        y, (_, bits) = self.kernel.forward(self.call, x, gamma, beta, residual, statistics=torch.stack(whole[1:]))
        return y, bits

    def sums(self, dy: Tensor, saved: _Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
        kept = torch.stack(saved.whole[1:]), saved.bits
        return self.kernel.gradient_sums(self.call, dy, saved.x, saved.gamma, saved.beta, kept)

    def gradients(
        self, dy: Tensor, saved: _Saved, sums: Tensor, d_mean: Tensor | None, d_variance: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kept, count = (torch.stack(saved.whole[1:]), saved.bits), saved.whole.count
        given = saved.x, saved.gamma, saved.beta, kept, sums, count, d_mean, d_variance
        return self.kernel.input_gradient(self.call, dy, *given)


class _ByFormulas(NamedTuple):
    """The halves of a pass by the formulas of `core`, on views (groups, outer, channel, inner) and with a mask."""

    call: Call

    def moments(self, x: Tensor, mask: Tensor | None) -> Moments:
        return moments_of(xp, reference.wide(xp, x), mask)

    def normalize(
        self,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        whole: Moments,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        return reference.infer(xp, self.call, x, whole, gamma, beta, residual), residual

    def sums(self, dy: Tensor, saved: _Saved) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dz, x = self._open(dy, saved)
        sums = gradient_sums(xp, dz, x, saved.whole)
        return torch.stack(sums), *parameter_gradients(
            xp, *sums, saved.whole, self.call.epsilon, saved.gamma is not None, saved.beta is not None
        )

    def gradients(
        self, dy: Tensor, saved: _Saved, sums: Tensor, d_mean: Tensor | None, d_variance: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dz, x = self._open(dy, saved)
        given = saved.whole, saved.gamma, self.call.epsilon, sums[0], sums[1], saved.mask, d_mean, d_variance
        return input_gradient(xp, dz, x, *given).to(saved.x.dtype), dz.to(dy.dtype)

    def _open(self, dy: Tensor, saved: _Saved) -> tuple[Tensor, Tensor]:
        residual = None if saved.bits is None else reference.wide(xp, saved.bits)
        given = saved.whole, saved.gamma, saved.beta, self.call.epsilon, self.call.activation, residual, saved.mask
        return dz_of(xp, reference.wide(xp, dy), reference.wide(xp, saved.x), *given)


class _Saved(NamedTuple):
    """What the backward pass needs. `bits` say which values the activation let through, or are the residual itself."""

    x: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    bits: Tensor | None
    mask: Tensor | None
    whole: Moments


class _Synchronized(torch.autograd.Function):
    """Synchronized normalization. It saves what `autograd._BatchNorm` does. The moments of the whole are outputs too, if
    asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        steps: _ByKernel | _ByFormulas,
        exchange: Exchange,
        differentiates: bool,
    ) -> tuple[Tensor, ...]:
        local = steps.moments(x, mask)
        whole, participants = exchange.gather(local, differentiates)
        count, mean, mean_low, variance = whole
        y, bits = steps.normalize(x, gamma, beta, residual, whole, mask)
        ctx.given = steps, exchange, participants, residual is not None
        ctx.mark_non_differentiable(mean, count)  # mean_low carries the derivative of both
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, gamma, beta, bits, mask, count, mean, mean_low, variance)
        return y, count, mean, mean_low, variance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, _: Any, __: Any, d_mean: Tensor | None, d_variance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, gamma, beta, bits, mask, *whole = ctx.saved_tensors
        steps, exchange, participants, has_residual = ctx.given
        dy = torch.zeros_like(x) if dy is None else dy.to(x.dtype)
        saved = _Saved(x, gamma, beta, bits, mask, Moments(*whole))
        sums, d_gamma, d_beta = steps.sums(dy, saved)
        if d_mean is None and d_variance is None:
            total = exchange.add(sums, participants)
        else:  # derivatives that reach the moments directly are of the whole batch, too
            beside = [torch.zeros_like(sums[0]) if d is None else d for d in (d_mean, d_variance)]
            total = exchange.add(torch.cat((sums, torch.stack(beside))), participants)
            _, _, d_mean, d_variance = total.unbind()
            total = total[:2]
        dx, d_residual = steps.gradients(dy, saved, total, d_mean, d_variance)
        return dx, d_gamma, d_beta, d_residual if has_residual else None, None, None, None, None


def train(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    exchange: Exchange,
) -> tuple[Tensor, Moments]:
    """Normalize `x`, one device's part of a batch; return y and the moments of the whole batch, (groups, channel).

    Their count is an int where it can be asked for without waiting for a device.
    """
    given = (x, gamma, beta, residual)
    differentiates = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    compiling = torch.compiler.is_compiling()
    dtype = acc_dtype(x)
    gamma, beta = (None if row is None else dense(row, dtype) for row in (gamma, beta))
    kernel = None if compiling or mask is not None or call.geometry.permutation else kernel_for(x, gamma, beta, residual)
    if kernel is not None and not call.gradient_needs_formulas:
        residual = None if residual is None else residual.to(x.dtype)
        y, *whole = _Synchronized.apply(x, gamma, beta, residual, None, _ByKernel(kernel, call), exchange, differentiates)
    else:
        geometry, sizes = call.geometry, tuple(x.shape)
        views = [None if t is None else geometry.view(xp, t, call.group_size) for t in (x, residual)]
        mask_view = None if mask is None else geometry.mask_view(xp, xp.boolean(mask), sizes, call.group_size)
        arguments = views[0], gamma, beta, views[1], mask_view
        y, *whole = _Synchronized.apply(*arguments, _ByFormulas(call), exchange, differentiates)
        y = geometry.restore(xp, y, sizes)
    moments = Moments(*whole)
    if x.is_cpu and not compiling and moments.count.numel() == 1:
        moments = moments._replace(count=int(moments.count))
    return y, moments


class _SynchronizedEngine(backend._TorchEngine):
    """An engine whose statistics are taken over all processes of the default group."""

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
        if collectives.size_of(None) == 1:
            return super().train(call, x, gamma, beta, mask=mask, residual=residual, grouped=grouped)
        self._check_residual(residual, tuple(x.shape))
        gamma, beta = self._flat(gamma, call.geometry), self._flat(beta, call.geometry)
        y, moments = train(call, x, gamma, beta, residual, mask, Exchange(None, lambda: "a synchronized layer"))
        return y, moments if grouped else self._of_parameter_shape(moments, call)


engine = _SynchronizedEngine("torch", xp, backend.engine.forward)
"""`evennorm.torch.engine` with statistics of the whole batch, where torch.distributed is initialized."""
