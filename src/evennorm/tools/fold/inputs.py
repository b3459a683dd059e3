"""Make a random batch that a model accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

import numpy as np

from evennorm.errors import ArgumentError, InputError
from evennorm.models.network import Network, Role, Step
from evennorm.tools.models import Opened

_SIDES = (32, 64, 224, 28, 96, 128, 299, 16, 8)
"""Sizes of images and sequences, in the order they are tried where none is given."""
_SAMPLES = 5
"""A number that few axes have, so that the batch axis is not taken for another."""
_LARGE = 100_000
"""Values of a sample for which two samples are enough."""


@dataclass(frozen=True)
class Input:
    """One input of a model, and how to draw values for it."""

    name: str
    shape: tuple[int, ...]
    """The shape of one sample."""
    dtype: str = "float32"
    below: int | None = None
    """Whole numbers are drawn below this one; None for floats."""

    def draw(self, samples: int) -> np.ndarray:
        """Draw the same at every call: normal values, and in the last sample values from 0 to 1, as in images."""
        rng = np.random.default_rng(0)
        shape = (samples, *self.shape)
        if self.below is not None:
            return rng.integers(0, self.below, shape).astype(self.dtype)
        values = rng.standard_normal(shape)
        values[-1] = rng.random(self.shape)
        return values.astype(self.dtype)


def random_batch(inputs: Sequence[Input]) -> tuple[np.ndarray, ...]:
    large = max((prod(each.shape) for each in inputs), default=0) > _LARGE
    return tuple(each.draw(2 if large else _SAMPLES) for each in inputs)


def inputs_of_keras(model: Any, network: Network, runs: Callable[[Sequence[Input]], str]) -> list[Input]:
    """Return the inputs of a Keras model; unknown sizes are tried until it runs.

    Raises:
        InputError: it takes something else than numbers, or does not run.
    """
    reason = ""
    for side in _SIDES:
        found = [_input_of_keras(tensor, network, side) for tensor in model.inputs]
        reason = runs(found)
        if not reason or all(None not in tensor.shape[1:] for tensor in model.inputs):
            break
    if reason:
        raise InputError(f"{model.name} does not run on random inputs ({reason}); give it some by --data")
    return found


def _input_of_keras(tensor: Any, network: Network, side: int) -> Input:
    name, dtype = tensor._keras_history.operation.name, str(tensor.dtype)
    if dtype == "string":
        raise InputError(f"the input {name!r} takes text, for which there are no random values; give some by --data")
    shape = tuple(side if size is None else size for size in tensor.shape[1:])
    below = _vocabulary(network, name)
    whole = dtype.startswith(("int", "uint", "bool"))
    return Input(name, shape, dtype, below if below is not None or not whole else 2)


def shapes_of(given: Sequence[int] | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the shapes of one sample of each input, from these or from the only one.

    Raises:
        ArgumentError: they are no shapes.

    Example:
        >>> shapes_of((3, 32, 32)), shapes_of([(3, 32, 32), (5,)])
        ([(3, 32, 32)], [(3, 32, 32), (5,)])
    """
    every: list[Any] = [given] if given and all(isinstance(size, int) for size in given) else list(given)
    for shape in every:
        if not isinstance(shape, Sequence) or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ArgumentError(
                "input_shape is the shape of one sample, such as (3, 32, 32), or a list of those of each input, all sizes "
                f"above 0; received {given!r}"
            )
    return [tuple(shape) for shape in every]


def inputs_of_torch(opened: Opened, network: Network, shapes: Sequence[tuple[int, ...]], runs: Any) -> list[Input]:
    """Return the inputs of a torch model: of the given shapes, else by the first layer that reads the input.

    Raises:
        InputError: that does not tell, or the model does not run on it.
    """
    ask = "say what one sample is by --input-shape, as in 3,224,224, or give --data"
    names = [step.name for step in network.steps if step.role is Role.INPUT] or ["input"]
    parameter = next(iter(opened.model.parameters()), None)
    dtype = "float32" if parameter is None else str(parameter.dtype).removeprefix("torch.").replace("bfloat16", "float32")
    if shapes:
        every = [*names, *(f"input {n}" for n in range(len(names), len(shapes)))]
        found = [_input(name, shape, dtype, network) for name, shape in zip(every, shapes, strict=False)]
        reason = runs(found)
        if reason:
            raise InputError(f"{opened.name} does not run on samples of shape {_text(shapes)} ({reason})")
        return found
    if len(names) != 1:
        raise InputError(f"{opened.name} takes {len(names)} inputs; {ask}")
    first = _first_layer(network, names[0])
    reason = "no layer that says what it reads"
    for shape in chain(_shapes_of(first), _shapes_of_other_ranks(first, opened.model)):
        found = [_input(names[0], shape, dtype, network)]
        reason = runs(found)
        if not reason:
            return found
    raise InputError(f"{opened.name} runs on none of the inputs that were tried ({reason}); {ask}")


def others_of_torch(opened: Opened, network: Network, taken: Sequence[Input], runs: Any) -> list[list[Input]]:
    """Return inputs of other ranks than those `taken`, one of each rank, that a torch model runs on as well.

    nn.Linear takes (N, C) and (N, L, C), nn.BatchNorm1d takes (N, C) and (N, C, L): a model of both may take vectors and
    sequences, and do something else with each. Lengths that fit are among the sizes of its weights, or their quotients.
    """
    if len(taken) != 1:
        return []
    first = _first_layer(network, taken[0].name)
    found: dict[int, list[Input]] = {}
    for shape in _shapes_of_other_ranks(first, opened.model):
        rank = len(shape)
        if rank != len(taken[0].shape) and rank not in found:
            inputs = [replace(taken[0], shape=shape)]
            if not runs(inputs):
                found[rank] = inputs
    return list(found.values())


_MOST_LENGTHS = 64
"""Lengths that are tried."""


def _shapes_of_other_ranks(first: Step | None, model: Any) -> Iterator[tuple[int, ...]]:
    layer: Any = None if first is None else first.handle
    kind = type(layer).__name__
    lengths = _lengths(model)
    if kind == "Linear":
        inner: tuple[int, ...] = (layer.in_features,)
    elif kind == "Embedding":
        inner = ()
    elif "BatchNorm" in kind:
        channels = int(layer.num_features)
        yield (channels,)
        yield from ((channels, length) for length in lengths)
        yield from ((channels, *[_SAMPLES + 4] * more) for more in (2, 3))
        return
    else:  # a convolution tells the number of axes
        return
    yield inner
    yield from ((length, *inner) for length in lengths)
    yield from ((length, _SAMPLES + 4, *inner) for length in lengths)


def _lengths(model: Any) -> list[int]:
    """Return sizes that the second axis of a model's values may need."""
    sizes = dict.fromkeys(int(size) for weight in model.parameters() for size in weight.shape)
    quotients = dict.fromkeys(a // b for a in sizes for b in sizes if b > 1 and a % b == 0)
    return [_SAMPLES + 4, *(each for each in {**sizes, **quotients} if each != _SAMPLES + 4)][:_MOST_LENGTHS]


def _input(name: str, shape: tuple[int, ...], dtype: str, network: Network) -> Input:
    below = _vocabulary(network, name)
    return Input(name, shape, dtype if below is None else "int64", below)


def _shapes_of(first: Step | None) -> Iterator[tuple[int, ...]]:
    layer: Any = None if first is None else first.handle
    kind = type(layer).__name__
    if kind == "Linear":
        yield (layer.in_features,)
        yield (_SAMPLES + 4, layer.in_features)
    elif kind == "Embedding":
        yield (16,)
    elif "Conv" in kind or kind.startswith(("BatchNorm", "SyncBatchNorm")):
        channels = int(getattr(layer, "in_channels", None) or layer.num_features)
        dimensions = int(kind[-2]) if kind[-2:-1].isdigit() else 2
        if kind == "BatchNorm1d":
            yield (channels,)
        for side in _SIDES:
            yield (channels, *([side] * dimensions))


def _first_layer(network: Network, name: str) -> Step | None:
    """Return the first step with weights on the way from an input; in code that cannot be followed, the first at all."""
    waiting, seen = [name], {name}
    while waiting:
        for step in network.steps:
            if step.name not in seen and waiting[0] in step.inputs:
                if step.role in (Role.LINEAR, Role.BATCH_NORM) and step.handle is not None:
                    return step
                seen.add(step.name)
                waiting.append(step.name)
        waiting.pop(0)
    return next((step for step in network.steps if step.role in (Role.LINEAR, Role.BATCH_NORM) and step.handle), None)


def _vocabulary(network: Network, name: str) -> int | None:
    """Return the least number of rows among the embeddings that read an input."""
    rows = [
        getattr(step.handle, "input_dim", getattr(step.handle, "num_embeddings", None))
        for step in network.steps
        if name in step.inputs and step.kind == "Embedding"
    ]
    return min((int(each) for each in rows if each), default=None)


def _text(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(" x ".join(map(str, shape)) for shape in shapes)
