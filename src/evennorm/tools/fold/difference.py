"""Measure how far the outputs of a folded model differ, and what rounding allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from evennorm.errors import InputError

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""A model in evaluation, as a function from a batch of each input to all outputs."""

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""The largest difference that is allowed, as a part of the largest output, by the dtype that a model computes in."""


@dataclass(frozen=True)
class Difference:
    """The difference between the outputs of two models, over all that they were run on."""

    largest: float = 0.0
    """The largest |before - after|."""
    output: float = 0.0
    """The largest |output|."""
    samples: int = 0
    varies: bool = False
    """Whether two samples gave different outputs."""
    outputs: tuple[Difference, ...] = ()
    """The difference of each output of a model, so that a large one does not hide a small one."""

    @property
    def relative(self) -> float:
        """The largest difference of an output as a part of the largest value of that output."""
        own = self.largest / self.output if self.output else self.largest
        return max((each.relative for each in self.outputs), default=own)

    def __or__(self, other: Difference) -> Difference:
        pairs = zip_longest(self.outputs, other.outputs, fillvalue=Difference())
        return Difference(
            max(self.largest, other.largest),
            max(self.output, other.output),
            self.samples + other.samples,
            self.varies or other.varies,
            tuple(a | b for a, b in pairs),
        )

    def as_dict(self) -> dict[str, float | int]:
        """Return the difference for programs."""
        return {"largest": self.largest, "output": self.output, "samples": self.samples, "relative": self.relative}


def difference(before: Run, after: Run, batches: Iterable[Sequence[np.ndarray]], name: str) -> Difference:
    """Compare the outputs of two models.

    Raises:
        InputError: the outputs cannot be compared, since they are not finite or of other shapes.
    """
    total = Difference()
    for batch in batches:
        expected, received = before(batch), after(batch)
        if [each.shape for each in expected] != [each.shape for each in received]:
            raise InputError(f"the outputs of {name} have other shapes once it is folded; nothing was written")
        parts = tuple(_between(old, new, name) for old, new in zip(expected, received, strict=True))
        for part in parts:
            total |= part
        total |= Difference(samples=len(batch[0]), outputs=parts)
    return total


def repeats(run: Run, batch: Sequence[np.ndarray]) -> bool:
    """Return whether a model gives the same twice, except for rounding: threads may add in another order."""
    pairs = zip(run(batch), run(batch), strict=True)
    return all(np.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs if _numeric(a))


def _between(old: np.ndarray, new: np.ndarray, name: str) -> Difference:
    if not old.size or not (_numeric(old) or old.dtype == bool):
        return Difference()
    wide, wide_new = old.astype("float64"), new.astype("float64")
    if not np.isfinite(wide).all():
        raise InputError(f"{name} gives outputs that are not finite, which cannot be compared; check the model")
    if not np.isfinite(wide_new).all():
        return Difference(float("inf"), float(abs(wide).max()))
    varies = wide.ndim > 0 and bool((wide != wide[:1]).any())
    return Difference(float(abs(wide - wide_new).max()), float(abs(wide).max()), varies=varies)


def _numeric(x: Any) -> bool:
    return bool(np.issubdtype(x.dtype, np.number))
