"""Record what an old file says: a model as its layers and calls, its weights by layer, and who wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Ref = tuple[str, int, int]
"""A reference to an output: the layer, the number of its call, the number of that call's output."""


@dataclass(frozen=True)
class OldCall:
    """One call of one layer."""

    inputs: tuple[Ref, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments other than tensors, such as `training`."""


@dataclass(frozen=True)
class OldLayer:
    """One layer of an old model, with its configuration in Keras 2's terms."""

    name: str
    path: str
    """The names of the models around it and its own, joined by "/"."""
    kind: str
    """The class, by its name in Keras 2; classes that only Keras 1 had keep theirs."""
    written: str
    """The class as the file names it."""
    config: Mapping[str, Any]
    calls: tuple[OldCall, ...] = ()
    model: OldModel | None = None
    """The layers of a nested model."""
    inner: OldLayer | None = None
    """The inner layer of a wrapper, such as TimeDistributed."""
    named: bool = True
    """Whether the file says its name."""
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The configuration in the file's own terms."""

    @property
    def trainable(self) -> bool:
        return bool(self.config.get("trainable", True))


@dataclass(frozen=True)
class OldModel:
    """Layers in the file's order."""

    name: str
    layers: tuple[OldLayer, ...]
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]
    sequential: bool
    trainable: bool = True

    def steps(self) -> int:
        """Return how many calls of layers there are, those of nested models included."""
        count = 0
        for layer in self.layers:
            nested = layer.model or (layer.inner.model if layer.inner is not None else None)
            count += max(1, len(layer.calls)) + (0 if nested is None else nested.steps())
        return count

    def leaves(self) -> Iterator[OldLayer]:
        """Yield all layers except nested models, at any depth; wrapped ones too."""
        for layer in self.layers:
            if layer.model is not None:
                yield from layer.model.leaves()
            else:
                yield layer
                inner = layer.inner
                while inner is not None:
                    if inner.model is not None:
                        yield from inner.model.leaves()
                    else:
                        yield inner
                    inner = inner.inner


@dataclass(frozen=True)
class OldWeights:
    """The arrays of one layer of the file, by the names they are stored under, in their order."""

    layer: str
    names: tuple[str, ...]
    arrays: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class OldFile:
    """One HDF5 file of Keras 1 or 2."""

    path: str
    config: Any
    """The parsed `model_config`; None for a file of weights only."""
    weights: tuple[OldWeights, ...]
    version: str | None
    """`keras_version`, where the file says it."""
    backend: str | None
    """`backend`, where the file says it."""
    training: Any = None
    """The parsed `training_config`."""
    optimizer_weights: int = 0
