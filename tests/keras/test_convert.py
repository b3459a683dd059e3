"""Exchange of Keras's batch normalization for ours and back: the outputs, the training, and the files stay the same."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from evennorm.errors import ArgumentError
from evennorm.keras import legacy
from evennorm.keras.convert import convert, revert
from evennorm.keras.layer import BatchNormalization

THEIRS, OURS = layers.BatchNormalization, BatchNormalization
RNG = np.random.default_rng(11)
IMAGES = RNG.normal(size=(16, 4, 4, 3)).astype("float32")
TARGETS = RNG.normal(size=(16, 2)).astype("float32")


def kinds(model):
    """Class by name of every batch normalization, at any depth."""
    return {layer.name: type(layer) for layer in model._flatten_layers() if isinstance(layer, THEIRS | OURS)}


def output(model, x, training=False):
    return keras.ops.convert_to_numpy(model(x, training=training))


def randomize(model):
    """Weights as after some training: nothing is 0 or 1 that started so, variances are positive."""
    for weight in model.weights:
        weight.assign(RNG.uniform(0.2, 1.0, weight.shape))
    return model


def nested_model(policy="float32"):
    """Normalizations with arguments: shared, nested, two deep in wrappers, frozen, channels-first, of another precision."""
    inner = keras.Sequential(
        [keras.Input((None, None, 3)), layers.Conv2D(3, 1), THEIRS(name="inner", epsilon=0.1, scale=False)], name="block"
    )
    shared = THEIRS(name="shared", momentum=0.9, center=False, gamma_regularizer="l2")
    inputs = keras.Input((4, 4, 3), name="image")
    x = inner(shared(inner(shared(inputs))))
    x = THEIRS(axis=1, name="frozen", renorm=True, renorm_clipping={"rmax": 2.0}, trainable=False)(
        layers.Permute((3, 1, 2))(x)
    )
    wrapped = keras.Sequential([keras.Input((4, 4)), layers.Flatten(), THEIRS(name="wrapped")])
    x = layers.TimeDistributed(THEIRS(name="alone"), name="each")(layers.TimeDistributed(wrapped)(x))
    x = THEIRS(name="policy", dtype=policy)(layers.Flatten()(x))
    return randomize(keras.Model(inputs, layers.Dense(2, name="out", dtype="float32")(x), name="rich"))


def flat_model():
    inputs = keras.Input((4, 4, 3))
    x = layers.ReLU()(THEIRS(name="a")(layers.Conv2D(4, 3, use_bias=False)(inputs)))
    x = layers.Dropout(0.3, seed=3)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(2)(THEIRS(name="b", momentum=0.5)(x)))


def test_every_layer_is_exchanged_and_the_outputs_stay():
    model = nested_model()
    expected = output(model, IMAGES)
    ours = convert(model)
    assert kinds(ours) == dict.fromkeys(["shared", "inner", "frozen", "wrapped", "alone", "policy"], OURS)
    np.testing.assert_allclose(output(ours, IMAGES), expected, rtol=1e-5, atol=1e-5)
    back = revert(ours)
    assert kinds(back) == dict.fromkeys(kinds(ours), THEIRS)
    np.testing.assert_array_equal(output(back, IMAGES), expected)


def test_weights_names_flags_policies_and_sharing_stay():
    model = nested_model("mixed_bfloat16")
    ours = convert(model)
    assert [layer.name for layer in ours._flatten_layers()] == [layer.name for layer in model._flatten_layers()]
    for mine, theirs in zip(ours.weights, model.weights, strict=True):
        assert mine.name == theirs.name
        assert mine is not theirs
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(mine), keras.ops.convert_to_numpy(theirs))
    flags = [(x.name, x.trainable, x.dtype_policy.name) for x in model._flatten_layers()]
    assert [(x.name, x.trainable, x.dtype_policy.name) for x in ours._flatten_layers()] == flags
    assert len(ours.trainable_weights) == len(model.trainable_weights)
    for old, new in zip(model._flatten_layers(), ours._flatten_layers(), strict=True):
        if isinstance(old, THEIRS):
            assert old.get_config() == new.get_config()


def test_the_original_is_untouched():
    model = nested_model()
    before, weights = model.to_json(), [weight.copy() for weight in model.get_weights()]
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    convert(model)
    assert (model.to_json(), [len(layer._inbound_nodes) for layer in model.layers]) == (before, nodes)
    for now, then in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, then)


def test_training_goes_on_where_it_was():
    """Three models, one of them converted in the midst of training, take the same way."""
    model = flat_model()
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    fit = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(IMAGES, TARGETS, **fit)
    variants = [convert(model), revert(convert(model)), model]
    losses = [variant.fit(IMAGES, TARGETS, **fit).history["loss"] for variant in variants]
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-4)
    np.testing.assert_allclose(losses[1], losses[2], rtol=1e-6)


def test_a_model_that_is_not_compiled_gives_one_that_is_not():
    assert not convert(flat_model()).compiled


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_a_loss_that_cannot_be_read_back_leaves_the_copy_uncompiled_and_says_so():
    model = flat_model()
    model.compile("sgd", loss=lambda y, z: keras.ops.mean(y - z))
    with pytest.warns(UserWarning, match="is not compiled, since its loss, metrics or optimizer cannot be read"):
        assert not convert(model).compiled


def test_files_of_both_sides_hold_the_same(tmp_path):
    model = randomize(flat_model())
    ours = convert(model)
    ours.save_weights(tmp_path / "ours.weights.h5")
    fresh = flat_model()
    fresh.load_weights(tmp_path / "ours.weights.h5")
    np.testing.assert_array_equal(output(fresh, IMAGES), output(model, IMAGES))
    ours.save(tmp_path / "ours.keras")
    loaded = keras.saving.load_model(tmp_path / "ours.keras")
    assert set(kinds(loaded).values()) == {OURS}
    np.testing.assert_array_equal(output(loaded, IMAGES), output(ours, IMAGES))


@pytest.mark.parametrize("change", [convert, revert])
def test_a_model_without_normalization_is_copied(change):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)], name="plain")
    copy = change(model)
    assert copy is not model
    assert type(copy) is keras.Sequential
    assert copy.name == "plain"
    np.testing.assert_array_equal(output(copy, IMAGES[0, 0]), output(model, IMAGES[0, 0]))


def test_layers_of_the_old_names_revert():
    model = keras.Sequential([keras.Input((3,)), legacy.BatchNormalization(1e-4, name="old"), layers.Dense(1)])
    back = revert(randomize(model))
    assert type(back.get_layer("old")) is THEIRS
    assert back.get_layer("old").epsilon == 1e-4
    np.testing.assert_allclose(output(back, IMAGES[0, 0]), output(model, IMAGES[0, 0]), rtol=1e-5)


class Derived(THEIRS):
    """May compute anything; here it does not normalize at all."""

    def call(self, inputs, training=None, mask=None):
        return inputs


def test_derived_classes_are_left_alone():
    model = keras.Sequential([keras.Input((3,)), Derived(name="derived"), THEIRS(name="exact")])
    assert kinds(convert(model)) == {"derived": Derived, "exact": OURS}


def test_a_model_class_of_its_own_stays_that_class():
    class Trained(keras.Model):
        def train_step(self, data):
            return {"loss": 0.0}

    inputs = keras.Input((3,))
    assert type(convert(Trained(inputs, THEIRS()(inputs)))) is Trained


class Holder(layers.Layer):
    """Makes its normalization in its own code."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = THEIRS(name="hidden")

    def build(self, shape):
        self.norm.build(shape)

    def call(self, x, training=None):
        return self.norm(x, training=training)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="own")
        self.norm = THEIRS()

    def call(self, x):
        return self.norm(x)


class OwnCall(keras.Model):
    """Functional by construction, but computes something else than its graph."""

    def call(self, x, **kwargs):
        return 2 * super().call(x, **kwargs)


def own_call():
    inputs = keras.Input((3,))
    return OwnCall(inputs, THEIRS()(inputs), name="own")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Subclassed, "only Sequential and functional models can be rewritten, .* received 'own' of class Subclassed"),
        (own_call, "received 'own' of class OwnCall"),
        (lambda: keras.Sequential([THEIRS()], name="bare"), "'bare' has no input shape yet"),
        (lambda: THEIRS(), "a Keras model is needed; received BatchNormalization"),
        (
            lambda: keras.Sequential([keras.Input((3,)), Holder(name="holder")]),
            "'holder' of class Holder makes its 'hidden' in its own code",
        ),
    ],
)
def test_what_convert_refuses(model, text):
    with pytest.raises(ArgumentError, match=text):
        convert(model())


def with_residual():
    inputs = keras.Input((4, 3))
    return keras.Model(inputs, OURS(name="joined")(layers.Dense(3)(inputs), residual=inputs))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": 2}, "'bn' does with mode=2; keep that layer, or build it without"),
        (
            {"activation": "relu"},
            "'bn' does with activation='relu'; keep that layer, write the activation as a layer of its own",
        ),
        ({"axis": (1, 2)}, r"'bn' does with axis=\(1, 2\)"),
        ({"momentum": None}, "'bn' does with momentum=None"),
        ({"virtual_batch_size": 2, "unbiased_variance": True}, "virtual_batch_size=2, unbiased_variance=True"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda layer: layer, layers.TimeDistributed], ids=["bare", "wrapped"])
def test_what_keras_cannot_do_is_not_reverted(options, text, wrap):
    size = (5, 4, 3) if wrap is layers.TimeDistributed else (4, 3)
    model = keras.Sequential([keras.Input(size), wrap(OURS(name="bn", **options))])
    if wrap is layers.TimeDistributed and "axis" in options:
        text = "'bn' does with axis="
    with pytest.raises(ArgumentError, match=text):
        revert(model)


def test_a_residual_call_is_not_reverted():
    with pytest.raises(ArgumentError, match="takes no residual, and 'joined' is called with one"):
        revert(with_residual())


def test_synchronized_layers_revert_where_keras_can_do_the_same():
    model = keras.Sequential([keras.Input((4, 3)), OURS(name="bn", synchronized=True)])
    if keras.backend.backend() == "torch":
        with pytest.raises(ArgumentError, match="cannot do what 'bn' does with synchronized=True; keep that layer"):
            revert(model)
    else:  # on JAX statistics are those of the whole batch in any case
        assert revert(model).get_layer("bn").synchronized is (keras.backend.backend() == "tensorflow")


def test_one_axis_in_a_tuple_is_one_axis():
    model = keras.Sequential([keras.Input((4, 3)), OURS(axis=(1,), name="bn")])
    assert revert(model).get_layer("bn").axis == 1


def test_masks_reach_the_exchanged_layer():
    model = keras.Sequential([keras.Input((None, 2)), layers.Masking(), THEIRS(name="bn", momentum=0.0), layers.LSTM(2)])
    x = RNG.normal(size=(2, 4, 2)).astype("float32")
    x[0, 1:] = 0
    ours = convert(model)
    output(ours, x, training=True)
    np.testing.assert_allclose(ours.get_layer("bn").get_weights()[2], np.concatenate([x[0, :1], x[1]]).mean(0), rtol=1e-5)


OLD_INITIALIZERS = ("uniform", "normal", "lecun_uniform", "glorot_uniform", "glorot_normal", "he_uniform", "he_normal")


@pytest.mark.parametrize("wrap", [lambda layer: layer, layers.TimeDistributed], ids=["bare", "wrapped"])
def test_what_revert_gives_is_loaded_by_a_process_that_knows_no_evennorm(tmp_path, wrap):
    names = (*OLD_INITIALIZERS, "orthogonal")
    inputs = x = keras.Input((5, 4, 3) if wrap is layers.TimeDistributed else (4, 3))
    for k, name in enumerate(names):
        x = wrap(
            legacy.BatchNormalization(beta_init=name, gamma_init=name, gamma_regularizer=legacy.l2(0.1), name=f"bn_{k}")
        )(x)
    x = wrap(OURS(gamma_init=lambda shape, name: np.full(shape, 1.5, "float32"), name="own"))(x)
    back = revert(keras.Model(inputs, x))
    back.save(tmp_path / "plain.keras")
    data = np.random.default_rng(5).normal(size=(2, *inputs.shape[1:])).astype("float32")
    np.save(tmp_path / "x.npy", data)
    np.save(tmp_path / "y.npy", back.predict(data, verbose=0))
    program = (
        "import sys, keras, numpy as np; m = keras.saving.load_model('plain.keras');"
        "np.testing.assert_allclose(m.predict(np.load('x.npy'), verbose=0), np.load('y.npy'), rtol=1e-5, atol=1e-6);"
        "keras.models.clone_model(m); assert not any(name.startswith('evennorm') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_old_initializers_keep_their_distribution():
    size = 400
    bounds = {"lecun_uniform": 3, "glorot_uniform": 3, "he_uniform": 6, "uniform": 0.05**2 * np.sqrt(size)}
    deviations = {"glorot_normal": 1, "he_normal": 2, "normal": 0.05**2 * np.sqrt(size)}
    for name in OLD_INITIALIZERS:
        model = keras.Sequential([keras.Input((size,)), OURS(gamma_init=name, name="bn")])
        found = revert(model).get_layer("bn").gamma_initializer
        assert type(found).__module__.startswith("keras.")
        values = np.asarray(keras.ops.convert_to_numpy(found((size,))))
        if name in bounds:
            limit = np.sqrt(bounds[name] / np.sqrt(size))
            assert 0.9 * limit < np.abs(values).max() <= limit
        else:
            np.testing.assert_allclose(values.std(), np.sqrt(deviations[name] / np.sqrt(size)), rtol=0.2)


def test_a_seed_that_nobody_gave_is_in_no_configuration():
    one, other = (OURS(beta_init="he_normal", gamma_init="uniform", name="bn").get_config() for _ in range(2))
    assert one == other
    assert keras.initializers.deserialize(one["gamma_initializer"]).maxval == 0.05


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.LSTM(3, recurrent_activation=legacy.hard_sigmoid, name="odd"),
        lambda: legacy.Bidirectional(layers.LSTM(3), name="odd"),
    ],
)
def test_revert_refuses_what_keras_alone_does_not_know(layer):
    model = keras.Sequential([keras.Input((4, 3)), OURS(), layer()])
    with pytest.raises(ArgumentError, match=r"Keras loads without evennorm, and Keras does not know evennorm.* of 'odd'"):
        revert(model)
