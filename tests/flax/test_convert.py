"""Models converted and reverted: the same objects or copies, the same state, the same results."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from evennorm.errors import ArgumentError
from evennorm.flax import BatchNorm, convert, read_states, revert, write_states
from tests.flax.test_nnx import assert_same_state, data, state_of


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.8, scale_init=nnx.initializers.uniform(2.0), rngs=rngs)
        self.same = self.norm
        self.more = nnx.List([nnx.BatchNorm(4, use_bias=False, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.same(x)).mean((1, 2))
        for layer in self.more:
            x = layer(x)
        return x


class Scaled(nnx.BatchNorm):
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(x, *args, **kwargs)


def kinds(model: nnx.Module) -> list[type]:
    return [type(module) for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]


def test_a_copy_is_converted_and_the_model_stays() -> None:
    model = Block(nnx.Rngs(0))
    ours = convert(model)
    assert kinds(model) == [nnx.BatchNorm] * 2
    assert kinds(ours) == [BatchNorm] * 2
    assert ours.same is ours.norm
    x = data((4, 6, 6, 3))
    for _ in range(3):
        np.testing.assert_allclose(ours(x), model(x), rtol=2e-5, atol=2e-5)
    assert_same_state(ours, model, rtol=1e-5)
    for each in (model, ours):
        each.eval()
    np.testing.assert_allclose(ours(x), model(x), rtol=2e-5, atol=2e-5)
    back = revert(ours)
    assert kinds(back) == [nnx.BatchNorm] * 2
    assert kinds(ours) == [BatchNorm] * 2
    assert nnx.graphdef(back) == nnx.graphdef(model)
    np.testing.assert_array_equal(back(x), revert(ours)(x))


def test_in_place_modules_and_variables_stay_the_objects_they_are() -> None:
    model = Block(nnx.Rngs(0))
    norm, scale = model.norm, model.norm.scale
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    assert convert(model, inplace=True) is model
    assert model.norm is norm
    assert type(norm) is BatchNorm
    assert norm.scale is scale
    before = state_of(model)
    gradients = nnx.grad(lambda model, x: (model(x) ** 2).sum())(model, data((4, 6, 6, 3)))
    optimizer.update(model, gradients)
    assert (scale[...] != before["norm.scale"]).any()
    assert revert(model, inplace=True) is model
    assert type(norm) is nnx.BatchNorm
    assert norm.scale is scale


def test_a_layer_by_itself_and_twice() -> None:
    layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    assert type(convert(convert(layer))) is BatchNorm
    assert type(revert(layer)) is nnx.BatchNorm
    assert type(copy.deepcopy(convert(layer))) is BatchNorm


def test_layers_under_jit_after_conversion_in_place() -> None:
    model = Block(nnx.Rngs(0))
    run = nnx.jit(lambda model, x: model(x))
    x = data((4, 6, 6, 3))
    expected = run(nnx.clone(model), x)
    np.testing.assert_allclose(run(convert(model, inplace=True), x), expected, rtol=2e-5, atol=2e-5)


def test_classes_of_the_users_stay() -> None:
    model = nnx.Sequential(Scaled(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert kinds(convert(model)) == [Scaled, BatchNorm]


def test_a_refusal_changes_nothing() -> None:
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, momentum=1.25, rngs=nnx.Rngs(0)))
    with pytest.raises(ArgumentError, match=r"layers.1: momentum weighs the old average.*received momentum=1.25"):
        convert(model, inplace=True)
    assert kinds(model) == [nnx.BatchNorm] * 2
    assert "activation" not in vars(model.layers[0])


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"virtual_batch_size": 2}, {"unbiased": True}])
def test_what_flax_cannot_do_is_not_reverted(options: dict[str, Any]) -> None:
    model = nnx.Sequential(BatchNorm(3, rngs=nnx.Rngs(0)), BatchNorm(3, rngs=nnx.Rngs(0), **options))
    (name, value), *_ = options.items()
    with pytest.raises(ArgumentError, match=f"cannot do what 'layers.1' does with {name}={value!r}"):
        revert(model, inplace=True)
    assert kinds(model) == [BatchNorm] * 2


@pytest.mark.parametrize("verb", [convert, revert])
def test_what_is_no_nnx_module(verb: Any) -> None:
    from flax import linen

    with pytest.raises(ArgumentError, match="takes an nnx module; received BatchNorm; of linen"):
        verb(linen.BatchNorm())


# States and checkpoints


def test_states_of_other_frameworks() -> None:
    import torch

    from evennorm.torch import read_states as states_of_torch

    source = torch.nn.Sequential(torch.nn.BatchNorm1d(3, momentum=0.25, eps=1e-3))
    source(torch.randn(16, 3))
    model = nnx.Sequential(BatchNorm(3, rngs=nnx.Rngs(0)))
    write_states(model, states_of_torch(source))
    (state,) = read_states(model).values()
    assert (state.decay, state.epsilon) == (0.75, 1e-3)
    x = data((5, 3))
    model.eval()
    expected = source.eval()(torch.from_numpy(np.array(x))).detach().numpy()
    np.testing.assert_allclose(model(x), expected, rtol=2e-6, atol=2e-6)


def _made(kind: Any, seed: int) -> Any:
    return kind(3, rngs=nnx.Rngs(seed))


def trained(model: nnx.Module) -> nnx.Module:
    for seed in range(3):
        model(data((8, 3), seed=seed))
    return model


def test_checkpoints_of_nnx_load_in_both_directions(tmp_path: Any) -> None:
    import orbax.checkpoint as orbax  # on which Flax itself depends

    makers = [partial(_made, kind, seed) for seed, kind in enumerate((BatchNorm, nnx.BatchNorm))]
    for number, (writer, reader) in enumerate([makers, makers[::-1]]):
        model = trained(writer())
        checkpointer = orbax.StandardCheckpointer()
        checkpointer.save(tmp_path / f"{number}", nnx.state(model))
        checkpointer.wait_until_finished()
        abstract = nnx.eval_shape(reader)
        restored = checkpointer.restore(tmp_path / f"{number}", nnx.state(abstract))
        checkpointer.close()
        other = nnx.merge(nnx.graphdef(abstract), restored)
        assert_same_state(model, other, rtol=0)
        x = data((5, 3), seed=9)
        np.testing.assert_allclose(
            model(x, use_running_average=True), other(x, use_running_average=True), rtol=2e-6, atol=2e-6
        )


def test_checkpoints_of_linen_load_in_both_directions(tmp_path: Any) -> None:
    import orbax.checkpoint as orbax  # on which Flax itself depends
    from flax import linen, serialization

    from evennorm.flax.linen import BatchNorm as Linen

    pairs = [(Linen(momentum=0.5), linen.BatchNorm(momentum=0.5)), (linen.BatchNorm(momentum=0.5), Linen(momentum=0.5))]
    x = data((8, 3))
    for number, (writer, reader) in enumerate(pairs):
        variables = writer.init(jax.random.key(0), x, use_running_average=False)
        _, changed = writer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        variables = {**variables, **changed}
        empty = reader.init(jax.random.key(1), x, use_running_average=False)
        by_bytes = serialization.from_bytes(empty, serialization.to_bytes(variables))
        checkpointer = orbax.StandardCheckpointer()
        checkpointer.save(tmp_path / f"{number}", variables)
        checkpointer.wait_until_finished()
        by_orbax = checkpointer.restore(tmp_path / f"{number}", empty)
        checkpointer.close()
        for restored in (by_bytes, by_orbax):
            jax.tree.map(np.testing.assert_array_equal, restored, variables)
            y, expected = (
                module.apply(values, x, use_running_average=True)
                for module, values in ((reader, restored), (writer, variables))
            )
            np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6)
