"""Describe what one old layer becomes: Keras 3 layers called one after the other, their weights, and what was changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import keras
import numpy as np

from evennorm.errors import InputError
from evennorm.tools.migrate.arguments import Translation
from evennorm.tools.migrate.provenance import Provenance, UnsaidError
from evennorm.tools.migrate.records import OldLayer

Shape = tuple[int | None, ...]


class Layout(Enum):
    """The order of axes in which a block takes and returns its arrays."""

    PLAIN = "as the old model had them"
    MOVED = "channels last, where the old model had them first"
    KEPT = "whichever the input has"


@dataclass
class Block:
    """Layers in the order of their calls, and the arrays that each takes."""

    layers: list[Any]
    values: list[tuple[Any, list[np.ndarray]]] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """One old layer to translate, with all that matters for it."""

    layer: OldLayer
    arrays: tuple[np.ndarray, ...]
    shapes: tuple[Shape, ...]
    """Shapes of its inputs, in the order of axes that they arrive in."""
    moved: bool
    """Whether the channel axis of the inputs has been moved to the end."""
    origin: Provenance
    converted: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.layer.config

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def arguments(self) -> Translation:
        return Translation(self.assumed)

    @property
    def base(self) -> dict[str, Any]:
        return {"name": self.name, "trainable": self.layer.trainable}

    def axis(self, axis: int) -> int:
        """Return where an axis of the old model is now."""
        rank = len(self.shape)
        axis %= rank
        if not self.moved or axis == 0:
            return axis
        return rank - 1 if axis == 1 else axis - 1

    def expect(self, *counts: int) -> None:
        """Raise InputError unless the layer has one of these numbers of arrays."""
        if len(self.arrays) not in counts:
            raise InputError(
                f"a {self.layer.written} stores {' or '.join(map(str, counts))} weights as {self.layer.name!r} is set, and "
                f"the file has {len(self.arrays)}; it is damaged, or the architecture is another"
            )

    def need_backend(self, size: Sequence[int], why: str = "stored convolution kernels flipped") -> None:
        """Raise InputError where nothing tells whether Theano wrote the file, and a window of this size needs to know."""
        if self.origin.backend is None and any(n != 1 for n in size):
            raise UnsaidError(
                f"Theano {why}, and nothing in the file tells whether {self.layer.name!r} comes from there",
                "backend",
                "say it with --written-by theano or --written-by tensorflow",
            )


def small_model(name: str, shapes: Sequence[Shape], compute: Callable[..., Any], trainable: bool = True) -> keras.Model:
    """Return a model that replaces one layer: `compute` applied to inputs of these shapes."""
    inputs = [keras.Input(batch_shape=(None, *shape[1:]), name=f"{name}_in{k or ''}") for k, shape in enumerate(shapes)]
    model = keras.Model(inputs[0] if len(inputs) == 1 else inputs, compute(*inputs), name=name)
    model.trainable = trainable
    return model


def tuple_of(value: Any, rank: int) -> tuple[int, ...]:
    """Return one number per spatial axis."""
    if isinstance(value, int | float):
        return (int(value),) * rank
    return tuple(int(x) for x in value)
