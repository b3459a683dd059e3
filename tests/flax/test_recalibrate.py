"""Recalibrated nnx models: every layer has the float64 statistics of what it gets, and nothing else has changed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from evennorm.errors import InputError
from evennorm.flax import BatchNorm, convert
from evennorm.tools.recalibrate import recalibrate
from tests.flax.test_nnx import state_of

X = (np.random.default_rng(0).normal(size=(60, 4)) * 3 + 1).astype("float32")


class Net(nnx.Module):
    def __init__(self, kind: Any = nnx.BatchNorm, **options: Any):
        rngs = nnx.Rngs(0)
        self.norm = kind(4, rngs=rngs, **options)
        self.linear = nnx.Linear(4, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = kind(5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.dropout(nnx.relu(self.linear(self.norm(x)))))


class Jitted(Net):
    @nnx.jit
    def __call__(self, x: Any) -> Any:
        return super().__call__(x)


def check(model: Any, x: np.ndarray) -> None:
    """Each layer by float64 NumPy, on what the one in front gives."""
    wide = x.astype("float64")
    for layer, values in ((model.norm, wide), (model.last, None)):
        if values is None:
            norm = model.norm
            values = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + norm.epsilon) * norm.scale[...] + norm.bias[...]
            values = np.maximum(values @ np.asarray(model.linear.kernel[...], "float64") + model.linear.bias[...], 0)
        np.testing.assert_allclose(layer.mean[...], values.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.var[...], values.var(0), rtol=1e-5)


@pytest.mark.parametrize("make", [Net, Jitted, lambda: Net(BatchNorm, activation=None), lambda: convert(Net())])
@pytest.mark.parametrize("batch_size", [60, 16])
def test_each_layer_has_the_statistics_of_what_it_gets(make: Any, batch_size: int) -> None:
    model = make()
    before, kinds = state_of(model), [type(module) for _, module in nnx.iter_modules(model)]
    model.dropout.deterministic = False
    done = recalibrate(model, X, batch_size=batch_size)
    assert {layer.name: layer.values for layer in done.layers} == {"norm": 60, "last": 60}
    check(model, X)
    after = state_of(model)
    assert after.keys() == before.keys()
    for name in set(after) - {f"{layer}.{row}" for layer in ("norm", "last") for row in ("mean", "var")}:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert [type(module) for _, module in nnx.iter_modules(model)] == kinds
    assert "_evennorm_watch" not in vars(model.norm)
    assert (model.norm.use_running_average, model.dropout.deterministic) == (False, False)


def test_one_pass() -> None:
    model = Net()
    done = recalibrate(model, X, one_pass=True)
    assert done.passes == 1
    check(model, X)


def test_labels_are_scored_and_masks_left_out() -> None:
    class Masked(nnx.Module):
        def __init__(self) -> None:
            self.norm = BatchNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.norm(x, mask=(x[:, :1] < 5))

    model = Masked()
    recalibrate(model, X)
    counted = X[X[:, 0] < 5].astype("float64")
    np.testing.assert_allclose(model.norm.mean[...], counted.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.norm.var[...], counted.var(0), rtol=1e-6)
    done = recalibrate(Net(), (X, np.arange(60) % 5))
    assert done.effect is not None
    assert done.effect.measure == "accuracy"


def test_what_no_value_can_be_seen_of() -> None:
    class Mapped(Net):
        def __call__(self, x: Any) -> Any:
            return nnx.vmap(lambda model, x: Net.__call__(model, x[None])[0], in_axes=(None, 0))(self, x)

    model = Mapped()
    before = state_of(model)
    with pytest.raises(InputError, match="'norm' is called within a transform"):
        recalibrate(model, X)
    jax.tree.map(np.testing.assert_array_equal, state_of(model), before)
    assert type(model.norm) is nnx.BatchNorm


def test_data_that_do_not_fit_change_nothing() -> None:
    model = Net()
    before = state_of(model)
    with pytest.raises(InputError, match="the model cannot take"):
        recalibrate(model, X[:, :3])
    bad = X.copy()
    bad[7, 2] = np.nan
    with pytest.raises(InputError, match="not finite"):
        recalibrate(model, bad)
    jax.tree.map(np.testing.assert_array_equal, state_of(model), before)
    with pytest.raises(InputError, match="no batch normalization"):
        recalibrate(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), X)


def test_a_class_of_the_users() -> None:
    class Plain(nnx.BatchNorm):
        def __call__(self, x: Any) -> Any:
            return super().__call__(x)

    model = Net(Plain)
    recalibrate(model, X)
    check(model, X)
    assert type(model.norm) is Plain
