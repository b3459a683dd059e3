"""Translate old dense, embedding, reshaping, noise and activation layers to Keras 3's."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import layers

from evennorm.tools.migrate.arguments import SLOPE, activation
from evennorm.tools.migrate.block import Block, Task, small_model
from evennorm.tools.migrate.convolutions import scaled


def dense(task: Task) -> Block:
    """Translate Dense and TimeDistributedDense."""
    config = task.config
    bias = bool(config.get("use_bias", True))
    task.expect(1 + bias)
    function = activation(config.get("activation"), task.name)
    layer = layers.Dense(
        units=int(config["units"]),
        activation=function,
        use_bias=bias,
        **task.arguments.common(config, "kernel", "bias"),
        **task.base,
    )
    return Block([layer], [(layer, scaled(task, function, list(task.arrays)))])


def embedding(task: Task) -> Block:
    """Translate Embedding, without its own dropout, which Keras 2 dropped."""
    config = task.config
    task.expect(1)
    if config.get("embedding_dropout"):
        task.assumed.append(f"dropout={config['embedding_dropout']} of whole words is left out; only training used it")
    layer = layers.Embedding(
        input_dim=int(config["input_dim"]),
        output_dim=int(config["output_dim"]),
        mask_zero=bool(config.get("mask_zero", False)),
        embeddings_initializer=task.arguments.initializer(config.get("embeddings_initializer"), "uniform"),
        embeddings_regularizer=task.arguments.regularizer(config.get("embeddings_regularizer")),
        embeddings_constraint=task.arguments.constraint(config.get("embeddings_constraint")),
        **task.base,
    )
    return Block([layer], [(layer, list(task.arrays))])


def activation_layer(task: Task) -> Block:
    """Translate Activation."""
    function = activation(task.config.get("activation"), task.name)
    if function != "hard_sigmoid":
        return Block([layers.Activation(function, **task.base)])
    task.converted.append("input times 1.2: hard_sigmoid had the slope 0.2 and has 1/6 in Keras 3")
    return Block([layers.Rescaling(SLOPE, name=f"{task.name}_slope"), layers.Activation(function, **task.base)])


def masking(task: Task) -> Block:
    return Block([layers.Masking(mask_value=float(task.config.get("mask_value", 0.0)), **task.base)])


def dropout(task: Task) -> Block:
    """Translate Dropout, its spatial and its Gaussian forms."""
    options: dict[str, Any] = dict(task.base)
    if task.layer.kind == "Dropout":
        options |= {"noise_shape": task.config.get("noise_shape"), "seed": task.config.get("seed")}
    rate = float(task.config.get("rate", 0.5))
    if not 0 <= rate < 1:
        task.converted.append(f"rate {rate:g} became 0: Keras 1 dropped nothing unless it lay between 0 and 1")
        rate = 0.0
    layer = getattr(layers, task.layer.kind)(rate, **{key: x for key, x in options.items() if key != "trainable"})
    return Block([layer])


def gaussian_noise(task: Task) -> Block:
    return Block([layers.GaussianNoise(float(task.config.get("stddev", 0.0)), **task.base)])


def activity_regularization(task: Task) -> Block:
    options = {key: float(task.config.get(key) or 0) for key in ("l1", "l2")}
    return Block([layers.ActivityRegularization(**options, **task.base)])


def flatten(task: Task) -> Block:
    return Block([layers.Flatten(**task.base)])


def reshape(task: Task) -> Block:
    return Block([layers.Reshape(tuple(int(n) for n in task.config["target_shape"]), **task.base)])


def permute(task: Task) -> Block:
    return Block([layers.Permute(tuple(int(a) for a in task.config["dims"]), **task.base)])


def repeat_vector(task: Task) -> Block:
    return Block([layers.RepeatVector(int(task.config["n"]), **task.base)])


def leaky_relu(task: Task) -> Block:
    return Block([layers.LeakyReLU(negative_slope=float(_number(task.config.get("alpha", 0.3))), **task.base)])


def elu(task: Task) -> Block:
    return Block([layers.ELU(alpha=float(_number(task.config.get("alpha", 1.0))), **task.base)])


def _number(value: Any) -> float:
    """Return a number, which tf.keras wrote as a dict where it was an array."""
    return float(np.asarray(value["value"] if isinstance(value, dict) else value).reshape(()))


def softmax(task: Task) -> Block:
    return Block([layers.Softmax(axis=task.config.get("axis", -1), **task.base)])


def relu(task: Task) -> Block:
    """Translate ReLU, a layer since Keras 2.2."""
    config = task.config
    options = {
        "max_value": None if config.get("max_value") is None else _number(config["max_value"]),
        "negative_slope": _number(config.get("negative_slope") or 0.0),
        "threshold": _number(config.get("threshold") or 0.0),
    }
    return Block([layers.ReLU(**options, **task.base)])


def thresholded_relu(task: Task) -> Block:
    """Translate ThresholdedReLU, x where it is above theta: Keras 3's threshold lets x through at the threshold itself."""
    above = float(np.nextafter(np.float32(_number(task.config.get("theta", 1.0))), np.float32(np.inf)))
    task.converted.append("became ReLU with the next number above theta as its threshold")
    return Block([layers.ReLU(threshold=above, **task.base)])


def prelu(task: Task) -> Block:
    """Translate PReLU. The axes that share a slope were not stored; they are those where the file's slopes have size 1."""
    task.expect(1)
    alpha = task.arrays[0]
    if task.moved:
        alpha = np.moveaxis(alpha, 0, -1)
    shared = [a + 1 for a, n in enumerate(alpha.shape) if n == 1 and task.shape[a + 1] != 1]
    if shared:
        task.converted.append(f"one slope along the axes {shared}, as the file holds them")
    layer = layers.PReLU(
        alpha_initializer=task.arguments.initializer(task.config.get("alpha_initializer"), "zeros"),
        alpha_regularizer=task.arguments.regularizer(task.config.get("alpha_regularizer")),
        alpha_constraint=task.arguments.constraint(task.config.get("alpha_constraint")),
        shared_axes=shared or None,
        **task.base,
    )
    return Block([layer], [(layer, [alpha])])


def maxout_dense(task: Task) -> Block:
    """Translate MaxoutDense as a Dense of all its features, and their maximum."""
    config = task.config
    bias = bool(config.get("use_bias", True))
    task.expect(1 + bias)
    units, features = int(config["units"]), int(config.get("nb_feature", 4))
    kernel = task.arrays[0].transpose(1, 0, 2).reshape(task.arrays[0].shape[1], -1)
    layer = layers.Dense(units * features, use_bias=bias, **task.arguments.common(config, "kernel", "bias"), **task.base)
    task.converted.append("became Dense, Reshape and GlobalMaxPooling1D over its features")
    after = [layers.Reshape((features, units), name=f"{task.name}_features")]
    after += [layers.GlobalMaxPooling1D(name=f"{task.name}_maximum")]
    return Block([layer, *after], [(layer, [kernel, *(x.reshape(-1) for x in task.arrays[1:])])])


def highway(task: Task) -> Block:
    """Translate Highway: gate * activation(W x + b) + (1 - gate) * x, gate = sigmoid(W_carry x + b_carry)."""
    config = task.config
    bias = bool(config.get("use_bias", True))
    task.expect(4 if bias else 2)
    matrices, vectors = ([x for x in task.arrays if x.ndim == rank] for rank in (2, 1))  # releases differ in their order
    function = activation(config.get("activation"), task.name)
    units = matrices[0].shape[1]
    transform = layers.Dense(units, activation=function, use_bias=bias, name=f"{task.name}_transform")
    gate = layers.Dense(units, activation="sigmoid", use_bias=bias, name=f"{task.name}_gate")

    def compute(x: Any) -> Any:
        opened, y = gate(x), transform(x)
        through = layers.Multiply(name=f"{task.name}_through")([opened, y])
        kept = layers.Multiply(name=f"{task.name}_kept")([opened, x])
        carried = layers.Subtract(name=f"{task.name}_carried")([x, kept])
        return layers.Add(name=f"{task.name}_sum")([through, carried])

    task.converted.append("became a small model of two Dense layers")
    model = small_model(task.name, [task.shape], compute, task.layer.trainable)
    values = scaled(task, function, [matrices[0], *vectors[:1]])
    return Block([model], [(transform, values), (gate, [matrices[1], *vectors[1:]])])


def parametric_softplus(task: Task) -> Block:
    """Translate ParametricSoftplus: alpha * softplus(beta * x), with own parameters for each value."""
    task.expect(2)
    inner, outer = (_elementwise(task, name) for name in ("beta", "alpha"))
    task.converted.append("became Activation softplus between two EinsumDense that multiply each value")
    middle = layers.Activation("softplus", name=f"{task.name}_softplus")
    alpha, beta = (_whole(task, x) for x in task.arrays)
    return Block([inner, middle, outer], [(inner, [beta]), (outer, [alpha])])


def srelu(task: Task) -> Block:
    """Translate SReLU: linear pieces with slopes a_left, 1 and a_right, parted at t_left and t_left + |t_right|.

    y = t_left + prelu(u, a_left) + (a_right - 1) * relu(u - |t_right|), where u = x - t_left.
    """
    task.expect(4)
    t_left, a_left, t_right, a_right = (_whole(task, x) for x in task.arrays)
    ones = np.ones_like(t_left)
    shift, late, back = (_elementwise(task, name, bias=True) for name in ("shift", "late", "back"))
    steep = _elementwise(task, "steep")
    left = layers.PReLU(name=f"{task.name}_left")

    def compute(x: Any) -> Any:
        u = shift(x)
        right = steep(layers.ReLU(name=f"{task.name}_right")(late(u)))
        return back(layers.Add(name=f"{task.name}_sum")([left(u), right]))

    task.converted.append("became a small model of PReLU, ReLU and EinsumDense that shift and multiply each value")
    values = [
        (shift, [ones, -t_left]),
        (left, [a_left]),
        (late, [ones, -np.abs(t_right)]),
        (steep, [a_right - 1]),
        (back, [ones, t_left]),
    ]
    return Block([small_model(task.name, [task.shape], compute, task.layer.trainable)], values)


def _elementwise(task: Task, name: str, bias: bool = False) -> Any:
    """Return a layer that multiplies each value by its own weight, and adds another."""
    axes = "cdefg"[: len(task.shape) - 1]
    return layers.EinsumDense(
        f"b{axes},{axes}->b{axes}",
        output_shape=task.shape[1:],
        bias_axes=axes if bias else None,
        trainable=task.layer.trainable,
        name=f"{task.name}_{name}",
    )


def _whole(task: Task, array: np.ndarray) -> np.ndarray:
    """Return one value per element, repeated along axes that shared one."""
    return np.broadcast_to(np.asarray(array, np.float64), tuple(int(n or 1) for n in task.shape[1:]))
