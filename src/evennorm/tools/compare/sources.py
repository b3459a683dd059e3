"""Read the data that a user's own function gives: arrays, a tf.data.Dataset, a torch DataLoader or Dataset, or the like.

All is read into memory once, within a bound: every run trains on the same samples in an order of its own, and training and
test accuracy are measured on fixed samples.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from evennorm.errors import EvennormError, InputError, first_line
from evennorm.tools.compare.files import Labelled
from evennorm.tools.imported import imported

BOUND = 4 * 2**30
"""The most bytes of samples that are read into memory."""

PARTS = ("train", "validation", "test")


def from_function(name: str) -> tuple[Labelled, tuple[np.ndarray, np.ndarray] | None]:
    """Read training and test samples from `module:function`, and validation samples where it gives some.

    The function is called without arguments and returns (train, test), (train, validation, test), a mapping with these
    names, or one part alone, of which a fifth is tested on. A part is a pair of arrays or gives pairs of samples and
    labels, alone or in batches.

    Raises:
        InputError: it gives something else, or more than fits into the bound.
    """
    source = f"--data {name}"
    function = imported(name, source, f"function {name.partition(':')[2]!r}")
    try:
        given = function()
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"{source}: calling it fails: {first_line(error)}") from error
    parts = {key: _read(f"{source}, {key}", part) for key, part in _parts(given, source).items()}
    labelled = Labelled(source, *parts["train"], *parts.get("test", ()))
    return labelled, parts.get("validation")


def _parts(given: Any, source: str) -> dict[str, Any]:
    if isinstance(given, Mapping):
        if "train" not in given or not set(given) <= set(PARTS):
            keys = ", ".join(map(str, given))
            raise InputError(f"{source}: a mapping has the keys train, validation and test; received {keys}")
        return {key: given[key] for key in PARTS if key in given}
    if isinstance(given, tuple | list) and not _is_pair(given):
        if len(given) == 2:
            return {"train": given[0], "test": given[1]}
        if len(given) == 3:
            return dict(zip(PARTS, given, strict=True))
        raise InputError(f"{source}: it returns (train, test) or (train, validation, test); received {len(given)} parts")
    return {"train": given}


def _is_pair(part: Any) -> bool:
    """Return whether these are the samples and the labels of one part."""
    return len(part) == 2 and all(hasattr(each, "shape") and hasattr(each, "dtype") for each in part)


def _read(source: str, part: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(part, tuple | list) and _is_pair(part):
        x, y = _array(part[0]), _array(part[1])
        _check_size(source, x.nbytes)
        return x, y
    xs: list[np.ndarray] = []
    ys: list[np.ndarray] = []
    size = 0
    try:
        for item in _items(part):
            if not isinstance(item, tuple | list) or len(item) < 2:
                raise InputError(f"{source}: it gives pairs of samples and labels; received {type(item).__name__}")
            x, y = _array(item[0]), _array(item[1])
            if not _is_batch(x, y):
                x, y = x[None], y[None]
            size += x.nbytes
            _check_size(source, size)
            xs.append(x)
            ys.append(y)
        return np.concatenate(xs), np.concatenate(ys)
    except EvennormError:
        raise
    except Exception as error:  # the user's code may raise anything; parts may differ in shape or be empty
        raise InputError(
            f"{source}: it cannot be read as arrays, a tf.data.Dataset or a torch DataLoader or Dataset of (sample, label): "
            f"{first_line(error)}"
        ) from error


def _items(part: Any) -> Iterator[Any]:
    """Yield the items of a data set in its own order; a data set that draws at random by torch draws the same at every
    call."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield from _plain_items(part)
        return
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield from _plain_items(part)


def _plain_items(part: Any) -> Iterator[Any]:
    if hasattr(part, "as_numpy_iterator"):
        yield from part.as_numpy_iterator()
    elif hasattr(part, "__iter__"):
        yield from part
    else:  # a torch Dataset need not say by IndexError where it ends
        for index in range(len(part)):
            yield part[index]


def _is_batch(x: np.ndarray, y: np.ndarray) -> bool:
    """Return whether these are several samples: as many labels as samples, and not one label."""
    return y.ndim > 0 and x.ndim > 1 and len(x) == len(y)


def _array(value: Any) -> np.ndarray:
    for method in ("detach", "cpu"):
        value = getattr(value, method)() if hasattr(value, method) else value
    return np.asarray(value)


def _check_size(source: str, size: int) -> None:
    if size > BOUND:
        raise InputError(
            f"{source}: samples are read into memory, {BOUND / 2**30:g} GiB of them at most, and these are more; give "
            "fewer, or smaller ones"
        )
