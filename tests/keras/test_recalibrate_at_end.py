"""The callback leaves the exact statistics of the data in the model that `fit` ends with."""

import keras
import numpy as np
import pytest
from keras import layers

from evennorm.errors import InputError
from evennorm.keras import BatchNormalization, Recalibrate
from tests.tools.populations import array, check

random = np.random.default_rng(0)
X = (random.normal(size=(60, 4)) * [1, 5, 0.1, 2] + [0, 30, -2, 1]).astype("float32")
Y = random.normal(size=(60, 1)).astype("float32")


def compiled(norm=BatchNormalization):
    norms = [norm(name="first"), layers.Dense(5), norm(name="second"), layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *norms])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def check_all(model, x):
    for name in ("first", "second"):
        check(model.get_layer(name), array(keras.Model(model.inputs[0], model.get_layer(name).input)(x, training=False)))


def fitted(model, *callbacks, x=X, epochs=2, **options):
    return model.fit(x, Y, batch_size=16, epochs=epochs, verbose=0, callbacks=list(callbacks), **options)


@pytest.mark.parametrize("norm", [layers.BatchNormalization, BatchNormalization])
def test_fit_ends_with_the_statistics_of_the_data_and_goes_on_from_them(norm) -> None:
    model, at_end = compiled(norm), Recalibrate((X, Y), batch_size=25)
    fitted(model, at_end)
    check_all(model, X)
    assert [layer.name for layer in at_end.report.layers] == ["first", "second"]
    assert at_end.report.samples == 60
    before = [array(weight).copy() for weight in model.weights]
    fitted(model, at_end, epochs=3, initial_epoch=2)  # a training that is resumed
    check_all(model, X)
    assert not np.array_equal(before[-1], array(model.weights[-1]))


def test_best_weights_get_their_own_statistics() -> None:
    """Those of the last epoch are others."""
    model = compiled()
    keep = keras.callbacks.EarlyStopping("loss", mode="max", patience=9, restore_best_weights=True)  # the first epoch
    kernels = []
    kernel = model.layers[1].kernel
    see = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: kernels.append(array(kernel).copy()))
    fitted(model, see, keep, Recalibrate(X), epochs=3)
    assert keep.best_epoch == 0
    np.testing.assert_array_equal(array(kernel), kernels[0])
    check_all(model, X)


def test_values_that_are_not_finite_leave_what_was_trained() -> None:
    broken = X.copy()
    broken[50, 2] = np.nan
    model, at_end = compiled(), Recalibrate(broken, batch_size=25)
    trained = []
    see = keras.callbacks.LambdaCallback(on_train_end=lambda logs: trained.extend(array(w).copy() for w in model.weights))
    with pytest.warns(RuntimeWarning, match="was not recalibrated.*batch 3 reaches 'first' with values that are not finite"):
        history = fitted(model, see, at_end)
    assert len(history.history["loss"]) == 2
    assert at_end.report is None
    for was, weight in zip(trained, model.weights, strict=True):
        np.testing.assert_array_equal(array(weight), was)


def test_wrong_data_are_told_before_training() -> None:
    with pytest.raises(InputError, match=r"there is no nothing\.npz"):
        Recalibrate("nothing.npz")
    with pytest.raises(InputError, match="takes samples of shape 4; received 3"):
        fitted(compiled(), Recalibrate(X[:, :3]))
