"""Record opened data: its name, its size, and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from evennorm.errors import InputError

Pair = ("x", "y", "weights")


class Batch(NamedTuple):
    """Samples: an array, or a tuple or dictionary of them for models of several inputs; labels where there are any."""

    x: Any
    y: Any = None

    @property
    def samples(self) -> int:
        return len(next(leaves(self.x)))


@dataclass(frozen=True)
class Data:
    """Batches that can be read as often as asked."""

    name: str
    samples: int | None
    """The number of samples; None where only reading tells."""
    labelled: bool | None
    """Whether there are labels; None where only reading tells."""
    read: Callable[[int, int | None], Iterator[Batch]]
    """Returns the batches of a size, at most a given number."""
    sized: bool = True
    """Whether the batches have the size that is asked for, not one of their own."""
    endless: bool = False

    def batches(self, size: int = 128, limit: int | None = None) -> Iterator[Batch]:
        """Yield the batches, without those that hold no samples.

        With a limit, data whose number of samples is known give batches from all over; others their first ones.

        Raises:
            InputError: there is no sample at all, or what is there cannot be read.
        """
        if self.endless and limit is None:
            raise InputError(f"{self.name} has no end; say how many batches to take by --batches")
        found = False
        for batch in self.read(size, limit):
            if batch.samples:
                found = True
                yield batch
        if not found:
            raise InputError(f"{self.name} is empty; statistics need samples")

    def first(self, size: int = 128) -> Batch:
        """Return the first batch.

        Raises:
            InputError: there is none.
        """
        return next(self.batches(size, 1 if self.endless or not self.sized else None))

    def require_labels(self, what: str) -> None:
        """Check that there are labels.

        Raises:
            InputError: there are no labels.
        """
        labelled = self.first(1).y is not None if self.labelled is None else self.labelled
        if not labelled:
            raise InputError(f"{what} needs labels, and {self.name} has none; add the array y, one label per sample")


def leaves(x: Any) -> Iterator[np.ndarray]:
    """Yield the arrays of a structure."""
    if isinstance(x, dict):
        for value in x.values():
            yield from leaves(value)
    elif isinstance(x, tuple | list):
        for value in x:
            yield from leaves(value)
    else:
        yield x


def mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """Return the same structure with a function applied to its arrays."""
    if isinstance(x, dict):
        return {key: mapped(function, value) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return tuple(mapped(function, value) for value in x)
    return function(x)


def ranges(samples: int, size: int, limit: int | None) -> list[tuple[int, int]]:
    """Return where batches begin and end: all of them, or a number from all over, in order.

    Example:
        >>> ranges(10, 4, None), ranges(100, 4, 2)
        ([(0, 4), (4, 8), (8, 10)], [(0, 4), (96, 100)])
    """
    starts = list(range(0, samples, size))
    if limit is not None and limit < len(starts):
        starts = [round(i * (samples - size) / max(limit - 1, 1)) for i in range(limit)]
    return [(start, min(start + size, samples)) for start in starts]
