"""Placement of batch normalization: which layers stand where, and what they compute."""

import keras
import numpy as np
import pytest
from keras import layers

from evennorm.keras.place import place
from evennorm.keras.sites import LINEAR
from tests.keras.placing import RNG, article_cnn, hidden_and, mlp, names, normalizations, normalized, output, randomize

# What each placement computes


def test_none_keeps_the_outputs():
    model = mlp()
    x = RNG.normal(size=(4, 6))
    np.testing.assert_array_equal(output(place(model, "none"), x), output(model, x))


@pytest.mark.parametrize("where", ["before", "after", "input"])
def test_each_placement_computes_what_its_name_says(where):
    model = mlp()
    x = RNG.normal(size=(16, 6)).astype("float32")
    w, b, v, c = (weight.astype("float64") for weight in model.get_weights())
    expected = {
        "before": np.tanh(normalized(x @ w)),
        "after": normalized(np.tanh(x @ w + b)),
        "input": np.tanh(normalized(x.astype("float64")) @ w + b),
    }
    np.testing.assert_allclose(output(place(model, where), x, training=True), expected[where] @ v + c, rtol=1e-4, atol=1e-5)


def test_placements_of_the_articles_network():
    model = article_cnn()
    body = "conv1 conv2 pool1 drop1 conv3 pool2 conv4 pool3 drop2 flatten dense drop3 emotion"
    assert names(place(model, "none")) == body.split()
    assert names(place(model, "input")) == ["face_bn", *body.split()]
    before, after = body, body
    for name in ("conv1", "conv2", "conv3", "conv4", "dense"):
        before = before.replace(name, f"{name} {name}_bn {name}_relu")
        after = after.replace(name, f"{name} {name}_bn")
    assert names(place(model, "before")) == before.split()
    assert names(place(model, "after")) == after.split()


def test_a_function_can_rebuild_the_articles_placement():
    places = {"conv2": "after", "pool2": "after", "flatten": "after", "conv1": "before"}
    placed = place(article_cnn(), lambda layer: places.get(layer.name))
    assert names(placed)[:6] == ["conv1", "conv1_bn", "conv1_relu", "conv2", "conv2_bn", "pool1"]
    assert normalizations(placed) == ["conv1_bn", "conv2_bn", "pool2_bn", "flatten_bn"]


def test_a_function_is_asked_about_each_hidden_layer_once():
    asked = []
    place(article_cnn(), lambda layer: asked.append(layer.name))
    assert " ".join(asked) == "conv1 conv2 pool1 drop1 conv3 pool2 conv4 pool3 drop2 flatten dense drop3"


@pytest.mark.parametrize("kind", LINEAR, ids=lambda kind: kind.__name__)
def test_every_linear_layer_splits(kind):
    rank = next((int(digit) for digit in kind.__name__ if digit.isdigit()), 0)
    options = (
        {"kernel_size": 2} | ({} if kind.__name__.startswith("Depthwise") else {"filters": 3}) if rank else {"units": 3}
    )
    if kind is layers.EinsumDense:
        options = {"equation": "ab,bc->ac", "output_shape": 3, "bias_axes": "c"}
    size = (5,) * rank + (2,)
    found = kind(activation="tanh", name="linear", activity_regularizer="l2", **options)
    model = randomize(keras.Sequential([keras.Input(size), found, layers.Flatten(), layers.Dense(1)]))
    x = RNG.normal(size=(8, *size)).astype("float32")
    np.testing.assert_array_equal(output(place(model, "none"), x), output(model, x))

    placed = place(model, "before")
    assert names(placed)[:3] == ["linear", "linear_bn", "linear_tanh"]
    old, linear = model.get_layer("linear"), placed.get_layer("linear")
    kept = [weight for weight in old.weights if weight.name != "bias"]
    assert len(linear.weights) == len(kept) == len(old.weights) - 1
    for mine, theirs in zip(linear.weights, kept, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(mine), keras.ops.convert_to_numpy(theirs))
    assert linear.activity_regularizer is None
    assert placed.get_layer("linear_tanh").activity_regularizer is old.activity_regularizer
    raw = keras.ops.convert_to_numpy(linear(x)).astype("float64")
    y = x
    for name in names(placed)[:3]:
        y = placed.get_layer(name)(y, **({"training": True} if name == "linear_bn" else {}))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(y), np.tanh(normalized(raw)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "activation",
    [
        layers.Activation("relu", name="act"),
        layers.ReLU(name="act"),
        layers.LeakyReLU(name="act"),
        layers.PReLU(name="act"),
        layers.ELU(name="act"),
        layers.Activation(lambda x: x * keras.ops.sigmoid(x), name="act"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_activation_layers(activation):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5, name="d"), activation, layers.Dense(1, name="out")])
    assert names(place(model, "before")) == ["d", "d_bn", "act", "out"]
    assert names(place(model, "after"))[:2] == ["d", "act"]
    assert place(model, "before").get_layer("d").use_bias is False
    assert place(model, "after").get_layer("d").use_bias is True
    x = RNG.normal(size=(4, 6))
    np.testing.assert_array_equal(output(place(randomize(model), "none"), x), output(model, x))


@pytest.mark.parametrize("function", [keras.activations.relu, keras.ops.relu, keras.ops.tanh, keras.activations.silu])
def test_activations_called_on_tensors(function):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(1)(function(layers.Dense(5, name="d")(inputs))))
    placed = place(model, "before")
    assert normalizations(placed) == ["d_bn"]
    assert placed.get_layer("d").use_bias is False
    x = RNG.normal(size=(9, 6)).astype("float32")
    hidden = normalized((x @ placed.get_layer("d").get_weights()[0]).astype("float64"))
    kernel, bias = placed.layers[-1].get_weights()
    expected = keras.ops.convert_to_numpy(function(keras.ops.convert_to_tensor(hidden))) @ kernel + bias
    np.testing.assert_allclose(output(placed, x, training=True), expected, rtol=1e-3, atol=1e-5)


# Output layers


@pytest.mark.parametrize(
    "ends",
    [
        [layers.Dense(4, activation="sigmoid", name="out")],
        [layers.Dense(4, name="out"), layers.Activation("sigmoid")],
        [layers.Dense(4, name="out"), layers.BatchNormalization(), layers.Softmax()],
        [layers.Dense(4, name="out"), layers.PReLU(), layers.Reshape((2, 2)), layers.Dropout(0.5)],
        [keras.Sequential([keras.Input((4,)), layers.Dense(4, activation="sigmoid", name="out")])],
        [layers.Dense(4, name="out"), keras.Sequential([keras.Input((4,)), layers.Activation("tanh")])],
    ],
    ids=lambda ends: "-".join(type(layer).__name__ for layer in ends),
)
def test_output_layers_are_not_touched(ends):
    for where in ("before", "after"):
        placed = place(hidden_and(*ends), where)
        assert normalizations(placed) == ["hidden_bn"]
        out = next(layer for layer in placed._flatten_layers() if layer.name == "out")
        assert out.use_bias
        assert out.activation == next(layer for layer in ends[0]._flatten_layers() if layer.name == "out").activation


def test_several_inputs_and_outputs():
    left, right = keras.Input((3,), name="left"), keras.Input((4,), name="right")
    x = layers.Concatenate()([layers.Dense(4, activation="relu", name="a")(left), right])
    aside = layers.Dense(2, activation="tanh", name="aside")(x)
    main = layers.Dense(1, name="main")(layers.Dense(3, activation="relu", name="b")(x))
    model = randomize(keras.Model({"left": left, "right": right}, {"main": main, "aside": aside}))
    data = {"left": RNG.normal(size=(5, 3)), "right": RNG.normal(size=(5, 4))}
    expected = model.predict(data, verbose=0)
    found = place(model, "none").predict(data, verbose=0)
    assert found.keys() == {"main", "aside"}
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key])
    assert sorted(normalizations(place(model, "before"))) == ["a_bn", "b_bn"]
    placed = place(model, "input")
    assert sorted(normalizations(placed)) == ["left_bn", "right_bn"]
    assert placed.output_names == model.output_names


# Sharing and nesting


def test_a_shared_layer_shares_its_normalization():
    twin = layers.Dense(4, activation="relu", name="twin")
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], layers.Dense(1, name="out")(layers.Subtract()([twin(a), twin(b)])))
    for where in ("before", "after"):
        placed = place(model, where)
        assert normalizations(placed) == ["twin_bn"]
        x = RNG.normal(size=(5, 3))
        np.testing.assert_array_equal(output(placed, x, x), np.zeros((5, 1)))


def test_a_shared_activation_layer_shares_nothing():
    relu = layers.ReLU(name="relu")
    inputs = keras.Input((3,))
    x = relu(layers.Dense(4, name="a")(inputs))
    x = relu(layers.Dense(5, name="b")(x))
    model = keras.Model(inputs, layers.Dense(1)(x))
    assert normalizations(place(model, "before")) == ["a_bn", "b_bn"]
    assert normalizations(place(model, "after")) == ["a_bn", "b_bn"]


def test_two_readers_of_one_normalization_move_its_statistics_once():
    inputs = keras.Input((3,))
    linear = layers.Dense(4, name="d")(inputs)
    gated = layers.Multiply()([layers.Activation("tanh")(linear), layers.Activation("sigmoid")(linear)])
    placed = place(randomize(keras.Model(inputs, layers.Dense(1)(gated))), "before")
    assert normalizations(placed) == ["d_bn"]
    assert placed.get_layer("d").use_bias is False
    x = RNG.normal(size=(32, 3)).astype("float32")
    output(placed, x, training=True)
    mean = (x @ placed.get_layer("d").get_weights()[0]).mean(0)
    np.testing.assert_allclose(placed.get_layer("d_bn").get_weights()[2], 0.01 * mean, rtol=1e-4, atol=1e-6)


def test_nested_models():
    block = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, activation="relu", name="one"), layers.Dense(4, name="two")], name="block"
    )
    inputs = keras.Input((4,))
    x = layers.ReLU(name="relu")(block(block(inputs)))
    model = randomize(keras.Model(inputs, layers.Dense(2, activation="softmax", name="out")(x)))
    x = RNG.normal(size=(5, 4))
    np.testing.assert_array_equal(output(place(model, "none"), x), output(model, x))
    placed = place(model, "before")
    assert names(placed.get_layer("block")) == ["one", "one_bn", "one_relu", "two"]
    assert names(placed) == ["block", "block_bn", "relu", "out"]
    assert len(place(model, "after").get_layer("block").weights) == len(block.weights) + 4


def test_a_nested_model_of_nothing_but_normalization_stays_callable():
    model = hidden_and(keras.Sequential([keras.Input((4,)), layers.BatchNormalization()]), layers.Dense(1))
    assert normalizations(place(model, "none")) == []
    x = RNG.normal(size=(3, 6))
    assert output(place(model, "none"), x).shape == (3, 1)


@pytest.mark.parametrize(
    ("equation", "shape", "axis"),
    [
        ("abc,cd->abd", (5, 6), -1),
        ("abc,cd->adb", (6, 5), 1),  # the features come to stand in the middle
        ("...x,xy->...y", (5, 6), -1),
    ],
)
def test_the_channel_axis_of_einsum_dense_is_that_of_its_equation(equation, shape, axis) -> None:
    x = keras.Input((5, 4))
    y = layers.EinsumDense(equation, shape, activation="relu", name="einsum")(x)
    placed = place(keras.Model(x, layers.Dense(2)(layers.Flatten()(y))), "before")
    norm = placed.get_layer("einsum_bn")
    assert norm.axis == axis
    assert norm.gamma.shape == (6,)


def test_flatten_may_be_all_that_knows_of_channels_first() -> None:
    x = keras.Input((3, 8, 8))
    for data_format, axis in (("channels_first", 1), ("channels_last", -1)):
        y = layers.Flatten(data_format=data_format)(x)
        placed = place(keras.Model(x, layers.Dense(2)(y)), "input")
        (norm,) = [layer for layer in placed.layers if "BatchNormalization" in type(layer).__name__]
        assert norm.axis == axis
