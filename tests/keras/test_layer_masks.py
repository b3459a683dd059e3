"""Masks on any axis: what they hide acts on no statistic, wherever the channel stands and wherever the mask comes from."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from evennorm.errors import ShapeError
from evennorm.keras import BatchNormalization
from tests.keras import textbook
from tests.keras.backend import array, gradients, train

N, T, C = 6, 7, 4
RNG = np.random.default_rng(12)
POSITIONS = RNG.random((N, T)) < 0.6
ELEMENTS = RNG.random((N, T, C)) < 0.6
SAMPLES, STEPS = POSITIONS[:, 0], POSITIONS[0]
IMAGE = RNG.random((N, T, 3)) < 0.6

CASES: dict[str, tuple[tuple[int, ...], Any, np.ndarray, np.ndarray]] = {  # shape, axis, mask, mask that broadcasts
    "(N, T) for (N, T, C)": ((N, T, C), -1, POSITIONS, POSITIONS[:, :, None]),
    "(N, T) for (N, C, T)": ((N, C, T), 1, POSITIONS, POSITIONS[:, None, :]),
    "(N, T) for (N, C, T) with C == T": ((N, T, T), 1, POSITIONS, POSITIONS[:, None, :]),
    "(N, T) for (N, T, C) with C == T": ((N, T, T), 2, POSITIONS, POSITIONS[:, :, None]),
    "(N, T) for (N, T, C) with C == 1": ((N, T, 1), -1, POSITIONS, POSITIONS[:, :, None]),
    "(N,) for (N, T, C)": ((N, T, C), -1, SAMPLES, SAMPLES[:, None, None]),
    "(N,) for (N, C)": ((N, C), -1, SAMPLES, SAMPLES[:, None]),
    "(N, T, 1)": ((N, T, C), -1, POSITIONS[:, :, None], POSITIONS[:, :, None]),
    "(N, 1, T)": ((N, C, T), 1, POSITIONS[:, None, :], POSITIONS[:, None, :]),
    "(N, 1, 1)": ((N, T, C), -1, SAMPLES[:, None, None], SAMPLES[:, None, None]),
    "(1, T, 1)": ((N, T, C), -1, STEPS[None, :, None], STEPS[None, :, None]),
    "elements": ((N, T, C), -1, ELEMENTS, ELEMENTS),
    "(N, H, W) for (N, C, H, W)": ((N, C, T, 3), 1, IMAGE, IMAGE[:, None]),
    "two channel axes apart": ((N, C, T, 3), (1, 3), POSITIONS, POSITIONS[:, None, :, None]),
}


@pytest.mark.parametrize("name", CASES)
def test_statistics_of_what_counts(name: str) -> None:
    """NaN stands where the mask hides: in the output it stays, in the statistics it shows a leak."""
    shape, axis, mask, where = CASES[name]
    x = np.random.default_rng(13).normal(50.0, 2.0, shape)
    hidden = ~np.broadcast_to(where, shape)
    x = np.where(hidden, np.nan, x).astype("float32")
    layer = BatchNormalization(axis=axis, momentum=0.5)
    y = array(train(layer, x, mask=mask))
    expected = textbook.train(x, axis=axis, where=where)
    np.testing.assert_allclose(y[~hidden], expected.y[~hidden], rtol=0, atol=2e-6)
    assert np.isnan(y[hidden]).all()
    np.testing.assert_allclose(array(layer.moving_mean), 0.5 * expected.mean, rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), 0.5 + 0.5 * expected.variance, rtol=1e-5)
    assert layer.skipped_batches == 0


def test_masked_values_are_normalized_too() -> None:
    x = np.random.default_rng(14).normal(3.0, 2.0, (N, T, C)).astype("float32")
    y = array(train(BatchNormalization(), x, mask=POSITIONS))
    np.testing.assert_allclose(y, textbook.train(x, where=POSITIONS[:, :, None]).y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32"])
def test_any_dtype_says_true_by_not_being_zero(dtype: str) -> None:
    x = np.random.default_rng(14).normal(3.0, 2.0, (N, T, C)).astype("float32")
    y = array(train(BatchNormalization(), x, mask=(2 * POSITIONS).astype(dtype)))
    np.testing.assert_allclose(y, textbook.train(x, where=POSITIONS[:, :, None]).y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("axis", [1, 2])
def test_gradients(axis: int) -> None:
    """Masked positions get the gradient of a normalization by constants, and give none to the statistics."""
    rng = np.random.default_rng(15)
    x, dy = rng.normal(1e4, 1.0, (N, T, T)).astype("float32"), rng.normal(size=(N, T, T)).astype("float32")
    where = POSITIONS[:, :, None] if axis == 2 else POSITIONS[:, None, :]
    layer = BatchNormalization(axis=axis)
    layer.build(x.shape)
    expected = textbook.gradients(x, np.ones(T), dy, axis=axis, where=where)
    for received, wanted in zip(gradients(layer, x, dy, mask=POSITIONS), expected, strict=True):
        np.testing.assert_allclose(received, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"activation": "relu"}, {"activation": "gelu"}], ids=str)
def test_a_nan_behind_the_mask_acts_on_no_gradient(options: dict[str, Any]) -> None:
    """The loss is masked too: its derivative is 0 where the mask hides."""
    rng = np.random.default_rng(20)
    hidden = ~POSITIONS[:, :, None]
    x, dy = rng.normal(3.0, 2.0, (N, T, C)), np.where(hidden, 0.0, rng.normal(size=(N, T, C)))
    found = []
    for value in (1.0, np.nan, np.inf):
        layer = BatchNormalization(**options)
        layer.build(x.shape)
        given = np.where(hidden, value, x).astype("float32")
        found.append(gradients(layer, given, dy.astype("float32"), mask=POSITIONS))
    for other in found[1:]:
        for received, wanted in zip(other[1:], found[0][1:], strict=True):
            np.testing.assert_allclose(received, wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other[0][POSITIONS], found[0][0][POSITIONS], rtol=1e-5, atol=1e-6)
    assert np.abs(found[0][1]).max() > 0.1


def test_inference_looks_at_no_mask() -> None:
    x = np.random.default_rng(14).normal(size=(N, T, C)).astype("float32")
    layer = BatchNormalization()
    np.testing.assert_array_equal(array(layer(x, mask=POSITIONS)), array(layer(x)))


def test_keras_computes_the_same_where_it_can() -> None:
    """Keras adds 1e-7 to the count, so that the agreement ends there."""
    x = np.random.default_rng(16).normal(0.5, 2.0, (N, T, C)).astype("float32")
    ours, theirs = (train(layer, x, mask=POSITIONS) for layer in (BatchNormalization(), keras.layers.BatchNormalization()))
    np.testing.assert_allclose(array(ours), array(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("axis", "shape", "mask_shape"),
    [
        (-1, (N, T, C), (N, T + 1)),
        (1, (N, C, T), (N, 3)),
        (-1, (N, T, C), (T,)),
        (-1, (N, C), (N, T, C)),
        (-1, (N, T, C), (T, C)),  # NumPy would broadcast this one, and the next
        (1, (N, C, T), (T,)),
    ],
)
def test_masks_that_do_not_fit(axis: int, shape: tuple[int, ...], mask_shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"a mask holds one value per position.*received a mask of shape"):
        BatchNormalization(axis=axis)(np.ones(shape, "float32"), training=True, mask=np.ones(mask_shape, bool))


def sequences() -> np.ndarray:
    """Whole steps of zeros, for keras.layers.Masking to find."""
    x = np.random.default_rng(17).normal(5.0, 1.0, (N, T, C)).astype("float32")
    return np.where(POSITIONS[:, :, None], x, 0).astype("float32")


def trained(model: keras.Model, x: Any, y: np.ndarray) -> None:
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, y, batch_size=len(y), epochs=1, verbose=0)


def test_masks_come_from_a_masking_layer_and_go_on() -> None:
    x = sequences()
    layer, after = BatchNormalization(momentum=0.0), keras.layers.GlobalAveragePooling1D()
    model = keras.Sequential([keras.Input((None, C)), keras.layers.Masking(), layer, after])
    trained(model, x, np.zeros((N, C)))
    expected = textbook.train(x, where=POSITIONS[:, :, None])
    np.testing.assert_allclose(array(layer.moving_mean), expected.mean, rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), expected.variance, rtol=1e-5)
    # Pooling averages over what counts: it received the mask that the layer was given.
    y = textbook.infer(x, expected.mean, expected.variance)
    pooled = np.nan_to_num([sample[keep].mean(0) if keep.any() else 0 for sample, keep in zip(y, POSITIONS, strict=True)])
    np.testing.assert_allclose(model.predict(x, verbose=0), pooled, rtol=0, atol=1e-5)


def test_masks_come_from_an_embedding() -> None:
    tokens = np.array([[3, 1, 0, 0], [2, 2, 5, 0], [4, 0, 0, 0]])
    embedding, layer = keras.layers.Embedding(6, C, mask_zero=True), BatchNormalization(momentum=0.0)
    model = keras.Sequential([keras.Input((None,)), embedding, layer, keras.layers.GlobalAveragePooling1D()])
    trained(model, tokens, np.zeros((3, C)))
    x = array(embedding.embeddings)[tokens]
    expected = textbook.train(x, where=(tokens > 0)[:, :, None])
    np.testing.assert_allclose(array(layer.moving_mean), expected.mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(array(layer.moving_variance), expected.variance, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("how", ["call", "functional"])
def test_masks_and_a_residual(how: str) -> None:
    """Keras fills `mask` in for calls of one tensor only; the layer finds it beside a residual all the same."""
    x = sequences()
    r = np.random.default_rng(18).normal(size=(N, T, C)).astype("float32")
    layer = BatchNormalization(momentum=0.0)
    if how == "call":
        y = layer(keras.layers.Masking()(x), training=True, residual=r)
        expected = textbook.train(x, where=POSITIONS[:, :, None]).y + r
        np.testing.assert_allclose(array(y), expected, rtol=0, atol=2e-6)
    else:
        inputs, residual = keras.Input((None, C)), keras.Input((None, C))
        masked = keras.layers.Masking()(inputs)
        trained(keras.Model([inputs, residual], layer(masked, residual=residual)), [x, r], np.zeros((N, T, C)))
    np.testing.assert_allclose(array(layer.moving_mean), textbook.train(x, where=POSITIONS[:, :, None]).mean, rtol=1e-6)


def test_a_mask_given_beside_a_residual_counts_more_than_the_inputs_own() -> None:
    x = sequences()
    masked = keras.layers.Masking()(x)
    everything = np.ones((N, T), bool)
    layer = BatchNormalization(momentum=0.0)
    layer(masked, training=True, residual=np.zeros_like(x), mask=everything)
    np.testing.assert_allclose(array(layer.moving_mean), textbook.train(x).mean, rtol=1e-6)


def test_a_mask_over_the_channel_axis_warns_once() -> None:
    """What Masking makes of (N, C, T), (N, C), covers the channels: taken at its word, with one warning."""
    mask = np.ones((N, C), bool)
    mask[: N // 2, 1] = False
    x = np.random.default_rng(19).normal(size=(N, C, T)).astype("float32")
    layer = BatchNormalization(axis=1, momentum=0.0)
    text = r"mask of shape \(6, 4\) covers the channel axis of inputs \(6, 4, 7\) \(axis=1\)"
    with pytest.warns(UserWarning, match=text) as said:
        train(layer, x, mask=mask)
    assert len(said) == 1
    train(layer, x, mask=mask)  # warnings are errors here
    expected = textbook.train(x, axis=1, where=mask[:, :, None])
    np.testing.assert_allclose(array(layer.moving_mean), expected.mean, rtol=1e-6, atol=1e-7)
