"""evennorm.flax.linen.BatchNorm beside flax.linen.BatchNorm: the same values, variables and names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from evennorm.errors import ArgumentError, ShapeError
from evennorm.flax.linen import BatchNorm

INIT = {"scale_init": linen.initializers.uniform(2.0), "bias_init": linen.initializers.normal(1.0)}
TOLERANCE = {"float64": 1e-6, "float32": 4e-6, "bfloat16": 2e-2, "float16": 2e-3}


@pytest.fixture(autouse=True)
def _float64_where_asked(request: pytest.FixtureRequest) -> Iterator[None]:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with jax.enable_x64("float64" in map(str, parameters.values())):
        yield


def pair(**options: Any) -> tuple[BatchNorm, linen.BatchNorm]:
    return tuple(kind(**{**INIT, **options}) for kind in (BatchNorm, linen.BatchNorm))  # type: ignore[return-value]


def data(shape: tuple[int, ...], dtype: Any = "float32", seed: int = 0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape, "float32") * 1.5 + 0.5).astype(dtype)


def assert_same(ours: Any, theirs: Any, tolerance: float = 4e-6) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)

    def compare(a: Any, b: Any) -> None:
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, "float64"), np.asarray(b, "float64"), rtol=tolerance, atol=tolerance)

    jax.tree.map(compare, ours, theirs)


def trained(module: Any, variables: Any, x: Any, **options: Any) -> tuple[Any, Any]:
    return module.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **options)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("input_dtype", ["float32", "bfloat16", "float64", "int32"])
def test_values_and_dtypes_of_both_modes(dtype: str | None, param_dtype: str, input_dtype: str) -> None:
    options = {"dtype": None if dtype is None else jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    x = data((16, 6, 4), input_dtype)
    results = []
    for module in pair(momentum=0.6, use_fast_variance=False, **options):
        variables = module.init(jax.random.key(1), x, use_running_average=False)
        outputs = []
        for _ in range(2):
            y, changed = trained(module, variables, x)
            stats = jax.tree.map(lambda a: a.astype("float32"), changed["batch_stats"])  # Flax's are float64 where x is
            variables = {**variables, "batch_stats": stats}
            outputs.append(y)
        outputs.append(module.apply(variables, x, use_running_average=True))
        results.append((outputs, variables))
    (outputs, variables), (expected, others) = results
    assert_same(outputs, expected, TOLERANCE[str(outputs[0].dtype)])
    assert_same(variables, others)


@pytest.mark.parametrize("axis", [-1, 1, 0, (1, 2), (-1, 0), [0, 2]])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("use_scale", [True, False])
def test_axes_and_absent_parameters(axis: Any, use_bias: bool, use_scale: bool) -> None:
    x = data((5, 4, 7, 6))
    results = []
    for module in pair(axis=axis, momentum=0.5, use_bias=use_bias, use_scale=use_scale):
        variables = module.init(jax.random.key(1), x, use_running_average=True)
        y, changed = trained(module, variables, x)
        variables = {**variables, **changed}
        results.append((y, variables, module.apply(variables, x, use_running_average=True)))
    assert_same(*results)


@pytest.mark.parametrize("reductions", [True, False])
def test_statistics_have_the_dtype_of_flax(reductions: bool) -> None:
    x = data((5, 4), "bfloat16")
    ours, theirs = (
        module.init(jax.random.key(1), x, use_running_average=True)
        for module in pair(force_float32_reductions=reductions, param_dtype=jnp.bfloat16)
    )
    assert_same(ours, theirs)


class Net(linen.Module):
    kind: Any

    @linen.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        for _ in range(2):
            x = linen.Dense(6, use_bias=False)(x)
            x = linen.relu(self.kind(use_running_average=not train, momentum=0.8)(x))
        return linen.Dense(1)(x)


def test_names_variables_and_training_of_a_network() -> None:
    """Layers without a name of their own are numbered by their class."""
    results = []
    for kind in (BatchNorm, linen.BatchNorm):
        net = Net(kind)
        variables = net.init(jax.random.key(0), data((8, 3)))
        assert set(variables["params"]) == {"BatchNorm_0", "BatchNorm_1", "Dense_0", "Dense_1", "Dense_2"}

        @jax.jit
        def step(variables: Any, x: Any, net: Any = net) -> Any:
            def loss(params: Any) -> Any:
                y, changed = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
                return ((y - x[:, :1] * x[:, 1:2]) ** 2).mean(), changed

            gradients, changed = jax.grad(loss, has_aux=True)(variables["params"])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
            return {"params": params, **changed}

        for seed in range(10):
            variables = step(variables, data((8, 3), seed=seed))
        results.append(variables)
    assert_same(*results, tolerance=1e-3)
    y, expected = (Net(kind).apply(results[0], data((8, 3), seed=99), train=False) for kind in (BatchNorm, linen.BatchNorm))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu6"])
def test_activation_and_residual(train: bool, activation: str) -> None:
    ours, theirs = BatchNorm(activation=activation, negative_slope=0.2, **INIT), linen.BatchNorm(**INIT)
    x, residual = data((8, 3, 4)), 4 * data((8, 3, 4), seed=1)
    variables = ours.init(jax.random.key(2), x, use_running_average=True)

    def fused(params: Any, x: Any, residual: Any) -> Any:
        given = {**variables, "params": params}
        y, _ = ours.apply(given, x, use_running_average=not train, residual=residual, mutable=["batch_stats"])
        return (y * x).sum()

    def plain(params: Any, x: Any, residual: Any) -> Any:
        given = {**variables, "params": params}
        y, _ = theirs.apply(given, x, use_running_average=not train, mutable=["batch_stats"])
        z = y + residual
        return ((jax.nn.relu6(z) if activation == "relu6" else jax.nn.leaky_relu(z, 0.2)) * x).sum()

    found, expected = (jax.grad(f, (0, 1, 2))(variables["params"], x, residual) for f in (fused, plain))
    assert_same(found, expected, tolerance=3e-5)


def test_masks_unbiased_variance_and_ghost_batches() -> None:
    x = data((6, 5, 4))
    mask = jnp.arange(30).reshape(6, 5, 1) % 3 > 0
    ours, theirs = pair(momentum=0.0, use_fast_variance=False)
    variables = ours.init(jax.random.key(2), x, use_running_average=True)
    assert_same(trained(ours, variables, x, mask=mask), trained(theirs, variables, x, mask=mask))
    _, changed = trained(BatchNorm(momentum=0.0, unbiased=True), variables, x)
    np.testing.assert_allclose(changed["batch_stats"]["var"], np.asarray(x, "float64").var((0, 1), ddof=1), rtol=1e-6)
    y, _ = trained(BatchNorm(virtual_batch_size=3), variables, x)
    first, _ = trained(BatchNorm(), variables, x[:3])
    np.testing.assert_allclose(y[:3], first, rtol=2e-6, atol=1e-6)


def test_a_batch_that_is_not_finite_changes_no_statistic_and_is_told_of() -> None:
    ours = BatchNorm(use_running_average=False, momentum=0.5)
    x = data((8, 3))
    variables = ours.init(jax.random.key(0), x)
    bad = x.at[1, 2].set(jnp.nan)
    _, changed = ours.apply(variables, bad, mutable=["batch_stats", "intermediates"])
    assert_same(changed["batch_stats"], variables["batch_stats"])
    assert [bool(each) for each in changed["intermediates"]["refused"]] == [True]
    _, changed = ours.apply(variables, bad, mutable=["batch_stats"])
    assert set(changed) == {"batch_stats"}


def test_initialization_moves_nothing_and_needs_no_axis() -> None:
    ours = BatchNorm(use_running_average=False, axis_name="devices")
    variables = ours.init(jax.random.key(0), data((8, 3)))
    assert variables["batch_stats"]["mean"].tolist() == [0, 0, 0]
    assert variables["batch_stats"]["var"].tolist() == [1, 1, 1]


def test_one_sample_initializes_without_a_warning() -> None:
    BatchNorm(use_running_average=False).init(jax.random.key(0), jnp.ones((1, 3)))
    with pytest.warns(UserWarning, match="one value per channel"):
        trained(BatchNorm(), BatchNorm().init(jax.random.key(0), jnp.ones((1, 3)), True), jnp.ones((1, 3)))


def test_bridges_between_linen_and_nnx() -> None:
    from flax import nnx

    x = data((8, 3))
    module = nnx.bridge.ToNNX(BatchNorm(use_running_average=False, momentum=0.5), rngs=nnx.Rngs(0)).lazy_init(x)
    assert module(x, mutable=["batch_stats"]).shape == x.shape
    np.testing.assert_allclose(module.mean[...], 0.5 * np.asarray(x, "float64").mean(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": -0.5}, "received momentum=-0.5"),
        ({"activation": "gelu"}, "received 'gelu'"),
        ({"virtual_batch_size": 0}, "received virtual_batch_size=0"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        BatchNorm(use_running_average=True, **options).init(jax.random.key(0), data((4, 3)))


def test_bad_arrays() -> None:
    ours = BatchNorm(use_running_average=False)
    with pytest.raises(ArgumentError, match="x is of dtype complex64"):
        ours.init(jax.random.key(0), jnp.ones((4, 3), "complex64"))
    with pytest.raises(ShapeError, match="axis 3 was asked"):
        BatchNorm(use_running_average=False, axis=3).init(jax.random.key(0), data((4, 3)))
    with pytest.raises(ShapeError, match="a mask broadcasts against the input"):
        ours.init(jax.random.key(0), data((4, 3)), mask=jnp.ones((4,), bool))
    with pytest.raises(ShapeError, match="residual"):
        ours.init(jax.random.key(0), data((4, 3)), residual=jnp.ones((4, 2)))
