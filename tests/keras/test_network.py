"""Keras models of every kind as Networks."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers

from evennorm.keras.network import network
from evennorm.models.network import Role


class Block(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units, name="dense")
        self.bn = layers.BatchNormalization(name="bn")

    def build(self, shape):
        self.dense.build(shape)
        self.bn.build((*shape[:-1], self.dense.units))

    def call(self, x, training=None):
        return keras.ops.relu(self.bn(self.dense(x), training=training))


class Subclassed(keras.Model):
    def __init__(self, frozen=None):
        super().__init__(name="net")
        self.block = Block(4, name="block")
        self.bn = layers.BatchNormalization(name="bn")
        self.out = layers.Dense(2, name="out")
        self.frozen = frozen

    def call(self, x):
        return self.out(self.bn(self.block(x), training=self.frozen))


def flow(read):
    return {step.name: step.inputs for step in read.steps}


def test_a_functional_model_with_a_branch():
    x = keras.Input((8, 8, 3), name="x")
    y = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv")(x)
    z = layers.Add(name="sum")([layers.BatchNormalization(name="bn")(y), y])
    read = network(keras.Model(x, layers.Softmax(name="softmax")(z)))
    assert flow(read) == {"x": (), "conv": ("x",), "bn": ("conv",), "sum": ("bn", "conv"), "softmax": ("sum",)}
    roles = [Role.INPUT, Role.LINEAR, Role.BATCH_NORM, Role.ADD, Role.SOFTMAX]
    assert [step.role for step in read.steps] == roles
    assert read.outputs == ("softmax",)
    conv = read["conv"]
    assert (conv.activation, conv.bias, conv.channel_axis, conv.shape) == ("relu", True, 3, (None, 8, 8, 4))


def test_state_of_a_layer():
    model = keras.Sequential([keras.Input((2,)), layers.BatchNormalization(momentum=0.9, epsilon=1e-4, name="bn")])
    model.get_layer("bn").set_weights([np.array(v, "float32") for v in ([1, 2], [3, 4], [5, 6], [7, 8])])
    state = network(model)["bn"].state
    assert (state.epsilon, state.decay, state.axis) == (1e-4, 0.9, (-1,))
    arrays = [value.tolist() for value in (state.gamma, state.beta, state.mean, state.variance)]
    assert arrays == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_nested_models_are_opened_and_second_calls_numbered():
    inner = keras.Sequential(
        [keras.Input((3,)), layers.Dense(3, name="d"), layers.BatchNormalization(name="bn")], name="inner"
    )
    x = keras.Input((3,), name="x")
    read = network(keras.Model(x, inner(inner(x))))
    assert flow(read) == {
        "x": (),
        "inner/d": ("x",),
        "inner/bn": ("inner/d",),
        "inner/d#2": ("inner/bn",),
        "inner/bn#2": ("inner/d#2",),
    }
    assert [step.name for step in read.calls(read["inner/bn#2"])] == ["inner/bn", "inner/bn#2"]


def test_layers_that_call_layers_are_opened():
    x = keras.Input((3,), name="x")
    block = Block(4, name="block")
    read = network(keras.Model(x, block(x)))
    assert flow(read)["block/bn"] == ("block/dense",)
    assert not read.gaps


def test_a_subclassed_model_is_read_from_its_code_and_stays_as_it_was():
    model = Subclassed()
    model(np.zeros((5, 3), "float32"))
    before = [len(layer._inbound_nodes) for layer in model._flatten_layers()]
    weights = [np.array(weight) for weight in model.get_weights()]
    read = network(model)
    assert flow(read)["bn"] == (next(step.name for step in read.steps if step.role is Role.ACTIVATION),)
    assert read.outputs == ("out",)
    assert read["bn"].shape == (None, 4)
    assert [len(layer._inbound_nodes) for layer in model._flatten_layers()] == before
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


def test_layers_of_a_model_without_shape_are_listed_with_the_gap():
    read = network(Subclassed())
    assert [step.layer for step in read.batch_norms()] == ["block/bn", "bn"]
    assert len(read.gaps) == 1
    assert "no input shape yet" in read.gaps[0]


def test_code_that_symbols_do_not_run_is_a_gap():
    class Odd(layers.Layer):
        def __init__(self):
            super().__init__(name="odd")
            self.bn = layers.BatchNormalization(name="bn")

        def build(self, shape):
            self.bn.build(shape)

        def call(self, x):
            return self.bn(keras.ops.convert_to_tensor(np.asarray(x)) if isinstance(x, keras.KerasTensor) else x)

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape)

    x = keras.Input((3,))
    read = network(keras.Model(x, Odd()(x)))
    assert [step.layer for step in read.batch_norms()] == ["odd/bn"]
    assert len(read.gaps) == 1


def test_the_mode_of_calls():
    x = keras.Input((3,))
    model = keras.Model(x, layers.BatchNormalization(name="bn")(x, training=False))
    step = network(model)["bn"]
    assert (step.training, step.asked) == (None, False)
    code = Subclassed(frozen=False)
    code(np.zeros((5, 3), "float32"))
    step = network(code)["bn"]
    assert (step.training, step.asked) == (False, None)


def test_fit_overrides_the_mode_of_a_functional_model_s_call():
    """Why a network tells `asked` from `training`; where Keras stops doing so, the finding about it has to go."""
    x = keras.Input((3,))
    layer = layers.BatchNormalization()
    model = keras.Model(x, layers.Dense(1)(layer(x, training=False)))
    model.compile("sgd", "mse")
    model.fit(np.ones((8, 3), "float32"), np.ones((8, 1), "float32"), verbose=0)
    assert np.all(np.array(keras.ops.convert_to_numpy(layer.moving_mean)) > 0)


def test_decayed_parameters_and_iterations():
    kinds = {"plain": {}, "penalized": {"gamma_regularizer": "l2"}}
    found = [layers.BatchNormalization(name=name, **kwargs) for name, kwargs in kinds.items()]
    model = keras.Sequential([keras.Input((3,)), *found])
    assert {step.name: step.decayed for step in network(model).batch_norms()} == {"plain": (), "penalized": ("gamma",)}
    optimizer = keras.optimizers.AdamW(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["beta"])
    model.compile(optimizer, "mse")
    read = network(model)
    assert {step.name: step.decayed for step in read.batch_norms()} == {"plain": ("gamma",), "penalized": ("gamma",)}
    assert read.iterations == 0
