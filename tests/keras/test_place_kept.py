"""What placement keeps of a model, and what it takes out: axes, masks, biases, weights, flags, names."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from evennorm.errors import ArgumentError
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.place import place
from tests.keras.placing import RNG, article_cnn, hidden_and, mlp, names, normalizations, output, randomize

# Axes, shapes, masks


@pytest.mark.parametrize("where", ["before", "after", "input"])
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_the_axis_is_the_channel(where, data_format):
    size = (3, None, None) if data_format == "channels_first" else (None, None, 3)
    inputs = keras.Input(size)
    x = layers.Conv2D(4, 3, data_format=data_format, activation="relu")(inputs)
    x = layers.AveragePooling2D(2, data_format=data_format)(x)
    x = layers.ReLU()(layers.Add()([x, layers.Dropout(0.1)(x)]))
    x = layers.GlobalAveragePooling2D(data_format=data_format)(x)
    x = layers.Dense(4, activation="relu")(x)
    placed = place(keras.Model(inputs, layers.Dense(2)(x)), where)
    found = [(len(layer.input.shape), layer.axis) for layer in placed.layers if isinstance(layer, BatchNormalization)]
    axis = 1 if data_format == "channels_first" else -1
    assert found == ([(4, axis)] if where == "input" else [(4, axis), (4, axis), (2, -1)])


def test_input_stands_behind_what_needs_raw_values_or_makes_the_channel():
    image = [keras.Input((28, 28)), layers.Reshape((28, 28, 1), name="reshape"), layers.Rescaling(1 / 255, name="rescale")]
    model = keras.Sequential([*image, layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)])
    assert names(place(model, "input"))[:3] == ["reshape", "rescale", "rescale_bn"]
    flat = keras.Sequential([keras.Input((28, 28)), layers.Flatten(name="flatten"), layers.Dense(2)])
    assert names(place(flat, "input"))[:2] == ["flatten", "flatten_bn"]
    colour = keras.Sequential([keras.Input((8, 8, 3), name="image"), layers.Flatten(), layers.Dense(2)])
    assert names(place(colour, "input"))[0] == "image_bn"


def test_masked_steps_stay_out_of_the_statistics():
    model = keras.Sequential(
        [keras.Input((None, 2)), layers.Masking(name="mask"), layers.LSTM(3), layers.Dense(2)], name="sequences"
    )
    placed = place(model, "input", momentum=0.0)
    assert names(placed)[:2] == ["mask", "mask_bn"]
    x = RNG.normal(size=(2, 4, 2)).astype("float32")
    x[0, 1:] = 0
    output(placed, x, training=True)
    counted = np.concatenate([x[0, :1], x[1]])
    np.testing.assert_allclose(placed.get_layer("mask_bn").get_weights()[2], counted.mean(0), rtol=1e-5, atol=1e-6)


def test_masks_pass_through_a_functional_model(tmp_path):
    inputs = keras.Input((None, 2))
    x = layers.Dense(3, activation="relu", name="d")(layers.Masking()(inputs))
    x = layers.BatchNormalization()(x)
    model = randomize(keras.Model(inputs, layers.Dense(1)(layers.LSTM(2)(x))))
    x = RNG.normal(size=(2, 4, 2)).astype("float32")
    x[0, 1:] = 0
    placed = place(model, "before", momentum=0.0)
    assert normalizations(placed) == ["d_bn"]
    output(placed, x, training=True)
    counted = np.concatenate([x[0, :1], x[1]]) @ placed.get_layer("d").get_weights()[0]
    np.testing.assert_allclose(placed.get_layer("d_bn").get_weights()[2], counted.mean(0), rtol=1e-5, atol=1e-6)
    placed.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(output(keras.saving.load_model(tmp_path / "model.keras"), x), output(placed, x))
    plain = place(model, "none")
    padded = np.concatenate([x, np.zeros_like(x)], axis=1)
    np.testing.assert_allclose(output(plain, padded), output(plain, x), rtol=1e-6)


def test_indices_are_not_normalized():
    words, numbers = keras.Input((None,), name="words"), keras.Input((3,), name="numbers")
    x = layers.Concatenate()([layers.GlobalAveragePooling1D()(layers.Embedding(9, 4)(words)), numbers])
    assert normalizations(place(keras.Model([words, numbers], layers.Dense(1)(x)), "input")) == ["numbers_bn"]
    with pytest.raises(
        ArgumentError, match="'text' has no place for where='input': none of its inputs holds floating-point"
    ):
        place(
            keras.Sequential([keras.Input((5,)), layers.Embedding(9, 4), layers.Flatten(), layers.Dense(1)], name="text"),
            "input",
        )


# Biases and normalizations that were there


def test_the_bias_stays_where_beta_does_not_do_its_work():
    model = mlp()
    assert place(model, "before").get_layer("hidden").use_bias is False
    assert place(model, "before", drop_bias=False).get_layer("hidden").use_bias is True
    assert place(model, "before", center=False).get_layer("hidden").use_bias is True
    assert place(model, "after").get_layer("hidden").use_bias is True
    kept = place(model, "before", drop_bias=False).get_layer("hidden").get_weights()[1]
    np.testing.assert_array_equal(kept, model.get_layer("hidden").get_weights()[1])


def test_the_bias_stays_where_another_layer_reads_it():
    inputs = keras.Input((4,))
    linear = layers.Dense(4, name="d")(inputs)
    model = keras.Model(inputs, layers.Dense(1)(layers.Add()([layers.ReLU()(linear), linear])))
    placed = place(model, "before")
    assert normalizations(placed) == ["d_bn"]
    assert placed.get_layer("d").use_bias is True


def test_normalization_that_was_there_is_taken_out_and_its_bias_comes_back():
    model = hidden_and(
        layers.Dense(5, use_bias=False, name="d"), layers.BatchNormalization(), layers.ReLU(name="act"), layers.Dense(1)
    )
    stripped = place(randomize(model), "none")
    assert normalizations(stripped) == []
    kernel, bias = stripped.get_layer("d").get_weights()
    np.testing.assert_array_equal(kernel, model.get_layer("d").get_weights()[0])
    np.testing.assert_array_equal(bias, np.zeros(5))
    assert place(model, "before").get_layer("d").use_bias is False
    assert place(model, "after").get_layer("d").use_bias is True
    assert normalizations(place(model, "after")) == ["hidden_bn", "d_bn"]


def test_a_bias_left_out_in_front_of_an_activation_stays_out():
    model = hidden_and(
        layers.Dense(5, use_bias=False, activation="relu", name="d"), layers.BatchNormalization(), layers.Dense(1)
    )
    assert place(model, "none").get_layer("d").use_bias is False


def test_normalization_of_each_step_is_taken_out_too():
    each = layers.TimeDistributed(layers.BatchNormalization())
    model = keras.Sequential([keras.Input((4, 3)), layers.Dense(3, activation="relu"), each, layers.LSTM(2)])
    assert len(place(model, "none").layers) == 2


def test_placing_twice_is_placing_once():
    once = place(mlp(), "before")
    twice = place(once, "before")
    assert names(twice) == names(once)
    assert names(place(place(once, "input"), "before")) == names(once)
    assert place(once, "none").get_layer("hidden").use_bias is True


def test_an_activation_inside_a_normalization_is_left_of_it():
    model = hidden_and(
        layers.Dense(3, name="d"), BatchNormalization(activation="relu", name="act"), layers.Dense(1, name="out")
    )
    placed = place(model, "before")
    assert names(placed) == ["hidden", "hidden_bn", "hidden_relu", "d", "d_bn", "d_relu", "out"]
    assert placed.get_layer("d_relu").activation is keras.activations.relu


# What is kept


def test_the_original_is_untouched():
    model = article_cnn()
    model.compile("sgd", "categorical_crossentropy")
    before = model.to_json(), [weight.copy() for weight in model.get_weights()]
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    for where in ("none", "before", "after", "input"):
        placed = place(model, where)
        assert not placed.compiled
        assert {id(weight) for weight in placed.weights}.isdisjoint({id(weight) for weight in model.weights})
    assert model.compiled
    assert model.to_json() == before[0]
    assert [len(layer._inbound_nodes) for layer in model.layers] == nodes
    for now, then in zip(model.get_weights(), before[1], strict=True):
        np.testing.assert_array_equal(now, then)


def test_trainable_flags_and_dtype_policies():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4, activation="relu", name="frozen", trainable=False),
            layers.Dense(4, activation="relu", name="half", dtype="mixed_bfloat16"),
            layers.Dense(1, name="out"),
        ]
    )
    placed = place(model, "before")
    assert [layer.name for layer in placed.layers if not layer.trainable] == ["frozen", "frozen_bn", "frozen_relu"]
    policies = [placed.get_layer(name).dtype_policy.name for name in ("frozen_bn", "half_bn", "half_relu", "out")]
    assert policies == ["float32", "mixed_bfloat16", "mixed_bfloat16", "float32"]
    model.trainable = False
    model.get_layer("out").trainable = True
    placed = place(model, "after")
    assert (placed.trainable, placed.get_layer("half_bn").trainable, placed.get_layer("out").trainable) == (
        False,
        False,
        True,
    )


def test_state_beside_weights_is_kept():
    scale = layers.Normalization(name="scale")
    scale.adapt(RNG.normal(5.0, 2.0, size=(50, 6)))
    model = keras.Sequential(
        [
            keras.Input((6,)),
            scale,
            layers.Lambda(lambda x: 2 * x, name="twice"),
            layers.Dense(4, activation="relu"),
            layers.Dropout(0.5, seed=1),
            layers.Dense(2),
        ]
    )
    x = RNG.normal(size=(3, 6)).astype("float32")
    np.testing.assert_array_equal(output(place(model, "none"), x), output(model, x))
    assert names(place(model, "input"))[:3] == ["scale", "scale_bn", "twice"]


def test_new_names_avoid_old_ones():
    model = hidden_and(layers.Dense(2, name="hidden_bn"), layers.Dense(1, name="hidden_relu"))
    assert names(place(model, "before")) == ["hidden", "hidden_bn_2", "hidden_relu_2", "hidden_bn", "hidden_relu"]


@pytest.mark.parametrize("where", ["none", "before", "after", "input"])
def test_the_result_trains_and_saves(where, tmp_path):
    inputs = keras.Input((None, None, 2))
    x = layers.Conv2D(3, 3, padding="same", activation="relu", name="c")(inputs)
    x = layers.Add()([x, layers.ReLU()(layers.Conv2D(3, 3, padding="same")(x))])
    model = keras.Model(inputs, layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling2D()(x)))
    placed = place(model, where)
    placed.compile("sgd", "sparse_categorical_crossentropy")
    data = RNG.normal(size=(8, 6, 5, 2)).astype("float32")
    placed.fit(data, RNG.integers(0, 2, 8), batch_size=4, verbose=0)
    expected = placed.predict(data, verbose=0)
    assert np.isfinite(expected).all()
    placed.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras").predict(data, verbose=0), expected)


stacks = st.lists(st.sampled_from(["dense", "relu", "both", "softmax", "bn", "dropout"]), min_size=1, max_size=6)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(stacks)
def test_any_stack_gets_one_normalization_per_hidden_activation(kinds):
    make = {
        "dense": lambda: layers.Dense(3),
        "relu": lambda: layers.Activation("relu"),
        "both": lambda: layers.Dense(3, activation="relu"),
        "softmax": lambda: layers.Dense(3, activation="softmax"),
        "bn": layers.BatchNormalization,
        "dropout": lambda: layers.Dropout(0.5),
    }
    model = randomize(keras.Sequential([keras.Input((3,)), *(make[kind]() for kind in kinds), layers.Dense(2)]))
    wanted = sum(kind in ("relu", "both") for kind in kinds)
    x = RNG.normal(size=(4, 3))
    plain = place(model, "none")
    assert normalizations(plain) == []
    if "bn" not in kinds:
        np.testing.assert_array_equal(output(plain, x), output(model, x))
    if wanted:
        assert len(normalizations(place(model, "before"))) == wanted
        assert len(normalizations(place(model, "after"))) == wanted
