"""Check that a model accepts the samples of a first batch."""

from __future__ import annotations

from typing import Any

from evennorm.errors import InputError
from evennorm.tools.data.batch import Batch, Data, leaves
from evennorm.tools.models import Opened


def check_fit(data: Data, opened: Opened) -> None:
    """Check that a model takes the samples of the first batch.

    Raises:
        InputError: the samples' shapes, number of inputs or names are not the model's. Models of torch and subclassed models
            of Keras do not say what they take; they are asked when they are run.
    """
    inputs = getattr(opened.model, "inputs", None) if opened.framework == "keras" else None
    if inputs:
        _check(data.name, data.first(1), inputs, opened)


def _check(name: str, batch: Batch, inputs: list[Any], opened: Opened) -> None:
    wanted = {tensor._keras_history.operation.name: tuple(tensor.shape) for tensor in inputs}
    if isinstance(batch.x, dict):
        missing = [key for key in wanted if key not in batch.x]
        if missing:
            raise InputError(
                f"{name} does not fit {opened.name}, whose inputs are {', '.join(wanted)}; {', '.join(missing)} is missing; "
                f"it holds {', '.join(batch.x)}"
            )
        received = {key: batch.x[key].shape for key in wanted}
    else:
        arrays = list(leaves(batch.x))
        if len(arrays) != len(wanted):
            raise InputError(f"{name} does not fit {opened.name}, which takes {len(wanted)} inputs; received {len(arrays)}")
        received = {key: array.shape for key, array in zip(wanted, arrays, strict=True)}
    for key, shape in wanted.items():
        if not _fits(received[key][1:], shape[1:]):
            raise InputError(
                f"{name} does not fit {opened.name}: its input {key!r} takes samples of shape {_text(shape[1:])}; "
                f"received {_text(received[key][1:])}"
            )


def _fits(sample: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Return whether Keras takes the sample; it adds or drops a last axis of size 1."""
    if len(sample) == len(wanted) + 1 and sample[-1] == 1:
        sample = sample[:-1]
    elif len(sample) + 1 == len(wanted) and wanted[-1] in (1, None):
        sample = (*sample, 1)
    return len(sample) == len(wanted) and all(w in (None, s) for s, w in zip(sample, wanted, strict=True))


def _text(shape: tuple[int | None, ...]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape) or "a single number"
