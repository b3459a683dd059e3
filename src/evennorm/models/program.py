"""A model as calls that can be made one by one: what a tool needs that runs parts of a model and watches its normalizations.

`evennorm.keras.program` and `evennorm.torch.program` make them of models; `core.network` is for reading alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from evennorm.models.state import BatchNormState

Key = Hashable
"""Names a value that flows between calls."""

Observer = Callable[[str, Any, Any], None]
"""Gets the path of a batch normalization, its input and its mask (or None), as arrays of NumPy, before it computes."""


class Halt(BaseException):
    """Raised by an observer that has seen enough; no Exception, so that no framework wraps it."""


@dataclass(frozen=True)
class Call:
    """One call of one layer or function in inference."""

    name: str
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    run: Callable[[Mapping[Key, Any]], Sequence[Any]]
    """Values by their keys go in, the values of `outputs` come out."""


class Statistics(Protocol):
    """A batch normalization with moving statistics: a door to its framework."""

    @property
    def path(self) -> str: ...

    @property
    def frozen(self) -> bool:
        """Whether it is kept from training."""

    def state(self) -> BatchNormState: ...

    def write(self, mean: Any, variance: Any) -> None:
        """Sets the moving statistics, in float64, and whatever follows from them."""

    def snapshot(self) -> Any:
        """Everything that `write` may change."""

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
        """The values that the calls start from, of a batch of NumPy arrays."""

    def verify(self, x: Any) -> None:
        """Makes the calls for a batch; where they do not give what the model gives, the model is one call from then on."""

    def predict(self, x: Any) -> list[Any]:
        """The model's own outputs in inference, as arrays of NumPy."""

    def apply(self, x: Any) -> list[Any]:
        """As `predict`, by the model's own code, call by call, so that observers see it."""

    def running(self) -> AbstractContextManager[None]:
        """Within it calls may be made: inference, and no derivatives."""

    def watched(self, paths: Sequence[str], observer: Observer) -> AbstractContextManager[None]:
        """Within it the observer sees the inputs of these normalizations."""

    def pack(self, value: Any) -> Any:
        """A value with all that belongs to it on the host, with its size as `nbytes`; None where it cannot be kept."""

    def unpack(self, packed: Any) -> Any: ...
