"""Gradients of gradients, on every engine: what a gradient penalty needs, and what constants in a saved statistic break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.cases import Case
from tests.contract.textbook import BENDS, spread

CASE = Case("dense", (6, 3))
MASK = np.array([1, 1, 0, 1, 1, 1], bool)
OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "relu6": {"activation": "relu6"},
    "leaky relu": {"activation": "leaky_relu"},
    "mask": {"mask": MASK},
    "ghost batches": {"virtual_batch_size": 3},
}


def _torch_textbook(x: Any, gamma: Any, beta: Any, **options: Any) -> tuple[Any, Any, Any]:
    """The formula as torch differentiates it by itself, twice if asked."""
    import torch

    size = options.get("virtual_batch_size", len(x))
    mask = torch.tensor(options.get("mask", np.ones(len(x), bool)))[:, None]
    parts, means, variances = [], [], []
    for start in range(0, len(x), size):
        xg, mg = x[start : start + size], mask[start : start + size]
        mean = torch.where(mg, xg, 0.0).sum(0) / mg.sum()
        variance = torch.where(mg, (xg - mean) ** 2, 0.0).sum(0) / mg.sum()
        parts.append((xg - mean) / torch.sqrt(variance + 1e-3) * gamma + beta)
        means.append(mean)
        variances.append(variance)
    z = torch.cat(parts)
    slope, limit = BENDS[options.get("activation")]
    return torch.where(z > 0, z, slope * z).clamp(max=limit), torch.stack(means), torch.stack(variances)


def _torch_derivatives(compute: Callable[..., Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Derivatives of sum(w * dL/dx) by x, gamma and beta, where L also looks at the moments."""
    import torch

    x, gamma, beta = (torch.tensor(a, requires_grad=True) for a in arrays[:3])
    dy, w = (torch.tensor(a) for a in arrays[3:])
    y, mean, variance = compute(x, gamma, beta)
    loss = (y * dy).sum() + torch.sin(variance).sum() + torch.sin(3 * mean).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    second = torch.autograd.grad((dx * w).sum(), (x, gamma, beta), allow_unused=True)
    return [np.zeros(a.shape) if g is None else g.numpy() for a, g in zip(arrays, second, strict=False)]


def _jax_derivatives(options: dict[str, Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
    import jax
    import jax.numpy as jnp

    from evennorm.jax import batch_norm

    x, gamma, beta, dy, w = map(jnp.asarray, arrays)

    def loss(x: Any, gamma: Any, beta: Any) -> Any:
        y, m = batch_norm(x, gamma, beta, epsilon=1e-3, **options)
        return jnp.sum(y * dy) + jnp.sum(jnp.sin(m.variance)) + jnp.sum(jnp.sin(3 * (m.mean + m.mean_low)))

    second = jax.jit(jax.grad(lambda *a: jnp.sum(jax.grad(loss)(*a) * w), (0, 1, 2)))(x, gamma, beta)
    return [np.asarray(g) for g in second]


def _tensorflow_derivatives(options: dict[str, Any], arrays: list[np.ndarray], compiled: bool) -> list[np.ndarray]:
    import tensorflow as tf

    from evennorm.tensorflow import batch_norm

    x, gamma, beta, dy, w = map(tf.constant, arrays)

    def second() -> Any:
        with tf.GradientTape() as outer:
            outer.watch([x, gamma, beta])
            with tf.GradientTape() as inner:
                inner.watch(x)
                y, m = batch_norm(x, gamma, beta, epsilon=1e-3, **options)
                loss = tf.reduce_sum(y * dy) + tf.reduce_sum(tf.sin(m.variance))
                loss += tf.reduce_sum(tf.sin(3 * (m.mean + m.mean_low)))
            weighted = tf.reduce_sum(inner.gradient(loss, x) * w)
        return outer.gradient(weighted, [x, gamma, beta], unconnected_gradients="zero")

    return [g.numpy() for g in (tf.function(second, autograph=False) if compiled else second)()]


def _ours_on_torch(options: dict[str, Any]) -> Callable[..., Any]:
    from evennorm.torch import batch_norm

    def compute(x: Any, gamma: Any, beta: Any) -> Any:
        y, m = batch_norm(x, gamma, beta, epsilon=1e-3, **options)
        return y, m.mean + m.mean_low, m.variance

    return compute


@pytest.mark.parametrize("dtype", ["float64"])  # turns JAX's double precision on
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("engine", ["torch", "jax", "tensorflow", "tensorflow function"])
def test_second_derivatives(engine: str, name: str, dtype: str) -> None:
    options = OPTIONS[name]
    arrays = CASE.make(3)
    arrays["gamma"] = arrays["gamma"] * spread(options.get("activation"))
    inputs = [arrays[key] for key in ("x", "gamma", "beta", "dy")] + [np.random.default_rng(7).standard_normal(CASE.shape)]
    expected = _torch_derivatives(lambda *a: _torch_textbook(*a, **options), inputs)
    if engine == "torch":
        got = _torch_derivatives(_ours_on_torch(options), inputs)
    elif engine == "jax":
        got = _jax_derivatives(options, inputs)
    else:
        got = _tensorflow_derivatives(options, inputs, compiled=engine.endswith("function"))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_checks_itself(name: str) -> None:
    """torch's own gradcheck and gradgradcheck, by numerical differentiation."""
    import torch

    arrays = CASE.make(3)
    arrays["gamma"] = arrays["gamma"] * spread(OPTIONS[name].get("activation"))
    inputs = tuple(torch.tensor(arrays[key], requires_grad=True) for key in ("x", "gamma", "beta"))
    compute = _ours_on_torch(OPTIONS[name])
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(lambda *a: compute(*a)[0], inputs)
