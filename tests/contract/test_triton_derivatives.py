"""Derivatives through the GPU kernels, first and second, and those that reach the moments on another way."""

from __future__ import annotations

import pytest

from tests.contract.on_triton import DEVICE, on_gpu_kernels  # isort: skip, may skip all

import torch

from evennorm.kernels.triton.kernel import TritonKernel
from evennorm.torch import batch_norm, normalize, recompute_outputs
from tests.grids import pairwise

__all__ = ["on_gpu_kernels"]


def failing(*_: object) -> None:
    raise RuntimeError("no such architecture")


@pytest.mark.parametrize(*pairwise(activation=[None, "leaky_relu"], group=[None, 3], streamed=[False, True]))
def test_derivatives_that_reach_the_moments(activation, group, streamed) -> None:
    """Of statistics that a loss looks at, and of the gradient itself, as the composed form has them."""
    shape = (6, 2, 60, 61) if streamed else (6, 4, 5)
    x, residual = (torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_() for _ in range(2))
    gamma, beta = (torch.rand(shape[1], dtype=torch.float64, device=DEVICE).requires_grad_() for _ in range(2))
    weight, direction = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE)
    leaves = x, gamma, beta, residual

    def ours(x, gamma, beta, residual):
        y, m = batch_norm(
            x, gamma, beta, axis=1, epsilon=1e-3, residual=residual, activation=activation, virtual_batch_size=group
        )
        return y, m.mean + m.mean_low, m.variance

    def formula(x, gamma, beta, residual):
        parts, means, variances = [], [], []
        row = (1, -1, *(1,) * (x.ndim - 2))
        axes = [a for a in range(x.ndim) if a != 1]
        for part in x.split(group or len(x)):
            mean, variance = part.mean(axes), part.var(axes, correction=0)
            parts.append(
                (part - mean.reshape(row)) / (variance.reshape(row) + 1e-3).sqrt() * gamma.reshape(row) + beta.reshape(row)
            )
            means.append(mean)
            variances.append(variance)
        z = torch.cat(parts) + residual
        slope = 1.0 if activation is None else 0.01
        return torch.where(z > 0, z, slope * z), torch.stack(means), torch.stack(variances)

    def derivatives(compute):
        y, mean, variance = compute(*leaves)
        loss = (y * weight).sum() + variance.sin().sum() + (3 * mean).sin().sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return *first, *torch.autograd.grad((dx * direction).sum(), leaves, allow_unused=True)

    for found, wanted in zip(derivatives(ours), derivatives(formula), strict=True):
        found = torch.zeros_like(wanted) if found is None and wanted is not None else found
        wanted = torch.zeros_like(found) if wanted is None and found is not None else wanted
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_torch_checks_the_derivatives() -> None:
    """By numerical differentiation, once and twice."""
    torch.manual_seed(5)
    double = {"dtype": torch.float64, "device": DEVICE, "requires_grad": True}
    leaves = torch.randn(3, 2, 2, **double), torch.rand(2, **double), torch.rand(2, **double), torch.randn(3, 2, 2, **double)

    def compute(x, gamma, beta, residual):
        y, m = batch_norm(x, gamma, beta, axis=1, epsilon=1e-3, activation="leaky_relu", residual=residual)
        return y, m.mean + m.mean_low, m.variance

    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *a: compute(*a)[0], leaves, fast_mode=True)


@pytest.mark.parametrize(
    *pairwise(
        activation=[None, "relu", "leaky_relu"],
        has_residual=[False, True],
        layout=[torch.contiguous_format, torch.channels_last],
        streamed=[False, True],
        fails=[False, True],
    )
)
def test_derivatives_by_given_statistics(activation, has_residual, layout, streamed, fails, monkeypatch) -> None:
    """A frozen layer: no value acts on mean and variance."""
    shape = (3, 2, 61, 60) if streamed else (3, 4, 5, 6)
    x, residual = (torch.randn(shape, dtype=torch.float64, device=DEVICE).contiguous(memory_format=layout) for _ in range(2))
    mean, variance, gamma, beta = (torch.rand(shape[1], dtype=torch.float64, device=DEVICE) + 0.5 for _ in range(4))
    weight, direction = torch.randn(2, *shape, dtype=torch.float64, device=DEVICE)
    leaves = [leaf.requires_grad_() for leaf in (x, gamma, beta, *([residual] if has_residual else []))]
    slope = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}[activation]

    def ours():
        given = {"epsilon": 1e-3, "activation": activation, "residual": residual if has_residual else None}
        return normalize(x, mean, variance, gamma, beta, axis=1, **given)

    def formula():
        m, v, g, b = (row.reshape(1, -1, 1, 1) for row in (mean, variance, gamma, beta))
        z = (x - m) / (v + 1e-3).sqrt() * g + b
        z = z + residual if has_residual else z
        return torch.where(z > 0, z, slope * z)

    def derivatives(compute):
        y = compute()
        with torch.no_grad():  # running statistics go on before the backward pass
            mean.add_(1)
        (dx,) = torch.autograd.grad((y * weight).sum(), x, create_graph=True)
        found = y, *torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True), second(dx)
        with torch.no_grad():
            mean.sub_(1)
        return found

    def second(dx):
        return torch.autograd.grad((dx * direction).sum(), gamma)[0]

    if fails:
        monkeypatch.setattr(TritonKernel, "backward", failing)
        with pytest.warns(UserWarning, match="a kernel failed"):
            found = derivatives(ours)
    else:
        found = derivatives(ours)
    for got, wanted in zip(found, derivatives(formula), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(*pairwise(dtype=[torch.float32, torch.bfloat16], group=[None, 3], streamed=[False, True]))
def test_outputs_are_computed_again_to_the_same_bits(dtype, group, streamed) -> None:
    x, residual = (torch.randn((6, 2, 60, 61) if streamed else (6, 4, 5), device=DEVICE).to(dtype) for _ in range(2))
    gamma, beta = (torch.rand(x.shape[1], device=DEVICE).requires_grad_() for _ in range(2))

    def gradients():
        factor = torch.ones_like(x).requires_grad_()
        options = {"residual": residual, "activation": "relu", "virtual_batch_size": group}
        product = batch_norm(x, gamma, beta, axis=1, **options)[0] * factor  # keeps the output
        return torch.autograd.grad(product.sum(), (factor, gamma, beta))

    expected = gradients()
    with recompute_outputs():
        found = gradients()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
