"""Train over devices and processes with keras.distribution: the batch is one array, and so are its statistics.

On four devices of one machine, or in two processes, each with a number of its own:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/distributed/keras_jax.py
    python examples/distributed/keras_jax.py localhost:12345 2 0
    python examples/distributed/keras_jax.py localhost:12345 2 1
"""

import os
import sys

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np

from evennorm.keras import BatchNormalization

BATCH = 16

address, processes, process = (sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 1 else (None, 1, 0)
if processes > 1:
    keras.distribution.initialize(address, processes, process)
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
keras.utils.set_random_seed(1)
rng = np.random.default_rng(0)
x = rng.normal(5.0, 2.0, (64, 8)).astype("float32")
y = np.sin(x.sum(1, keepdims=True)).astype("float32")

# On JAX this is so without synchronized=True, too; with it, the layer is the same on every backend.
norm = BatchNormalization(momentum=0.5, activation="relu", synchronized=True)
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), norm, keras.layers.Dense(1)])
model.compile(keras.optimizers.SGD(0.05), "mse")

# Every process hands over what is its own of each batch.
part = (np.arange(64) % BATCH) // (BATCH // processes) == process
history = model.fit(x[part], y[part], batch_size=BATCH // processes, epochs=2, shuffle=False, verbose=0)
print("loss", history.history["loss"][-1])
for variable in (norm.gamma, norm.moving_mean, norm.moving_variance):
    print(variable.name, *np.asarray(variable))
