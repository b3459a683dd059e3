"""Keras 1's initializers and regularizers, in each of the forms that its programs and files have them."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import keras
import numpy as np
import pytest

from evennorm.errors import ArgumentError
from evennorm.keras import BatchNormalization, legacy
from tests.keras.backend import array

N = 40_000
ROOT = sqrt(N)  # Keras 1's fan_in and fan_out of a vector


def beta_of(size: int = N, **given: Any) -> np.ndarray:
    layer = BatchNormalization(**given)
    layer.build((None, size))
    return array(layer.beta)


@pytest.mark.parametrize(("name", "value"), [("zero", 0.0), ("one", 1.0), ("zeros", 0.0), ("ones", 1.0)])
def test_constants(name: str, value: float) -> None:
    layer = legacy.BatchNormalization(beta_init=name, gamma_init=name)
    layer.build((None, 5))
    np.testing.assert_array_equal(array(layer.beta), np.full(5, value))
    np.testing.assert_array_equal(array(layer.gamma), np.full(5, value))


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("uniform", 0.05),
        ("lecun_uniform", sqrt(3 / ROOT)),
        ("glorot_uniform", sqrt(6 / (ROOT + ROOT))),
        ("he_uniform", sqrt(6 / ROOT)),
    ],
)
def test_uniform_distributions(name: str, limit: float) -> None:
    beta = beta_of(beta_init=name)
    assert 0.999 * limit < np.abs(beta).max() <= limit * (1 + 1e-6)
    assert beta.std() == pytest.approx(limit / sqrt(3), rel=0.02)
    assert beta.mean() == pytest.approx(0, abs=0.02 * limit)


@pytest.mark.parametrize(
    ("name", "std"), [("normal", 0.05), ("glorot_normal", sqrt(2 / (ROOT + ROOT))), ("he_normal", sqrt(2 / ROOT))]
)
def test_normal_distributions(name: str, std: float) -> None:
    beta = beta_of(beta_init=name)
    assert beta.std() == pytest.approx(std, rel=0.02)
    assert beta.mean() == pytest.approx(0, abs=0.03 * std)
    # Not truncated: a normal distribution has 0.27 % beyond three deviations.
    assert np.mean(np.abs(beta) > 3 * std) == pytest.approx(0.0027, rel=0.5)


def test_orthogonal_is_a_vector_of_length_one_point_one() -> None:
    assert np.linalg.norm(beta_of(50, beta_init="orthogonal")) == pytest.approx(1.1, rel=1e-6)


def test_random_names_follow_the_global_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        drawn.append(beta_of(20, beta_init="normal"))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).all()


@pytest.mark.parametrize("kind", ["beta", "gamma"])
def test_names_that_keras_1_had_not_or_refused(kind: str) -> None:
    with pytest.raises(ArgumentError, match=r"take one of glorot_normal, .*zeros, or a callable; received 'glorot'"):
        BatchNormalization(**{f"{kind}_init": "glorot"})
    with pytest.raises(ArgumentError, match="identity fills a square matrix"):
        BatchNormalization(**{f"{kind}_init": "identity"})


@pytest.mark.parametrize(
    "wrap", [np.asarray, keras.ops.convert_to_tensor, keras.Variable, list], ids=lambda wrap: wrap.__name__
)
def test_callables_of_shape_and_name(wrap: Callable[[Any], Any]) -> None:
    asked = []

    def counting(shape: tuple[int, ...], name: str | None = None) -> Any:
        asked.append((shape, name))
        return wrap(np.arange(shape[0], dtype="float32"))

    layer = BatchNormalization(beta_init=counting, gamma_init=counting)
    layer.build((None, 4))
    np.testing.assert_array_equal(array(layer.beta), np.arange(4))
    np.testing.assert_array_equal(array(layer.gamma), np.arange(4))
    assert sorted(asked) == [((4,), "beta"), ((4,), "gamma")]
    assert len(layer.weights) == 4


def test_a_callable_that_returns_another_shape() -> None:
    with pytest.raises(ArgumentError, match=r"beta_init was asked for an array of shape \(4,\); it returned one of \(5,\)"):
        beta_of(4, beta_init=lambda shape, name=None: np.zeros(shape[0] + 1))


@keras.saving.register_keras_serializable(package="tests")
def rising(shape: tuple[int, ...], name: str | None = None) -> np.ndarray:
    return np.arange(shape[0], dtype="float32")


def test_a_registered_callable_survives_saving() -> None:
    layer = BatchNormalization(beta_init=rising)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    again.build((None, 3))
    np.testing.assert_array_equal(array(again.beta), [0, 1, 2])


def test_objects_of_keras_3_are_taken_too() -> None:
    np.testing.assert_array_equal(beta_of(3, beta_init=keras.initializers.Constant(2.0)), [2, 2, 2])


@pytest.mark.parametrize("kind", ["beta", "gamma"])
@pytest.mark.parametrize("layer_class", [BatchNormalization, legacy.BatchNormalization])
def test_an_old_and_a_new_name_for_one_thing(layer_class: type, kind: str) -> None:
    """An error even where both say what the default says: the reader of the program cannot know which one counts."""
    for old, new in (("one", "zeros"), ("zero", "zeros"), ("one", "ones")):
        received = f"received {kind}_init='{old}' and {kind}_initializer='{new}'"
        with pytest.raises(ArgumentError, match=f"{kind}_init is Keras 1's name for {kind}_initializer .*{received}"):
            layer_class(**{f"{kind}_init": old, f"{kind}_initializer": new})


REGULARIZERS = {
    "l1": ("l1", 0.01, 0.0),
    "l2": ("l2", 0.0, 0.01),
    "l1l2": ("l1l2", 0.01, 0.01),
    "old dict": ({"name": "WeightRegularizer", "l1": 0.1, "l2": 0.2}, 0.1, 0.2),
    "old dict, l1 alone": ({"name": "L1L2Regularizer", "l1": 0.1}, 0.1, 0.0),
    "WeightRegularizer": (legacy.WeightRegularizer(l1=0.3, l2=0.4), 0.3, 0.4),
    "l1()": (legacy.l1(), 0.01, 0.0),
    "l2(0.5)": (legacy.l2(0.5), 0.0, 0.5),
    "l1l2(0.1, 0.2)": (legacy.l1l2(0.1, 0.2), 0.1, 0.2),
    "Keras 3's": (keras.regularizers.L1L2(0.1, 0.2), 0.1, 0.2),
}


@pytest.mark.parametrize("name", REGULARIZERS)
@pytest.mark.parametrize("layer_class", [BatchNormalization, legacy.BatchNormalization])
def test_regularizers(layer_class: type, name: str) -> None:
    given, l1, l2 = REGULARIZERS[name]
    layer = layer_class(gamma_regularizer=given, gamma_init=keras.initializers.Constant(-3.0))
    layer.build((None, 2))
    assert float(array(layer.losses[0])) == pytest.approx(l1 * 6 + l2 * 18)
    again = layer_class(beta_regularizer=keras.saving.deserialize_keras_object(layer.get_config()["gamma_regularizer"]))
    again.build((None, 2))
    again.beta.assign([1.0, -1.0])
    assert float(array(again.losses[0])) == pytest.approx(l1 * 2 + l2 * 2)


def test_old_dicts_with_unknown_keys() -> None:
    with pytest.raises(ArgumentError, match=r"has the keys name, l1 and l2; received \['l3'\]"):
        BatchNormalization(beta_regularizer={"name": "WeightRegularizer", "l3": 1.0})
    with pytest.raises(ValueError, match="l3"):
        BatchNormalization(beta_regularizer="l3")
