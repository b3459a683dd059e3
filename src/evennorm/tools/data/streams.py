"""Turn an iterable of batches of any framework into batches of NumPy arrays that are the same in every pass."""

from __future__ import annotations

import itertools
import pickle
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from evennorm.errors import EvennormError, InputError, first_line
from evennorm.tools.data.batch import Batch, Data, leaves, mapped

_RULE = "batches are x, (x, y) or (x, y, weights), arrays with the samples along their first axis"


def from_stream(source: Any, name: str, started: Iterator[Any] | None = None) -> Data:
    """Return data from an iterable, a torch Dataset or a keras PyDataset, or a function that starts one (`started`).

    Raises:
        InputError: nothing that can be iterated.
    """
    samples, endless, sized = None, False, False
    if started is not None:
        start: Callable[[int], Iterable[Any]] = lambda _: source()  # noqa: E731
    elif _is_torch_dataset(source):
        from torch.utils.data import DataLoader

        start, sized = (lambda size: DataLoader(source, batch_size=size)), True
        samples = len(source) if hasattr(source, "__len__") else None
    elif hasattr(source, "__next__"):
        start = _Kept(source).batches
    elif hasattr(source, "cardinality"):  # tf.data.Dataset
        endless = int(source.cardinality()) == -1
        start = lambda _: source  # noqa: E731
    elif hasattr(source, "__iter__"):
        start = lambda _: source  # noqa: E731
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):  # keras.utils.PyDataset
        start = lambda _: (source[i] for i in range(len(source)))  # noqa: E731
    else:
        raise InputError(f"data are arrays or an iterable of batches; received {type(source).__name__}")

    def read(size: int, limit: int | None) -> Iterator[Batch]:
        iterator = iter(start(size))
        for number in itertools.count(1):
            if limit is not None and number > limit:
                return
            try:
                element = next(iterator)
            except StopIteration:
                return
            except EvennormError:
                raise
            except Exception as error:
                raise InputError(f"{name}: reading batch {number} fails: {first_line(error)}") from error
            yield _batch(element, name, number)

    return Data(name, samples, None, read, sized, endless)


class _Kept:
    """The elements of an iterator that runs only once, in an unnamed file, for the passes after the first."""

    def __init__(self, iterator: Iterator[Any]):
        self._iterator = iterator
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with this object
        weakref.finalize(self, self._file.close)
        self._positions: list[int] = []

    def batches(self, size: int) -> Iterator[Any]:
        for number in itertools.count():
            if number == len(self._positions):
                try:
                    element = next(self._iterator)
                except StopIteration:
                    return
                self._positions.append(self._file.seek(0, 2))
                pickle.dump(tuple(_batch(element, "the iterator", number + 1)), self._file, pickle.HIGHEST_PROTOCOL)
            self._file.seek(self._positions[number])
            yield pickle.load(self._file)  # written above, by this process


def _is_torch_dataset(source: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.utils.data.Dataset)


def _batch(element: Any, name: str, number: int) -> Batch:
    """Split an element into x and y as Keras does: a tuple or list of up to three, or x alone."""
    parts = tuple(element) if isinstance(element, tuple | list) else (element,)
    if not 1 <= len(parts) <= 3:
        raise InputError(f"{name}: {_RULE}; batch {number} is a {type(element).__name__} of {len(parts)}")
    if isinstance(element, dict) and "x" in element:
        parts = (element["x"], element.get("y"))
    try:
        x = mapped(_numpy, parts[0])
        y = None if len(parts) < 2 or parts[1] is None else mapped(_numpy, parts[1])
    except Exception as error:
        raise InputError(f"{name}: {_RULE}; batch {number} cannot be read as such: {first_line(error)}") from error
    arrays = [*leaves(x), *leaves(() if y is None else y)]
    if not arrays or any(array.ndim == 0 for array in arrays) or len({len(array) for array in arrays}) > 1:
        shapes = ", ".join(str(array.shape) for array in arrays) or "nothing"
        raise InputError(f"{name}: {_RULE}, and as many labels as samples; batch {number} has {shapes}")
    return Batch(x, y)


def _numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value)
