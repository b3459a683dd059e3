"""Train on several processes, each with a part of every batch; batch normalization takes its statistics over all of them.

    python examples/distributed/on_jax.py localhost:8476 2 0 & python examples/distributed/on_jax.py localhost:8476 2 1

The words are the address of process 0, the number of processes, and which of them this is.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from evennorm.jax import batch_norm

address, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # on the CPU; GPUs have their own
    jax.distributed.initialize(address, processes, process)

mesh = jax.make_mesh((jax.device_count(),), ("devices",))
samples, features = 8, 5


def loss(weights, x, target):
    y, moments = batch_norm(x @ weights["kernel"], weights["gamma"], weights["beta"], activation="relu", axis_name="devices")
    return jax.lax.pmean(jnp.mean((y - target) ** 2), "devices"), moments


def step(weights, running, x, target):
    (value, moments), gradients = jax.value_and_grad(loss, has_aux=True)(weights, x, target)
    weights = jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)
    batch = {"mean": moments.mean + moments.mean_low, "variance": moments.variance}
    return weights, jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, running, batch), value


shared, parted = P(), P("devices")
spread = jax.jit(
    jax.shard_map(step, mesh=mesh, in_specs=(shared, shared, parted, parted), out_specs=(shared, shared, shared))
)

rng = np.random.default_rng(0)
weights = {
    "kernel": rng.normal(size=(features, 3)).astype("float32"),
    "gamma": np.ones(3, "float32"),
    "beta": np.zeros(3, "float32"),
}
running = {"mean": np.zeros(3, "float32"), "variance": np.ones(3, "float32")}
for _ in range(5):
    batch = rng.normal(100, 1, (samples, features)), rng.normal(1, 1, (samples, 3))
    x, target = (
        jax.make_array_from_callback(a.shape, NamedSharding(mesh, parted), lambda part, a=a: a[part].astype("float32"))
        for a in batch
    )
    weights, running, value = spread(weights, running, x, target)
print(f"loss {value:.6f}")
print("moving mean", *(f"{mean:.4f}" for mean in np.asarray(running["mean"])))
print("moving variance", *(f"{variance:.4f}" for variance in np.asarray(running["variance"])))
