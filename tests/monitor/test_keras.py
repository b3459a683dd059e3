"""`evennorm.keras.StatisticsMonitor`: what it logs during fit, against the batches themselves in float64."""

from __future__ import annotations

import csv
from pathlib import Path

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization, StatisticsMonitor
from tests.events import events


def data() -> np.ndarray:
    return np.random.default_rng(0).normal(3, 2, (24, 4)).astype("float32")


def model_of(layer: keras.Layer, **options: object) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.0), "mse", **options)
    return model


@pytest.mark.parametrize("kind", [keras.layers.BatchNormalization, BatchNormalization])
def test_the_numbers_are_those_of_float64(kind: type[keras.Layer]) -> None:
    model, seen, x = model_of(kind(momentum=0.9, name="bn")), [], data()
    see = StatisticsMonitor(lambda *found: seen.append(found), every=2)
    model.fit(x, np.zeros(24), batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[see])
    assert [(step, layer) for step, layer, _ in seen] == [(1, "bn"), (2, "bn"), (4, "bn"), (6, "bn")]
    mean, variance = np.zeros(4), np.ones(4)
    by_step = {step: found for step, _, found in seen}
    for step in range(1, 7):
        batch = x[8 * ((step - 1) % 3) :][:8].astype("float64")
        if step in by_step:
            found, off = by_step[step], (batch.mean(0) - mean) / np.sqrt(variance + 1e-3)
            assert found["batch_mean_max"] == pytest.approx(batch.mean(0).max(), rel=1e-4)
            assert found["batch_variance_min"] == pytest.approx(batch.var(0).min(), rel=1e-3)
            assert found["drift"] == pytest.approx(np.sqrt((off**2).mean()), rel=1e-3)
        mean, variance = 0.9 * mean + 0.1 * batch.mean(0), 0.9 * variance + 0.1 * batch.var(0)
        if step in by_step:
            assert by_step[step]["moving_mean_median"] == pytest.approx(np.median(mean), rel=1e-4)


def test_skipped_batches() -> None:
    model, seen = model_of(BatchNormalization(name="bn")), []
    x = data()
    x[0] = np.nan
    see = StatisticsMonitor(lambda step, layer, found: seen.append(found["skipped_batches"]), every=1)
    model.fit(x, np.zeros(24), batch_size=8, shuffle=False, verbose=0, callbacks=[see])
    assert seen == [1, 1, 1]


def test_steps_that_run_together(tmp_path: Path) -> None:
    model = model_of(BatchNormalization(name="bn"), steps_per_execution=3)
    model.fit(data(), np.zeros(24), batch_size=4, verbose=0, callbacks=[StatisticsMonitor(tmp_path / "log.csv", every=3)])
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6"]
    assert all(0 < float(row["batch_variance_median"]) < 20 for row in rows)


def test_the_last_execution_of_an_epoch_is_a_shorter_one() -> None:
    model, seen, x = model_of(BatchNormalization(name="bn"), steps_per_execution=4), [], data()
    see = StatisticsMonitor(lambda step, layer, found: seen.append((step, found["batch_mean_max"])), every=1)
    model.fit(x, np.zeros(24), batch_size=5, epochs=2, shuffle=False, verbose=0, callbacks=[see])
    assert [step for step, _ in seen] == [4, 5, 9, 10]
    for step, found in seen:
        if step % 5 == 0:  # an execution of one step
            assert found == pytest.approx(x[20:].astype("float64").mean(0).max(), rel=1e-4)


def test_two_trainings_are_one_log(tmp_path: Path) -> None:
    model, see = model_of(BatchNormalization(name="bn")), StatisticsMonitor(tmp_path / "runs", every=2)
    for _ in range(2):
        model.fit(data(), np.zeros(24), batch_size=8, verbose=0, callbacks=[see])
    found = events(tmp_path / "runs")
    assert {step for _, step in found} == {1, 2, 4, 6}
    assert found["bn/moving_mean_max", 6] == pytest.approx(float(np.max(model.layers[0].moving_mean)))


def test_no_step_is_waited_for() -> None:
    """For a callback with a method of its own at the end of a batch, Keras reads the loss of every step."""
    assert StatisticsMonitor.on_train_batch_end is keras.callbacks.Callback.on_train_batch_end
    assert StatisticsMonitor.on_batch_end is keras.callbacks.Callback.on_batch_end


def test_a_training_that_fails_leaves_no_step_to_the_next_one() -> None:
    class Failing(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            raise InterruptedError

    model, seen = model_of(BatchNormalization(name="bn")), []
    see = StatisticsMonitor(lambda step, layer, found: seen.append((step, "batch_mean_max" in found)), every=1)
    with pytest.raises(InterruptedError):
        model.fit(data(), np.zeros(24), batch_size=8, verbose=0, callbacks=[see, Failing()])
    model.fit(data(), np.zeros(24), batch_size=8, verbose=0, callbacks=[see])
    assert seen == [(1, True), (2, True), (3, True)]


def test_training_is_not_changed() -> None:
    weights = []
    for callbacks in ([], [StatisticsMonitor(lambda *found: None, every=1)]):
        keras.utils.set_random_seed(3)
        model = model_of(BatchNormalization())
        model.optimizer.learning_rate = 0.1
        model.fit(data(), data()[:, :1], batch_size=8, verbose=0, callbacks=callbacks)
        weights.append(model.get_weights())
    for one, two in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, two)
