"""Every way that JAX differentiates: what it makes of the kernels, against what it makes of the plain formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evennorm.jax import batch_norm
from tests.cases import Case
from tests.contract.textbook import BENDS, spread
from tests.grids import mostly

pytestmark = pytest.mark.usefixtures("_double_precision")


@pytest.fixture
def _double_precision() -> Any:
    with jax.enable_x64(True):
        yield


CASES = [
    Case("dense", (6, 3)),
    Case("images, channels first", (3, 2, 3, 3), 1),
    Case("single column", (7, 1)),
    Case("ghost batches", (6, 2, 2), group=3),
    Case("mask over time", (4, 3, 2), mask="positions"),
]


def arrays_of(case: Case, residual: bool) -> tuple[list[np.ndarray], dict[str, Any]]:
    made = case.make(5)
    options = {"mask": made["mask"], "virtual_batch_size": case.group}
    names = ["x", "gamma", "beta", *(["residual"] if residual else [])]
    return [np.nan_to_num(made[name], nan=0.5) for name in names], options


def ours(case: Case, activation: str | None, **options: Any) -> Callable[..., tuple[Any, Any, Any]]:
    def compute(x: Any, gamma: Any, beta: Any, residual: Any = None) -> tuple[Any, Any, Any]:
        fixed = {"axis": case.axis, "epsilon": case.epsilon, "activation": activation}
        y, m = batch_norm(x, gamma, beta, residual=residual, **fixed, **options)
        return y, (m.mean + m.mean_low).ravel(), m.variance.ravel()

    return compute


def textbook(case: Case, activation: str | None, mask: Any, virtual_batch_size: int | None) -> Callable[..., Any]:
    counts = np.ones(case.shape, bool) if mask is None else case.full_mask(mask)

    def compute(x: Any, gamma: Any, beta: Any, residual: Any = 0.0) -> tuple[Any, Any, Any]:
        shape = [n if a in case.axes else 1 for a, n in enumerate(case.shape)]
        size = virtual_batch_size or case.shape[0]
        parts, means, variances = [], [], []
        for start in range(0, case.shape[0], size):
            xg, counted = x[start : start + size], counts[start : start + size]
            n = counted.sum(case.reduced, keepdims=True)
            mean = jnp.where(counted, xg, 0.0).sum(case.reduced, keepdims=True) / n
            variance = jnp.where(counted, (xg - mean) ** 2, 0.0).sum(case.reduced, keepdims=True) / n
            parts.append((xg - mean) / jnp.sqrt(variance + case.epsilon))
            means.append(mean.ravel())
            variances.append(variance.ravel())
        z = jnp.concatenate(parts) * gamma.reshape(shape) + beta.reshape(shape) + residual
        slope, limit = BENDS[activation]
        y = jnp.where(z >= limit, limit, jnp.where(z > 0, z, slope * z))
        return y, jnp.concatenate(means), jnp.concatenate(variances)

    return compute


def scalar(function: Callable[..., Any]) -> Callable[..., Any]:
    """A loss that looks at y and at both moments, with a second derivative everywhere."""

    def loss(*inputs: Any) -> Any:
        y, mean, variance = function(*inputs)
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(jnp.sin(y * weights)) + jnp.sum(jnp.sin(mean)) + jnp.sum(jnp.sin(3 * variance))

    return loss


def by_all(inputs: list[Any]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


def linear(f: Callable[..., Any], a: list[Any]) -> tuple[Any, Any, Any]:
    """The linear map at a point, its transpose, and the transpose of that."""
    y, along = jax.linearize(f, *a)
    back = jax.linear_transpose(along, *a)
    again = jax.linear_transpose(lambda c: jax.vjp(f, *a)[1](c), y)
    return along(*a), back(y), again(tuple(a))


def through_scan(f: Callable[..., Any], a: list[Any]) -> Any:
    def loss(x: Any) -> Any:
        return jax.lax.scan(lambda c, _: (f(c, *a[1:])[0], None), x, None, length=3)[0].sum()

    return jax.grad(lambda x: jnp.sin(loss(x)))(a[0])


WAYS: dict[str, Callable[[Callable[..., Any], list[Any]], Any]] = {
    "jvp": lambda f, a: jax.jvp(f, tuple(a), tuple(jnp.sin(7 * v) for v in a)),
    "jvp by gamma": lambda f, a: jax.jvp(lambda g: f(a[0], g, *a[2:]), (a[1],), (a[2],)),
    "grad": lambda f, a: jax.grad(scalar(f), by_all(a))(*a),
    "grad by gamma": lambda f, a: jax.grad(scalar(f), 1)(*a),
    "grad by the last": lambda f, a: jax.grad(scalar(f), len(a) - 1)(*a),
    "grad of the variance": lambda f, a: jax.grad(lambda x: jnp.sin(f(x, *a[1:])[2]).sum())(a[0]),
    "jacfwd": lambda f, a: jax.jacfwd(f, by_all(a))(*a),
    "jacrev": lambda f, a: jax.jacrev(f, by_all(a))(*a),
    "hessian": lambda f, a: jax.hessian(scalar(f), by_all(a))(*a),
    "reverse over reverse": lambda f, a: jax.jacrev(jax.jacrev(scalar(f), by_all(a)), by_all(a))(*a),
    "reverse over forward": lambda f, a: jax.jacrev(jax.jacfwd(scalar(f), by_all(a)), by_all(a))(*a),
    "forward over forward": lambda f, a: jax.jacfwd(jax.jacfwd(scalar(f), by_all(a)), by_all(a))(*a),
    "third": lambda f, a: jax.jvp(lambda x: jax.hessian(scalar(f))(x, *a[1:]), (a[0],), (jnp.sin(a[0]),))[1],
    "linear maps": linear,
    "checkpoint": lambda f, a: jax.grad(jax.checkpoint(scalar(f)), by_all(a))(*a),
    "scan": through_scan,
}


def compare(got: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1.0, np.abs(b).max(initial=0.0)))


RUNS = [
    (CASES[0], None, True),
    (CASES[0], "relu", False),
    *((case, "leaky_relu", True) for case in CASES),
    (CASES[0], "relu6", True),
]


def crossed(way: str, run: tuple[Case, str | None, bool]) -> bool:
    """Every way with a residual behind a dense layer, and with one other run at least; every run in several ways."""
    place = RUNS.index(run)
    return place == 2 or (place + list(WAYS).index(way)) % 6 == 0


@pytest.mark.parametrize(
    *mostly(
        lambda case, activation, residual, way: crossed(way, (case, activation, residual)),
        "case, activation, residual, way",
        [(*run, way) for run in RUNS for way in WAYS],
    )
)
def test_derivatives(case: Case, activation: str | None, residual: bool, way: str) -> None:
    inputs, options = arrays_of(case, residual)
    inputs[1] = inputs[1] * spread(activation)
    got, expected = (
        jax.jit(lambda *a, f=function: WAYS[way](f, list(a)))(*inputs)
        for function in (ours(case, activation, **options), textbook(case, activation, **options))
    )
    compare(got, expected)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("batched", [(0, None, None, None), (1, 0, 0, 0), (None, 0, 1, None), (2, None, 0, 0)], ids=str)
def test_vmap(batched: tuple[int | None, ...], activation: str | None) -> None:
    """y, moments and every example's own gradients, in both modes, with and without parameters of each example."""
    case = Case("images", (4, 3, 2))
    rng = np.random.default_rng(3)
    shapes = (case.shape, (2,), (2,), case.shape)
    stacked = [
        rng.uniform(0.5, 1.5, s if axis is None else np.insert(s, axis, 5)) for s, axis in zip(shapes, batched, strict=True)
    ]

    def everything(f: Callable[..., Any], *inputs: Any) -> Any:
        gradients = jax.grad(scalar(f), (0, 1, 2, 3))(*inputs)
        return f(*inputs), gradients, jax.jvp(f, inputs, gradients)[1]

    def one_by_one(f: Callable[..., Any]) -> Any:
        one, results = jax.jit(lambda *inputs: everything(f, *inputs)), []
        for i in range(5):
            inputs = [a if axis is None else np.take(a, i, axis) for a, axis in zip(stacked, batched, strict=True)]
            results.append(one(*inputs))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    compute = ours(case, activation)
    got = jax.jit(jax.vmap(lambda *a: everything(compute, *a), batched))(*stacked)
    compare(got, one_by_one(textbook(case, activation, None, None)))


def test_vmap_of_vmap() -> None:
    x = np.random.default_rng(4).standard_normal((3, 2, 6, 4))
    together = jax.vmap(jax.vmap(jax.grad(lambda a: (batch_norm(a)[0] ** 3).sum())))(x)
    one_by_one = [[jax.grad(lambda a: (batch_norm(a)[0] ** 3).sum())(b) for b in a] for a in x]
    np.testing.assert_allclose(together, one_by_one, rtol=0, atol=1e-12)


def test_the_rounded_mean_is_a_constant() -> None:
    x = np.random.default_rng(5).standard_normal((6, 4))
    _, moved = jax.jvp(lambda a: batch_norm(a)[1].mean, (x,), (x,))
    np.testing.assert_array_equal(moved, np.zeros(4))
    assert (jax.grad(lambda a: batch_norm(a)[1].mean.sum())(x) == 0).all()


@pytest.mark.parametrize("inner", [1, 2, 8, 9, 10, 17])
def test_the_bits_of_an_activation_mask_are_found_in_planes_of_any_length(inner: int) -> None:
    """A gradient by the kernel saves the mask, and the derivative of that gradient reads it in JAX's operations."""
    x, residual, along = np.random.default_rng(inner).normal(size=(3, 6, 5, inner))

    def plain(x: Any, residual: Any) -> Any:
        mean = x.mean((0, 2), keepdims=True)
        z = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean((0, 2), keepdims=True) + 1e-3) + residual
        return jnp.where(z > 0, z, 0.01 * z)

    def kernel(x: Any, residual: Any) -> Any:
        return batch_norm(x, axis=1, epsilon=1e-3, activation="leaky_relu", residual=residual)[0]

    def derivative(f: Callable[..., Any]) -> Any:
        gradient = jax.grad(lambda *arrays: jnp.sin(f(*arrays)).sum(), (0, 1))
        return jax.grad(lambda *arrays: sum(jnp.vdot(along, g) for g in gradient(*arrays)), (0, 1))(x, residual)

    compare(derivative(kernel), derivative(plain))
