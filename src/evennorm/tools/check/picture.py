"""The arrays of one layer go in; a row of panels, one curve over the channels each, comes out as inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from evennorm.errors import printable

_WIDE, _HIGH, _GAP, _TOP, _BOTTOM = 200, 84, 24, 20, 16
_COLUMNS = 100
"""Places along the channels; where there are more channels, a place shows the smallest and the largest of its own."""
_DECADES = 100.0
"""Positive values whose largest is more than this many times the smallest are drawn by their logarithm."""


class Panel(NamedTuple):
    """One array over the channels."""

    title: str
    values: np.ndarray
    mark: float | None = None
    """A value to draw a line at: what a new layer has."""


def picture(panels: Sequence[Panel], label: str) -> str:
    """The figure as an <svg> element for a page; its colours are the page's classes."""
    columns = min(len(panels), 5)
    wide = columns * (_WIDE + _GAP) - _GAP
    high = _TOP + _HIGH + _BOTTOM
    drawn = "".join(_drawn(panel, i * (_WIDE + _GAP)) for i, panel in enumerate(panels))
    size = f'viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"'
    return f'<svg {size} role="img" aria-label="{escape(printable(label), {chr(34): "&quot;"})}">{drawn}</svg>'


def _drawn(panel: Panel, left: int) -> str:
    values = np.asarray(panel.values, np.float64).reshape(-1)
    finite = values[np.isfinite(values)]
    lost = values.size - finite.size
    title = f"{panel.title}, {lost:,} not finite" if lost else panel.title
    parts = [f'<text x="{left}" y="13">{escape(title)}</text>']
    parts.append(f'<rect class="frame" x="{left}" y="{_TOP}" width="{_WIDE}" height="{_HIGH}"/>')
    if finite.size:
        logarithmic = finite.min() > 0 and finite.max() > _DECADES * finite.min()
        scale = np.log10 if logarithmic else np.asarray
        known = finite if panel.mark is None or (logarithmic and panel.mark <= 0) else np.append(finite, panel.mark)
        low, high = float(scale(known.min())), float(scale(known.max()))
        room = (high - low) * 0.06 or max(abs(high), 1e-3) * 0.1
        low, high = low - room, high + room

        def at(value: float) -> float:
            return _TOP + _HIGH * (high - float(scale(value))) / (high - low)

        if panel.mark is not None and known.size > finite.size:
            parts.append(_line(left, at(panel.mark)))
        parts.append(f'<path class="curve" d="{_envelope(values, left, at)}"/>')
        ends = f"{_between(finite.min(), finite.max())}{', log scale' if logarithmic else ''}"
        parts.append(f'<text class="soft" x="{left}" y="{_TOP + _HIGH + 13}">{ends}</text>')
    return "".join(parts)


def _between(low: float, high: float) -> str:
    """Both ends in as few digits as tell them apart.

    Example:
        >>> _between(0.99991, 1.00021), _between(0.5, 2.0), _between(1.0, 1.0)
        ('0.9999 to 1', '0.5 to 2', '1')
    """
    for digits in range(3, 9):
        texts = [f"{end:.{digits}g}" for end in (low, high)]
        if texts[0] != texts[1] and (digits > 3 or abs(high - low) > 0.01 * abs(high)):
            return " to ".join(texts)
    return texts[0]


def _line(left: int, y: float) -> str:
    return f'<path class="mark" d="M{left} {y:.1f}h{_WIDE}"/>'


def _envelope(values: np.ndarray, left: int, at: Callable[[float], float]) -> str:
    """The area between the smallest and the largest value of each place, at least a line thick."""
    upper, lower = [], []
    parts = np.array_split(values, min(values.size, _COLUMNS))
    for i, part in enumerate(parts):
        part = part[np.isfinite(part)]
        if part.size:
            begin, end = (left + _WIDE * k / len(parts) for k in (i, i + 1))
            top, bottom = at(part.max()) - 0.7, at(part.min()) + 0.7
            upper += [(begin, top), (end, top)]
            lower += [(begin, bottom), (end, bottom)]
    points = upper + lower[::-1]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z"
