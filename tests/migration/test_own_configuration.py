"""A file's own configuration against an architecture that is given for it; what is asked, and said once."""

from __future__ import annotations

import json

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from evennorm.errors import InputError
from evennorm.tools.migrate import migrate
from tests.migration.building import functional, layer, sequential
from tests.migration.keras1 import Keras1
from tests.migration.test_refusals import add_foreign, command, dense, draw, written

NORM = {"mode": 2, "epsilon": 1e-5}


def with_norm(**norm):
    conv = layer("Convolution2D", "conv", nb_filter=4, nb_row=3, nb_col=3, border_mode="same", activation="relu")
    return sequential((6, 6, 3), conv, layer("BatchNormalization", "bn", **norm), layer("Flatten", "flat"), dense("out", 2))


def changed(model, name, **settings):
    model = json.loads(json.dumps(model))
    entry = next(x for x in model["config"] if x["config"]["name"] == name)
    entry["config"] |= settings
    return model


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("bn", {"mode": 0}, "bn: mode 2 in the file, 0 in the architecture"),
        ("bn", {"epsilon": 1e-3}, "bn: epsilon 1e-05 in the file, 0.001 in the architecture"),
        ("bn", {"axis": -2}, "bn: axis -1 in the file, -2 in the architecture"),
        ("conv", {"subsample": [2, 2]}, "conv: strides 1 in the file, 2 in the architecture"),
        ("conv", {"border_mode": "valid"}, "conv: padding same in the file, valid in the architecture"),
        ("conv", {"activation": "tanh"}, "conv: activation relu in the file, tanh in the architecture"),
        ("conv", {"dim_ordering": "th"}, "conv: data_format channels_last in the file, channels_first"),
    ],
)
@pytest.mark.parametrize("renamed", [False, True], ids=["by name", "by order"])
def test_an_architecture_that_says_otherwise_is_refused(name, settings, said, renamed, tmp_path):
    model = with_norm(**NORM)
    path = written(tmp_path, model, (6, 6, 3))
    given = changed(model, name, **settings)
    if renamed:
        for entry in given["config"]:
            entry["config"]["name"] += "_x"
        said = said.replace(f"{name}:", f"{name}_x:")
    with pytest.raises(InputError, match="has a configuration of its own, and the architecture says otherwise") as error:
        migrate(path, architecture=given)
    assert said in str(error.value)
    assert str(error.value).count(" in the file, ") == 1


def test_one_that_says_the_same_is_taken(tmp_path):
    model = with_norm(**NORM)
    path = written(tmp_path, model, (6, 6, 3))
    x = draw(6, 6, 3).astype("float32")
    plain = migrate(path).model.predict_on_batch(x)
    for architecture in (model, model["config"], {"name": "sequential_1", "layers": model["config"]}):
        report = migrate(path, architecture=architecture)
        np.testing.assert_array_equal(report.model.predict_on_batch(x), plain)
        assert report.from_architecture == ()


def test_a_model_in_keras_3_is_compared_too(tmp_path):
    model = with_norm(epsilon=1e-5, momentum=0.9)
    path = written(tmp_path, model, (6, 6, 3))

    def own(epsilon):
        return keras.Sequential(
            [
                keras.Input((6, 6, 3)),
                layers.Conv2D(4, 3, padding="same", activation="relu", name="conv"),
                layers.BatchNormalization(axis=3, epsilon=epsilon, name="bn"),
                layers.Flatten(name="flat"),
                layers.Dense(2, name="out"),
            ]
        )

    with pytest.raises(InputError, match=r"\(bn: epsilon 1e-05 in the file, 0.001 in the architecture\)"):
        migrate(path, architecture=own(1e-3))
    report = migrate(path, architecture=own(1e-5))
    assert report.from_architecture == (
        "the architecture counts where the file says otherwise: bn: momentum 0.9 in the file, 0.99 in the architecture",
    )
    x = draw(6, 6, 3).astype("float32")
    np.testing.assert_allclose(report.model.predict_on_batch(x), migrate(path).model.predict_on_batch(x), atol=1e-5)


def test_weights_alone_say_what_the_architecture_decided(tmp_path):
    model = with_norm(**NORM)
    report = migrate(written(tmp_path, model, (6, 6, 3), whole=False), architecture=model, written_by="keras==1.2.2")
    (said,) = report.from_architecture
    assert "holds weights alone" in said
    assert "epsilon 1e-05, axis -1, mode 2 of 1 batch normalization)" in said


def test_what_get_config_returned_is_read(tmp_path):
    inputs = functional({"a": (5,)}, [(dense("d"), "a"), (dense("e", 2), "d")], ["e"])
    path = written(tmp_path, inputs, (5,), whole=False)
    (tmp_path / "config.json").write_text(json.dumps(inputs["config"]))
    assert migrate(path, architecture=tmp_path / "config.json").model.output_shape == (None, 2)


@pytest.mark.parametrize("backend", ["theano", "tensorflow"])
def test_one_weight_without_a_name_hides_no_backend(backend, tmp_path):
    model = with_norm()
    old = Keras1(backend)
    old.predict(model, draw(6, 6, 3))
    path = old.save(tmp_path / "w.h5", model, whole=False)
    with h5py.File(path, "r+") as file:
        names = list(file["out"].attrs["weight_names"])
        file["out"].move(names[1], "param_0")
        file["out"].attrs["weight_names"] = [names[0], "param_0"]
    assert migrate(path, architecture=model, written_by="keras==1.2.2").written_by == f"Keras 1.2.2 on {backend}"


@pytest.mark.parametrize("first", ["conv", "bn"])
def test_one_refusal_asks_for_all_that_is_missing(first, tmp_path):
    conv = layer("Convolution2D", "conv", nb_filter=3, nb_row=3, nb_col=3)
    norm = layer("BatchNormalization", "bn", epsilon=1e-3, momentum=0.5)
    del norm["config"]["gamma_regularizer"], norm["config"]["beta_regularizer"]
    model = sequential((6, 6, 3), *((conv, norm) if first == "conv" else (norm, conv)))
    old = Keras1("theano", "1.0.4")
    old.predict(model, draw(6, 6, 3))
    path = old.save(tmp_path / "w.h5", model, whole=False, named=False)
    with pytest.raises(InputError) as error:
        migrate(path, architecture=model)
    text = str(error.value)
    assert "nothing in the file tells whether 'conv' comes from there" in text
    assert "the fourth weight of 'bn' may be" in text
    assert text.endswith("say both, as in --written-by keras==1.0.4,theano")
    assert migrate(path, architecture=model, written_by="keras==1.0.4,theano").parameters > 0


def test_a_class_is_named_once(tmp_path):
    path = written(tmp_path, sequential((5,), dense("d")), (5,))
    for k in range(12):
        add_foreign(path, "LRN2D", f"odd_{k}")
    with pytest.raises(InputError) as error:
        migrate(path)
    assert str(error.value).count("LRN2D") == 1
    assert "'odd_11', 'odd_10', 'odd_9' and 9 more are of class LRN2D" in str(error.value)


def test_partial_that_leaves_nothing_is_an_error(tmp_path):
    path = written(tmp_path, sequential((5,), dense("first"), dense("second")), (5,))
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace('"Dense"', '"Mystery"', 1).encode()
    result = command(path, "-o", tmp_path / "new.keras", "--partial")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "nothing of 'sequential_1' can be exported" in result.output
    assert not (tmp_path / "new.keras").exists()


OWN = """
import keras

class Scale(keras.layers.Layer):
    def __init__(self, output_dim, **kwargs):
        super().__init__(**kwargs)
        self.output_dim = output_dim

    def build(self, shape):
        self.factor = self.add_weight(shape=(self.output_dim,), name="factor")

    def call(self, x):
        return x * self.factor

function = len
"""


@pytest.fixture
def of_the_user(tmp_path, monkeypatch):
    """A file with a layer of a class that only its author knows, and its weights."""
    (tmp_path / "own_layers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = written(tmp_path, sequential((5,), dense("first"), dense("last", 2)), (5,))
    add_foreign(path, "Scale", "mine", output_dim=4)
    with h5py.File(path, "r+") as file:
        root = file["model_weights"]
        root.attrs["layer_names"] = [b"first", b"mine", b"last"]
        group = root.create_group("mine")
        group["mine_factor:0"] = np.arange(4, dtype="float32")
        group.attrs["weight_names"] = [b"mine_factor:0"]
    return path


def test_layers_of_the_user(of_the_user, tmp_path):
    result = command(of_the_user, "-o", tmp_path / "new.keras", "--custom", "own_layers:Scale", "--json")
    assert result.exit_code == 0, result.output
    from own_layers import Scale

    new = keras.saving.load_model(tmp_path / "new.keras", custom_objects={"Scale": Scale})
    assert [type(x).__name__ for x in new.layers] == ["Dense", "Scale", "Dense"]
    np.testing.assert_array_equal(new.get_layer("mine").get_weights()[0], np.arange(4))


@pytest.mark.parametrize(
    ("custom", "match"),
    [
        ("own_layers", "--custom takes module:Class, as in my_layers:LRN2D; received 'own_layers'"),
        ("own_layers:Missing", "own_layers has no 'Missing'"),
        ("own_layers:function", "--custom names classes of Keras layers"),
        ("no_such_module:Scale", "no module 'no_such_module' can be imported"),
    ],
)
def test_what_is_no_layer_of_the_user(custom, match, of_the_user):
    with pytest.raises(InputError, match=match):
        migrate(of_the_user, custom=[custom])
