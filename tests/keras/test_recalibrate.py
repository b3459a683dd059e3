"""Recalibrated Keras models: every layer has the float64 statistics of what it gets, and nothing else has changed."""

import keras
import numpy as np
import pytest
from keras import layers

from evennorm.errors import InputError
from evennorm.keras import BatchNormalization
from evennorm.keras.program import Program
from evennorm.models.program import Call
from evennorm.tools.recalibrate import recalibrate
from tests.tools.populations import array, check

random = np.random.default_rng(0)
IMAGES = (random.normal(size=(50, 8, 8, 3)) * [1, 5, 0.1] + [0, 30, -2]).astype("float32")
LABELS = random.integers(0, 4, 50)


def inputs_of(model, x):
    """What each batch normalization gets from the model as it is: its own inputs, by an inner model for each."""
    found = {}
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization | BatchNormalization):
            # A layer that is called once; not compiled, since compilers round otherwise.
            found[layer.name] = array(keras.Model(model.inputs[0], layer.input)(x, training=False))
    return found


def scramble(model):
    """Statistics that have nothing to do with the data, gamma and beta that are not 1 and 0."""
    for weight in model.weights:
        path = weight.path
        if "moving_variance" in path or "stddev" in path:
            weight.assign(random.uniform(0.5, 2, weight.shape))
        elif any(part in path for part in ("moving_mean", "gamma", "beta")):
            weight.assign(random.normal(size=weight.shape))
    return model


def residual(norm):
    inputs = keras.Input((8, 8, 3))
    x = norm(name="first")(inputs)
    x = layers.Conv2D(6, 3, padding="same", activation="relu")(x)
    y = norm(name="left")(x)
    y = layers.Conv2D(6, 3, padding="same")(layers.ReLU()(y))
    z = norm(name="right")(x)
    x = norm(name="behind")(layers.Add()([y, z]))
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x))
    x = norm(name="last")(layers.Dense(5)(x))
    return scramble(keras.Model(inputs, layers.Dense(4, activation="softmax")(x)))


@pytest.mark.parametrize("norm", [layers.BatchNormalization, BatchNormalization])
@pytest.mark.parametrize("cache", [None, 0, 20_000])
def test_each_layer_has_the_statistics_of_what_it_gets(norm, cache) -> None:
    model = residual(norm)
    others = {w.path: array(w).copy() for w in model.weights if "moving" not in w.path}
    done = recalibrate(model, (IMAGES, LABELS), batch_size=16, cache=cache)
    assert done.passes == 4  # left and right are beside each other
    for name, x in inputs_of(model, IMAGES).items():
        check(model.get_layer(name), x)
    for weight in model.weights:
        if weight.path in others:
            np.testing.assert_array_equal(array(weight), others[weight.path])
    assert {layer.name: layer.values for layer in done.layers}["first"] == 50 * 64
    assert done.effect.measure == "accuracy"
    predicted = model.predict(IMAGES, verbose=0).argmax(-1)
    assert done.effect.after == np.mean(predicted == LABELS)


def test_parts_are_computed_once_where_values_fit(monkeypatch) -> None:
    made = []
    plain = Program._opened

    def watched(call):
        def run(values):
            made.append(call.name)
            return call.run(values)

        return Call(call.name, call.inputs, call.outputs, run)

    monkeypatch.setattr(Program, "_opened", lambda self: [watched(call) for call in plain(self)])
    for cache, times in ((None, 3), (0, 5)):  # one to learn the order, one to be seen; then passed once, or at each stage
        made.clear()
        recalibrate(residual(layers.BatchNormalization), IMAGES, batch_size=50, cache=cache)
        assert made.count("first") == times


def test_a_large_mean() -> None:
    x = (random.normal(size=(4000, 3)) + np.array([1e5, -1e4, 0])).astype("float32")
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(), layers.Dense(2), layers.BatchNormalization()])
    recalibrate(model, x, batch_size=100)
    check(model.layers[0], x)


def test_frozen_layers() -> None:
    for keep in (False, True):
        model = residual(layers.BatchNormalization)
        for name in ("first", "behind"):
            model.get_layer(name).trainable = False
        old = {name: array(model.get_layer(name).moving_mean).copy() for name in ("first", "behind")}
        done = recalibrate(model, IMAGES, keep_frozen=keep)
        for name, x in inputs_of(model, IMAGES).items():
            if keep and name in old:
                np.testing.assert_array_equal(array(model.get_layer(name).moving_mean), old[name])
                assert (name, "it is frozen") in done.left
            else:
                check(model.get_layer(name), x)
        assert not model.get_layer("first").trainable
    model.trainable = False
    with pytest.raises(InputError, match="it is frozen"):
        recalibrate(model, IMAGES, keep_frozen=True)


def test_nested_and_shared() -> None:
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(name="inner")], name="nested")
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    shared = layers.BatchNormalization(name="shared")
    a, b = inner(shared(left)), inner(shared(right))
    model = scramble(keras.Model([left, right], layers.Concatenate()([a, b])))
    x = [random.normal(size=(70, 4)).astype("float32") * 3 + i * 5 for i in range(2)]
    done = recalibrate(model, {"x": tuple(x)}, batch_size=32)
    assert [layer.name for layer in done.layers] == ["shared", "nested/inner"]
    check(shared, np.concatenate(x))
    dense, norm = inner.layers
    check(norm, np.concatenate([array(dense(shared(each))) for each in x]))
    assert done.layers[0].values == 140


def test_a_layer_behind_itself_comes_to_rest() -> None:
    shared, dense = layers.BatchNormalization(), layers.Dense(4)
    inputs = keras.Input((4,))
    middle = dense(shared(inputs))
    model = keras.Model(inputs, shared(middle))
    x = (random.normal(size=(90, 4)) + 2).astype("float32")
    done = recalibrate(model, x)
    second = array(keras.Model(inputs, middle)(x))
    check(shared, np.concatenate([x, second]), bound=1e-5)
    assert done.notes == ()


def test_padded_sequences() -> None:
    x = random.normal(size=(40, 7, 3)).astype("float32") + 1
    lengths = random.integers(1, 8, 40)
    mask = np.arange(7) < lengths[:, None]
    x[~mask] = 0
    inputs = keras.Input((7, 3))
    y = layers.Masking()(inputs)
    y = BatchNormalization(name="masked")(y)
    between = layers.TimeDistributed(layers.Dense(3))(y)
    y = BatchNormalization(name="second")(between)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(y))
    recalibrate(model, x, batch_size=16)
    check(model.get_layer("masked"), x, mask=mask)
    second = array(keras.Model(inputs, between)(x))
    check(model.get_layer("second"), second, mask=mask)


def test_embedded_words() -> None:
    x = random.integers(1, 20, (60, 5))
    x[:20, 3:] = 0
    inputs = keras.Input((5,), dtype="int32")
    y = layers.BatchNormalization(name="words")(layers.Embedding(20, 4, mask_zero=True)(inputs))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(y))
    recalibrate(model, x)
    check(model.get_layer("words"), array(model.layers[1](x)), mask=x != 0)


def test_channels_first_and_several_axes() -> None:
    x = random.normal(size=(30, 3, 5, 4)).astype("float32")
    model = keras.Sequential(
        [keras.Input((3, 5, 4)), layers.BatchNormalization(axis=1), BatchNormalization(axis=(1, 3)), layers.Flatten()]
    )
    recalibrate(model, x)
    check(model.layers[0], x, axis=1)
    y = np.asarray(array(model.layers[0](x)), "float64")
    np.testing.assert_allclose(array(model.layers[1].moving_mean), y.mean(axis=(0, 2)), atol=1e-6)
    np.testing.assert_allclose(array(model.layers[1].moving_variance), y.var(axis=(0, 2)), rtol=1e-5)


def test_time_distributed() -> None:
    x = random.normal(size=(20, 6, 3)).astype("float32") * 2 + 1
    inner = keras.Sequential(
        [keras.Input((3,)), layers.BatchNormalization(name="a"), layers.Dense(2), layers.BatchNormalization(name="b")]
    )
    model = keras.Sequential(
        [keras.Input((6, 3)), layers.TimeDistributed(layers.BatchNormalization(), name="td"), layers.TimeDistributed(inner)]
    )
    scramble(model)
    done = recalibrate(model, x, batch_size=8)
    check(model.layers[0].layer, x)
    y = array(model.layers[0](x))
    check(inner.layers[0], y)
    check(inner.layers[2], array(inner.layers[1](inner.layers[0](y.reshape(-1, 3)))))
    assert {layer.values for layer in done.layers} == {120}


class Own(keras.Model):
    """A model of its own code."""

    def __init__(self):
        super().__init__()
        self.norms = [layers.BatchNormalization(name=f"norm{i}") for i in range(3)]
        self.dense = [layers.Dense(4) for _ in range(2)]
        self.unused = layers.BatchNormalization(name="unused")
        self.unused.build((None, 4))

    def call(self, x, training=None):
        x = self.norms[0](x, training=training)
        for dense, norm in zip(self.dense, self.norms[1:], strict=True):
            x = norm(dense(x), training=training)
        return x


def test_models_of_their_own_code() -> None:
    model = Own()
    x = (random.normal(size=(100, 4)) * 4 + 3).astype("float32")
    model(x[:2])
    scramble(model)
    done = recalibrate(model, x, batch_size=30)
    for norm, dense in zip(model.norms, [*model.dense, None], strict=True):
        check(norm, x)
        x = array(dense(norm(x))) if dense else x
    assert [name for name, _ in done.left] == ["unused"]


@pytest.mark.parametrize("norm", [layers.BatchNormalization, BatchNormalization])
def test_renorm(norm) -> None:
    model = keras.Sequential([keras.Input((3,)), norm(renorm=True), layers.Dense(2)])
    x = (random.normal(size=(64, 3)) * 3 + 1).astype("float32")
    recalibrate(model, x)
    layer = model.layers[0]
    check(layer, x)
    deviation = np.sqrt(x.astype("float64").var(axis=0) + layer.epsilon)
    for name in ("moving_stddev", "renorm_stddev"):
        np.testing.assert_allclose(array(getattr(layer, name)), deviation, rtol=1e-6)
    np.testing.assert_allclose(array(layer.renorm_mean), x.astype("float64").mean(axis=0), rtol=1e-6)


def test_ghost_batches_and_modes() -> None:
    stack = [BatchNormalization(virtual_batch_size=8), BatchNormalization(mode=1, name="one"), layers.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *stack])
    x = (random.normal(size=(64, 3)) * 3 + 1).astype("float32")
    done = recalibrate(model, x)
    check(stack[0], x)
    assert done.left == (("one", "mode 1 has no moving statistics in use"),)


def test_half_precision() -> None:
    half = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    parts = [layers.Conv2D(4, 3, dtype=half), layers.BatchNormalization(dtype=half), layers.ReLU(dtype=half)]
    parts += [layers.Conv2D(4, 3, dtype=half), layers.BatchNormalization(dtype=half)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *parts])
    recalibrate(model, IMAGES)
    x = model.layers[0](IMAGES)
    check(model.layers[1], array(keras.ops.cast(x, "float32")))
    x = model.layers[3](model.layers[2](model.layers[1](x)))
    check(model.layers[4], array(keras.ops.cast(x, "float32")), bound=1e-5)


def test_one_pass_takes_each_batch_by_its_own_statistics() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(), layers.Dense(2), layers.BatchNormalization()])
    scramble(model)
    x = (random.normal(size=(90, 3)) * 3 + 1).astype("float32")
    done = recalibrate(model, x, batch_size=32, one_pass=True)
    assert done.passes == 1
    first, dense, second = model.layers
    check(first, x)
    parts = []
    for part in (x[:32], x[32:64], x[64:]):
        wide = part.astype("float64")
        z = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + first.epsilon) * array(first.gamma) + array(first.beta)
        parts.append(z @ array(dense.kernel) + array(dense.bias))
    check(second, np.concatenate(parts), bound=1e-5)


def test_statistics_that_were_no_numbers() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(), layers.Dense(2)])
    model.layers[0].moving_mean.assign([np.nan, 0, np.inf])
    x = random.normal(size=(90, 3)).astype("float32")
    done = recalibrate(model, x)
    check(model.layers[0], x)
    assert done.layers[0].shift == np.inf
    assert done.as_dict()["layers"][0]["shift"] is None


def test_everything_is_as_it_was_after_an_error() -> None:
    model = residual(layers.BatchNormalization)
    before = [array(weight).copy() for weight in model.weights]
    broken = IMAGES.copy()
    broken[40, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="batch 3 reaches 'first' with values that are not finite") as caught:
        recalibrate(model, broken, batch_size=16, measure=False)
    assert "\n" not in str(caught.value)

    def stop(what, done, total):
        if "3 of" in what and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, IMAGES, batch_size=16, progress=stop)
    for old, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(array(weight), old)
    assert all("call" not in vars(layer) for layer in model._flatten_layers())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (IMAGES[..., :2], "takes samples of shape 8 x 8 x 3; received 8 x 8 x 2"),
        (IMAGES[:0], "is empty"),
        ((IMAGES, LABELS[:7]), "one label for each sample"),
        ((IMAGES, np.zeros((50, 9))), "the labels of the data do not fit"),
        ({"other": IMAGES, "more": IMAGES}, "is missing"),
        ([np.zeros((4, 8, 8, 3), "float32"), np.zeros((4, 7, 7, 4), "float32")], "the model cannot take"),
    ],
)
def test_data_that_do_not_fit(data, words) -> None:
    with pytest.raises(InputError, match=words) as caught:
        recalibrate(residual(layers.BatchNormalization), data)
    assert "\n" not in str(caught.value)


def test_a_model_without_batch_normalization() -> None:
    with pytest.raises(InputError, match="no batch normalization"):
        recalibrate(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), np.ones((4, 3)))


def test_progress_and_limits() -> None:
    said = []
    recalibrate(
        residual(layers.BatchNormalization), IMAGES, batch_size=10, batches=3, progress=lambda *step: said.append(step)
    )
    assert ("outputs before", 3, 3) in said
    assert ("layers 4 of 4", 3, 3) in said
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.BatchNormalization()])
    recalibrate(model, iter([IMAGES[:20], IMAGES[20:40], IMAGES[40:]]), batches=2)
    check(model.layers[0], IMAGES[:40])


def test_a_compiled_model_stays_compiled_and_its_optimizer_as_it_was() -> None:
    model = residual(layers.BatchNormalization)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(IMAGES, LABELS, epochs=1, verbose=0)
    before = [array(variable).copy() for variable in model.optimizer.variables]
    recalibrate(model, (IMAGES, LABELS))
    for old, variable in zip(before, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(array(variable), old)
    model.fit(IMAGES, LABELS, epochs=1, verbose=0)


@pytest.mark.parametrize("structure", ["one", "list", "dict"])
@pytest.mark.parametrize("given", ["tuple", "dict"])
def test_structures_of_inputs(structure, given) -> None:
    norms = [layers.BatchNormalization(name=f"norm_{name}") for name in "ab"]
    inputs = [keras.Input((3,), name=name) for name in "ab"][: 1 if structure == "one" else 2]
    output = layers.Concatenate()([norm(each) for norm, each in zip(norms, inputs, strict=False)] * 2)
    taken = {"one": inputs[0], "list": inputs, "dict": dict(zip("ab", inputs, strict=False))}[structure]
    model = keras.Model(taken, output)
    x = [random.normal(size=(40, 3)).astype("float32") + i for i in range(len(inputs))]
    data = tuple(x) if given == "tuple" else dict(zip("ab", x, strict=False))
    recalibrate(model, [(data,)] if given == "tuple" else data)
    for norm, each in zip(norms, x, strict=False):
        check(norm, each)
