"""Choose the axes that a figure draws, merged and shortened, and a colour for each group."""

from __future__ import annotations

from collections.abc import Iterable
from colorsys import hls_to_rgb
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from evennorm.explanation import Explanation
from evennorm.tools.svg import mixed

_MOST_AXES = 5
_PALETTE = ("#4f8fd0", "#f0953f", "#45b08c", "#a877c9", "#e3bf45", "#dd6b66", "#3fb0c6", "#a58a6f")
_GOLDEN_ANGLE = 0.381966


@dataclass(frozen=True)
class DrawnCell:
    """One index of an axis: its label, and where it begins, in cells."""

    label: str
    at: float


@dataclass(frozen=True)
class DrawnAxis:
    """One axis of the array, or several neighbours as one; `gap` is the place of the omitted cells, if any."""

    axes: tuple[int, ...]
    role: str
    size: int | None
    kept: bool
    cells: tuple[DrawnCell, ...] = ()
    gap: float | None = None

    @property
    def label(self) -> str:
        """Role and size: "height (28)"."""
        return f"{self.role} ({'?' if self.size is None else self.size})"

    def at(self, cell: DrawnCell) -> str:
        """Return role and index: "batch 0"."""
        return f"{self.role}{':' if self.role[-1].isdigit() else ''} {cell.label}"

    @property
    def length(self) -> float:
        """The length that it is drawn with, in cells."""
        return self.cells[-1].at + 1

    def shortened(self, most: int, gap: float = 0.55) -> DrawnAxis:
        """Return the axis with its first `most` cells and the last one after a gap, or with all where only one would be
        omitted."""
        if self.size is not None and self.size <= most + 1:
            return replace(self, cells=tuple(DrawnCell(str(i), float(i)) for i in range(self.size)))
        first = [DrawnCell(str(i), float(i)) for i in range(most)]
        last = DrawnCell("last" if self.size is None else str(self.size - 1), most + gap)
        return replace(self, cells=(*first, last), gap=most + gap / 2)

    def begins(self, cell: DrawnCell) -> bool:
        """Return whether no cell is drawn just before `cell`: it is the first, or follows the gap."""
        return cell is self.cells[0] or (self.gap is not None and cell is self.cells[-1])

    def ends(self, cell: DrawnCell) -> bool:
        """Return whether no cell is drawn just after `cell`: it is the last, or precedes the gap."""
        return cell is self.cells[-1] or (self.gap is not None and cell is self.cells[-2])


def named_axes(explanation: Explanation) -> list[DrawnAxis]:
    """Return every axis of the array, called by its role, or by its number where the format gives it none."""
    geometry, roles = explanation.geometry, explanation.data_format.roles
    names = [f"axis {a}" if role == "position" else role for a, role in enumerate(roles)]
    return [DrawnAxis((a,), names[a], size, a in geometry.axis) for a, size in enumerate(geometry.shape)]


def drawn_axes(explanation: Explanation) -> list[DrawnAxis]:
    """Return the axes as the figure shows them: neighbours of one kind become one while there are more than five.

    Where that is not enough the last five stay, and the figure shows index 0 of the others.
    """
    axes, at = named_axes(explanation), 0
    while len(axes) > _MOST_AXES and at + 1 < len(axes):
        if axes[at].kept == axes[at + 1].kept:
            axes[at : at + 2] = [_merged(axes[at], axes[at + 1])]
        else:
            at += 1
    return axes[-_MOST_AXES:]


class GroupColours:
    """A colour for each group, no two alike: hues along one kept axis, shades of them along a second."""

    def __init__(self, axes: Iterable[DrawnAxis]):
        self.kept = sorted((axis for axis in axes if axis.kept), key=lambda axis: axis.axes)
        sizes = [len(axis.cells) for axis in self.kept]
        groups = product(*([cell.label for cell in axis.cells] for axis in self.kept))
        self._colours = dict(zip(groups, _colours(sizes), strict=True))

    def of(self, index: dict[tuple[int, ...], str]) -> str:
        """Return the colour, as #rrggbb, of the cell with these labels on the drawn axes."""
        return self._colours[tuple(index[axis.axes] for axis in self.kept)]


def _colours(sizes: list[int]) -> list[str]:
    if len(sizes) == 1 and sizes[0] <= len(_PALETTE):
        return list(_PALETTE[: sizes[0]])
    if len(sizes) == 2 and sizes[0] <= len(_PALETTE):
        shades = [0.7 * i / max(sizes[1] - 1, 1) for i in range(sizes[1])]
        return [mixed(hue, "#ffffff", shade) for hue in _PALETTE[: sizes[0]] for shade in shades]
    return [_hue(i) for i in range(prod(sizes))]


def _merged(a: DrawnAxis, b: DrawnAxis) -> DrawnAxis:
    size = None if a.size is None or b.size is None else a.size * b.size
    return DrawnAxis(a.axes + b.axes, f"{a.role} x {b.role}", size, a.kept)


def _hue(index: int) -> str:
    """Return a hue; hues are a golden angle apart, in rounds of slightly different lightness."""
    rgb = hls_to_rgb(index * _GOLDEN_ANGLE % 1, 0.45 + 0.3 * (index * 0.618034 % 1), 0.6)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
