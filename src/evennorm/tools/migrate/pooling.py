"""Translate old pooling, padding, cropping and up-sampling to Keras 3's, with the padding of their backend."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from evennorm.errors import InputError
from evennorm.tools.migrate.block import Block, Task, small_model, tuple_of


def pooling(task: Task, rank: int) -> Block:
    """Translate max and average pooling."""
    config = task.config
    size = tuple_of(config.get("pool_size") or 2, rank)
    strides = size if config.get("strides") is None else tuple_of(config["strides"], rank)
    mode = config.get("padding", "valid")
    largest = task.layer.kind.startswith("Max")
    class_ = getattr(layers, task.layer.kind)
    if mode == "same":
        task.need_backend(size, "padded otherwise than the other backends")
    if mode == "same" and task.origin.theano:
        return Block([_as_theano(task, class_, largest, size, strides)])
    return Block([class_(pool_size=size, strides=strides, padding=mode, **task.base)])


def _as_theano(task: Task, class_: Any, largest: bool, size: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """Return a pooling with Theano's "same": padded alike before and after, cut to the length of TensorFlow's."""
    pads = []
    for k, s, n in zip(size, strides, task.shape[1:-1], strict=True):
        front = max(k - 2 if k % 2 else k - 1, 0)
        if n is None:
            raise InputError(
                f'{task.name!r} pads as Theano did for border_mode "same", and the size of its input is unknown'
            )
        pads.append((front, max((-(-n // s) - 1) * s + k - n - front, 0)))
    cut = tuple(slice(0, -(-n // s)) for n, s in zip(task.shape[1:-1], strides, strict=True))  # type: ignore[operator]
    widths = [(0, 0), *pads, (0, 0)]
    task.converted.append('border_mode "same" became the padding that Theano took, in a small model of its own')

    def compute(x: Any) -> Any:
        def pool(y: Any, value: float) -> Any:
            padded = ops.pad(y, widths, constant_values=value)
            return class_(pool_size=size, strides=strides, padding="valid")(padded)[(slice(None), *cut)]

        if largest:
            return pool(x, float(np.finfo(np.float32).min))
        return pool(x, 0.0) / pool(ops.ones_like(x), 0.0)  # what was padded did not count

    return small_model(task.name, [task.shape], compute, task.layer.trainable)


def global_pooling(task: Task, rank: int) -> Block:
    """Translate global max and average pooling."""
    keep = bool(task.config.get("keepdims", False))
    return Block([getattr(layers, task.layer.kind)(keepdims=keep, **task.base)])


def zero_padding(task: Task, rank: int) -> Block:
    """Translate ZeroPadding1D, 2D, 3D; Keras 1 also wrote dicts, and four numbers for two axes."""
    value = task.config.get("padding", 1)
    if isinstance(value, dict):
        keys = ("left_pad", "right_pad") if rank == 1 else ("top_pad", "bottom_pad", "left_pad", "right_pad")
        flat = [int(value.get(key, 0)) for key in keys]
        pads = [(flat[2 * k], flat[2 * k + 1]) for k in range(rank)]
    elif isinstance(value, int):
        pads = [(value, value)] * rank
    elif rank == 1:
        pads = [(int(value[0]), int(value[1]))]
    elif len(value) == 4 and rank == 2:
        pads = [(int(value[0]), int(value[1])), (int(value[2]), int(value[3]))]
    else:
        pads = [(int(x), int(x)) if isinstance(x, int) else (int(x[0]), int(x[1])) for x in value]
    return Block([getattr(layers, task.layer.kind)(pads[0] if rank == 1 else pads, **task.base)])


def cropping(task: Task, rank: int) -> Block:
    """Translate Cropping1D, 2D, 3D."""
    value = task.config.get("cropping", 1)
    if rank == 1:
        sides: Any = tuple_of(value, 2)
    else:
        value = [value] * rank if isinstance(value, int) else value
        sides = [(x, x) if isinstance(x, int) else (int(x[0]), int(x[1])) for x in value]
    return Block([getattr(layers, task.layer.kind)(sides, **task.base)])


def up_sampling(task: Task, rank: int) -> Block:
    """Translate UpSampling1D, 2D, 3D."""
    size = tuple_of(task.config.get("size", 2), rank)
    options: dict[str, Any] = {"interpolation": task.config.get("interpolation", "nearest")} if rank == 2 else {}
    if options.get("interpolation") == "bilinear":
        said = task.origin.said or ""
        if not said.endswith("-tf") and task.origin.releases[-1] < (2, 4, 0):
            return _bilinear(task, size)
        if said == "2.2.4-tf":
            task.assumed.append("bilinear as of TensorFlow 2; 1.13 to 1.15, of the same version, sampled from the corners")
    layer: keras.Layer = getattr(layers, task.layer.kind)(size[0] if rank == 1 else size, **options, **task.base)
    return Block([layer])


def _bilinear(task: Task, size: tuple[int, ...]) -> Block:
    """Translate bilinear up-sampling of Keras 2.2.3 to 2.3.1: place i reads i / size, where Keras 3 reads (i + 1/2) / size -
    1/2."""
    rows, columns = task.shape[1:3]
    if task.origin.theano or rows is None or columns is None:
        raise InputError(
            f"{task.name!r} interpolates as {'Theano' if task.origin.theano else 'TensorFlow 1'} did, which migration knows "
            "for TensorFlow and inputs of a known size only; rebuild that layer in Keras 3"
        )
    steps = []
    shape = [rows, columns, task.shape[3]]
    for axis, (n, factor, equation) in enumerate(
        zip((rows, columns), size, ("bhwc,hy->bywc", "bhwc,wy->bhyc"), strict=True)
    ):
        places = np.arange(n * factor) / factor
        low = places.astype(int)
        matrix = np.zeros((n, n * factor))
        np.add.at(matrix, (low, np.arange(n * factor)), 1 - (places - low))
        np.add.at(matrix, (np.minimum(low + 1, n - 1), np.arange(n * factor)), places - low)
        shape[axis] = n * factor
        name = f"{task.name}_{('rows', 'columns')[axis]}"
        steps.append((layers.EinsumDense(equation, output_shape=tuple(shape), trainable=False, name=name), [matrix]))
    task.converted.append("became two EinsumDense that sample from the corners, as TensorFlow 1 did, and Keras 3 does not")
    return Block([step for step, _ in steps], steps)
