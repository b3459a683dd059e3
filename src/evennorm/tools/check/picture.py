"""Draw an array of one layer as a panel, a curve over the channels in inline SVG."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import log10
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from evennorm.errors import printable

_WIDE, _HIGH, _GAP = 150, 84, 16
_LEFT, _TOP, _BOTTOM = 60, 20, 34
_COLUMNS = 100
"""Places along the channels; where there are more channels, each place shows the smallest and the largest of its own."""
_DECADES = 100.0
"""Positive values whose largest is more than this many times the smallest are drawn by their logarithm."""


class Panel(NamedTuple):
    """One array over the channels."""

    title: str
    values: np.ndarray
    mark: float | None = None
    """A value to draw a line at: what a new layer has."""


@dataclass(frozen=True)
class Scale:
    """The vertical axis of a panel: the values at its ends, and whether it is logarithmic."""

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def over(cls, panels: Iterable[Panel]) -> Scale | None:
        """Return one scale for all panels with a title, so that layers can be compared; None where no value is finite."""
        panels = list(panels)
        arrays = [values[np.isfinite(values)] for values in (np.asarray(each.values, np.float64) for each in panels)]
        values = np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.empty(0)
        if not values.size:
            return None
        marks = [panel.mark for panel in panels if panel.mark is not None]
        logarithmic = bool(values.min() > 0 and values.max() > _DECADES * values.min())
        known = [float(values.min()), float(values.max()), *(mark for mark in marks if mark > 0 or not logarithmic)]
        low, high = min(known), max(known)
        if low == high:
            room = abs(low) or 1.0
            return cls(low - room, high + room)
        return cls(low, high, logarithmic)

    def at(self, value: float) -> float:
        """Return the height of a value, 0 at the lower end and 1 at the upper one."""
        low, high, value = (log10(n) if self.logarithmic else n for n in (self.low, self.high, value))
        return (value - low) / (high - low)


def picture(panel: Panel, scale: Scale | None, layer: str) -> str:
    """Return one panel as an <svg> element for a page; its colours are the page's classes."""
    wide, high = _LEFT + _WIDE + _GAP, _TOP + _HIGH + _BOTTOM
    size = f'viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"'
    label = escape(printable(f"{panel.title} of {layer}"), {'"': "&quot;"})
    return f'<svg {size} role="img" aria-label="{label}">{"".join(_drawn(panel, scale))}</svg>'


def _drawn(panel: Panel, scale: Scale | None) -> Iterator[str]:
    values = np.asarray(panel.values, np.float64).reshape(-1)
    finite = values[np.isfinite(values)]
    lost = values.size - finite.size
    title = panel.title + (", log scale" if scale is not None and scale.logarithmic else "")
    title += f", {lost:,} not finite" if lost else ""
    yield f'<text x="{_LEFT}" y="13">{escape(title)}</text>'
    yield f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{_WIDE}" height="{_HIGH}"/>'
    yield from _channels(values.size)
    if scale is not None:
        yield from _ticks(panel, scale)
    if scale is not None and finite.size:
        yield f'<path class="curve" d="{_envelope(values, scale)}"/>'
        below = _between(finite.min(), finite.max()) + (", as in a new layer" if (finite == panel.mark).all() else "")
        yield f'<text class="soft" x="{_LEFT}" y="{_TOP + _HIGH + 29}">{below}</text>'


def _channels(count: int) -> Iterator[str]:
    """Yield the labels of the horizontal axis: the first channel and the last one."""
    y = _TOP + _HIGH + 13
    yield f'<text class="soft" x="{_LEFT}" y="{y}">channel 0</text>'
    if count > 1:
        yield f'<text class="soft end" x="{_LEFT + _WIDE}" y="{y}">{count - 1}</text>'


def _ticks(panel: Panel, scale: Scale) -> Iterator[str]:
    """Yield the labels of the vertical axis and the line at a new layer's value; labels that would overlap are left out."""
    taken: list[float] = []
    if panel.mark is not None and (panel.mark > 0 or not scale.logarithmic):
        up = scale.at(panel.mark)
        taken.append(up)
        yield f'<path class="mark" d="M{_LEFT} {_height(up):.1f}h{_WIDE}"/>'
        yield _tick(f"new {panel.mark:g}", up)
    for end, up in ((scale.low, 0.0), (scale.high, 1.0)):
        if all(abs(up - other) > 0.15 for other in taken):
            yield _tick(f"{end:.3g}", up)


def _tick(text: str, up: float) -> str:
    return f'<text class="soft end" x="{_LEFT - 4}" y="{_height(up) + 4:.1f}">{text}</text>'


def _height(up: float) -> float:
    return _TOP + _HIGH * (1 - up)


def _between(low: float, high: float) -> str:
    """Format both ends in as few digits as tell them apart.

    Example:
        >>> _between(0.99991, 1.00021), _between(0.5, 2.0), _between(1.0, 1.0)
        ('0.9999 to 1', '0.5 to 2', '1')
    """
    for digits in range(3, 9):
        texts = [f"{end:.{digits}g}" for end in (low, high)]
        if texts[0] != texts[1] and (digits > 3 or abs(high - low) > 0.01 * abs(high)):
            return " to ".join(texts)
    return texts[0]


def _envelope(values: np.ndarray, scale: Scale) -> str:
    """Return the area between the smallest and the largest value of each place, at least a line thick."""
    upper, lower = [], []
    parts = np.array_split(values, min(values.size, _COLUMNS))
    for i, part in enumerate(parts):
        part = part[np.isfinite(part)]
        if part.size:
            begin, end = (_LEFT + _WIDE * k / len(parts) for k in (i, i + 1))
            top, bottom = _height(scale.at(part.max())) - 0.7, _height(scale.at(part.min())) + 0.7
            upper += [(begin, top), (end, top)]
            lower += [(begin, bottom), (end, bottom)]
    points = upper + lower[::-1]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"
