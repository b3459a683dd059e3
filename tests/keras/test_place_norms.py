"""Keras's own normalizations in the places of batch normalization, by value; and places given by the names of layers."""

import keras
import numpy as np
import pytest
from keras import layers

from evennorm import ArgumentError
from evennorm.keras import place
from evennorm.keras.place import sites

IMAGE = (4, 6, 8)
X = np.random.default_rng(0).normal(3, 2, (5, *IMAGE)).astype("float32")


def network(channels_first=False):
    form = "channels_first" if channels_first else "channels_last"
    return keras.Sequential(
        [
            keras.Input(IMAGE),
            layers.Conv2D(6, 1, activation="tanh", name="conv", data_format=form),
            layers.Flatten(name="flatten", data_format=form),
            layers.Dense(4, activation="relu", name="hidden"),
            layers.Dense(2, name="out"),
        ]
    )


def of(model, name, x=X):
    """What a layer gives, in float64."""
    return np.asarray(keras.ops.convert_to_numpy(keras.Model(model.inputs[0], model.get_layer(name).output)(x)), "float64")


def behind(model, name):
    """The values in front of a normalization, and behind it."""
    layer = model.get_layer(name)
    given, made = keras.Model(model.inputs[0], [layer.input, layer.output])(X)
    return np.asarray(keras.ops.convert_to_numpy(given), "float64"), np.asarray(keras.ops.convert_to_numpy(made), "float64")


def normalized(x, axes, epsilon):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)


def test_layer_normalization_of_an_image_takes_all_of_it_and_of_features_their_channels():
    model = place(network(), "before", norm="layer")
    x, y = behind(model, "conv_layer")
    np.testing.assert_allclose(y, normalized(x, (1, 2, 3), 1e-3), rtol=1e-3, atol=1e-4)
    x, y = behind(model, "hidden_layer")
    np.testing.assert_allclose(y, normalized(x, (1,), 1e-3), rtol=1e-3, atol=1e-4)
    assert type(model.get_layer("conv_layer")) is layers.LayerNormalization
    assert model.get_layer("conv").use_bias is False  # beta does its work


def test_group_normalization_takes_groups_of_two_channels_at_least():
    model = place(network(), "after", norm="group")
    x, y = behind(model, "conv_group")
    grouped = x.reshape(5, 4, 6, 3, 2)
    np.testing.assert_allclose(y, normalized(grouped, (1, 2, 4), 1e-3).reshape(x.shape), rtol=1e-3, atol=1e-4)
    assert model.get_layer("hidden_group").groups == 2
    # With one channel a group is all of an image's pixels; one value alone cannot be normalized.
    grey = keras.Sequential([keras.Input((3, 3, 1)), layers.Conv2D(1, 1), layers.Flatten(), layers.Dense(2)])
    assert place(grey, "input", norm="group").layers[0].groups == 1


def test_group_normalization_of_channels_first():
    x = layers.GroupNormalization(groups=2, axis=1)
    model = place(network(channels_first=True), "input", norm="group")
    assert (model.layers[0].axis, model.layers[0].groups) == (1, 2)
    expected = normalized(X.astype("float64").reshape(5, 2, 2, 6, 8), (2, 3, 4), x.epsilon).reshape(X.shape)
    np.testing.assert_allclose(of(model, model.layers[0].name), expected, rtol=1e-3, atol=1e-4)


def test_rms_normalization_keeps_the_bias():
    """It has no beta."""
    model = place(network(), "before", norm="rms", epsilon=1e-5)
    assert model.get_layer("conv").use_bias
    x, y = behind(model, "conv_rms")
    np.testing.assert_allclose(y, x / np.sqrt((x**2).mean((1, 2, 3), keepdims=True) + 1e-5), rtol=1e-3, atol=1e-4)


def test_the_steps_of_a_sequence_are_normalized_each_by_itself():
    model = keras.Sequential([keras.Input((None, 8)), layers.Dense(4, "relu", name="hidden"), layers.Dense(2)])
    assert place(model, "before", norm="layer").get_layer("hidden_layer").axis == [2 - 3]


def test_what_cannot_be_normalized_is_refused():
    unknown = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 1, activation="relu"), layers.Conv2D(2, 1)])
    with pytest.raises(ArgumentError, match=r"has shape \(None, None, None, 4\); give the sizes in keras.Input"):
        place(unknown, "before", norm="layer")
    single = keras.Sequential([keras.Input((3,)), layers.Dense(1, "relu"), layers.Dense(2)])
    for norm in ("layer", "group", "rms"):
        with pytest.raises(ArgumentError, match=f"{norm} normalization of a single value loses it"):
            place(single, "before", norm=norm)
    with pytest.raises(ArgumentError, match="norm is one of batch, layer, group, rms; received 'instance'"):
        place(network(), "before", norm="instance")
    with pytest.raises(ArgumentError, match="LayerNormalization takes no argument 'momentum'"):
        place(network(), "none", norm="layer", momentum=0.9)


def test_places_by_the_names_of_layers():
    model = network()
    assert sites(model) == ["conv", "hidden"]
    placed = place(model, {"conv": "after", "hidden": "before", "flatten": None})
    assert [layer.name for layer in placed.layers] == [
        *("conv", "conv_bn", "flatten", "hidden", "hidden_bn", "hidden_relu", "out"),
    ]
    with pytest.raises(ArgumentError, match="the names are those of hidden layers, conv, flatten, hidden; received 'out'"):
        place(model, {"out": "after"})
