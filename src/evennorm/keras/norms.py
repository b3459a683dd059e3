"""Make Keras's own layer, group and RMS normalization in the places of batch normalization."""

from __future__ import annotations

import inspect
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import layers

from evennorm.errors import ArgumentError
from evennorm.keras.layer import BatchNormalization

NORMS = ("batch", "layer", "group", "rms")
"""Batch normalization, and the layers of Keras that do not depend on the batch."""

MOST_GROUPS = 32
"""The most groups, as in the paper on group normalization (Wu and He 2018, arXiv 1803.08494)."""

_CLASSES = {
    "batch": BatchNormalization,
    "layer": layers.LayerNormalization,
    "group": layers.GroupNormalization,
    "rms": layers.RMSNormalization,
}
SETTLED = {"axis", "groups", "name", "dtype", "trainable", "activation", "weights"}


def made(norm: str, tensor: Tensor, axis: int, name: str, **options: Any) -> keras.Layer:
    """Make a normalization of `tensor`, whose channel axis is known.

    Layer and RMS normalization take what one sample has: all of an image (height, width and channels), or the channels of
    each step of a sequence. Group normalization takes groups of channels.

    Raises:
        ArgumentError: the tensor has sizes that the layer needs and that are not known, or a single channel.

    Example:
        >>> made("layer", keras.KerasTensor((None, 8, 8, 3)), -1, "norm").axis
        [1, 2, 3]
        >>> made("layer", keras.KerasTensor((None, 20, 3)), -1, "norm").axis
        [-1]
        >>> made("group", keras.KerasTensor((None, 8, 8, 48)), -1, "norm").groups
        24
    """
    if norm == "batch":
        return BatchNormalization(axis=axis, name=name, **options)
    if norm == "group":
        return layers.GroupNormalization(groups_of(tensor, axis), axis, name=name, **options)
    axes = list(range(1, len(tensor.shape))) if len(tensor.shape) > 3 else [axis]
    sizes = [tensor.shape[each] for each in axes]
    if None in sizes:
        raise ArgumentError(
            f"{norm} normalization of images has weights for each pixel; the tensor {tensor.name!r} has shape "
            f"{tuple(tensor.shape)}; give the sizes in keras.Input, or use group normalization"
        )
    if sizes == [1]:
        raise ArgumentError(
            f"{norm} normalization of a single value loses it; the tensor {tensor.name!r} has shape "
            f"{tuple(tensor.shape)}; use batch normalization there"
        )
    return _CLASSES[norm](axis=axes, name=name, **options)


def groups_of(tensor: Tensor, axis: int) -> int:
    """Return the number of groups: the most, up to 32, that divide the channels and have at least two of them, since a dense
    layer's group of one would hold a single value. A single channel of an image is a group of all its pixels.

    Raises:
        ArgumentError: there is a single value.

    Example:
        >>> [groups_of(keras.KerasTensor((None, channels)), -1) for channels in (64, 48, 7)]
        [32, 24, 1]
    """
    channels = int(tensor.shape[axis])
    if channels == 1 and len(tensor.shape) > 2:
        return 1
    if channels == 1:
        raise ArgumentError(
            f"group normalization of a single value loses it; the tensor {tensor.name!r} has shape {tuple(tensor.shape)}; "
            "use batch normalization there"
        )
    return max(groups for groups in range(1, MOST_GROUPS + 1) if channels % groups == 0 and channels // groups > 1)


def has_beta(norm: str, options: dict[str, Any]) -> bool:
    """Return whether the layer adds an offset to each channel, which replaces the bias of the layer before it."""
    if norm == "rms":
        return False
    return bool(options.get("center", True)) and options.get("mode", 0) != 1


def check(norm: str, options: dict[str, Any]) -> None:
    """Refuse a name that is no normalization, and arguments that its layer does not take, even where nothing is placed.

    Raises:
        ArgumentError: one of these, named.
    """
    if norm not in NORMS:
        raise ArgumentError(f"norm is one of {', '.join(NORMS)}; received {norm!r}")
    kind = _CLASSES[norm]
    settled = sorted(set(options) & SETTLED)
    if settled:
        raise ArgumentError(
            f"options are arguments of {kind.__name__} that are the same for every layer, such as epsilon; place "
            f"decides {' and '.join(settled)} itself; received {', '.join(f'{key}={options[key]!r}' for key in settled)}"
        )
    known = inspect.signature(kind).parameters
    unknown = [key for key in options if key not in known]
    if unknown and norm != "batch":
        raise ArgumentError(f"{kind.__name__} takes no argument {unknown[0]!r}; it takes {', '.join(set(known) - SETTLED)}")
    try:
        kind(name="options", **options)
    except (TypeError, ValueError) as error:
        raise ArgumentError(str(error)) from error
