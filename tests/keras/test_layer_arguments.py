"""Every argument of Keras 3's layer: its name, place, default, meaning, and its way through a config and back."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import keras
import numpy as np
import pytest

from evennorm.errors import ArgumentError, ShapeError
from evennorm.keras import BatchNormalization
from evennorm.kernels import choose
from tests.keras import textbook
from tests.keras.backend import BACKEND, array

EVERYTHING = {
    "axis": 1,
    "momentum": 0.7,
    "epsilon": 1e-2,
    "center": True,
    "scale": True,
    "beta_initializer": keras.initializers.RandomNormal(seed=1),
    "gamma_initializer": keras.initializers.Constant(2.0),
    "moving_mean_initializer": "ones",
    "moving_variance_initializer": keras.initializers.Constant(3.0),
    "beta_regularizer": keras.regularizers.L1(0.1),
    "gamma_regularizer": keras.regularizers.L2(0.2),
    "beta_constraint": keras.constraints.NonNeg(),
    "gamma_constraint": keras.constraints.MaxNorm(2.0),
    "renorm": True,
    "renorm_clipping": {"rmax": 3.0, "rmin": 0.3, "dmax": 5.0},
    "renorm_momentum": 0.8,
    "name": "normalize",
    "trainable": False,
    "dtype": "mixed_bfloat16",
}


def test_signature_begins_with_keras_3s() -> None:
    def described(layer: type) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(layer.__init__).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert described(BatchNormalization) == described(keras.layers.BatchNormalization)


@pytest.mark.parametrize(
    "given", [{"name": "b"}, EVERYTHING, {"name": "b", "center": False}, {"name": "b", "scale": False, "renorm": True}]
)
def test_weights_and_config_are_keras_3s(given: dict[str, Any]) -> None:
    ours, theirs = BatchNormalization(**given), keras.layers.BatchNormalization(**given)
    for layer in (ours, theirs):
        layer.build((None, 3, 3))
    for attribute in ("weights", "trainable_weights", "non_trainable_weights"):
        described = [[(w.name, w.path, w.shape, w.dtype) for w in getattr(x, attribute)] for x in (ours, theirs)]
        assert described[0] == described[1]
    assert ours.get_config() == theirs.get_config()
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert ours.count_params() == theirs.count_params()


def test_configs_of_each_are_read_by_the_other() -> None:
    config = keras.layers.BatchNormalization(**EVERYTHING).get_config()
    assert BatchNormalization.from_config(config).get_config() == config
    assert keras.layers.BatchNormalization.from_config(BatchNormalization(**EVERYTHING).get_config()).get_config() == config


@pytest.mark.parametrize(
    "given",
    [
        EVERYTHING,
        {"axis": (1, -1), "momentum": None, "unbiased_variance": True, "activation": "gelu", "virtual_batch_size": 4},
        {"activation": keras.layers.LeakyReLU(0.3)},
        {"mode": 2},
        {"mode": 1, "beta_init": "normal", "gamma_init": "uniform", "gamma_regularizer": "l1l2"},
    ],
)
def test_config_round_trip_through_json(given: dict[str, Any]) -> None:
    layer = BatchNormalization(**given)
    text = json.dumps(keras.saving.serialize_keras_object(layer))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is BatchNormalization
    assert again.get_config() == layer.get_config()
    for key in set(given) - {"activation"} - set(EVERYTHING) - {"beta_init", "gamma_init"}:
        assert getattr(again, key) == given[key]


def test_the_callers_objects_stay_as_they_were() -> None:
    clipping = {"rmax": 3.0}
    config = BatchNormalization(renorm=True, renorm_clipping=clipping, virtual_batch_size=None).get_config()
    before = json.dumps(config, sort_keys=True)
    BatchNormalization.from_config(config)
    assert json.dumps(config, sort_keys=True) == before
    assert clipping == {"rmax": 3.0}


def test_regularizers_add_their_losses() -> None:
    layer = BatchNormalization(
        beta_initializer=keras.initializers.Constant(-3.0),
        gamma_initializer=keras.initializers.Constant(2.0),
        beta_regularizer=keras.regularizers.L1(0.1),
        gamma_regularizer="l2",
    )
    layer(np.ones((2, 4), "float32"))
    assert sorted(float(array(loss)) for loss in layer.losses) == pytest.approx([0.01 * 4 * 4, 0.1 * 3 * 4])


def test_constraints_hold_after_a_step() -> None:
    layer = BatchNormalization(beta_constraint="non_neg", gamma_constraint=keras.constraints.MaxNorm(0.5, axis=0))
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    model.fit(x, np.full_like(x, -2.0), epochs=1, verbose=0)
    np.testing.assert_array_equal(array(layer.beta), np.zeros(4))
    assert np.linalg.norm(array(layer.gamma)) == pytest.approx(0.5, rel=1e-5)


def test_initializers() -> None:
    layer = BatchNormalization(
        beta_initializer=keras.initializers.RandomUniform(3, 4, seed=5),
        gamma_initializer="ones",
        moving_mean_initializer=keras.initializers.Constant(7.0),
        moving_variance_initializer=keras.initializers.Constant(9.0),
    )
    x = np.array([[1.0, 10.0]], "float32")
    y = layer(x)
    beta = keras.initializers.RandomUniform(3, 4, seed=5)((2,))
    np.testing.assert_array_equal(array(layer.beta), array(beta))
    np.testing.assert_allclose(array(y), textbook.infer(x, 7.0, 9.0, 1.0, array(beta)), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"momentum": 1.5}, "momentum is the weight of the old average, from 0 to 1 .*received momentum=1.5"),
        ({"momentum": -0.1}, "received momentum=-0.1"),
        ({"momentum": float("nan")}, "received momentum=nan"),
        ({"epsilon": -1e-3}, "epsilon is a small number added to the variance, 0 or more; received epsilon=-0.001"),
        ({"epsilon": float("nan")}, "received epsilon=nan"),
        ({"renorm": True, "renorm_momentum": 2.0}, "renorm_momentum is .*received renorm_momentum=2.0"),
        ({"renorm": True, "renorm_momentum": None}, "renorm_momentum is .*received renorm_momentum=None"),
        ({"renorm": True, "renorm_clipping": {"rtop": 1}}, "invalid keys for `renorm_clipping` argument: {'rtop': 1}"),
        ({"renorm": True, "renorm_clipping": {"rmax": 1, "rmin": 2}}, "Received: rmax=1, rmin=2"),
        ({"renorm": True, "renorm_clipping": {"dmax": -1}}, "dmax should be non-negative .*Received: dmax=-1"),
        ({"mode": 3}, "mode is 0 .*received mode=3"),
        ({"mode": "1"}, "received mode='1'"),
        ({"virtual_batch_size": 0}, "1 or more; received virtual_batch_size=0"),
        ({"virtual_batch_size": 2.5}, "1 or more; received virtual_batch_size=2.5"),
        ({"virtual_batch_size": True}, "1 or more; received virtual_batch_size=True"),
        ({"mode": 1, "renorm": True}, "mode and renorm cannot be combined"),
        ({"mode": 2, "virtual_batch_size": 4}, "mode and virtual_batch_size cannot be combined"),
        ({"mode": 2, "renorm": True, "virtual_batch_size": 4}, "mode and renorm and virtual_batch_size cannot"),
        ({"renorm": True, "virtual_batch_size": 4}, "renorm and virtual_batch_size cannot be combined"),
    ],
)
def test_values_outside_their_range(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text) as caught:
        BatchNormalization(**given)
    assert "\n" not in str(caught.value)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ValueError, match="momentun"):
        BatchNormalization(momentun=0.9)


def test_synchronized_is_for_every_backend() -> None:
    assert BatchNormalization(synchronized=True).get_config()["synchronized"] is True
    assert "synchronized" in keras.layers.BatchNormalization().get_config()


COMPLEX = (
    "batch normalization is of real numbers, since a complex variance can mean several things; {} is of dtype complex64"
)


@pytest.mark.parametrize("call", [{"training": True}, {"training": False}])
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_complex_inputs_are_refused(mode: int, call: dict) -> None:
    x = keras.ops.convert_to_tensor(np.ones((4, 3), "complex64"))
    with pytest.raises(ArgumentError, match=re.escape(COMPLEX.format("inputs"))):
        BatchNormalization(mode=mode)(x, **call)
    with pytest.raises(ArgumentError, match=re.escape(COMPLEX.format("residual"))):
        BatchNormalization(mode=mode)(np.ones((4, 3), "float32"), residual=x, **call)


def test_complex_models_are_refused_before_they_run() -> None:
    with pytest.raises(ArgumentError, match=re.escape(COMPLEX.format("inputs"))):
        BatchNormalization()(keras.Input((3,), dtype="complex64"))
    with pytest.raises(ArgumentError, match=re.escape(COMPLEX.format("dtype"))):
        BatchNormalization(dtype="complex64")


@pytest.mark.parametrize(
    ("axis", "shape", "text"),
    [
        (3, (None, 8, 4), r"axis 3 was asked of a shape of rank 3, \(\?, 8, 4\); valid axes are -3 to 2"),
        (-4, (None, 8, 4), "axis -4 was asked"),
        ((1, -2), (None, 8, 4), "each axis may be named once"),
        ((), (None, 8, 4), "at least one channel axis is needed"),
        (1, (None, None, 4), "the channel axis needs a known size.*axis 1 of shape"),
        (-1, (), "received the empty shape"),
    ],
)
def test_axes_that_cannot_be(axis: Any, shape: tuple[int | None, ...], text: str) -> None:
    layer = BatchNormalization(axis=axis)
    with pytest.raises(ShapeError, match=text):
        layer.build(shape)
    with pytest.raises(ShapeError, match=text):
        BatchNormalization(axis=axis).compute_output_shape(shape)


def test_a_built_layer_refuses_another_rank_or_channel() -> None:
    layer = BatchNormalization(axis=1)
    layer(np.ones((2, 3, 4), "float32"))
    with pytest.raises(ValueError, match="expected ndim=3, found ndim=2"):
        layer(np.ones((2, 3), "float32"))
    with pytest.raises(ValueError, match="expected axis 1 of input shape to have value 3"):
        layer(np.ones((2, 4, 3), "float32"))
    assert tuple(layer(np.ones((5, 3, 9), "float32")).shape) == (5, 3, 9)


def test_output_shape() -> None:
    assert BatchNormalization(axis=1).compute_output_shape((None, 3, None)) == (None, 3, None)
    symbolic = BatchNormalization(dtype="mixed_float16")(keras.Input((None, 3)))
    assert (symbolic.shape, symbolic.dtype) == ((None, None, 3), "float16")


def test_repr_names_kernel_and_engine() -> None:
    layer = BatchNormalization(axis=1, name="here")
    training, inference = (choose(BACKEND, "float32", training=training) for training in (True, False))
    kernel = training if training == inference else f"{training}, at inference {inference}"
    assert repr(layer) == f"<BatchNormalization name=here, axis=1, built=False, kernel={kernel} on {BACKEND}>"
    layer.build((None, 3, 5, 5))
    assert repr(layer) == f"<BatchNormalization name=here, axis=1, built=True, kernel={kernel} on {BACKEND}>"
