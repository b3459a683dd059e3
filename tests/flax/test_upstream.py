"""What Flax's own tests say of batch normalization, said of ours: its package ships no tests, so their meaning stands here.

Of tests/nnx/nn/normalization_test.py and tests/linen/linen_test.py in Flax 0.12, under their names. Left out is
test_batch_norm_complex, since complex numbers are refused (`test_complex_numbers_are_refused`, in test_nnx.py).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from evennorm.flax import BatchNorm
from evennorm.flax.linen import BatchNorm as LinenBatchNorm


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("param_dtype", ["float32", "float16"])
@pytest.mark.parametrize("use_fast_variance", [True, False])
@pytest.mark.parametrize("mask", [None, [True, False, True, False, True]])
def test_nnx_linen_batchnorm_equivalence(
    dtype: str, param_dtype: str, use_fast_variance: bool, mask: list[bool] | None
) -> None:
    """nnx rounds the input to half precision first, linen does not: equal to the bit in float32 alone, in Flax too."""
    given = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    options = {"use_running_average": False, "use_fast_variance": use_fast_variance, **given}
    x = jax.random.normal(jax.random.key(0), (10, 5))
    counted = np.ones(5, bool) if mask is None else np.array(mask)
    mask = None if mask is None else jnp.array(mask)
    of_linen, of_nnx = LinenBatchNorm(**options), BatchNorm(5, rngs=nnx.Rngs(42), **options)
    variables = of_linen.init(jax.random.key(1), x)
    y, _ = of_linen.apply(variables, x, mask=mask, mutable=["batch_stats"])
    z = of_nnx(x, mask=mask)
    assert y.dtype == z.dtype == dtype
    dense, linear = linen.Dense(4, **given), nnx.Linear(5, 4, rngs=nnx.Rngs(1), **given)
    weights = dense.init(jax.random.key(2), y)
    linear.kernel[...] = weights["params"]["kernel"]
    if dtype == "float32":
        np.testing.assert_array_equal(y, z)
        np.testing.assert_array_equal(dense.apply(weights, y), linear(z))
    else:
        np.testing.assert_allclose(y[:, counted], z[:, counted], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("masked", [True, False])
def test_batch_norm(masked: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, 3, 2))
    mask = jax.random.bernoulli(keys[1], shape=(4, 3, 1)) if masked else None
    x = x if mask is None else jnp.where(mask, x, jnp.nan)
    module = LinenBatchNorm(momentum=0.9, use_running_average=False)
    y, variables = module.init_with_output(keys[2], x, mask=mask)
    np.testing.assert_allclose(y.mean((0, 1), where=mask), 0, atol=1e-4)
    np.testing.assert_allclose(y.var((0, 1), where=mask), 1, rtol=1e-4)
    _, changed = module.apply(variables, x, mutable=["batch_stats"], mask=mask)
    averages = changed["batch_stats"]
    np.testing.assert_allclose(averages["mean"], 0.1 * x.mean((0, 1), where=mask), atol=1e-4)
    np.testing.assert_allclose(averages["var"], 0.9 + 0.1 * x.var((0, 1), where=mask), rtol=1e-4)


def test_batch_norm_multi_init() -> None:
    """One layer called twice, over an axis that nothing binds while it is initialized."""

    class Twice(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            norm = LinenBatchNorm(name="norm", use_running_average=False, axis_name="batch")
            x = norm(x)
            return x, norm(x)

    (first, second), _ = Twice().init_with_output(jax.random.key(0), jax.random.normal(jax.random.key(1), (2, 4)))
    np.testing.assert_allclose(first, second, rtol=0.005)


def test_the_examples_of_both_docstrings() -> None:
    x = jax.random.normal(jax.random.key(0), (5, 6))
    layer = BatchNorm(num_features=6, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.train()
    layer(x)
    first = nnx.clone(nnx.state(layer, nnx.BatchStat))
    layer(x)
    second = nnx.clone(nnx.state(layer, nnx.BatchStat))
    assert (first["mean"][...] != second["mean"][...]).all()
    assert (first["var"][...] != second["var"][...]).all()
    layer.eval()
    layer(x)
    third = nnx.state(layer, nnx.BatchStat)
    assert (second["mean"][...] == third["mean"][...]).all()
    assert (second["var"][...] == third["var"][...]).all()
    variables = LinenBatchNorm(momentum=0.9, epsilon=1e-5, dtype=jnp.float32).init(
        jax.random.key(1), x, use_running_average=False
    )
    assert jax.tree.map(jnp.shape, variables) == {
        "batch_stats": {"mean": (6,), "var": (6,)},
        "params": {"bias": (6,), "scale": (6,)},
    }
