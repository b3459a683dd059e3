"""Compare the outputs of a model before and after a change, by accuracy or difference, on data larger than memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evennorm.errors import EvennormError, InputError
from evennorm.tools.data import Data
from evennorm.tools.recalibrate.passes import misfit

_KEPT = 64 << 20
"""Bytes of outputs that are kept for comparison; later samples count for the score only."""


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model for all batches."""

    samples: int
    batches: int
    kept: tuple[np.ndarray, ...]
    """The first outputs, one array for each of the model's outputs."""
    measure: str | None
    """accuracy, or mean squared error, or None without labels."""
    score: float | None


@dataclass(frozen=True)
class Effect:
    """What a change of statistics did to the outputs."""

    samples: int
    measure: str | None
    before: float | None
    after: float | None
    largest_difference: float
    """The largest difference of one output; infinite where it was not finite before."""
    mean_difference: float
    compared: int
    """The number of samples that were compared."""

    @property
    def lines(self) -> list[str]:
        """It in words."""
        lines = []
        if self.measure == "accuracy" and self.before is not None and self.after is not None:
            lines.append(f"accuracy: {100 * self.before:.2f} % before, {100 * self.after:.2f} % after")
        elif self.measure is not None:
            lines.append(f"{self.measure}: {self.before:.6g} before, {self.after:.6g} after")
        if math.isfinite(self.largest_difference):
            differences = f"largest difference {self.largest_difference:.3g}, mean {self.mean_difference:.3g}"
        else:
            differences = "some were not finite"
        return [*lines, f"outputs before and after: {differences}, of {self.compared:,} samples"]


def outputs(
    predict: Callable[[Any], list[np.ndarray]], data: Data, size: int, limit: int | None, tick: Callable[[], None]
) -> Outputs:
    """Run the model over the data.

    Raises:
        InputError: the model cannot take the data, or the labels do not fit its outputs.
    """
    samples = count = used = 0
    kept: list[list[np.ndarray]] = []
    total, measure = _Mean(), None
    for batch in data.batches(size, limit):
        try:
            given = predict(batch.x)
        except EvennormError:
            raise
        except Exception as error:
            raise misfit(data, batch, error) from error
        if used < _KEPT:
            kept.append([np.array(output) for output in given])
            used += sum(output.nbytes for output in given)
        if batch.y is not None and len(given) == 1 and isinstance(batch.y, np.ndarray):
            measure, values = scored(given[0], batch.y, data.name)
            total.add(values)
        samples += batch.samples
        count += 1
        tick()
    joined = tuple(np.concatenate([part[i] for part in kept]) for i in range(len(kept[0])) if kept[0][i].ndim)
    return Outputs(samples, count, joined, measure, total.value if measure else None)


def scored(output: np.ndarray, y: np.ndarray, name: str) -> tuple[str, np.ndarray]:
    """Return the name of the score that these labels allow, and its value for each of them.

    Whole numbers are classes: of outputs (samples, classes), of one output at 0.5 (or at 0, if outputs leave 0 to 1), or of
    each position of (samples, ..., classes) or torch's (samples, classes, ...). One-hot rows are classes too. Numbers of the
    shape of the outputs are targets.

    Raises:
        InputError: labels of another shape.
    """
    output = output.astype("float64")
    whole = y.dtype.kind in "bui" or (y.dtype.kind == "f" and bool((y == np.round(y)).all()))
    if y.shape == output.shape and output.ndim > 1 and output.shape[-1] > 1:
        if whole and bool(((y == 0) | (y == 1)).all() and (y.sum(axis=-1) == 1).all()):
            return "accuracy", output.argmax(axis=-1) == y.argmax(axis=-1)
        return "mean squared error", (output - y) ** 2
    labels = y[..., 0] if y.ndim > 1 and y.shape[-1] == 1 and y.ndim == output.ndim else y
    single = output[..., 0] if output.ndim > 1 and output.shape[-1] == 1 else output
    if labels.shape == single.shape:
        if whole and bool(((labels == 0) | (labels == 1)).all()):
            inside = bool(((single >= 0) & (single <= 1)).all())
            return "accuracy", (single > (0.5 if inside else 0.0)) == (labels == 1)
        return "mean squared error", (single - labels) ** 2
    if whole and labels.shape == output.shape[:-1]:
        return "accuracy", output.argmax(axis=-1) == labels
    if whole and output.ndim > 2 and labels.shape == (output.shape[0], *output.shape[2:]):
        return "accuracy", output.argmax(axis=1) == labels
    raise InputError(
        f"the labels of {name} do not fit: a batch of them has the shape {y.shape} and the dtype {y.dtype}, the model's "
        f"outputs have the shape {output.shape}; give a class per sample, one-hot rows, targets of that shape, or no y"
    )


def effect(before: Outputs, after: Outputs) -> Effect:
    """Return the difference between the outputs of two runs over the same data."""
    largest, total = 0.0, _Mean()
    compared = 0
    for old, new in zip(before.kept, after.kept, strict=True):
        rows = min(len(old), len(new))
        with np.errstate(invalid="ignore"):
            gaps = np.abs(new[:rows].astype("float64") - old[:rows].astype("float64"))
        gaps = np.where(np.isfinite(gaps), gaps, np.inf)
        largest, compared = max(largest, float(gaps.max(initial=0.0))), rows
        total.add(gaps)
    return Effect(after.samples, after.measure, before.score, after.score, largest, total.value or 0.0, compared)


class _Mean:
    """A mean over batches in which each value counts once."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        self._sum += float(values.sum(dtype="float64"))
        self._count += values.size

    @property
    def value(self) -> float | None:
        return self._sum / self._count if self._count else None
