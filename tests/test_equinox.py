"""evennorm.equinox.BatchNorm beside Equinox's layer and float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evennorm.equinox import BatchNorm
from evennorm.errors import ArgumentError, ShapeError

random = np.random.default_rng(0)
X = jnp.asarray(random.normal(size=(6, 3, 4, 4)) * 3 + 1, "float32")


def made(kind=BatchNorm, **options):
    return eqx.nn.make_with_state(kind)(3, "batch", mode="batch", **options)


def run(layer, x, state, **options):
    call = jax.vmap(lambda x, state: layer(x, state, **options), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return call(x, state)


def same(one, other) -> bool:
    return all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("affine", [True, False])
def test_the_same_as_equinoxs_layer(affine: bool) -> None:
    """Outputs, gradients, and the moving mean; the tree of arrays too, so that files of one are read by the other."""
    (ours, state), (theirs, other) = made(channelwise_affine=affine), made(eqx.nn.BatchNorm, channelwise_affine=affine)
    arrays = [jax.tree.leaves(eqx.filter(pair, eqx.is_array)) for pair in ((ours, state), (theirs, other))]
    assert [a.shape for a in arrays[0]] == [a.shape for a in arrays[1]]

    def loss(x, layer, state):
        return (run(layer, x, state)[0] ** 3).sum()

    np.testing.assert_allclose(jax.grad(loss)(X, ours, state), jax.grad(loss)(X, theirs, other), rtol=1e-3, atol=1e-4)
    for _ in range(3):
        y, state = run(ours, X, state)
        z, other = run(theirs, X, other)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        state.get(ours.batch_state_index)[0], other.get(theirs.batch_state_index)[0], rtol=1e-5, atol=1e-6
    )


def test_inference_by_the_average_of_the_batches_seen() -> None:
    """In float64, from the second batch on and before the first; Equinox's variance has a rest of its first value, 1."""
    layer, state = made(momentum=0.9, activation="relu")
    y, _ = run(layer, X, state, inference=True)
    np.testing.assert_allclose(y, np.maximum(np.asarray(X) / np.sqrt(1 + 1e-5), 0), rtol=1e-6)
    batches = [X, 2 * X + 5]
    for x in batches:
        _, state = run(layer, x, state)
    first, second = (np.asarray(x, "float64") for x in batches)
    axes = (0, 2, 3)
    mean, variance = ((0.9 * m(first, axis=axes) + m(second, axis=axes)) / 1.9 for m in (np.mean, np.var))
    wanted = (first - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5)
    np.testing.assert_allclose(run(layer, X, state, inference=True)[0], np.maximum(wanted, 0), rtol=1e-5, atol=1e-5)
    evaluating = eqx.nn.inference_mode(layer)
    assert same(run(evaluating, X, state)[0], run(layer, X, state, inference=True)[0])


def test_large_means_and_refused_batches() -> None:
    layer, state = made(eps=0.0)
    y, state = run(layer, X + 1e5, state)
    x = np.asarray(X + 1e5, "float64")
    wanted = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(y, wanted, atol=2e-5)
    _, after = run(layer, X.at[0, 1, 0, 0].set(jnp.nan), state)
    assert same(state, after)
    _, after = run(layer, X[:1, :, 0, 0], state)  # one value per channel has no variance
    assert same(state, after)


@pytest.mark.parametrize("activation", ["leaky_relu", "relu6"])
def test_a_residual_is_added_before_the_activation(activation: str) -> None:
    layer, state = made(activation=activation, negative_slope=0.2)
    plain, _ = run(made()[0], X, made()[1])
    call = jax.vmap(lambda x, z: layer(x, state, residual=z)[0], axis_name="batch")
    summed = np.asarray(plain) + 4 * np.asarray(X)
    expected = np.clip(summed, 0, 6) if activation == "relu6" else np.where(summed > 0, summed, 0.2 * summed)
    np.testing.assert_allclose(call(X, 4 * X), expected, rtol=1e-5, atol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match=r'mode="batch"; received mode=\'ema\''):
        BatchNorm(3, "batch", mode="ema")
    with pytest.raises(ArgumentError, match="momentum weighs the old average"):
        BatchNorm(3, "batch", momentum=1.5)
    layer, state = made()
    with pytest.raises(ShapeError, match="input_size=3; received"):
        run(layer, X[:, :2], state)
    with pytest.raises(ArgumentError, match="batch"):
        layer(X[0], state)  # no axis of that name is bound
