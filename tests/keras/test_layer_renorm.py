"""Batch renormalization, held against Keras's layer and the paper's formulas (Ioffe 2017, arXiv 1702.03275)."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization
from tests.keras.backend import array, gradients, state, train

CLIPPINGS = [None, {"rmax": 1.2, "rmin": 0.9, "dmax": 0.1}, {"rmax": 1.1}, {"rmin": 1.5}, {"dmax": 0.0}]


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_several_steps_as_keras_takes_them(clipping: dict[str, float] | None) -> None:
    given = {"renorm": True, "renorm_clipping": clipping, "renorm_momentum": 0.7, "momentum": 0.8, "epsilon": 1e-2}
    ours, theirs = BatchNormalization(**given), keras.layers.BatchNormalization(**given)
    rng = np.random.default_rng(6)
    for step in range(6):
        x = rng.normal(1.0 + 0.2 * step, 2.0, (20, 3, 4)).astype("float32")
        np.testing.assert_allclose(array(train(ours, x)), array(train(theirs, x)), rtol=1e-5, atol=3e-6)
        assert [w.name for w in ours.weights] == [w.name for w in theirs.weights]
        for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(array(ours(x)), array(theirs(x)), rtol=1e-5, atol=3e-6)


def test_gradients_as_keras_takes_them() -> None:
    rng = np.random.default_rng(7)
    x, dy = (rng.normal(size=(20, 4)).astype("float32") for _ in range(2))
    ours, theirs = BatchNormalization(renorm=True), keras.layers.BatchNormalization(renorm=True)
    for layer in (ours, theirs):
        layer.build(x.shape)
        layer.renorm_mean.assign(np.full(4, 0.3))
        layer.renorm_stddev.assign(np.full(4, 1.7))
    for mine, other in zip(gradients(ours, x, dy), gradients(theirs, x, dy), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_formula_at_a_large_mean() -> None:
    """(xhat * r + d) * gamma + beta in float64, where Keras's own layer is off by thousands of units."""
    x = np.random.default_rng(8).normal(1e4, 2.0, (200, 3)).astype("float32")
    layer = BatchNormalization(renorm=True, renorm_clipping={"dmax": 5.0, "rmax": 3.0})
    layer.build(x.shape)
    layer.renorm_mean.assign(np.full(3, 9999.0))
    layer.gamma.assign(np.full(3, 1.5))
    wide = x.astype("float64")
    deviation = np.sqrt(wide.var(0) + 1e-3)
    r, d = np.clip(deviation / 1.0, 0, 3.0), np.clip((wide.mean(0) - 9999.0) / 1.0, -5.0, 5.0)
    expected = ((wide - wide.mean(0)) / deviation * r + d) * 1.5
    np.testing.assert_allclose(array(layer(x, training=True)), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*one value per channel")
@pytest.mark.parametrize("bad", [np.full((4, 3), np.nan), np.zeros((0, 3)), np.full((4, 3), np.inf)])
def test_a_bad_first_batch_changes_nothing(bad: np.ndarray) -> None:
    layer = BatchNormalization(renorm=True)
    layer.build((None, 3))
    before = state(layer)
    layer(bad.astype("float32"), training=True)
    for old, new in zip(before, state(layer), strict=True):
        np.testing.assert_array_equal(old, new)
    assert layer.skipped_batches == 1


@pytest.mark.filterwarnings("ignore:.*one value per channel")
def test_one_value_per_channel_leaves_every_deviation_alone() -> None:
    layer = BatchNormalization(renorm=True, momentum=0.5, renorm_momentum=0.5)
    x = np.array([[2.0, -4.0]], "float32")
    layer.build(x.shape)
    before = dict(zip([w.name for w in layer.weights], state(layer), strict=True))
    layer(x, training=True)
    after = dict(zip([w.name for w in layer.weights], state(layer), strict=True))
    for name in ("moving_variance", "moving_stddev", "renorm_stddev"):
        np.testing.assert_array_equal(after[name], before[name])
    for name in ("moving_mean", "renorm_mean"):
        np.testing.assert_array_equal(after[name], [1.0, -2.0])
