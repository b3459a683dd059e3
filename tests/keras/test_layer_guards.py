"""Batches that would poison the moving statistics, or tell nothing of a variance, leave them bit for bit as they were."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import pytest

from evennorm.errors import ShapeError
from evennorm.keras import BatchNormalization
from tests.keras import textbook
from tests.keras.backend import array, state

C = 3


def good(seed: int = 0, shape: tuple[int, ...] = (8, 5, C)) -> np.ndarray:
    return np.random.default_rng(seed).normal(100.0, 2.0, shape).astype("float32")


def with_value(value: float) -> np.ndarray:
    x = good()
    x[3, 2, 1] = value
    return x


BAD: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
    "one NaN": (with_value(np.nan), {}),
    "one infinity": (with_value(np.inf), {}),
    "minus infinity": (with_value(-np.inf), {}),
    "all NaN": (np.full((8, 5, C), np.nan, "float32"), {}),
    "a square beyond float32": (with_value(3e38), {}),
    "no samples": (np.zeros((0, 5, C), "float32"), {}),
    "no steps": (np.zeros((8, 0, C), "float32"), {}),
    "everything masked": (good(), {"mask": np.zeros((8, 5), bool)}),
    "everything masked, and NaN": (np.full((8, 5, C), np.nan, "float32"), {"mask": np.zeros((8, 5), bool)}),
    "NaN where the mask does not hide it": (with_value(np.nan), {"mask": np.arange(8) < 6}),
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.5},
    "cumulative": {"momentum": None},
    "unbiased": {"momentum": 0.5, "unbiased_variance": True},
    "ghost batches": {"momentum": 0.5, "virtual_batch_size": 4},
    "without parameters": {"momentum": 0.5, "center": False, "scale": False},
}


@pytest.mark.filterwarnings("ignore:.* the variance of a channel is beyond the range:UserWarning")
@pytest.mark.parametrize("name", BAD)
def test_nothing_changes(name: str) -> None:
    x, call = BAD[name]
    for given in LAYERS.values():
        layer, spared = BatchNormalization(**given), BatchNormalization(**given)
        for each in (layer, spared):
            each(good(1), training=True)
        before = state(layer)
        y = layer(x, training=True, **call)
        assert tuple(y.shape) == x.shape
        for old, new in zip(before, state(layer), strict=True):
            np.testing.assert_array_equal(new, old)
        assert layer.skipped_batches == 1
        # What follows is what would have followed without it.
        for each in (layer, spared):
            each(good(2), training=True)
        for ours, theirs in zip(state(layer), state(spared), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert (layer.skipped_batches, spared.skipped_batches) == (1, 0)


def test_a_broken_batch_shows_in_the_output() -> None:
    """NaN is not hidden: the channel that holds it comes out as NaN, the others as ever."""
    y = array(BatchNormalization(activation="relu")(with_value(np.nan), training=True))
    assert np.isnan(y[..., 1]).all()
    assert np.isfinite(y[..., [0, 2]]).all()


def test_the_first_batch_may_be_bad() -> None:
    layer = BatchNormalization(momentum=0.5)
    layer(with_value(np.nan), training=True)
    np.testing.assert_array_equal(array(layer.moving_mean), np.zeros(C))
    np.testing.assert_array_equal(array(layer.moving_variance), np.ones(C))


def test_nothing_is_counted_before_and_outside_training() -> None:
    layer = BatchNormalization()
    assert layer.skipped_batches == 0
    layer(with_value(np.nan))
    layer.trainable = False
    layer(with_value(np.nan), training=True)
    assert layer.skipped_batches == 0


def test_half_precision_that_overflows() -> None:
    x = np.array([[6e4], [-6e4], [1e5]])  # the last is infinity in float16
    layer = BatchNormalization(dtype="mixed_float16")
    with np.errstate(over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        layer(x.astype("float16"), training=True)
    assert layer.skipped_batches == 1
    layer(x[:2].astype("float16"), training=True)  # its variance, 3.6e9, is beyond float16 and well within float32
    assert layer.skipped_batches == 1
    np.testing.assert_allclose(array(layer.moving_variance), 0.99 + 0.01 * x[:2].astype("float16").astype("float64").var())


def compiled_model(layer: BatchNormalization, jit: bool | str = "auto") -> keras.Model:
    model = keras.Sequential([keras.Input((C,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=jit)
    return model


def test_in_fit_on_every_engine() -> None:
    """Four batches, the second with a NaN: the loss breaks, as it must, and the moving statistics do not."""
    layer = BatchNormalization(momentum=0.5, center=False, scale=False)
    x = good(3, (32, C))
    x[9, 1] = np.nan
    compiled_model(layer).fit(x, np.zeros((32, 1)), batch_size=8, shuffle=False, verbose=0)
    mean, variance = np.zeros(C), np.ones(C)
    for batch in (x[:8], x[16:24], x[24:]):
        of_batch = textbook.train(batch)
        mean, variance = (mean + of_batch.mean) / 2, (variance + of_batch.variance) / 2
    assert layer.skipped_batches == 1
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, C), (1, 1, 1, C)])
@pytest.mark.parametrize("given", LAYERS.values(), ids=list(LAYERS))
def test_one_value_per_channel_warns_once(given: dict[str, Any], shape: tuple[int, ...]) -> None:
    given = given | ({"virtual_batch_size": 1} if "virtual_batch_size" in given else {})
    layer = BatchNormalization(**given, name="lonely")
    x = good(4, shape)
    with pytest.warns(UserWarning, match="lonely: training with one value per channel.*use larger batches") as said:
        layer(x, training=True)
    assert len(said) == 1
    layer(x, training=True)  # warnings are errors here
    np.testing.assert_array_equal(array(layer.moving_variance), np.ones(C))
    weight = 1.0 if given["momentum"] is None else 0.75  # two batches of momentum .5
    np.testing.assert_allclose(array(layer.moving_mean), weight * x.reshape(C).astype("float64"), rtol=1e-6)
    assert layer.skipped_batches == 0
    with pytest.warns(UserWarning, match="another: training with one value"):
        BatchNormalization(name="another")(x, training=True)


def test_one_value_per_channel_is_no_matter_at_inference() -> None:
    layer = BatchNormalization()
    layer(good(4, (1, C)))  # warnings are errors here
    layer.trainable = False
    layer(good(4, (1, C)), training=True)


def test_two_values_per_channel_are_enough() -> None:
    layer = BatchNormalization(momentum=0.5)
    x = good(4, (2, C))
    layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_variance), 0.5 + 0.5 * textbook.train(x).variance, rtol=1e-5)


def test_a_mask_that_leaves_one_value() -> None:
    """The mean follows it, the variance stands."""
    layer = BatchNormalization(momentum=0.5)
    x = good()
    mask = np.zeros((8, 5), bool)
    mask[2, 3] = True
    layer(x, training=True, mask=mask)
    np.testing.assert_allclose(array(layer.moving_mean), x[2, 3].astype("float64") / 2, rtol=1e-6)
    np.testing.assert_array_equal(array(layer.moving_variance), np.ones(C))


def test_fit_with_batches_of_one() -> None:
    layer = BatchNormalization(momentum=0.5)
    x = good(5, (4, C))
    with pytest.warns(UserWarning, match="one value per channel") as said:
        compiled_model(layer).fit(x, np.zeros((4, 1)), batch_size=1, shuffle=False, verbose=0)
    assert len([warning for warning in said if "one value per channel" in str(warning.message)]) == 1
    np.testing.assert_array_equal(array(layer.moving_variance), np.ones(C))
    expected = x.astype("float64").T @ [0.0625, 0.125, 0.25, 0.5]
    np.testing.assert_allclose(array(layer.moving_mean), expected, rtol=1e-6)


def test_ghost_batches_that_do_not_divide_the_batch() -> None:
    layer = BatchNormalization(virtual_batch_size=3)
    with pytest.raises(
        ShapeError, match="virtual_batch_size must divide the batch: received 8 samples and virtual_batch_size=3"
    ):
        layer(good(), training=True)
    np.testing.assert_array_equal(array(layer.moving_mean), np.zeros(C))
    layer(good())  # at inference no ghost batches are cut
    with pytest.raises(ShapeError, match="ghost batches divide the first axis, which axis=0"):
        BatchNormalization(axis=0, virtual_batch_size=2)(good(), training=True)


def test_residuals_that_do_not_fit() -> None:
    x = good()
    with pytest.raises(ShapeError, match=r"residual .*has its shape, \(8, 5, 3\); received shape \(8, 5, 1\)"):
        BatchNormalization()(x, training=True, residual=x[..., :1])
    with pytest.raises(ShapeError, match=r"received shape \(5, 3\)"):
        BatchNormalization()(x, residual=x[0])


@pytest.mark.parametrize("value", [3e38, 1e20])
def test_finite_values_whose_variance_is_beyond_float32_are_told_of_once(value: float) -> None:
    layer = BatchNormalization(momentum=0.5)
    with pytest.warns(UserWarning, match="variance of a channel is beyond the range of float32"):
        layer(with_value(value), training=True)
    layer(with_value(value), training=True)  # warnings are errors here
    assert layer.skipped_batches == 2
    layer = BatchNormalization()
    layer(with_value(np.inf), training=True)  # what is infinite shows by itself


def test_a_power_of_two_brings_values_back_into_range() -> None:
    x = with_value(1e20)
    y = array(BatchNormalization(epsilon=0.0)(np.ldexp(x, -70)[:, :, 1:2], training=True))
    np.testing.assert_allclose(y, textbook.train(x[:, :, 1:2], epsilon=0.0).y, rtol=0, atol=1e-5)
