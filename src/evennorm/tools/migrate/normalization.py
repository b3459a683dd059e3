"""Translate an old batch normalization to the layer of Keras 3 or evennorm with the same outputs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from evennorm.errors import InputError
from evennorm.keras.layer import BatchNormalization
from evennorm.tools.migrate.block import Block, Task, small_model
from evennorm.tools.migrate.provenance import Fourth
from evennorm.tools.migrate.statistics import meaning_of, variance


def batch_normalization(task: Task) -> Block:
    """Translate all modes of Keras 1, and the options of Keras 2 and tf.keras."""
    mode = int(task.config.get("mode", 0) or 0)
    if mode == 1:
        return _per_sample(task)
    axis = task.config.get("axis", -1)
    axes = [task.axis(int(a)) for a in (axis if isinstance(axis, list | tuple) else [axis])]
    own = mode == 2 or len(axes) > 1 or bool(task.config.get("virtual_batch_size"))
    options = _options(task, axes)
    layer: Any
    if own:
        extra: dict[str, Any] = {"mode": 2} if mode == 2 else {}
        if task.config.get("virtual_batch_size"):
            extra["virtual_batch_size"] = int(task.config["virtual_batch_size"])
        layer = BatchNormalization(**options, **extra)
        task.converted.append(
            "became evennorm.keras.BatchNormalization, which does what Keras 3's does not: " + _why(mode, axes)
        )
    else:
        layer = layers.BatchNormalization(**options)
    return Block([layer], [(layer, _arrays(task, axes))])


def _why(mode: int, axes: list[int]) -> str:
    if mode == 2:
        return "the batch's statistics at inference too (mode 2)"
    return "several channel axes" if len(axes) > 1 else "ghost batches"


def _options(task: Task, axes: list[int]) -> dict[str, Any]:
    config, arguments = task.config, task.arguments
    options: dict[str, Any] = {
        "axis": tuple(axes) if len(axes) > 1 else (-1 if axes[0] == len(task.shape) - 1 else axes[0]),
        "momentum": float(config.get("momentum", 0.99)),
        "epsilon": float(config["epsilon"]),
        "center": bool(config.get("center", True)),
        "scale": bool(config.get("scale", True)),
        **task.base,
    }
    for name in ("gamma", "beta"):
        options[f"{name}_initializer"] = arguments.initializer(
            config.get(f"{name}_initializer"), "ones" if name == "gamma" else "zeros"
        )
        options[f"{name}_regularizer"] = arguments.regularizer(config.get(f"{name}_regularizer"))
        options[f"{name}_constraint"] = arguments.constraint(config.get(f"{name}_constraint"))
    if config.get("renorm"):
        clipping = {key: value for key, value in (config.get("renorm_clipping") or {}).items() if value is not None}
        options |= {
            "renorm": True,
            "renorm_clipping": clipping,
            "renorm_momentum": float(config.get("renorm_momentum", 0.99)),
        }
        task.converted.append("batch renormalization kept, with its own statistics")
    if task.origin.major == 1 and not task.layer.trainable:
        task.assumed.append(
            "trainable=False: Keras 1 went on normalizing by the batch in training, Keras 3 uses the moving statistics"
        )
    return options


def _arrays(task: Task, axes: list[int]) -> list[np.ndarray]:
    """Return gamma, beta, moving mean, moving variance, and the arrays of renormalization."""
    config = task.config
    parameters = bool(config.get("scale", True)) + bool(config.get("center", True))
    found = list(task.arrays)
    if config.get("renorm") and len(found) == parameters + 6:  # TensorFlow 1 stored sums and the weight they have
        mean, mean_weight, stddev, stddev_weight = found[parameters + 2 :]
        scale = [np.where(weight == 0, 1, weight) for weight in (mean_weight, stddev_weight)]
        moved = np.sqrt(np.maximum(found[parameters + 1], 0))
        found = [*found[: parameters + 2], moved, mean / scale[0], stddev / scale[1]]
        task.converted.append("renormalization statistics divided by the weights that TensorFlow 1 stored beside them")
    counts = [parameters + 2 + (3 if config.get("renorm") else 0)]
    if len(found) not in counts:
        task.expect(*counts)
    shape = tuple(task.shape[a] for a in axes)
    if len(axes) == 1:
        found = [x.reshape(-1) for x in found]
    if any(x.size != np.prod([n or 1 for n in shape]) for x in found):
        raise InputError(
            f"{task.name!r} has one gamma for each of {shape} channels, axis {config.get('axis', -1)}; the file holds "
            f"{found[0].shape}; the file is damaged, or the architecture is another"
        )
    where = parameters + 1
    epsilon = float(config["epsilon"])
    meaning = meaning_of(task.name, found[where], epsilon, task.origin)
    if meaning is Fourth.STANDARD_DEVIATION:
        task.converted.append("the fourth weight s was a standard deviation: variance (s + epsilon)^2 - epsilon")
    elif meaning is Fourth.VARIANCE_EPSILON_OUTSIDE:
        task.converted.append("epsilon stood outside the root: variance (sqrt(v) + epsilon)^2 - epsilon")
    found[where] = variance(found[where], epsilon, meaning)
    _say_what_it_holds(task)
    return found


def _say_what_it_holds(task: Task) -> None:
    first, last = task.origin.releases[0], task.origin.releases[-1]
    if (1, 2, 0) <= first <= last <= (1, 2, 2) and task.origin.theano:
        task.assumed.append(
            "the moving variance holds variance + epsilon, as Theano's did; kept, since outputs depend on it"
        )
    if task.origin.said is None:
        return
    of_tensorflow = "tf" in task.origin.said or first >= (2, 4, 0)
    kept = "kept, since outputs depend on it; training goes on with the plain variance"
    if of_tensorflow and len(task.shape) == 4:
        task.assumed.append(
            f"the moving variance is of the sample, times n / (n - 1), where tf.keras fused the layer; {kept}"
        )
    elif not of_tensorflow and (2, 1, 4) <= first <= (2, 3, 1):
        task.assumed.append(
            f"the moving variance is of the sample, times n / (n - (1 + epsilon)), as Keras 2.1.4 to 2.3.1 had it; {kept}"
        )


def _per_sample(task: Task) -> Block:
    """Translate Keras 1's mode 1, over the last axis whatever `axis` says."""
    task.expect(2, 4)
    epsilon, channels = float(task.config["epsilon"]), task.shape[-1]
    gamma, beta = (np.asarray(x).reshape(-1) for x in task.arrays[:2])
    if gamma.size != channels:
        if gamma.size != 1:
            raise InputError(
                f"mode 1 scales the last axis, of {channels} values, and {task.name!r} holds {gamma.size}; Keras 1 could "
                "not have run this model either"
            )
        gamma, beta = np.repeat(gamma, channels or 1), np.repeat(beta, channels or 1)
    if task.origin.releases[-1] <= (1, 0, 4):
        return _per_sample_plain(task, gamma, beta, epsilon)
    if task.origin.releases[0] <= (1, 0, 4):
        task.assumed.append("mode 1 as from 1.0.5 on; up to 1.0.4 epsilon did not stand under the root")
    layer = BatchNormalization(**{**_options(task, [len(task.shape) - 1]), "axis": -1}, mode=1)
    task.converted.append("became evennorm.keras.BatchNormalization: each sample on its own (mode 1)")
    statistics = [np.zeros(gamma.size), np.ones(gamma.size)]
    return Block([layer], [(layer, [gamma, beta, *statistics])])


def _per_sample_plain(task: Task, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> Block:
    """Translate mode 1 up to 1.0.4: gamma * (x - mean) / (std + epsilon) + beta."""
    axes = "xyzw"[: len(task.shape) - 2]
    scale = layers.EinsumDense(
        f"b{axes}c,c->b{axes}c", output_shape=task.shape[1:], bias_axes="c", name=f"{task.name}_scale"
    )

    def compute(x: Any) -> Any:
        centred = x - ops.mean(x, axis=-1, keepdims=True)
        return scale(centred / (ops.std(x, axis=-1, keepdims=True) + epsilon))

    task.converted.append("mode 1 as up to 1.0.4, by the plain standard deviation, became a small model")
    model: keras.Model = small_model(task.name, [task.shape], compute, task.layer.trainable)
    return Block([model], [(scale, [gamma, beta])])
