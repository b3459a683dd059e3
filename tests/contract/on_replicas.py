"""Normalize on the replicas of a tf.distribute strategy and on one device: the program of test_tensorflow_replicas.py.

TensorFlow makes logical devices only before it starts, so that `on_forks` runs this in processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Split:
    """A batch in parts, one per replica, and how it is normalized."""

    name: str
    parts: tuple[int, ...]
    mean: float = 0.0
    axis: int = -1
    inner: tuple[int, ...] = ()
    activation: str | None = None
    residual: bool = False
    masked: tuple[int, ...] | None = None
    """Replicas whose mask hides all; () for a mask that hides some everywhere."""
    nan: bool = False
    """Behind the mask, or, without one, on replica 1."""
    dtype: str = "float32"
    eager: bool = False
    further: bool = False
    """Whether to take derivatives of the moments, and second ones."""


SPLITS = (
    Split("even", (8, 8)),
    Split("even, mean 1e4", (8, 8), 1e4),
    Split("uneven", (3, 12), 1e4, further=True),
    Split("an empty replica", (7, 0), 5.0),
    Split("one value on a replica", (9, 1), 5.0),
    Split("one value on each", (1, 1), 5.0),
    Split("one value in all", (1, 0), 5.0),
    Split("planes, fused", (3, 5), 10.0, 1, (4, 6), "relu", True),
    Split("rows, fused", (3, 5), 10.0, -1, (4, 6), "leaky_relu", True, further=True),
    Split("a mask", (6, 9), 10.0, -1, (4,), "relu", True, (), True, further=True),
    Split("a mask that hides a replica", (6, 9), 10.0, -1, (4,), None, False, (1,), True),
    Split("NaN on one replica", (6, 9), nan=True),
    Split("eager", (3, 12), 1e4, activation="relu", eager=True, further=True),
    Split("float64", (3, 12), 1e5, dtype="float64"),
    Split("four", (4, 4, 4, 4), 1e4),
    Split("four, uneven", (5, 0, 1, 30), 1e4, activation="relu", residual=True, further=True),
)
CHANNELS = 3
EPSILON = 1e-3


def made(split: Split) -> dict[str, np.ndarray]:
    """Parts of different means: the replicas' own statistics are far from those of the whole."""
    rng = np.random.default_rng(len(split.name))
    shape = [sum(split.parts), *split.inner]
    shape.insert(len(shape) if split.axis == -1 else 1, CHANNELS)
    of_part = np.repeat(np.arange(len(split.parts)), split.parts)
    x = rng.normal(split.mean, 1.0, shape) + 3.0 * of_part.reshape(-1, *[1] * (len(shape) - 1))
    arrays = {
        "x": x,
        "dy": rng.normal(size=shape),
        "gamma": rng.uniform(0.5, 2, CHANNELS),
        "beta": rng.normal(size=CHANNELS),
    }
    arrays |= {"w": rng.normal(size=shape), "of_mean": rng.normal(size=CHANNELS), "of_variance": rng.normal(size=CHANNELS)}
    if split.residual:
        arrays["residual"] = rng.normal(size=shape)
    if split.masked is not None:
        arrays["mask"] = (rng.random((shape[0], *split.inner)) < 0.6) & ~np.isin(of_part, split.masked)[:, None]
        arrays["x"] = np.where(arrays["mask"][..., None], arrays["x"], np.nan) if split.nan else arrays["x"]
    elif split.nan:
        arrays["x"][split.parts[0] + 1, 1] = np.nan
    return {name: value if name == "mask" else value.astype(split.dtype) for name, value in arrays.items()}


PER_SAMPLE = ("x", "dy", "w", "residual", "mask")


def step(engine: Any, split: Split, given: dict[str, Any], weight: float) -> dict[str, Any]:
    """y, the moments, derivatives of sum(y * dy), of the same with the moments in the loss, and second ones."""
    import tensorflow as tf

    wanted = [name for name in ("x", "gamma", "beta", "residual") if name in given]
    inputs = {name: given[name] for name in (*wanted, "mask") if name in given}
    tensors = [inputs[name] for name in wanted]

    def normalized() -> Any:
        return engine.batch_norm(**inputs, axis=split.axis, epsilon=EPSILON, activation=split.activation)

    def gradient() -> Any:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y, m = normalized()
            loss = tf.reduce_sum(y * given["dy"])
        return y, m, tape.gradient(loss, tensors)

    y, m, first = gradient()
    mean, mean_low, count = (tf.cast(value, "float64") for value in (m.mean, m.mean_low, m.count))
    results = {"y": y, "mean": mean + mean_low, "variance": m.variance, "count": count}
    results |= {f"d_{name}": d for name, d in zip(wanted, first, strict=True)}
    if not split.further:
        return results
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(tensors)
        penalty = tf.reduce_sum(gradient()[2][0] * given["w"])
        _, m = normalized()
        of_moments = tf.reduce_sum((m.mean + m.mean_low) * given["of_mean"] + m.variance * given["of_variance"]) * weight
    results["second"], results["d_x of the moments"] = (tape.gradient(value, inputs["x"]) for value in (penalty, of_moments))
    return results


@cache
def mirrored(replicas: int) -> Any:
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def on_replicas(split: Split, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import tensorflow as tf

    from evennorm.tensorflow import synchronized

    replicas = len(split.parts)
    strategy = mirrored(replicas)
    ends = np.cumsum(split.parts)

    def part(name: str) -> Any:
        def of(context: Any) -> Any:
            i = context.replica_id_in_sync_group
            value = arrays[name]
            return tf.constant(value[ends[i] - split.parts[i] : ends[i]] if name in PER_SAMPLE else value)

        return strategy.experimental_distribute_values_from_function(of)

    def run(given: dict[str, Any]) -> Any:
        def one(given: dict[str, Any]) -> Any:
            return step(synchronized, split, given, 1.0 / replicas)

        return strategy.run(one, (given,))

    with counted() as sent:
        found = (run if split.eager else tf.function(run, autograph=False))({name: part(name) for name in arrays})
    local = {
        name: [value.numpy() for value in strategy.experimental_local_results(values)] for name, values in found.items()
    }
    results = {}
    for name, values in local.items():
        if name in ("d_gamma", "d_beta"):
            results[name] = np.sum(values, 0)
        elif name in ("mean", "variance", "count"):
            assert all(np.array_equal(value, values[0], equal_nan=True) for value in values), (
                name
            )  # the same bits everywhere
            results[name] = values[0]
        else:
            results[name] = np.concatenate(values)
    return results | {"sent": np.array(sent[:2])}


@contextmanager
def counted() -> Iterator[list[int]]:
    """Collect how many numbers replica 0 sends, exchange by exchange."""
    import tensorflow as tf

    kind, sent = tf.distribute.ReplicaContext, []
    before = kind.all_reduce

    def all_reduce(context: Any, op: Any, value: Any, options: Any = None) -> Any:
        if tf.get_static_value(context.replica_id_in_sync_group) == 0:
            sent.append(sum(int(np.prod(each.shape)) for each in tf.nest.flatten(value)))
        return before(context, op, value, options)

    kind.all_reduce = all_reduce
    try:
        yield sent
    finally:
        kind.all_reduce = before


def on_one_device(split: Split, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In float64."""
    import tensorflow as tf

    from evennorm.tensorflow import engine

    given = {name: tf.constant(value if name == "mask" else value.astype("float64")) for name, value in arrays.items()}
    return {name: value.numpy() for name, value in step(engine, split, given, 1.0).items()}


def refused(compute: Callable[[], Any]) -> str:
    try:
        compute()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals() -> dict[str, str]:
    """What is said of programs that cannot exchange anything."""
    import tensorflow as tf

    from evennorm.tensorflow import synchronized

    strategy = mirrored(2)
    x = tf.ones((4, 3))
    compiled = tf.function(lambda x: synchronized.batch_norm(x)[0], autograph=False, jit_compile=True)
    alone = mirrored(1).run(compiled, (x,))
    return {
        "xla": refused(lambda: strategy.run(compiled, (x,))),
        "xla around": refused(tf.function(lambda: strategy.run(lambda: synchronized.batch_norm(x)[0]), jit_compile=True)),
        "ghosts": refused(lambda: strategy.run(lambda: synchronized.batch_norm(x, virtual_batch_size=2)[0])),
        "xla on one replica": "computed" if np.array_equal(alone.numpy(), np.zeros((4, 3))) else "differs",
    }


def main(path: Path, replicas: int) -> None:
    """Of those splits that have so many parts: TensorFlow lets a process have one number of replicas."""
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    found = {}
    for split in SPLITS:
        if len(split.parts) != replicas:
            continue
        arrays = made(split)
        for where, results in (("replicas", on_replicas(split, arrays)), ("one", on_one_device(split, arrays))):
            found |= {f"{split.name}/{where}/{name}": value for name, value in results.items()}
    if replicas == 2:
        found |= {f"refused/{name}": np.array(text) for name, text in refusals().items()}
    np.savez(path, **found)
