"""evennorm.flax.BatchNorm beside flax.nnx.BatchNorm: the same values, state and behaviour in programs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from evennorm.errors import ArgumentError, ShapeError
from evennorm.flax import BatchNorm

TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-3}


@pytest.fixture(autouse=True)
def _float64_where_asked(request: pytest.FixtureRequest) -> Iterator[None]:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with jax.enable_x64("float64" in map(str, parameters.values())):
        yield


def pair(num_features: int, **options: Any) -> tuple[BatchNorm, nnx.BatchNorm]:
    """Ours and Flax's with the same parameters, none of which is 1 or 0."""
    init = {"scale_init": nnx.initializers.uniform(2.0), "bias_init": nnx.initializers.normal(1.0)}
    return tuple(kind(num_features, rngs=nnx.Rngs(3), **{**init, **options}) for kind in (BatchNorm, nnx.BatchNorm))  # type: ignore[return-value]


def data(shape: tuple[int, ...], dtype: Any = "float32", seed: int = 0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape, "float32") * 1.5 + 0.5).astype(dtype)


def state_of(module: nnx.Module) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(value[...])
        for path, value in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
    }


def assert_same_state(ours: nnx.Module, theirs: nnx.Module, rtol: float = 2e-6) -> None:
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    mine, other = state_of(ours), state_of(theirs)
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name].dtype == other[name].dtype, name
        np.testing.assert_allclose(mine[name], other[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("input_dtype", ["float32", "bfloat16", "float64", "int32"])
def test_values_and_dtypes_of_both_modes(dtype: str | None, param_dtype: str, input_dtype: str) -> None:
    options = {"dtype": None if dtype is None else jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype), "momentum": 0.6}
    ours, theirs = pair(4, use_fast_variance=False, **options)
    x = data((16, 6, 4), input_dtype)
    for use_running_average in (False, False, True):
        y, expected = (module(x, use_running_average=use_running_average) for module in (ours, theirs))
        assert y.dtype == expected.dtype
        tolerance = max(TOLERANCE[str(y.dtype)], 2e-6 if y.dtype != "float64" else 1e-6 if use_running_average else 1e-12)
        np.testing.assert_allclose(
            np.asarray(y, "float64"), np.asarray(expected, "float64"), rtol=2 * tolerance, atol=2 * tolerance
        )
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("axis", [-1, 1, 0, -3])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("use_scale", [True, False])
def test_axes_and_absent_parameters(axis: int, use_bias: bool, use_scale: bool) -> None:
    x = data((4, 5, 6))
    ours, theirs = pair(x.shape[axis], axis=axis, use_bias=use_bias, use_scale=use_scale)
    for _ in range(3):
        np.testing.assert_allclose(ours(x), theirs(x), rtol=2e-6, atol=2e-6)
    assert_same_state(ours, theirs)
    for module in (ours, theirs):
        module.eval()
    np.testing.assert_allclose(ours(x), theirs(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("axis", [(1, 2), (-1, 0), [0, 2]])
def test_several_channel_axes_keep_flat_variables(axis: Any) -> None:
    """Which Flax's layer normalizes at inference alone: its update adds arrays of two shapes."""
    x = data((3, 4, 5, 2))
    kept = sorted(a % x.ndim for a in axis)
    channels = int(np.prod([x.shape[a] for a in kept]))
    ours, theirs = pair(channels, axis=tuple(axis), momentum=0.0)
    y = ours(x)
    wide, reduced = np.asarray(x, "float64"), tuple(a for a in range(x.ndim) if a not in kept)
    scale, bias = (
        np.asarray(p[...], "float64").reshape([x.shape[a] if a in kept else 1 for a in range(x.ndim)])
        for p in (ours.scale, ours.bias)
    )
    mean, variance = wide.mean(reduced, keepdims=True), wide.var(reduced, keepdims=True)
    np.testing.assert_allclose(y, (wide - mean) / np.sqrt(variance + 1e-5) * scale + bias, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(ours.mean[...], mean.ravel(), rtol=1e-6)
    np.testing.assert_allclose(ours.var[...], variance.ravel(), rtol=1e-6)
    nnx.update(theirs, nnx.state(ours))
    np.testing.assert_allclose(ours(x, use_running_average=True), theirs(x, use_running_average=True), rtol=2e-6, atol=2e-6)


def test_statistics_after_many_steps_are_those_of_float64() -> None:
    ours, _ = pair(3, momentum=0.9)
    mean, variance = np.zeros(3), np.ones(3)
    for seed in range(30):
        x = data((7, 3), seed=seed)
        ours(x)
        wide = np.asarray(x, "float64")
        mean, variance = 0.9 * mean + 0.1 * wide.mean(0), 0.9 * variance + 0.1 * wide.var(0)
    np.testing.assert_allclose(ours.mean[...], mean, rtol=2e-6)
    np.testing.assert_allclose(ours.var[...], variance, rtol=2e-6)


def test_a_large_mean_costs_nothing() -> None:
    """Where Flax's fast variance is off by all of it."""
    x = data((64, 3)) + 1e5
    ours = BatchNorm(3, rngs=nnx.Rngs(0))
    wide = np.asarray(x, "float64")
    np.testing.assert_allclose(ours(x), (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5), atol=2e-6)
    half = BatchNorm(3, dtype=jnp.bfloat16, momentum=0.0, rngs=nnx.Rngs(0))
    half(x)
    np.testing.assert_allclose(half.mean[...], np.asarray(x.astype("bfloat16"), "float64").mean(0), rtol=1e-6)


def test_at_inference_in_half_precision_the_mean_keeps_its_precision() -> None:
    module = BatchNorm(1, dtype=jnp.bfloat16, epsilon=0.0, use_running_average=True, rngs=nnx.Rngs(0))
    module.mean[...] = jnp.array([1003.0])
    x = jnp.array([[1000.0], [1008.0]], "bfloat16")
    assert module(x).ravel().tolist() == [-3.0, 5.0]  # bfloat16 has 1000 and 1004, not 1003


def test_the_unbiased_variance() -> None:
    ours = BatchNorm(2, unbiased=True, momentum=0.0, rngs=nnx.Rngs(0))
    x = data((5, 2))
    ours(x)
    np.testing.assert_allclose(ours.var[...], np.asarray(x, "float64").var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("relu6", 0.0), ("leaky_relu", 0.2), (None, 1.0)])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_activation_and_residual(activation: str | None, slope: float, use_running_average: bool) -> None:
    ours, theirs = pair(4)
    ours = BatchNorm(
        4,
        activation=activation,
        negative_slope=0.2,
        scale_init=nnx.initializers.uniform(2.0),
        bias_init=nnx.initializers.normal(1.0),
        use_running_average=use_running_average,
        rngs=nnx.Rngs(3),
    )
    x, residual = data((8, 3, 4)), 4 * data((8, 3, 4), seed=1)

    def loss(module: Any, x: Any, residual: Any) -> Any:
        return (module(x, residual=residual) * x).sum()

    def plain(module: Any, x: Any, residual: Any) -> Any:
        z = module(x, use_running_average=use_running_average) + residual
        return (jnp.minimum(jnp.where(z > 0, z, slope * z), 6.0 if activation == "relu6" else jnp.inf) * x).sum()

    found = nnx.value_and_grad(loss, argnums=(0, 1, 2))(ours, x, residual)
    expected = nnx.value_and_grad(plain, argnums=(0, 1, 2))(theirs, x, residual)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected)


def masks() -> Iterator[tuple[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    positions = draw.random((6, 5)) < 0.6
    yield "positions", positions[:, :, None]
    yield "values", draw.random((6, 5, 4)) < 0.6
    yield "channels", np.array([True, False, True, True])
    yield "time and channel", draw.random((5, 4)) < 0.7
    yield "numbers", positions[:, :, None].astype("int32")


@pytest.mark.parametrize("mask", [pytest.param(mask, id=name) for name, mask in masks()])
def test_masks_broadcast_as_in_flax(mask: np.ndarray) -> None:
    ours, theirs = pair(4, momentum=0.5, use_fast_variance=False)
    x = data((6, 5, 4))
    full = np.broadcast_to(mask.astype(bool), x.shape)
    y, expected = ours(x, mask=mask), theirs(x, mask=jnp.asarray(full))
    counted = full.any((0, 1))  # a channel without values is NaN in Flax, and takes its statistics along
    np.testing.assert_allclose(y[..., counted], expected[..., counted], rtol=2e-6, atol=2e-6)
    for mine, other, before in ((ours.mean, theirs.mean, 0.0), (ours.var, theirs.var, 1.0)):
        np.testing.assert_allclose(mine[...][counted], other[...][counted], rtol=2e-6, atol=1e-6)
        assert (mine[...][~counted] == before).all()


def test_what_the_mask_hides_acts_on_nothing() -> None:
    ours, _ = pair(3, momentum=0.5)
    x = data((6, 3))
    mask = jnp.arange(6)[:, None] < 4
    bad = x.at[4:].set(jnp.nan)

    def loss(module: Any, x: Any) -> Any:
        return jnp.where(mask, module(x, mask=mask) ** 3, 0.0).sum()

    found = nnx.grad(loss, argnums=1)(nnx.clone(ours), bad)
    expected = nnx.grad(lambda module, x: (module(x) ** 3).sum(), argnums=1)(ours, x[:4])
    np.testing.assert_allclose(found[:4], expected, rtol=1e-5, atol=1e-5)
    assert (found[4:] == 0).all()


@pytest.mark.parametrize("shape", [(3, 2), (5,), (7, 6, 5, 4), (6, 5)])
def test_a_mask_that_does_not_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    ours, _ = pair(4)
    words = rf"a mask broadcasts against the input.* shape \({', ?'.join(map(str, shape))},?\) for .*\(6, 5, 4\)"
    with pytest.raises(ShapeError, match=words):
        ours(data((6, 5, 4)), mask=jnp.ones(shape, bool))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_batch_that_is_not_finite_changes_no_statistic(bad: float, jitted: bool) -> None:
    ours, _ = pair(3)
    ours(data((8, 3)))
    before = state_of(ours)
    x = data((8, 3)).at[2, 1].set(bad)
    call = nnx.jit(lambda module, x: module(x)) if jitted else (lambda module, x: module(x))
    y = call(ours, x)
    assert not np.isfinite(y[:, 1]).all()
    assert np.isfinite(y[:, 0]).all()
    jax.tree.map(np.testing.assert_array_equal, state_of(ours), before)


@pytest.mark.parametrize("masked", [False, True])
def test_an_empty_batch_changes_no_statistic(masked: bool) -> None:
    ours, _ = pair(3)
    before = state_of(ours)
    if masked:
        ours(data((8, 3)), mask=jnp.zeros((8, 1), bool))
    else:
        assert ours(jnp.zeros((0, 3))).shape == (0, 3)
    jax.tree.map(np.testing.assert_array_equal, state_of(ours), before)


def test_skipped_batches_are_told_to_who_captures() -> None:
    ours, _ = pair(2)
    run = nnx.capture(lambda module, x: module(x), nnx.Intermediate)
    x = data((4, 2))
    told = []
    for batch in (x, x.at[0, 0].set(jnp.nan), x):
        _, intermediates = run(ours, batch)
        told += [bool(each) for each in intermediates["refused"].get_value()]
    assert told == [False, True, False]
    assert set(state_of(ours)) == {"bias", "mean", "scale", "var"}


def test_one_value_per_channel_leaves_the_variance_and_warns() -> None:
    ours, _ = pair(2, momentum=0.5)
    with pytest.warns(UserWarning, match="one value per channel"):
        y = ours(jnp.array([[3.0, 5.0]]))
    np.testing.assert_array_equal(y, ours.bias[...][None])
    assert ours.mean[...].tolist() == [1.5, 2.5]
    assert ours.var[...].tolist() == [1.0, 1.0]


def test_ghost_batches() -> None:
    ours = BatchNorm(3, virtual_batch_size=4, momentum=0.0, rngs=nnx.Rngs(0))
    x = data((8, 2, 3))
    y = ours(x)
    halves = [BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0)) for _ in range(2)]
    expected = [module(part) for module, part in zip(halves, (x[:4], x[4:]), strict=True)]
    np.testing.assert_allclose(y, np.concatenate(expected), rtol=2e-6, atol=1e-6)
    for name in ("mean", "var"):
        averaged = sum(getattr(module, name)[...] for module in halves) / 2
        np.testing.assert_allclose(getattr(ours, name)[...], averaged, rtol=2e-6)


# Modes and programs


class Block(nnx.Module):
    def __init__(self, kind: Any, rngs: nnx.Rngs):
        self.first = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
        self.norm = kind(8, momentum=0.9, rngs=rngs)
        self.second = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.relu(self.norm(self.first(x))))


def test_the_attribute_the_call_and_the_modes() -> None:
    ours, theirs = pair(3)
    x = data((5, 3))
    for module in (ours, theirs):
        module(x)
    cases = itertools.product((True, False, None), ("train", "eval"))
    for given, mode in cases:
        results = []
        for module in (ours, theirs):
            getattr(module, mode)()
            results.append(module(x, use_running_average=given))
        np.testing.assert_allclose(*results, rtol=2e-6, atol=2e-6, err_msg=f"{given} {mode}")
    assert_same_state(ours, theirs)
    view = nnx.view(ours, use_running_average=True)
    np.testing.assert_array_equal(view(x), ours(x, use_running_average=True))


def test_neither_the_attribute_nor_the_call() -> None:
    ours, _ = pair(3, use_running_average=None)
    with pytest.raises(ArgumentError, match="use_running_average says which"):
        ours(data((5, 3)))


def test_a_training_loop_is_that_of_flax() -> None:
    import optax

    models = [Block(kind, nnx.Rngs(0)) for kind in (BatchNorm, nnx.BatchNorm)]

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    losses: list[list[float]] = []
    for model in models:
        optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
        losses.append([])
        for seed in range(20):
            x = data((16, 4), seed=seed)
            losses[-1].append(float(step(model, optimizer, x, x[:, :1] * x[:, 1:2])))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert_same_state(*models, rtol=1e-3)
    for model in models:
        model.eval()
    x = data((16, 4), seed=99)
    np.testing.assert_allclose(models[0](x), models[1](x), rtol=1e-3, atol=1e-3)


def test_plain_jit_of_a_split_module() -> None:
    ours, theirs = pair(3)
    x = data((6, 3))

    def program(module: Any) -> Any:
        graph, state = nnx.split(module)

        @jax.jit
        def run(state: Any, x: Any) -> Any:
            module = nnx.merge(graph, state)
            return module(x), nnx.state(module)

        return run(state, x)

    (y, state), (expected, other) = program(ours), program(theirs)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), state, other)


def _made(create: Any, rngs: nnx.Rngs) -> Any:
    return create(rngs=rngs)


def test_layers_under_vmap_and_scan() -> None:
    """Variables with an axis in front, one layer for each."""
    x = data((16, 4))
    results = []
    for kind in (BatchNorm, nnx.BatchNorm):
        create = partial(kind, 4, momentum=0.5, scale_init=nnx.initializers.uniform(2.0))
        layers = nnx.vmap(partial(_made, create))(nnx.Rngs(0).fork(split=3))
        y = nnx.scan(lambda x, layer: layer(x) * 2 + 1, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)
        each = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)
        results.append((y, each, state_of(layers)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


def test_second_derivatives_and_forward_mode() -> None:
    ours, theirs = pair(3)
    x, direction = data((6, 3)), data((6, 3), seed=1)

    def of(module: Any) -> Any:
        def loss(x: Any) -> Any:
            return (nnx.clone(module)(x) ** 3).sum()

        return jax.jvp(jax.grad(loss), (x,), (direction,))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), of(ours), of(theirs))


def test_a_function_of_the_users_promotes_as_it_likes() -> None:
    def promote(values: Any, dtype: Any = None) -> Any:
        return tuple(None if value is None else jnp.asarray(value, jnp.bfloat16) for value in values)

    ours, theirs = pair(3, promote_dtype=promote)
    x = data((6, 3))
    y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype("float32"), expected.astype("float32"), rtol=1e-2, atol=1e-2)


def test_momentum_from_a_schedule() -> None:
    ours, theirs = pair(3)
    x = data((6, 3))

    def run(module: Any, momentum: Any) -> Any:
        module.momentum = momentum
        y = module(x)
        module.momentum = 0.99
        return y

    for module in (ours, theirs):
        nnx.jit(run)(module, jnp.float32(0.25))
    assert_same_state(ours, theirs)


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.5}, "momentum weighs the old average, from 0 to 1 .*received momentum=1.5"),
        ({"momentum": None}, "received momentum=None"),
        ({"epsilon": -1e-3}, "received epsilon=-0.001"),
        ({"activation": "gelu"}, "activation is one of None, 'relu', 'relu6', 'leaky_relu'; received 'gelu'"),
        ({"virtual_batch_size": 0}, "received virtual_batch_size=0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        BatchNorm(3, rngs=nnx.Rngs(0), **options)


def test_another_number_of_channels() -> None:
    with pytest.raises(ShapeError, match=r"3 for an input of shape \(4, 3\) with axis=-1; received num_features=5"):
        BatchNorm(5, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))(data((4, 3)))


def test_complex_numbers_are_refused() -> None:
    with pytest.raises(ArgumentError, match="x is of dtype complex64"):
        BatchNorm(3, rngs=nnx.Rngs(0))(jnp.ones((4, 3), "complex64"))


def test_the_repr_says_which_kernel_computes() -> None:
    from evennorm.kernels import choose

    assert f"kernel={choose('jax', 'float32', training=True)!r}" in repr(BatchNorm(3, rngs=nnx.Rngs(0)))
