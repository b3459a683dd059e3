"""Translate old merges to Keras 3's merging layers."""

from __future__ import annotations

from typing import Any

from keras import layers, ops

from evennorm.errors import InputError
from evennorm.tools.migrate.block import Block, Task, small_model

_MODES = {"sum": "Add", "mul": "Multiply", "ave": "Average", "max": "Maximum", "concat": "Concatenate", "dot": "Dot"}


def merge(task: Task) -> Block:
    """Translate Merge with any of Keras 1's modes, and the merging layers of Keras 2."""
    config = task.config
    kind = task.layer.kind
    if kind == "Merge":
        mode = config.get("mode", "sum")
        if config.get("mode_type", "raw") != "raw" or mode not in (*_MODES, "cos"):
            raise InputError(
                f"{task.name!r} merges by a function of Python, and code in a file is never run; rebuild it in Keras 3"
            )
        if mode == "cos":
            return _cosine(task)
        kind = _MODES[mode]
    if kind == "Concatenate":
        axis = task.axis(int(config.get("concat_axis", config.get("axis", -1))))
        return Block([layers.Concatenate(axis=-1 if axis == len(task.shape) - 1 else axis, **task.base)])
    if kind == "Dot":
        return _dot(task)
    return Block([getattr(layers, kind)(**task.base)])


def _axes(task: Task) -> list[int]:
    value = task.config.get("dot_axes", task.config.get("axes", -1))
    first, second = (value, value) if isinstance(value, int) else value
    return [int(first) % len(task.shapes[0]), int(second) % len(task.shapes[1])]


def _dot(task: Task) -> Block:
    axes = _axes(task)
    _say_what_was_wrong(task)
    layer = layers.Dot(axes=axes, normalize=bool(task.config.get("normalize", False)), **task.base)
    return Block([layer])


def _say_what_was_wrong(task: Task) -> None:
    if task.origin.releases[0] < (1, 2, 0) and not task.origin.theano and len(task.shape) == 2:
        task.assumed.append(
            "each sample's product with its partner, as on Theano and from 1.2 on; before, TensorFlow multiplied all "
            "samples of the batch with all"
        )


def _cosine(task: Task) -> Block:
    """Translate Keras 1's cosine: the dot product over the root of both squares' product, with an axis of size 1 after the
    batch."""
    axes = _axes(task)
    _say_what_was_wrong(task)
    if any(len(shape) != 2 for shape in task.shapes):
        raise InputError(
            f"{task.name!r} merges by cosine over arrays of rank {len(task.shape)}, where Keras 1 divided matrices element "
            "by element; rebuild that layer in Keras 3"
        )

    def compute(a: Any, b: Any) -> Any:
        def dot(x: Any, y: Any) -> Any:
            return layers.Dot(axes=axes)([x, y])

        return ops.expand_dims(dot(a, b) / ops.maximum(ops.sqrt(dot(a, a) * dot(b, b)), 1e-7), 1)

    task.converted.append("became a small model: dot product over the norms, with the extra axis that Keras 1 gave it")
    return Block([small_model(task.name, task.shapes, compute, task.layer.trainable)])
