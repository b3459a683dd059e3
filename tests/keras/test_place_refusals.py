"""What placement refuses, in which words."""

import keras
import pytest
from keras import layers

from evennorm.errors import ArgumentError
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.place import place
from tests.keras.placing import article_cnn, hidden_and, mlp

# Refusals


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)


class Holder(layers.Layer):
    """Makes a normalization in its own code."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.BatchNormalization(name="inner")

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x, training=None):
        return self.inner(x, training=training)


class NoConfig(layers.Layer):
    def __init__(self, table):
        super().__init__(name="own")
        self.table = table

    def call(self, x):
        return x * self.table.value


def hidden_normalization():
    return keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.BatchNormalization(name="inner")])


def open_channel():
    inputs = keras.Input((4, None))
    return keras.Model(inputs, layers.Dense(1)(keras.ops.mean(inputs, axis=-1)), name="open")


def residual():
    inputs = keras.Input((4,))
    x = BatchNormalization(name="joined")(layers.Dense(4, activation="relu")(inputs), residual=inputs)
    return keras.Model(inputs, layers.Dense(1)(x))


@pytest.mark.parametrize(
    ("model", "where", "text"),
    [
        (mlp, "behind", "where is one of none, before, after, input, or a function of a layer .* received 'behind'"),
        (mlp, None, "received None"),
        (mlp, lambda layer: "input", "returns None, 'before' or 'after'; it returned 'input' for 'hidden'"),
        (
            article_cnn,
            lambda layer: "before" if layer.name == "pool1" else None,
            "'pool1' of class MaxPooling2D has none of its own",
        ),
        (Subclassed, "none", "only Sequential and functional models .* received 'own' of class Subclassed"),
        (lambda: "model.keras", "none", "a Keras model is needed; received str"),
        (
            lambda: keras.Sequential([layers.Dense(2)], name="bare"),
            "none",
            "the Sequential model 'bare' has no input shape yet; add keras.Input",
        ),
        (
            lambda: keras.Sequential([keras.Input((5, 4)), layers.LSTM(3), layers.Dense(2)], name="rnn"),
            "before",
            "model 'rnn' has no place for where='before': none of its hidden layers has an activation",
        ),
        (
            lambda: hidden_and(Holder(name="holder"), layers.Dense(1)),
            "none",
            "inside 'holder' of class Holder, which holds 'inner'",
        ),
        (
            lambda: hidden_and(NoConfig(type("Table", (), {"value": 2.0})()), layers.Dense(1)),
            "none",
            "'own' of class NoConfig cannot be: .*; give the class a get_config",
        ),
        (open_channel, "input", r"known size; .* of model 'open' has shape \(None, 4, None\) and channel axis -1"),
        (
            lambda: hidden_and(
                layers.Reshape((2, 2)), layers.TimeDistributed(hidden_normalization()), layers.Flatten(), layers.Dense(1)
            ),
            "none",
            "cannot be done inside 'time_distributed.*' of class TimeDistributed, which holds 'inner'",
        ),
        (residual, "none", "'joined' is called with residual, which nothing else could take"),
    ],
)
def test_refusals(model, where, text):
    with pytest.raises(ArgumentError, match=text) as caught:
        place(model(), where)
    assert "\n" not in str(caught.value)


def test_options_are_checked_even_where_nothing_is_placed():
    with pytest.raises(ArgumentError, match="place decides axis and name itself; received axis=1, name='x'"):
        place(mlp(), "none", axis=1, name="x")
    with pytest.raises(ArgumentError, match="momentum"):
        place(mlp(), "none", momentum=2.0)
    with pytest.raises(
        ArgumentError, match=r"Unrecognized keyword arguments passed to BatchNormalization: .'momentun': 0.9"
    ):
        place(mlp(), "none", momentun=0.9)
    assert place(mlp(), "after", momentum=0.5).get_layer("hidden_bn").momentum == 0.5
