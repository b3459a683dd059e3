"""Whole models: graphs, nested and shared layers, merges, files of weights alone, who wrote them."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest

from evennorm.errors import InputError
from evennorm.keras import BatchNormalization, legacy
from evennorm.tools.migrate import migrate
from tests.migration.building import both, difference, functional, layer, sequential
from tests.migration.keras1 import Keras1


def draw(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=(4, *shape)).astype("float32")


def dense(name, units=4, **config):
    return layer("Dense", name, output_dim=units, **config)


# Graphs


@pytest.mark.parametrize("mode", ["sum", "mul", "ave", "max", "concat", "dot", "cos"])
def test_merges_of_vectors(mode, tmp_path):
    model = functional(
        {"a": (5,), "b": (5,)},
        [
            (dense("d1"), "a"),
            (dense("d2"), "b"),
            (layer("Merge", "merged", mode=mode, dot_axes=[1, 1]), "d1", "d2"),
            (layer("Flatten", "flat") if mode == "cos" else layer("Activation", "flat", activation="linear"), "merged"),
            (dense("out", 2), "flat"),
        ],
        ["out"],
    )
    assert difference(Keras1(), model, tmp_path, draw(5), draw(5, seed=2)) < 1e-5


@pytest.mark.parametrize(
    ("version", "backend", "said"),
    [
        ("1.0.8", "tensorflow", True),
        ("1.1.2", "tensorflow", True),
        ("1.1.2", "theano", False),
        ("1.2.0", "tensorflow", False),
    ],
)
@pytest.mark.parametrize("mode", ["dot", "cos"])
def test_products_of_vectors_are_of_one_sample(mode, version, backend, said, tmp_path):
    """TensorFlow multiplied all samples of a batch with all before 1.2; what is predicted depends on no other sample."""
    merged = layer("Merge", "merged", mode=mode, dot_axes=[1, 1])
    model = functional({"a": (5,), "b": (5,)}, [(dense("d", 5), "a"), (merged, "d", "b")], ["merged"])
    expected, got, report = both(Keras1(backend, version), model, tmp_path, draw(5), draw(5, seed=2))
    assert got[0].shape == ((4, 1) if mode == "dot" else (4, 1, 1))
    np.testing.assert_allclose(got[0].ravel(), expected[0].ravel(), atol=1e-5)
    sentences = [sentence for found in report.layers for sentence in found.assumed]
    assert any("TensorFlow multiplied all samples of the batch with all" in sentence for sentence in sentences) is said


@pytest.mark.parametrize("axes", [[2, 2], [1, 1], [1, 2]])
def test_dot_merge_of_matrices(axes, tmp_path):
    model = functional(
        {"a": (4, 4), "b": (4, 4)},
        [(dense("d1"), "a"), (layer("Merge", "merged", mode="dot", dot_axes=axes), "d1", "b")],
        ["merged"],
    )
    assert difference(Keras1(), model, tmp_path, draw(4, 4), draw(4, 4, seed=2)) < 1e-5


@pytest.mark.parametrize("backend", ["theano", "tensorflow"])
def test_channels_first_blocks_that_join(backend, tmp_path):
    """As in ResNet and Inception: additions and concatenations along the channels."""

    def conv(name, filters, size=1, **config):
        options = {"nb_filter": filters, "nb_row": size, "nb_col": size, "dim_ordering": "th", "border_mode": "same"}
        return layer("Convolution2D", name, **options | config)

    model = functional(
        {"image": (3, 8, 8)},
        [
            (conv("stem", 4, 3, subsample=[2, 2]), "image"),
            (layer("BatchNormalization", "bn1", axis=1), "stem"),
            (layer("Activation", "relu1", activation="relu"), "bn1"),
            (conv("left", 4, 3), "relu1"),
            (layer("Merge", "sum", mode="sum"), "left", "relu1"),
            (conv("wide", 2), "sum"),
            (
                layer("AveragePooling2D", "pool", pool_size=[3, 3], strides=[1, 1], border_mode="same", dim_ordering="th"),
                "sum",
            ),
            (layer("Merge", "joined", mode="concat", concat_axis=1), "wide", "pool"),
            (layer("GlobalAveragePooling2D", "global", dim_ordering="th"), "joined"),
            (dense("out", 3, activation="softmax"), "global"),
        ],
        ["out", "joined"],
    )
    expected, got, report = both(Keras1(backend), model, tmp_path, draw(3, 8, 8))
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
    turns = [x for x in report.model.layers if isinstance(x, keras.layers.Permute)]
    assert [x.name for x in turns] == ["image_to_channels_last", "joined_to_channels_first"]


def test_a_layer_called_twice_stays_one_layer(tmp_path):
    shared = dense("shared")
    model = functional(
        {"a": (5,), "b": (5,)},
        [(shared, "a"), (shared, "b"), (layer("Merge", "m", mode="concat"), ("shared", 0), ("shared", 1))],
        ["m"],
    )
    expected, got, report = both(Keras1(), model, tmp_path, draw(5), draw(5, seed=2))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    assert report.parameters == 5 * 4 + 4


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("kind", ["Sequential", "Model"])
def test_nested_models_stored_their_trainable_weights_first(kind, trainable, tmp_path):
    inside = [
        dense("inner_1", trainable=trainable),
        layer("BatchNormalization", "inner_bn"),
        dense("inner_2"),
    ]
    nested = {**sequential((5,), *inside), "name": "nested"}
    if kind == "Model":
        nested = functional({"x": (5,)}, [(inside[0], "x"), (inside[1], "inner_1"), (inside[2], "inner_bn")], ["inner_2"])
        nested = {**nested, "name": "nested", "config": {**nested["config"], "name": "nested"}}
    model = functional(
        {"a": (5,), "b": (5,)},
        [
            (nested, "a"),
            (nested, "b"),
            (layer("Merge", "m", mode="sum"), ("nested", 1), ("nested", 2)),
            (dense("out", 2), "m"),
        ],
        ["out"],
    )
    expected, got, report = both(Keras1("theano"), model, tmp_path, draw(5), draw(5, seed=2))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    assert [x.old for x in report.layers if x.old.startswith("nested/")][-3:] == [
        "nested/inner_1",
        "nested/inner_bn",
        "nested/inner_2",
    ]
    assert report.model.get_layer("nested").get_layer("inner_1").trainable is trainable


def test_a_sequential_that_begins_with_a_merge(tmp_path):
    branches = [sequential((5,), dense("left")), sequential((6,), dense("right"), layer("BatchNormalization", "bn"))]
    first = layer("Merge", "merged", mode="concat")
    first["config"]["layers"] = branches
    model = {"class_name": "Sequential", "config": [first, dense("out", 3)]}
    assert difference(Keras1(), model, tmp_path, draw(5), draw(6, seed=2)) < 1e-5


def test_a_branch_under_two_merges_is_one_branch(tmp_path):
    """As in the memory network of Keras's examples: the question meets the story, and both meet the question again."""
    question, story = sequential((5,), dense("q1"), dense("q2")), sequential((6,), dense("s"))
    inner = layer("Merge", "inner", mode="mul")
    inner["config"]["layers"] = [story, question]
    response = {"class_name": "Sequential", "config": [inner, dense("r", 3)]}
    outer = layer("Merge", "outer", mode="concat")
    outer["config"]["layers"] = [response, question]
    model = {"class_name": "Sequential", "config": [outer, dense("out", 2)]}
    old, a, b = Keras1(), draw(6), draw(5, seed=2)
    met = [old.predict(story, a.astype("float64")), old.predict(question, b.astype("float64"))]
    expected = old.predict(model["config"][1:], np.concatenate([old.predict([dense("r", 3)], met[0] * met[1]), met[1]], 1))
    new = migrate(old.save(tmp_path / "old.h5", model)).model
    assert [x.name for x in new.inputs] == ["s_input", "q1_input"]
    np.testing.assert_allclose(new.predict_on_batch([a, b]), expected, atol=1e-5)


@pytest.mark.parametrize("same", [True, False], ids=["same shapes", "other shapes"])
def test_sequentials_in_a_sequential_had_no_names(same, tmp_path):
    """As a generator and a discriminator: the file of weights has their names, the configuration has not."""
    made = sequential((4,), dense("g"), layer("BatchNormalization", "bn"))
    judged = sequential((4,), dense("d", 4 if same else 3), layer("BatchNormalization", "bn2"))
    model = {"class_name": "Sequential", "config": [{**made, "name": "sequential_2"}, {**judged, "name": "sequential"}]}
    plain = {"class_name": "Sequential", "config": [made, judged]}
    old, x = Keras1(), draw(4)
    expected = old.predict(model, x.astype("float64"))
    report = migrate(old.save(tmp_path / "w.h5", model, whole=False), architecture=plain, written_by="keras==1.2.2")
    np.testing.assert_allclose(report.model.predict_on_batch(x), expected, atol=1e-5)
    assert report.notes == ("layers of the architecture do not all have names; they were matched in their order",)


def test_time_distributed_models(tmp_path):
    inner = {**sequential((5,), dense("d", activation="relu"), layer("BatchNormalization", "bn")), "name": "inner"}
    model = sequential((3, 5), layer("TimeDistributed", "each", layer=inner), layer("LSTM", output_dim=2))
    assert difference(Keras1(), model, tmp_path, draw(3, 5)) < 1e-5


def test_progress_counts_the_layers_of_nested_models_too(tmp_path):
    inner = {**sequential((5,), dense("d"), layer("BatchNormalization", "bn")), "name": "inner"}
    model = sequential((3, 5), layer("TimeDistributed", "each", layer=inner), layer("LSTM", output_dim=2))
    told: list[tuple[str, int, int | None]] = []
    old = Keras1()
    old.predict(model, draw(3, 5))
    path = old.save(tmp_path / "old.h5", model)
    migrated = migrate(path, tmp_path / "new.keras", progress=lambda *words: told.append(words))
    *built, last = told
    assert built == [("building", done, 6) for done in range(1, 7)]  # two inputs, Dense, BatchNormalization, each, LSTM
    assert last == ("writing", 0, None)

    told.clear()
    migrate(path, architecture=migrated.model, progress=lambda *words: told.append(words))
    assert told == [("building", done, 4) for done in range(1, 5)]


def test_words_that_are_masked(tmp_path):
    """A masked step keeps the state, as it did."""
    words = np.random.default_rng(0).integers(0, 4, (5, 6))
    words[:, 3:] = 0
    old = Keras1()
    embedding = layer("Embedding", input_dim=10, output_dim=4, input_length=6, mask_zero=True)
    lstm = layer("LSTM", output_dim=3)
    model = sequential((6,), embedding, lstm)
    x = old.Embedding(embedding["config"], words)
    expected = old.LSTM(lstm["config"], x, mask=words != 0)
    migrate(old.save(tmp_path / "old.h5", model), tmp_path / "new.keras")
    got = keras.saving.load_model(tmp_path / "new.keras").predict_on_batch(words)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def tagged(old, merge_mode, tmp_path):
    """A file whose Bidirectional layer returns sequences of masked words; the words; what Keras 1 predicted."""
    words = np.random.default_rng(0).integers(0, 4, (5, 6))
    words[:, 4:] = 0
    embedding = layer("Embedding", input_dim=10, output_dim=4, input_length=6, mask_zero=True)
    inner = layer("LSTM", "inner", output_dim=3, return_sequences=True)
    wrapped = layer("Bidirectional", "both", layer=inner, merge_mode=merge_mode)
    expected = old.Bidirectional(wrapped["config"], old.Embedding(embedding["config"], words), mask=words != 0)
    return old.save(tmp_path / "old.h5", sequential((6,), embedding, wrapped)), words, expected


@pytest.mark.parametrize("merge_mode", ["concat", "sum", "mul", "ave"])
def test_both_directions_repeat_their_output_at_masked_steps(merge_mode, tmp_path):
    path, words, expected = tagged(Keras1(), merge_mode, tmp_path)
    migrate(path, tmp_path / "new.keras")
    new = keras.saving.load_model(tmp_path / "new.keras")
    assert type(new.layers[-1]) is legacy.Bidirectional
    np.testing.assert_allclose(new.predict_on_batch(words), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "backend", "said"),
    [
        ("1.0.8", "tensorflow", True),
        ("1.1.0", "tensorflow", True),
        ("1.1.0", "theano", False),
        ("1.2.0", "tensorflow", False),
    ],
)
def test_masks_that_ran_backwards_are_those_of_their_sample(version, backend, said, tmp_path):
    path, words, expected = tagged(Keras1(backend, version), "concat", tmp_path)
    report = migrate(path)
    np.testing.assert_allclose(report.model.predict_on_batch(words), expected, atol=1e-5)
    sentences = [sentence for found in report.layers for sentence in found.assumed]
    assert any("TensorFlow gave each sample the mask of another" in sentence for sentence in sentences) is said


def test_a_stateful_model_keeps_its_batch_size_and_its_state(tmp_path):
    old = Keras1()
    lstm = layer("LSTM", output_dim=3, stateful=True, batch_input_shape=[4, 6, 2], input_dtype="float32")
    model = {"class_name": "Sequential", "config": [lstm]}
    x = draw(12, 2)
    expected = old.LSTM(lstm["config"], x.astype("float64"))
    migrate(old.save(tmp_path / "old.h5", model), tmp_path / "new.keras")
    new = keras.saving.load_model(tmp_path / "new.keras")
    new(x[:, :6])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(new(x[:, 6:])), expected, atol=1e-5)


# Who wrote the file

BATCH_NORM = {"axis": -1, "mode": 0, "momentum": 0.9}
RELEASES = [
    (version, backend)
    for version in ("1.0.0", "1.0.5", "1.0.6", "1.0.7", "1.0.8", "1.1.2", "1.2.2")
    for backend in ("theano", "tensorflow")
]


@pytest.mark.parametrize(("version", "backend"), RELEASES)
def test_the_fourth_weight_by_release_and_backend(version, backend, tmp_path):
    model = sequential((5,), layer("BatchNormalization", "bn", epsilon=0.3, momentum=0.9), dense("out", 2))
    assert difference(Keras1(backend, version), model, tmp_path, draw(5)) < 1e-5


@pytest.mark.parametrize("version", ["1.0.4", "1.0.5"])
def test_mode_1_by_release(version, tmp_path):
    model = sequential((3, 5), layer("BatchNormalization", "bn", mode=1, epsilon=0.2), dense("out", 2))
    assert difference(Keras1("theano", version), model, tmp_path, draw(3, 5)) < 1e-5


def weights_only(tmp_path, backend, version, epsilon, momentum, named=True, units=5):
    norm = layer("BatchNormalization", "bn", epsilon=epsilon, momentum=momentum)
    if version < "1.1":
        norm["config"] = {key: x for key, x in norm["config"].items() if "regularizer" not in key}
    model = sequential((units,), norm, dense("out", 2))
    old = Keras1(backend, version)
    x = draw(units)
    expected = old.predict(model, x.astype("float64"))
    architecture = tmp_path / "model.json"
    architecture.write_text(json.dumps(model))
    return old.save(tmp_path / "w.h5", model, whole=False, named=named), architecture, x, expected


@pytest.mark.parametrize(
    ("backend", "version", "epsilon", "momentum", "sentence"),
    [
        ("theano", "1.0.6", 1e-6, 0.9, "epsilon 1e-06 and momentum 0.9 are the defaults of 1.0.0 to 1.0.6"),
        ("theano", "1.0.7", 1e-6, 0.99, "epsilon 1e-06 and momentum 0.99 are the defaults of 1.0.7"),
        ("tensorflow", "1.0.7", 1e-6, 0.99, 'names of weights end in ":0": written on tensorflow'),
        ("tensorflow", "1.0.8", 1e-5, 0.99, "BatchNormalization has no argument gamma_regularizer: up to 1.0.8"),
        ("theano", "1.2.1", 0.1, 0.5, "BatchNormalization has the argument gamma_regularizer: from 1.1.0"),
        ("theano", "1.2.1", 1e-3, 0.99, 'names of weights do not end in ":0": written on theano'),
    ],
)
def test_evidence_tells_releases_apart(backend, version, epsilon, momentum, sentence, tmp_path):
    weights, architecture, x, expected = weights_only(tmp_path, backend, version, epsilon, momentum)
    report = migrate(weights, tmp_path / "new.keras", architecture=architecture)
    np.testing.assert_allclose(report.model.predict_on_batch(x), expected, atol=1e-5)
    assert sentence in report.evidence


def test_what_cannot_be_told_is_asked(tmp_path):
    weights, architecture, x, expected = weights_only(tmp_path, "tensorflow", "1.0.5", 1e-6, 0.9)
    with pytest.raises(InputError, match=r"fourth weight of 'bn' may be .*1\.0\.0 to 1\.0\.6 on tensorflow.*--written-by"):
        migrate(weights, tmp_path / "new.keras", architecture=architecture)
    assert not (tmp_path / "new.keras").exists()
    report = migrate(weights, architecture=architecture, written_by="keras==1.0.5")
    np.testing.assert_allclose(report.model.predict_on_batch(x), expected, atol=1e-5)
    other = migrate(weights, architecture=architecture, written_by="keras==1.0.6,tensorflow")
    assert np.abs(other.model.predict_on_batch(x) - expected).max() > 1e-3


def test_an_architecture_says_its_version(tmp_path):
    weights, architecture, x, expected = weights_only(tmp_path, "tensorflow", "1.0.5", 1e-6, 0.9)
    architecture.write_text(json.dumps(json.loads(architecture.read_text()) | {"keras_version": "1.0.5"}))
    report = migrate(weights, architecture=architecture)
    np.testing.assert_allclose(report.model.predict_on_batch(x), expected, atol=1e-5)
    assert report.written_by == "Keras 1.0.5 on tensorflow"


def test_weights_without_names_need_to_know_their_backend(tmp_path):
    conv = layer("Convolution2D", "conv", nb_filter=2, nb_row=3, nb_col=3, dim_ordering="th")
    model = sequential((3, 6, 6), conv, layer("Flatten", "f"), dense("out", 2))
    old = Keras1("theano")
    x = draw(3, 6, 6)
    expected = old.predict(model, x.astype("float64"))
    weights = old.save(tmp_path / "w.h5", model, whole=False, named=False)
    with pytest.raises(InputError, match="whether 'conv' comes from there; say it with --written-by theano"):
        migrate(weights, architecture=model)
    got = migrate(weights, architecture=model, written_by="theano").model.predict_on_batch(x)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_file_name_that_tells_of_its_kernels(tmp_path):
    """fchollet's th_kernels files were converted on TensorFlow, and have its names."""
    conv = layer("Convolution2D", "conv", nb_filter=2, nb_row=3, nb_col=3)
    model = sequential((6, 6, 3), conv)
    old = Keras1("tensorflow")
    x = draw(6, 6, 3)
    old.predict(model, x.astype("float64"))
    path = old.save(tmp_path / "net_th_dim_ordering_th_kernels.h5", model, whole=False)
    old.theano = True
    got = migrate(path, architecture=model).model.predict_on_batch(x)
    np.testing.assert_allclose(got, old.predict(model, x.astype("float64")), atol=1e-5)


def test_layers_of_other_names_are_matched_in_order(tmp_path):
    weights, architecture, x, expected = weights_only(tmp_path, "theano", "1.2.1", 1e-3, 0.99)
    renamed = architecture.read_text().replace('"bn"', '"batchnormalization_7"').replace('"out"', '"dense_9"')
    report = migrate(weights, architecture=json.loads(renamed))
    np.testing.assert_allclose(report.model.predict_on_batch(x), expected, atol=1e-5)
    assert any("other names" in note for note in report.notes)


def test_an_architecture_in_keras_3(tmp_path):
    """What module:function returns: layers as today, weights as they were."""
    old = Keras1("theano", "1.0.5")
    model = sequential(
        (8, 8, 3),
        layer("Convolution2D", "conv", nb_filter=4, nb_row=3, nb_col=3, activation="relu"),
        layer("BatchNormalization", "bn", epsilon=0.01),
        layer("Flatten", "flat"),
        layer("RepeatVector", "repeat", n=3),
        layer("LSTM", "lstm", output_dim=3, return_sequences=True, inner_activation="sigmoid"),
        layer("Bidirectional", "both", layer=layer("GRU", "gru", output_dim=2)),
        layer("TimeDistributedDense", "dense", output_dim=2),
    )
    model["config"] = model["config"][:-1]
    x = draw(8, 8, 3)
    expected = old.predict(model, x.astype("float64"))
    weights = old.save(tmp_path / "w.h5", model, whole=False)
    layers = keras.layers
    new = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(epsilon=0.01),
            layers.Flatten(),
            layers.RepeatVector(3),
            layers.LSTM(3, return_sequences=True),
            layers.Bidirectional(layers.GRU(2, recurrent_activation="hard_sigmoid", reset_after=False)),
        ]
    )
    with pytest.raises(InputError, match="fourth weight"):
        migrate(weights, architecture=new)
    report = migrate(weights, tmp_path / "new.keras", architecture=new, written_by="keras==1.0.5")
    np.testing.assert_allclose(report.model.predict_on_batch(x), expected, atol=1e-5)


def test_modes_become_our_layer(tmp_path):
    model = sequential((5,), layer("BatchNormalization", "a", mode=1), layer("BatchNormalization", "b", mode=2))
    old = Keras1()
    old.predict(model, draw(5).astype("float64"))
    report = migrate(old.save(tmp_path / "old.h5", model))
    assert [(type(x), x.mode) for x in report.model.layers] == [(BatchNormalization, 1), (BatchNormalization, 2)]


# Training arguments


def test_penalties_constraints_and_initializers_carry_over(tmp_path):
    model = sequential(
        (5,),
        dense(
            "d",
            init="uniform",
            W_regularizer={"name": "WeightRegularizer", "l1": 0.0, "l2": 0.01},
            activity_regularizer={"name": "ActivityRegularizer", "l1": 0.5, "l2": 0.0},
            W_constraint={"name": "MaxNorm", "m": 3, "axis": 0},
            b_constraint={"name": "NonNeg"},
            trainable=False,
        ),
        layer("BatchNormalization", "bn", gamma_regularizer={"name": "L1L2Regularizer", "l1": 0.25, "l2": 0.0}),
    )
    old = Keras1()
    old.predict(model, draw(5).astype("float64"))
    made, norm = migrate(old.save(tmp_path / "old.h5", model)).model.layers
    assert made.kernel_regularizer.get_config() == {"l1": 0.0, "l2": pytest.approx(0.01)}
    assert made.activity_regularizer.get_config() == {"l1": 0.5, "l2": 0.0}
    assert isinstance(made.kernel_constraint, keras.constraints.MaxNorm)
    assert made.kernel_constraint.max_value == 3
    assert isinstance(made.bias_constraint, keras.constraints.NonNeg)
    assert (made.kernel_initializer.minval, made.kernel_initializer.maxval) == (-0.05, 0.05)
    assert made.trainable is False
    assert norm.gamma_regularizer.get_config()["l1"] == 0.25


def test_what_has_no_counterpart_is_said(tmp_path):
    model = sequential((5,), dense("d", init="my_init", W_regularizer={"name": "EigenvalueRegularizer", "k": 1}))
    old = Keras1()
    old.predict(model, draw(5).astype("float64"))
    (report,) = migrate(old.save(tmp_path / "old.h5", model)).layers
    assert [sentence.split(" has ")[0] for sentence in report.assumed] == [
        "initializer 'my_init'",
        "regularizer 'EigenvalueRegularizer'",
    ]
