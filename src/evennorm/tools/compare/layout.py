"""Give images to a model with their channels where its framework has them: first in PyTorch, last in Keras."""

from __future__ import annotations

import numpy as np

from evennorm.errors import InputError
from evennorm.explanation.data_format import DataFormat

FORMATS = ("channels_last", "channels_first")
"""Keras's names for where images have their channels."""

UNCHANGED = "unchanged"
"""In place of a format: samples are what the model takes."""


def stored_format(shape: tuple[int, ...], wanted: str, source: str, said: str | None = None) -> str:
    """Return where the images of a file have their channels, as is said or its sizes tell; last where neither does.

    Args:
        shape: of all samples.
        wanted: where the model has them.
        source: what errors call the file.
        said: what the user says of it.

    Raises:
        InputError: the sizes fit both, and the model would not have them last.

    Example:
        >>> stored_format((600, 3, 32, 32), "channels_first", "my_data.npz")
        'channels_first'
    """
    if len(shape) != 4:
        return "channels_last"  # that of grey images is appended
    if said or wanted == UNCHANGED:
        return said or UNCHANGED
    found = DataFormat.of(shape)
    if found.certainty == "unclear":
        if wanted != "channels_last":
            raise InputError(
                f"{source}: images of {' x '.join(map(str, shape[1:]))} may have their channels first or last; "
                "give --data-format channels_first or channels_last"
            )
        return wanted
    return "channels_first" if found.channel_axis == 1 else "channels_last"


def moved(x: np.ndarray, stored: str, wanted: str) -> np.ndarray:
    """Return samples with the channels of images where they are wanted, contiguous.

    Example:
        >>> moved(np.zeros((600, 32, 32, 3)), "channels_last", "channels_first").shape
        (600, 3, 32, 32)
    """
    if x.ndim == 4 and UNCHANGED not in (stored, wanted) and stored != wanted:
        x = np.moveaxis(x, *((-1, 1) if wanted == "channels_first" else (1, -1)))
    return np.ascontiguousarray(x)
