"""The operators that torch.compile sees: their values, their derivatives, first and second, and programs around them."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch

from evennorm.torch import batch_norm, compiled
from tests.cases import CASES, SHAPES, Case
from tests.contract import textbook
from tests.grids import mostly


def inputs(residual: bool = True) -> list[torch.Tensor | None]:
    torch.manual_seed(3)
    double = {"dtype": torch.float64, "requires_grad": True}
    image = torch.randn(6, 4, 5, **double)
    return [image, torch.rand(4, **double), torch.rand(4, **double), torch.randn(6, 4, 5, **double) if residual else None]


@pytest.mark.parametrize(
    ("slope", "limit", "group", "residual"),
    [(1.0, inf, None, True), (0.1, inf, 2, False), (0.0, inf, None, False), (0.1, inf, 3, True), (0.0, 6.0, None, True)],
)
def test_derivatives(slope, limit, group, residual) -> None:
    def run(x, gamma, beta, residual):
        y, shift, rest, variance = compiled.batch_norm(x, gamma, beta, residual, [1], 1e-3, slope, limit, group)
        return y, shift.detach() + rest, variance

    given = inputs(residual)
    if limit == 6:
        given[1] = (given[1] * 6).detach().requires_grad_()
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize(*mostly(lambda case: case.name in SHAPES, "case", [(case,) for case in CASES if case.mask is None]))
def test_values_and_gradients_over_the_case_table(case: Case) -> None:
    """As `torch.compile` traces them, without generating code."""
    arrays = case.make()
    del arrays["mask"]
    expected = textbook.forward(case, **{k: v for k, v in arrays.items() if k != "dy"}, activation="relu")
    names = ("x", "gamma", "beta", "residual")
    wanted = textbook.backward(case, *(arrays[name] for name in ("dy", *names)), activation="relu")
    tensors = [torch.tensor(arrays[name], dtype=torch.float32, requires_grad=True) for name in names]
    options = {"axis": case.axis, "epsilon": case.epsilon, "virtual_batch_size": case.group, "activation": "relu"}
    torch.compiler.reset()
    program = torch.compile(
        lambda x, gamma, beta, residual: batch_norm(x, gamma, beta, residual=residual, **options)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    y = program(*tensors)
    np.testing.assert_allclose(y.detach().double().numpy(), expected, rtol=0, atol=4e-6)
    found = torch.autograd.grad((y * torch.tensor(arrays["dy"], dtype=torch.float32)).sum(), tensors)
    for name, got, exact in zip(names, found, wanted, strict=True):
        scale = max(1.0, np.abs(exact).max(initial=0.0))
        np.testing.assert_allclose(got.double().numpy(), exact, rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_an_outlier_beside_a_constant(dtype) -> None:
    """Where one value differs from 4,095 equal ones, a rounded mean would be off by more than y is rounded."""
    x = torch.full((4096, 2), 1000.0, dtype=dtype)
    x[7] = x[7] + 8
    exact = x.double()
    expected = (exact - exact.mean(0)) / (exact.var(0, correction=0) + 1e-5).sqrt()
    torch.compiler.reset()
    y = torch.compile(lambda x: batch_norm(x)[0], fullgraph=True)(x)
    torch.testing.assert_close(y.double(), expected.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_a_large_mean_over_many_values() -> None:
    """Float32 sums of squares are rounded down there again and again."""
    x = torch.tensor(np.random.default_rng(0).normal(1e5, 1, (70_001, 2)), dtype=torch.float32)
    exact = x.double()
    torch.compiler.reset()
    y = torch.compile(lambda x: batch_norm(x)[0], fullgraph=True)(x)
    expected = (exact - exact.mean(0)) / (exact.var(0, correction=0) + 1e-5).sqrt()
    assert (y - expected).abs().max() < 2e-6


def test_a_compiled_program_calls_the_operator() -> None:
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
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        gradients, wanted = (torch.autograd.grad(z.square().sum(), (x, gamma)) for z in (y, expected))
        torch.testing.assert_close(gradients, wanted, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    assert sum("evennorm.batch_norm" in str(node.target) for node in graphs[0].graph.nodes) == 1


def test_under_functional_transforms() -> None:
    x, gamma = torch.randn(3, 6, 4), torch.rand(4)

    def loss(x):
        return batch_norm(x, gamma, activation="relu")[0].square().sum()

    torch.compiler.reset()
    for transform in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")):
        gradients = transform(torch.func.vmap(torch.func.grad(loss)))(x)
        for one, wanted in zip(x.clone(), gradients, strict=True):
            one = one.detach().requires_grad_()
            torch.testing.assert_close(torch.autograd.grad(loss(one), one)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-19, 1e18])
def test_gradients_at_the_ends_of_the_range(scale: float) -> None:
    """Where the square of 1 / deviation is beyond float32, or loses digits."""
    x = (torch.randn(6, 4, 5) * scale).requires_grad_()
    dy = torch.randn(6, 4, 5)
    y, _, _, _ = compiled.batch_norm(x, None, None, None, [1], 1e-44, 1.0, inf, None)
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = x.detach().double().requires_grad_()
    centred = wide - wide.mean((0, 2), keepdim=True)
    exact = centred / centred.square().mean((0, 2), keepdim=True).sqrt()
    (expected,) = torch.autograd.grad(exact, wide, dy.double())
    torch.testing.assert_close(dx.double() * scale, expected * scale, rtol=1e-5, atol=1e-5)
