"""Make the normalization of a place: batch normalization, or torch's own layer, group and RMS normalization."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from evennorm.errors import ArgumentError
from evennorm.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

NORMS = ("batch", "layer", "group", "rms")
"""Batch normalization, and the modules of torch that do not depend on the batch."""

MOST_GROUPS = 32
"""The most groups, as in the paper on group normalization (Wu and He 2018, arXiv 1803.08494)."""

_BY_RANK: dict[int, Any] = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
_CLASSES: dict[str, Any] = {"batch": BatchNorm1d, "layer": nn.LayerNorm, "group": nn.GroupNorm, "rms": nn.RMSNorm}
_SETTLED = {"num_features", "normalized_shape", "num_groups", "num_channels"} | {
    *("device", "dtype", "activation", "negative_slope", "alpha", "memory"),
}


def made(norm: str, shape: Sequence[int], axis: int, **options: Any) -> nn.Module:
    """Make a normalization of tensors of this shape, whose channel axis is known.

    Layer and RMS normalization take what one sample has: all of an image (channels, height and width), or the channels of
    each step of a sequence. Group normalization takes groups of channels.

    Raises:
        ArgumentError: there is a single value to normalize.

    Example:
        >>> made("layer", (2, 3, 8, 8), 1).normalized_shape, made("layer", (2, 3, 20), 1).normalized_shape
        ((3, 8, 8), (3,))
        >>> made("group", (2, 48, 8, 8), 1).num_groups
        24
    """
    if norm == "batch":
        module: nn.Module = _BY_RANK[len(shape)](shape[axis], **options)
        return module
    if norm == "group":
        return nn.GroupNorm(groups_of(shape, axis), shape[axis], **options)
    sizes = tuple(shape[1:]) if len(shape) > 3 else (shape[axis],)
    if sizes == (1,):
        raise ArgumentError(_SINGLE.format(norm, tuple(shape)))
    kind: type[nn.Module] = _CLASSES[norm]
    return kind(sizes, **options)


_SINGLE = "{} normalization of a single value loses it; a hidden tensor has shape {}; use batch normalization there"


def groups_of(shape: Sequence[int], axis: int) -> int:
    """Return the number of groups: the most, up to 32, that divide the channels and have at least two of them. A single
    channel of an image is a group of all its pixels.

    Raises:
        ArgumentError: there is a single value.

    Example:
        >>> [groups_of((2, channels), 1) for channels in (64, 48, 7)]
        [32, 24, 1]
    """
    channels = shape[axis]
    if channels == 1 and len(shape) > 2:
        return 1
    if channels == 1:
        raise ArgumentError(_SINGLE.format("group", tuple(shape)))
    return max(groups for groups in range(1, MOST_GROUPS + 1) if channels % groups == 0 and channels // groups > 1)


def channel_axis_taken(norm: str, rank: int, axis: int) -> int:
    """Return the axis on which a module expects the channels: 1 for batch and group normalization, the last of a sequence
    for others.

    Of images, layer and RMS normalization take all, so that any axis will do.

    Example:
        >>> channel_axis_taken("batch", 3, 2), channel_axis_taken("layer", 3, 1), channel_axis_taken("rms", 4, 1)
        (1, -1, 1)
    """
    if norm in ("batch", "group"):
        return 1
    return axis if rank > 3 else -1


def has_beta(norm: str, options: dict[str, Any]) -> bool:
    """Return whether the module adds an offset to each channel, which replaces the bias of the layer before it."""
    return norm != "rms" and all(options.get(name, True) for name in ("affine", "elementwise_affine", "bias"))


def check(norm: str, options: dict[str, Any]) -> None:
    """Refuse a name that is no normalization, and arguments that its module does not take, even where nothing is placed.

    Raises:
        ArgumentError: one of these, named.
    """
    if norm not in NORMS:
        raise ArgumentError(f"norm is one of {', '.join(NORMS)}; received {norm!r}")
    name = "BatchNorm" if norm == "batch" else _CLASSES[norm].__name__
    settled = sorted(set(options) & _SETTLED)
    if settled:
        raise ArgumentError(
            f"options are arguments of {name} that are the same for every layer, such as "
            f"{'momentum' if norm == 'batch' else 'eps'}; place decides {' and '.join(settled)} itself; received "
            f"{', '.join(f'{key}={options[key]!r}' for key in settled)}"
        )
    known = [key for key in inspect.signature(_CLASSES[norm]).parameters if key not in _SETTLED]
    unknown = [key for key in options if key not in known]
    if unknown and norm != "batch":
        raise ArgumentError(f"{name} takes no argument {unknown[0]!r}; it takes {', '.join(known)}")
    try:
        _CLASSES[norm](*(1,) * (1 + (norm == "group")), **options)
    except (TypeError, ValueError) as error:
        raise ArgumentError(str(error)) from error
