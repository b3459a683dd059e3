"""Represent a model as calls that can be made one by one, for tools that run parts of a model and watch its normalizations.

`evennorm.keras.program` and `evennorm.torch.program` make them of models; `models.network` is for reading alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from evennorm.models.state import BatchNormState

Key = Hashable
"""The name of a value that flows between calls."""

Observer = Callable[[str, Any, Any], None]
"""A callback that gets the path of a batch normalization, its input and its mask (or None), as NumPy arrays, before it
computes."""


class Halt(BaseException):
    """Raised by an observer that has seen enough. It is no Exception, so that no framework wraps it."""


@dataclass(frozen=True)
class Call:
    """One call of one layer or function in inference."""

    name: str
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    run: Callable[[Mapping[Key, Any]], Sequence[Any]]
    """A function from values by their keys to the values of `outputs`."""


class Statistics(Protocol):
    """A batch normalization with moving statistics, through an interface that hides its framework."""

    @property
    def path(self) -> str: ...

    @property
    def frozen(self) -> bool:
        """Whether it is excluded from training."""

    def state(self) -> BatchNormState: ...

    def write(self, mean: Any, variance: Any) -> None:
        """Set the moving statistics, in float64, and everything that depends on them."""

    def snapshot(self) -> Any:
        """Return everything that `write` may change."""

    def restore(self, snapshot: Any) -> None: ...


class Program(Protocol):
    """The calls of a model in an order in which they can be made, and its batch normalizations by their paths."""

    @property
    def calls(self) -> Sequence[Call]: ...

    @property
    def layers(self) -> Mapping[str, Statistics]: ...

    @property
    def skipped(self) -> Mapping[str, str]:
        """Normalizations without moving statistics, and why."""

    def begin(self, x: Any) -> dict[Key, Any]:
        """Return the values that the calls start from, for a batch of NumPy arrays."""

    def verify(self, x: Any) -> None:
        """Compare the calls with the model on a batch. If they give something else, the model is one call from then on."""

    def predict(self, x: Any) -> list[Any]:
        """Return the model's own outputs in inference, as arrays of NumPy."""

    def apply(self, x: Any) -> list[Any]:
        """Compute as `predict`, but by the model's own code and call by call, so that observers see it."""

    def running(self) -> AbstractContextManager[None]:
        """Return a context in which calls may be made: inference, without derivatives."""

    def watched(self, paths: Sequence[str], observer: Observer) -> AbstractContextManager[None]:
        """Return a context in which the observer sees the inputs of these normalizations."""

    def pack(self, value: Any) -> Any:
        """Return a value in host memory with all that belongs to it and its size as `nbytes`; None where it cannot be
        kept."""

    def unpack(self, packed: Any) -> Any: ...
