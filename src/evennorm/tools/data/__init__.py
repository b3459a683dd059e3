"""Open a file, a folder, `module:function` or an object as batches of NumPy arrays that can be read repeatedly.

Nothing is held but one batch, so that data may be larger than memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evennorm.errors import InputError, first_line
from evennorm.tools.data.arrays import from_arrays, open_npy, open_npz
from evennorm.tools.data.batch import Batch, Data, Pair
from evennorm.tools.data.fit import check_fit
from evennorm.tools.data.folders import open_folder
from evennorm.tools.data.streams import from_stream
from evennorm.tools.imported import imported, misnamed

__all__ = ["Batch", "Data", "check_fit", "open_data"]

_FORMS = (
    "an .npz file with x (and y), an .npy file, a folder of those, a folder of images in class folders, or module:function "
    "that returns batches"
)


def open_data(source: Any, framework: str = "keras") -> Data:
    """Open the data of a command's --data argument.

    Args:
        source: the path of an `.npz` file with the arrays x and, if there are labels, y (x_train and y_train are taken too;
            the inputs of a model with several by their names); of an `.npy` file; of a folder of such files, or of images in
            one folder per class; `module:function`, the user's own code. Or an object: an array, a tuple of x and y, a
            dictionary of arrays, a torch DataLoader or Dataset, a tf.data.Dataset, a keras.utils.PyDataset, or any iterable
            of batches x, (x, y) or (x, y, weights). An iterable that can be read only once is kept on disk as it is read.
        framework: whose convention images of a folder follow: keras (height, width, channels), 0 to 255; torch (channels,
            height, width), 0 to 1.

    Raises:
        InputError: there is nothing of the kind, it is damaged, empty, or made of Python objects.

    Example:
        >>> import numpy as np
        >>> data = open_data((np.arange(6.0).reshape(3, 2), np.array([0, 1, 1])))
        >>> data.samples, [(batch.x.shape, batch.y.shape) for batch in data.batches(2)]
        (3, [((2, 2), (2,)), ((1, 2), (1,))])
    """
    if isinstance(source, Data):
        return source
    if isinstance(source, str | os.PathLike):
        return _from_text(os.fspath(source), framework)
    kinds = (np.ndarray, tuple, list, Mapping)
    plain = isinstance(source, kinds) or hasattr(source, "shape")
    return _from_object(source, "the data" if plain else type(source).__name__)


def _from_text(text: str, framework: str) -> Data:
    path = Path(text)
    if (hint := misnamed(text)) and (path.suffix == ".py" or not path.exists()):
        raise InputError(f"{text} is no data: {hint}")
    if path.is_dir():
        return open_folder(path, framework)
    if path.is_file():
        if path.suffix == ".npz":
            return open_npz(path)
        if path.suffix == ".npy":
            return open_npy(path)
        raise InputError(f"{path} is no data file; data are {_FORMS}")
    function = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)", text)
    if function:
        return _from_function(*function.groups())
    raise InputError(f"there is no {text}; data are {_FORMS}")


def _from_function(module: str, function: str) -> Data:
    name = f"{module}:{function}"
    found = imported(name, name, f"{function!r}; it is to return batches")
    return _from_object(found, name)


def _from_object(source: Any, name: str) -> Data:
    if callable(source) and not hasattr(source, "__iter__") and not hasattr(source, "__getitem__"):
        try:
            made = source()
        except Exception as error:
            raise InputError(f"{name}: calling it without arguments fails: {first_line(error)}") from error
        if hasattr(made, "__next__"):  # a generator function: each pass calls it anew
            return from_stream(source, name, made)
        source = made
    if isinstance(source, Data):
        return source
    if isinstance(source, Mapping):
        return from_arrays(name, source)
    if isinstance(source, tuple) and 1 <= len(source) <= 3 and hasattr(source[0], "shape"):
        return from_arrays(name, dict(zip(Pair, source, strict=False)))
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return from_arrays(name, {"x": source})
    return from_stream(source, name)
