"""tf.distribute on two logical devices: synchronized statistics are those of the whole batch, others those of a replica."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.keras import textbook

# Logical devices can be made only before TensorFlow starts, so that all of it runs in a process of its own.
PROGRAM = """
import json, sys, warnings
import numpy as np
import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import keras
from evennorm.keras import BatchNormalization

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
given = json.load(sys.stdin)
results = {}
for name, case in given.items():
    x, dy = np.array(case["x"], "float32"), np.array(case["dy"], "float32")
    half = case["first"]
    with strategy.scope(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layer = getattr(sys.modules[case["module"]], "BatchNormalization")(momentum=0.5, **case["arguments"])
        layer.build((None, *x.shape[1:]))

    def per_replica(array):
        parts = tf.constant(array[:half]), tf.constant(array[half:])
        return strategy.experimental_distribute_values_from_function(lambda c: parts[c.replica_id_in_sync_group])

    @tf.function
    def step(x, dy):
        def one(x, dy):
            variables = [v.value for v in layer.trainable_variables]
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                loss = tf.reduce_sum(y * dy)
            # The gradient of the sum over replicas: of x as it is, of the variables summed as optimizers do it.
            d_x, *d_variables = tape.gradient(loss, [x, *variables])
            summed = tf.distribute.get_replica_context().all_reduce("sum", d_variables) if variables else []
            return y, d_x, summed
        return strategy.run(one, (x, dy))

    for _ in range(case["steps"]):
        y, d_x, d_variables = step(per_replica(x), per_replica(dy))
    local = strategy.experimental_local_results
    results[name] = {
        "y": np.concatenate([part.numpy() for part in local(y)]).tolist(),
        "d_x": np.concatenate([part.numpy() for part in local(d_x)]).tolist(),
        "d_variables": [local(d)[0].numpy().tolist() for d in d_variables],
        "weights": {w.name: np.asarray(w).tolist() for w in layer.weights},
        "skipped": getattr(layer, "skipped_batches", None),
        "said": [str(each.message) for each in said if each.category is UserWarning],
    }
json.dump(results, sys.stdout)
"""

RNG = np.random.default_rng(50)


def case(x: np.ndarray, steps: int = 1, module: str = "evennorm.keras", first: int = 8, **arguments: Any) -> dict[str, Any]:
    """`first` samples of x are the first replica's."""
    dy = RNG.normal(size=x.shape).astype("float32")
    return {"x": x.tolist(), "dy": dy.tolist(), "arguments": arguments, "module": module, "steps": steps, "first": first}


def drawn(mean: float) -> np.ndarray:
    """Two halves of different means: the replicas' own statistics are far from those of the whole."""
    return (RNG.normal(mean, 1.0, (16, 3)) + np.repeat([0.0, 3.0], 8)[:, None]).astype("float32")


BROKEN = drawn(0.0)
BROKEN[2, 1] = np.nan
CASES = {
    "mean 0": case(drawn(0.0), synchronized=True),
    "mean 1e4": case(drawn(1e4), synchronized=True),
    "mean 1e4, three steps": case(drawn(1e4), synchronized=True, steps=3),
    "uneven": case(drawn(1e4), synchronized=True, first=3),
    "an empty replica": case(drawn(10.0), synchronized=True, first=16),
    "relu": case(drawn(0.0), synchronized=True, activation="relu"),
    "renorm": case(drawn(0.0), synchronized=True, renorm=True),
    "Keras's renorm": case(drawn(0.0), 1, "keras.layers", synchronized=True, renorm=True),
    "NaN on one replica": case(BROKEN, synchronized=True),
    "unsynchronized": case(drawn(1e4)),
    "frozen": case(drawn(0.0), trainable=False),
    "sample by sample": case(drawn(0.0), mode=1),
    "ghost batches": case(drawn(0.0), virtual_batch_size=4),
    "Keras's, unsynchronized": case(drawn(0.0), 1, "keras.layers"),
}
CASES["Keras's renorm"] |= {key: CASES["renorm"][key] for key in ("x", "dy")}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array(CASES[name]["x"]), np.array(CASES[name]["dy"])


@pytest.mark.parametrize("name", ["mean 0", "mean 1e4", "mean 1e4, three steps", "uneven", "an empty replica", "relu"])
def test_statistics_and_gradients_are_those_of_the_whole_batch(name: str, results: dict[str, Any]) -> None:
    x, dy = arrays(name)
    expected, steps = textbook.train(x), CASES[name]["steps"]
    z = expected.y
    if name == "relu":
        z, dy = np.maximum(z, 0), np.where(z > 0, dy, 0)
    np.testing.assert_allclose(results[name]["y"], z, rtol=0, atol=2e-6)
    d_x, d_gamma, d_beta = textbook.gradients(x, np.ones(3), dy)
    np.testing.assert_allclose(results[name]["d_x"], d_x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(results[name]["d_variables"], [d_gamma, d_beta], rtol=1e-5, atol=1e-5)
    weights, old = results[name]["weights"], 0.5**steps
    np.testing.assert_allclose(weights["moving_mean"], (1 - old) * expected.mean, rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(weights["moving_variance"], old + (1 - old) * expected.variance, rtol=2e-6)


def test_renorm_is_keras_own(results: dict[str, Any]) -> None:
    ours, theirs = results["renorm"], results["Keras's renorm"]
    for key in ("y", "d_x", "d_variables"):
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    for name, value in theirs["weights"].items():
        np.testing.assert_allclose(ours["weights"][name], value, rtol=1e-5, atol=1e-6)


def test_a_broken_replica_poisons_no_statistic(results: dict[str, Any]) -> None:
    weights = results["NaN on one replica"]["weights"]
    assert weights["moving_mean"] == [0.0] * 3
    assert weights["moving_variance"] == [1.0] * 3
    assert results["NaN on one replica"]["skipped"] == 1


def test_unsynchronized_each_replica_has_its_own(results: dict[str, Any]) -> None:
    """As with Keras's layer: outputs by the replica's own batch, moving statistics those of the first replica."""
    x, dy = arrays("unsynchronized")
    halves = slice(0, 8), slice(8, 16)
    expected = np.concatenate([textbook.train(x[half]).y for half in halves])
    np.testing.assert_allclose(results["unsynchronized"]["y"], expected, rtol=0, atol=2e-6)
    d_x = np.concatenate([textbook.gradients(x[half], np.ones(3), dy[half])[0] for half in halves])
    np.testing.assert_allclose(results["unsynchronized"]["d_x"], d_x, rtol=0, atol=1e-5)
    for name in ("unsynchronized", "Keras's, unsynchronized"):
        first = textbook.train(arrays(name)[0][:8])
        np.testing.assert_allclose(results[name]["weights"]["moving_mean"], 0.5 * first.mean, rtol=1e-5)
        np.testing.assert_allclose(results[name]["weights"]["moving_variance"], 0.5 + 0.5 * first.variance, rtol=1e-5)


def test_a_layer_that_keeps_the_statistics_of_one_replica_says_so(results: dict[str, Any]) -> None:
    (said,) = results["unsynchronized"]["said"]
    assert "each of the 2 replicas normalizes its part of the batch by itself" in said
    assert "follow the first one alone; build the layer with synchronized=True" in said
    (said,) = results["ghost batches"]["said"]
    assert "build the layer without virtual_batch_size and with synchronized=True" in said
    for name in ("mean 0", "frozen", "sample by sample", "renorm"):
        assert results[name]["said"] == []
