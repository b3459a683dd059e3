"""The operator that torch's compilers see: its derivatives, first and second, its fake tensors, and programs around it."""

from __future__ import annotations

import pytest
import torch

from evennorm.kernels import cpu
from evennorm.torch import batch_norm, op

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without the compiled kernels")


def inputs(residual: bool = True) -> list[torch.Tensor | None]:
    torch.manual_seed(3)
    double = {"dtype": torch.float64, "requires_grad": True}
    image = torch.randn(6, 4, 5, **double)
    return [image, torch.rand(4, **double), torch.rand(4, **double), torch.randn(6, 4, 5, **double) if residual else None]


def operator(slope, group):
    def run(x, gamma, beta, residual):
        y, mean, mean_low, variance = op.batch_norm(x, gamma, beta, residual, [1], 1e-3, slope, group)
        return y, mean + mean_low, variance  # the rounded mean by itself is a constant

    return run


def door(activation, group):
    def run(x, gamma, beta, residual):
        y, m = batch_norm(
            x, gamma, beta, axis=1, residual=residual, activation=activation, epsilon=1e-3, virtual_batch_size=group
        )
        return y, m.mean + m.mean_low, m.variance

    return run


@pytest.mark.parametrize(
    ("run", "residual"),
    [
        (operator(1.0, None), True),
        (operator(0.1, 2), False),
        (operator(0.0, None), False),
        (door(None, None), True),
        (door("leaky_relu", 3), True),
        (door("relu", None), True),
        (door("relu", 2), False),
    ],
)
def test_derivatives(run, residual) -> None:
    given = inputs(residual)
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_torch_accepts_the_operator(affine, memory) -> None:
    x = torch.randn(6, 4, 5, 3).to(memory_format=memory).requires_grad_()
    gamma, beta = (torch.rand(4, requires_grad=True) if affine else None for _ in range(2))
    torch.library.opcheck(op.batch_norm, (x, gamma, beta, None, [1], 1e-3, 0.0, None))
    torch.library.opcheck(op.batch_norm, (x, gamma, beta, torch.randn_like(x), [1], 1e-3, 1.0, 3))


def test_a_compiled_program_calls_it() -> None:
    """Once for the batch, whatever its size; with the values and gradients of eager mode."""
    torch.compiler.reset()
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(backend=record, fullgraph=True, dynamic=True)
    def step(x, gamma):
        return batch_norm(x * 2, gamma, axis=1, activation="relu")[0] + 1

    for n in (6, 8):
        x, gamma = torch.randn(n, 4, 5, requires_grad=True), torch.rand(4, requires_grad=True)
        y = step(x, gamma)
        expected = batch_norm(x * 2, gamma, axis=1, activation="relu")[0] + 1
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        gradients, wanted = (torch.autograd.grad(z.square().sum(), (x, gamma)) for z in (y, expected))
        torch.testing.assert_close(gradients, wanted, rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1
    assert sum("evennorm.batch_norm" in str(node.target) for node in graphs[0].graph.nodes) == 1


def test_under_functional_transforms() -> None:
    """The composed form serves there."""
    x, gamma = torch.randn(3, 6, 4), torch.rand(4)

    def loss(x):
        return batch_norm(x, gamma, activation="relu")[0].square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(x)
    for one, wanted in zip(x, gradients, strict=True):
        one.requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(one), one)[0], wanted, rtol=1e-5, atol=1e-5)
