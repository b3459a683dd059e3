"""Statistics over a named axis: the same as those of one device with the whole batch, in nnx and linen."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from evennorm.errors import ArgumentError
from evennorm.flax import BatchNorm
from evennorm.flax.linen import BatchNorm as LinenBatchNorm
from tests.flax.test_nnx import data, pair, state_of


def over_parts(module: nnx.Module, parts: Any, masks: Any = None, residuals: Any = None) -> Any:
    """The layer on each part, all of which share the module, whose state is that of the first afterwards."""
    graph, state = nnx.split(module)

    def run(x: Any, mask: Any, residual: Any) -> Any:
        module = nnx.merge(graph, state, copy=True)
        y = module(x, **({} if mask is None else {"mask": mask}), **({} if residual is None else {"residual": residual}))
        return y, nnx.state(module)

    axes = tuple(None if given is None else 0 for given in (parts, masks, residuals))
    y, states = jax.jit(jax.vmap(run, in_axes=axes, axis_name="devices"))(parts, masks, residuals)
    for leaf in jax.tree.leaves(states):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))  # the same bits everywhere
    nnx.update(module, jax.tree.map(lambda leaf: leaf[0], states))
    return y


@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_a_batch_are_the_batch(masked: bool) -> None:
    x, residual = data((4, 3, 5)), data((4, 3, 5), seed=1)
    mask = jnp.arange(12).reshape(4, 3, 1) % 5 < jnp.arange(4)[:, None, None] if masked else None  # none on the first
    options = {"momentum": 0.5, "activation": "relu", "scale_init": nnx.initializers.uniform(2.0)}
    together = BatchNorm(5, axis_name="devices", rngs=nnx.Rngs(0), **options)
    whole = BatchNorm(5, rngs=nnx.Rngs(0), **options)
    y = over_parts(together, x, mask, residual)
    flat = None if mask is None else mask.reshape(12, 1)
    expected = whole(x.reshape(12, 5), mask=flat, residual=residual.reshape(12, 5))
    np.testing.assert_allclose(y.reshape(12, 5), expected, rtol=2e-6, atol=2e-6)
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(together, name)[...], getattr(whole, name)[...], rtol=1e-6)


def test_groups_of_devices() -> None:
    x = data((4, 3, 5))
    groups = ((0, 2), (1, 3))
    graph, state = nnx.split(BatchNorm(5, axis_name="devices", axis_index_groups=groups, rngs=nnx.Rngs(0)))
    y = jax.vmap(lambda x: nnx.merge(graph, state, copy=True)(x), axis_name="devices")(x)
    for group in map(list, groups):
        alone = BatchNorm(5, rngs=nnx.Rngs(0))(x[jnp.array(group)].reshape(6, 5))
        np.testing.assert_allclose(y[jnp.array(group)].reshape(6, 5), alone, rtol=2e-6, atol=2e-6)


def test_flax_and_ours_agree_on_equal_parts() -> None:
    ours, theirs = pair(5, axis_name="devices", momentum=0.5)
    x = data((4, 3, 5))
    np.testing.assert_allclose(over_parts(ours, x), over_parts(theirs, x), rtol=4e-6, atol=4e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=4e-6), state_of(ours), state_of(theirs))


def test_nan_on_one_device_is_refused_on_all() -> None:
    ours, _ = pair(5, axis_name="devices")
    before = state_of(ours)
    y = over_parts(ours, data((4, 3, 5)).at[2, 1, 0].set(jnp.nan))
    assert np.isfinite(y[..., 1:]).all()
    jax.tree.map(np.testing.assert_array_equal, state_of(ours), before)


def test_linen_over_parts() -> None:
    x = data((4, 3, 5))
    results = []
    for module, batch in (
        (LinenBatchNorm(use_running_average=False, axis_name="devices"), x),
        (linen.BatchNorm(use_running_average=False, axis_name="devices"), x),
        (LinenBatchNorm(use_running_average=False), x.reshape(1, 12, 5)),
    ):
        variables = module.init(jax.random.key(0), x[0])

        def run(x: Any, module: Any = module, variables: Any = variables) -> Any:
            return module.apply(variables, x, mutable=["batch_stats"])

        y, changed = jax.vmap(run, axis_name="devices")(batch)
        results.append((y.reshape(12, 5), jax.tree.map(lambda a: a[0], changed)))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=4e-6, atol=4e-6), results[0], other)


def test_an_axis_that_nothing_binds() -> None:
    layer = BatchNorm(5, axis_name="devices", rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match="'devices' is not bound here"):
        layer(data((4, 5)))
    assert layer(data((4, 5)), use_running_average=True).shape == (4, 5)  # which needs no other device


def test_groups_that_do_not_cover_the_devices() -> None:
    layer = BatchNorm(5, axis_name="devices", axis_index_groups=((0, 1), (2,)), rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match="axis_index_groups divides the 4 devices"):
        over_parts(layer, data((4, 3, 5)))


class Net(nnx.Module):
    def __init__(self, kind: Any, axis_name: str | None):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 8, rngs=rngs, use_bias=False)
        self.norm = kind(8, axis_name=axis_name, momentum=0.5, rngs=rngs)
        self.second = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.relu(self.norm(self.first(x))))


def loss_of(model: Any, x: Any) -> Any:
    return ((model(x) - x[:, :1] * x[:, 1:2]) ** 2).mean()


ON_FOUR_DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from evennorm.flax import BatchNorm, convert
from tests.flax.test_devices import Net, data, loss_of, state_of

x = data((16, 3))
whole = Net(BatchNorm, None)
expected = nnx.jit(nnx.value_and_grad(loss_of))(whole, x)

def same(found, model):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), state_of(model), state_of(whole))

def step(model, x):
    loss, gradients = nnx.value_and_grad(loss_of)(model, x)
    return jax.lax.pmean(loss, "data"), jax.tree.map(lambda g: jax.lax.pmean(g, "data"), gradients)

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
for model in (Net(BatchNorm, "data"), convert(Net(nnx.BatchNorm, "data"))):
    for check in (True, False):  # whether JAX keeps in types what all devices share, and adds up derivatives by it
        copied = nnx.clone(model)
        spread = nnx.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()), check_vma=check)
        loss, gradients = nnx.jit(spread)(copied, x)
        same((loss, jax.tree.map(lambda g: g / (4 if check else 1), gradients)), copied)

model = Net(BatchNorm, "data")
run = nnx.pmap(step, axis_name="data", in_axes=(None, 0), out_axes=None)
same(run(model, x.reshape(4, 4, 3)), model)

# Spread by types: y lies as x does.
explicit = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
with jax.set_mesh(explicit):
    typed, alone = BatchNorm(3, rngs=nnx.Rngs(0)), BatchNorm(3, rngs=nnx.Rngs(0))
    y = nnx.jit(lambda norm, x: norm(x))(typed, jax.device_put(x, NamedSharding(explicit, P("data"))))
    assert y.sharding.spec[0] == "data"
    np.testing.assert_allclose(y, alone(x), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(typed.mean[...], alone.mean[...], rtol=1e-6, atol=1e-8)

# Spread by jit: one batch, without a name.
model = Net(BatchNorm, None)
spread = jax.device_put(x, NamedSharding(mesh, P("data")))
same(nnx.jit(nnx.value_and_grad(loss_of))(model, spread), model)
print("same")
"""


def test_several_devices() -> None:
    run = subprocess.run([sys.executable, "-c", ON_FOUR_DEVICES], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "same", run.stderr
