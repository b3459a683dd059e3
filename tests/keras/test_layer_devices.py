"""The programs in examples/distributed for this backend: on two processes, or four devices, the weights are those of one."""

from __future__ import annotations

import re
from collections.abc import Callable

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization
from tests import loopback
from tests.keras.backend import BACKEND, state

PROGRAM = f"examples/distributed/keras_{BACKEND}.py"


def numbers(said: str) -> dict[str, np.ndarray]:
    """What a program prints at its end: a name and its numbers, line by line."""
    found = re.findall(r"^(loss|gamma|moving_mean|moving_variance) (.*)$", said, re.MULTILINE)
    return {name: np.array(list(map(float, values.split()))) for name, values in found}


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    (ended,) = loopback.run(lambda _: [PROGRAM], lambda _: {}, processes=1)
    assert ended.code == 0, ended.error[-3000:]
    return numbers(ended.out)


def on_two_processes() -> list[loopback.Ended]:
    ports = loopback.free_ports(2)
    if BACKEND == "jax":
        return loopback.run(lambda process: [PROGRAM, f"localhost:{ports[0]}", "2", str(process)], lambda _: {})
    if BACKEND == "tensorflow":
        return loopback.run(lambda _: [PROGRAM], lambda process: loopback.tf_config(ports, process))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(ports[0]), PROGRAM]
    return loopback.run(lambda _: launcher, lambda _: {"OMP_NUM_THREADS": "1"}, processes=1)


def on_four_devices() -> list[loopback.Ended]:
    return loopback.run(
        lambda _: [PROGRAM], lambda _: {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, processes=1
    )


@pytest.mark.parametrize("spread", [on_two_processes, *([on_four_devices] if BACKEND == "jax" else [])])
def test_devices_train_to_the_weights_of_one(
    spread: Callable[[], list[loopback.Ended]], alone: dict[str, np.ndarray]
) -> None:
    assert set(alone) == {"loss", "gamma", "moving_mean", "moving_variance"}
    for ended in spread():
        assert ended.code == 0, ended.error[-3000:]
        found = numbers(ended.out)
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_on_one_device_a_synchronized_layer_is_any_other() -> None:
    x = np.random.default_rng(0).normal(5.0, 2.0, (6, 3)).astype("float32")
    layers = [BatchNormalization(momentum=0.5, synchronized=synchronized) for synchronized in (False, True)]
    outputs = [keras.ops.convert_to_numpy(layer(x, training=True)) for layer in layers]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=0, atol=1e-6)
    for a, b in zip(*map(state, layers), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6)
    restored = BatchNormalization.from_config(layers[1].get_config())
    assert restored.synchronized


MODEL_PARALLEL = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import keras, numpy as np
from evennorm.keras import BatchNormalization

rng = np.random.default_rng(0)
x, y = rng.normal(5.0, 2.0, (64, 8)).astype("float32"), rng.normal(size=(64, 1)).astype("float32")

def trained():
    keras.utils.set_random_seed(1)
    norm = BatchNormalization(momentum=0.5, activation="relu", synchronized=True, name="norm")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="wide"), norm, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return norm, [np.asarray(v) for v in model.weights]

_, alone = trained()
mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), keras.distribution.list_devices())
layouts = keras.distribution.LayoutMap(mesh)
layouts[".*wide/kernel"] = (None, "model")
layouts[".*norm/.*"] = ("model",)
keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"))
norm, spread = trained()
print(norm.gamma.value.sharding.spec, norm.moving_mean.value.sharding.spec)
print(max(float(np.abs(a - b).max()) for a, b in zip(alone, spread)))
"""


@pytest.mark.skipif(BACKEND != "jax", reason="only on JAX has Keras a distribution of its own")
def test_channels_and_batch_spread_over_a_mesh() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    (ended,) = loopback.run(lambda _: ["-c", MODEL_PARALLEL], lambda _: flags, processes=1)
    assert ended.code == 0, ended.error[-3000:]
    shardings, difference = ended.out.splitlines()
    assert shardings.count("'model'") == 2
    assert float(difference) <= 2e-6


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX runs programs of parts of arrays")
def test_a_layer_that_sees_one_part_of_an_array_is_refused() -> None:
    """In a process of two devices; on a mesh of one device the part is the whole."""
    program = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import jax, jax.numpy as jnp
from evennorm.keras import BatchNormalization

layer = BatchNormalization(synchronized=True)
layer.build((4, 3))
for devices in (1, 2):
    mesh, spec = jax.sharding.Mesh(jax.devices()[:devices], ("batch",)), jax.sharding.PartitionSpec("batch")
    call = lambda x: layer.stateless_call([v.value for v in layer.trainable_variables],
                                          [v.value for v in layer.non_trainable_variables], x, training=True)[0]
    try:
        print(jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones((4, 3))).shape)
    except ValueError as error:
        print(error)
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    (ended,) = loopback.run(lambda _: ["-c", program], lambda _: flags, processes=1)
    assert ended.code == 0, ended.error[-3000:]
    assert ended.out.startswith("(4, 3)\n")
    assert "received a call under the axes 'batch'; spread arrays by keras.distribution instead" in ended.out
