"""Represent a model as the calls of its layers and what flows between them, for tools that read models of any framework."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from evennorm.models.state import BatchNormState


class Role(StrEnum):
    """What a layer does, as far as batch normalization is concerned."""

    INPUT = "input"
    LINEAR = "linear"  # convolutions, dense layers, embeddings: a kernel times its input, and a bias
    BATCH_NORM = "batch normalization"
    NORM = "normalization"  # any other: layer, group, instance, spectral
    ACTIVATION = "activation"
    SOFTMAX = "softmax"
    DROPOUT = "dropout"
    ADD = "addition"
    MERGE = "merge"  # concatenation and whatever else takes several inputs
    POOLING = "pooling"
    PADDING = "padding"
    RESHAPE = "reshape"  # flatten, permute and the like: elements move, none changes
    OTHER = "other"


@dataclass(frozen=True)
class Step:
    """One call of one layer; a layer that is called twice makes two steps."""

    name: str
    """Unique in the network: the layer's path, followed by "#2" at the layer's second call."""
    layer: str
    """The layer's path in its model, as the framework writes it."""
    kind: str
    """The class of the layer, or the name of the function."""
    role: Role
    inputs: tuple[str, ...]
    """Names of the steps whose outputs it reads."""
    handle: Any = None
    """The framework's own layer; None for a function."""
    shape: tuple[int | None, ...] | None = None
    """The shape of its output, with None where a size is unknown."""
    state: BatchNormState | None = None
    """The state, for a batch normalization."""
    activation: str | None = None
    """The function that it applies last: that of an activation layer, or of a layer that holds one ("relu")."""
    bias: bool = False
    """Whether a linear layer adds one value per channel at its end."""
    channel_axis: int | None = None
    """The channel axis of its output, 0 or more, where the layer itself says which it is: convolutions, dense layers, image
    pooling."""
    trainable: bool = True
    """Whether training changes the layer's weights; for one without weights, whether its flag says so."""
    training: bool | None = None
    """The mode that the call is fixed to, or that the module is in; None where it follows the model's."""
    asked: bool | None = None
    """The mode that the call asks for without getting it: Keras's fit passes its own to all layers of a functional model."""
    rate: float | None = None
    """The rate, for a dropout."""
    decayed: tuple[str, ...] = ()
    """Which of gamma and beta are pulled to 0 by a regularizer or the optimizer's weight decay."""
    dtype: str | None = None
    """The dtype that it computes in, such as "float32"."""


@dataclass(frozen=True)
class Network:
    """The steps of a model, each after those it takes its inputs from."""

    name: str
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    """Names of the steps whose outputs are the model's."""
    gaps: tuple[str, ...] = ()
    """What could not be read, and why: layers whose surroundings are unknown."""
    framework: str = ""
    """"keras" or "torch": the framework whose terms a message about it uses."""
    iterations: int | None = None
    """Number of steps that its optimizer has taken, where that is known."""

    def __getitem__(self, name: str) -> Step:
        return self._by_name[name]

    def consumers(self, step: Step) -> tuple[Step, ...]:
        """Return the steps that take the output of `step`."""
        return tuple(other for other in self.steps if step.name in other.inputs)

    def calls(self, step: Step) -> tuple[Step, ...]:
        """Return all steps of the layer of `step`, itself included."""
        return tuple(other for other in self.steps if other.layer == step.layer)

    def batch_norms(self) -> Iterator[Step]:
        return (step for step in self.steps if step.role is Role.BATCH_NORM)

    @cached_property
    def _by_name(self) -> dict[str, Step]:
        return {step.name: step for step in self.steps}
