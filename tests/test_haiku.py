"""evennorm.haiku.BatchNorm beside Haiku's module and float64."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evennorm.errors import ArgumentError
from evennorm.haiku import BatchNorm

random = np.random.default_rng(0)
X = jnp.asarray(random.normal(size=(6, 4, 4, 3)) * 3 + 1, "float32")


def net(kind=BatchNorm, create=True, **options):
    return hk.transform_with_state(
        lambda x, training=True, **given: kind(create, create, 0.9, **options)(x, is_training=training, **given)
    )


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize(
    "options", [{}, {"data_format": "channels_first"}, {"axis": [1, 2]}, {"axis": [0]}], ids=["last", "first", "own", "rows"]
)
def test_the_same_as_haikus_module(options) -> None:
    """Outputs, gradients, parameters, states and their names, in training and at inference."""
    ours, theirs = net(**options), net(hk.BatchNorm, **options)
    params, state = ours.init(None, X)
    assert shapes((params, state)) == shapes(theirs.init(None, X))
    other = state
    for step in range(3):
        y, state = ours.apply(params, state, None, X + step)
        z, other = theirs.apply(params, other, None, X + step)
        np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, other)
    grad = [jax.grad(lambda x, n=n: (n.apply(params, state, None, x)[0] ** 3).sum())(X) for n in (ours, theirs)]
    np.testing.assert_allclose(*grad, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(
        ours.apply(params, state, None, X, False)[0], theirs.apply(params, state, None, X, False)[0], rtol=1e-4, atol=1e-4
    )


def test_large_means_and_refused_batches() -> None:
    norm = net(eps=0.0)
    params, state = norm.init(None, X)
    y, state = norm.apply(params, state, None, X + 1e5)
    x = np.asarray(X + 1e5, "float64")
    np.testing.assert_allclose(y, (x - x.mean((0, 1, 2))) / x.std((0, 1, 2)), atol=2e-5)
    for bad in (X.at[0, 0, 0, 1].set(jnp.inf), X[:1, :1, :1]):
        _, after = norm.apply(params, state, None, bad)
        jax.tree.map(np.testing.assert_array_equal, after, state)


@pytest.mark.parametrize(("activation", "largest"), [("relu", np.inf), ("relu6", 6.0)])
def test_scale_and_offset_of_each_sample(activation: str, largest: float) -> None:
    """As conditional normalization gives them, with a residual and an activation after."""
    norm = net(create=False, activation=activation)
    scale, offset = (jnp.asarray(random.normal(size=(6, 1, 1, 3)), "float32") for _ in range(2))
    y, _ = norm.apply(*norm.init(None, X), None, X, scale=scale, offset=offset, residual=4 * X)
    x = np.asarray(X, "float64")
    wanted = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * np.asarray(scale) + np.asarray(offset) + 4 * x
    np.testing.assert_allclose(y, np.clip(wanted, 0, largest), rtol=1e-4, atol=1e-5)


def test_devices_together_are_one_batch() -> None:
    one, parts = net(), net(cross_replica_axis="devices")
    params, state = one.init(None, X)
    split = X.reshape(3, 2, *X.shape[1:])
    y, moved = jax.vmap(lambda x: parts.apply(params, state, None, x), axis_name="devices")(split)
    z, wanted = one.apply(params, state, None, X)
    np.testing.assert_allclose(y.reshape(X.shape), z, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-6), moved, wanted)


def test_bad_input() -> None:
    norm = net()
    params, state = norm.init(None, X)
    with pytest.raises(ArgumentError, match="takes no scale"):
        norm.apply(params, state, None, X, scale=jnp.ones(3))
    with pytest.raises(ArgumentError, match="momentum weighs"):
        hk.transform_with_state(lambda x: BatchNorm(True, True, 1.5)(x, True)).init(None, X)
    with pytest.raises(ArgumentError, match="complex"):
        norm.init(None, X.astype("complex64"))
