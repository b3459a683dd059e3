"""Find what looks wrong about a shape and an axis, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt

from evennorm import notebook
from evennorm.core.geometry import Geometry
from evennorm.explanation.data_format import DataFormat

FEW_VALUES = 32
"""Below this many values a variance is off by more than a quarter: sqrt(2 / 31) = 25 %."""


@dataclass(frozen=True)
class Finding:
    """Something about a shape and an axis that looks wrong.

    `code` is permanent, for programs; `message` says what is wrong, with its values; `remedy` what to do.
    """

    code: str
    message: str
    remedy: str

    def _repr_html_(self) -> str:
        return notebook.titled(f"{self.code}: {self.message}", notebook.paragraphs([f"What to do: {self.remedy}"]))


def findings(geometry: Geometry, data_format: DataFormat) -> tuple[Finding, ...]:
    """Return everything that looks wrong: the axis first, then the number of values behind each mean.

    Example:
        >>> from evennorm import Geometry
        >>> from evennorm.explanation.data_format import DataFormat
        >>> shape = (32, 3, 28, 28)
        >>> [f.code for f in findings(Geometry(shape, -1), DataFormat.of(shape))]
        ['spatial-axis']
    """
    return (*_axis_findings(geometry, data_format), *_count_findings(geometry, data_format))


def relative_error(count: int) -> float | None:
    """Return the standard error of a variance taken from `count` values, relative to it; None for fewer than two.

    sqrt(2 / (count - 1)), exact for independent, normally distributed values; neighbouring pixels resemble each other, so
    that a real error is larger.
    """
    return sqrt(2 / (count - 1)) if count > 1 else None


def percent(part: float) -> str:
    """Format a fraction as a percentage with two digits, or with all of them from 100 % on."""
    return f"{100 * part:.0f} %" if part >= 0.1 else f"{100 * part:.2g} %"


def _axis_findings(geometry: Geometry, data_format: DataFormat) -> Iterator[Finding]:
    right = data_format.channel_axis
    wrong = [a for a in geometry.axis if a not in (right, data_format.also)]
    batch = [a for a in wrong if data_format.roles[a] == "batch"]
    positions = [a for a in wrong if a not in batch]
    remaining = [a for a in geometry.axis if a not in wrong] or [right]
    remedy = f"use {_argument(remaining, geometry.rank)}"
    if batch:
        size = geometry.shape[0]
        yield Finding(
            "batch-axis",
            f"axis 0 looks like the batch: each of its {size} samples would get a mean, a gamma and a beta of its own, and "
            f"the layer would accept batches of exactly {size} samples",
            f"{remedy}; to normalize each sample by itself, use layer, group or instance normalization instead",
        )
    if positions:
        yield Finding(
            "time-axis" if "time" in _roles(data_format, positions) else "spatial-axis",
            _position_message(geometry, data_format, positions),
            _position_remedy(geometry, data_format, remedy),
        )


def _position_message(geometry: Geometry, data_format: DataFormat, positions: list[int]) -> str:
    right = data_format.channel_axis
    one, several = {
        "clear": ("looks like", "look like"),
        "likely": ("is probably", "are probably"),
        "unclear": ("may be",) * 2,
    }[data_format.certainty]
    looks = one if len(positions) == 1 else several
    roles = _roles(data_format, positions)
    size = prod(geometry.shape[a] or 1 for a in positions)
    whose = f"the {roles} of {data_format.name} whose channels are on axis {right}"
    message = f"{_axes(positions, geometry.rank)} {looks} {whose}: each of the {size} positions would get a mean of its own"
    if right in geometry.axis:
        return f"{message} in every channel, {geometry.channel:,} means instead of {geometry.shape[right]:,}"
    channels = geometry.shape[right]
    return message if channels is None else f"{message}, shared by all {channels:,} channels"


def _position_remedy(geometry: Geometry, data_format: DataFormat, remedy: str) -> str:
    right, last = data_format.channel_axis, geometry.rank - 1
    if right in geometry.axis:
        return (
            f"{remedy}, unless a mean per position is meant: it ties the layer to this size, and costs the parameters for it"
        )
    if data_format.certainty == "unclear":
        doubt = "; where the data is channels-first, as in PyTorch, the axis is right and this can be ignored"
        return f"{remedy} if so{doubt if geometry.axis == (1,) else ''}"
    if right != last and geometry.axis == (last,):
        return f"{remedy} for this channels-first data, or move the channels to the end and keep axis=-1"
    if right == last and geometry.axis == (1,):
        return f"{remedy} for this channels-last data; axis=1 belongs to channels-first data"
    return remedy


def _count_findings(geometry: Geometry, data_format: DataFormat) -> Iterator[Finding]:
    count, shape = geometry.count, geometry.shape
    if 0 in shape:
        yield Finding(
            "no-values",
            f"the array is empty, since axis {shape.index(0)} has size 0: there is nothing to take a mean of",
            "check the shape; evennorm's layers leave the moving statistics as they were on an empty batch",
        )
    elif count == 1:
        yield Finding(
            "one-value",
            "each mean is computed from one value: the variance is 0, and so is every normalized value, so the layer "
            "returns "
            "beta",
            _more_values(geometry, data_format),
        )
    elif count is not None and count < FEW_VALUES:
        yield Finding(
            "few-values",
            f"each mean is computed from only {count} values: a variance from so few is off by about "
            f"{percent(sqrt(2 / (count - 1)))} (standard error sqrt(2 / ({count} - 1)) for independent, "
            "normally distributed values)",
            _more_values(geometry, data_format),
        )
    elif shape[0] == 1 and 0 in geometry.reduced and data_format.roles[0] == "batch":
        yield Finding(
            "one-sample",
            "the batch is a single sample: its own statistics normalize it in training (instance normalization), the moving "
            "averages over all samples at inference, and the two differ",
            "use larger batches, or group or instance normalization, which do the same in training and at inference",
        )


def _more_values(geometry: Geometry, data_format: DataFormat) -> str:
    if "batch" not in data_format.roles:
        return "give the shape with its batch axis first, ? where its size is unknown"
    if 0 in geometry.axis:
        return "choose an axis that leaves the batch to be averaged over"
    return (
        f"use larger batches ({percent(sqrt(2 / (FEW_VALUES - 1)))} with {FEW_VALUES} values), batch renormalization "
        "(renorm=True), or layer or group normalization, which do not depend on the batch"
    )


def _roles(data_format: DataFormat, axes: list[int]) -> str:
    return " and ".join(dict.fromkeys(data_format.roles[a] for a in axes))


def _axes(axes: list[int], rank: int) -> str:
    names = [f"{a} (-1)" if a == rank - 1 else str(a) for a in axes]
    return f"axis {names[0]}" if len(names) == 1 else f"axes {', '.join(names[:-1])} and {names[-1]} together"


def _argument(axes: list[int], rank: int) -> str:
    """Return `axes` as the argument that chooses them: -1 for the last, as users write it."""
    if len(axes) == 1:
        return f"axis={-1 if axes[0] == rank - 1 else axes[0]}"
    return f"axis={tuple(axes)}"
