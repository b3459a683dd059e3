"""Write polygons and lines of text as a self-contained SVG document for light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

Point = tuple[float, float]

_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
# Every rule names the figure: pages that hold the SVG inline keep their own styles.
_STYLE = f"""
.evennorm text {{ font-family: {_FONT}; fill: #1f2933; font-size: 12px }}
.evennorm .title {{ font-size: 18px; font-weight: 600 }}
.evennorm .soft {{ fill: #5c6b7a }}
.evennorm .tick {{ fill: #5c6b7a; font-size: 10px }}
.evennorm .strong {{ font-weight: 600 }}
.evennorm .warning {{ font-weight: 600; fill: #8a5a00 }}
.evennorm .paper {{ fill: #ffffff }}
.evennorm .dot {{ fill: #5c6b7a }}
.evennorm .cell {{ stroke: #ffffff; stroke-width: 1.2; stroke-linejoin: round }}
@media (prefers-color-scheme: dark) {{
.evennorm text {{ fill: #e6edf3 }}
.evennorm .soft, .evennorm .tick, .evennorm .dot {{ fill: #9aa7b4 }}
.evennorm .warning {{ fill: #f2c14e }}
.evennorm .paper {{ fill: #14191f }}
.evennorm .cell {{ stroke: #14191f }}
}}
"""
_SIZES = {"title": 18.0, "tick": 10.0}
_MARGIN = 24.0


@dataclass
class Canvas:
    """A collection of elements and their extent, so that the document is as large as its content.

    Example:
        >>> canvas = Canvas()
        >>> canvas.polygon([(0, 0), (10, 0), (10, 10)], "#4f8fd0")
        >>> canvas.document("a triangle", "three corners").startswith("<svg xmlns=")
        True
    """

    _elements: list[str] = field(default_factory=list)
    _x: list[float] = field(default_factory=list)
    _y: list[float] = field(default_factory=list)

    def polygon(self, points: Iterable[Point], fill: str) -> None:
        """Draw a cell, or a face of one, in the colour `fill`."""
        corners = list(points)
        self._room(corners)
        joined = " ".join(f"{_number(x)},{_number(y)}" for x, y in corners)
        self._elements.append(f'<polygon class="cell" points="{joined}" fill="{fill}"/>')

    def dots(self, centre: Point, step: Point) -> None:
        """Draw three dots, `step` apart: something is left out here."""
        for place in (-1, 0, 1):
            x, y = centre[0] + place * step[0], centre[1] + place * step[1]
            self._elements.append(f'<circle class="dot" cx="{_number(x)}" cy="{_number(y)}" r="2.2"/>')
            self._room([(x - 3, y - 3), (x + 3, y + 3)])

    def text(self, at: Point, words: str, kind: str = "", anchor: str = "start", turn: float = 0) -> None:
        """Draw `words` with their baseline at a point; `turn` in degrees clockwise."""
        x, y = at
        wide, high = text_width(words, kind), _SIZES.get(kind, 12.0)
        left = {"start": 0.0, "middle": -wide / 2, "end": -wide}[anchor]
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        corners = [(left, -high), (left + wide, -high), (left, 3.0), (left + wide, 3.0)]
        self._room([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in corners])
        place = f'x="{_number(x)}" y="{_number(y)}"'
        turned = f' transform="rotate({_number(turn)} {_number(x)} {_number(y)})"' if turn else ""
        style = f" class={quoteattr(kind)}" if kind else ""
        self._elements.append(f'<text {place}{style} text-anchor="{anchor}"{turned}>{escape(words)}</text>')

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of everything drawn."""
        return min(self._x), min(self._y), max(self._x), max(self._y)

    def document(self, title: str, description: str) -> str:
        """Return the SVG file's text."""
        left, top, right, bottom = self.bounds
        x, y = left - _MARGIN, top - _MARGIN
        wide, high = right - left + 2 * _MARGIN, bottom - top + 2 * _MARGIN
        size = f'width="{_number(wide)}" height="{_number(high)}"'
        box = f"{_number(x)} {_number(y)} {_number(wide)} {_number(high)}"
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="evennorm" viewBox="{box}" {size} role="img">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            f"<style>{_STYLE}</style>",
            f'<rect class="paper" x="{_number(x)}" y="{_number(y)}" {size} rx="12"/>',
            *self._elements,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def _room(self, points: Iterable[Point]) -> None:
        for x, y in points:
            self._x.append(x)
            self._y.append(y)


def text_width(words: str, kind: str = "") -> float:
    """Return the most that `words` can be wide, in pixels, without a font."""
    return 0.58 * _SIZES.get(kind, 12.0) * len(words)


def mixed(colour: str, other: str, part: float) -> str:
    """Return `colour` mixed with the fraction `part` of `other`, both as #rrggbb."""
    pairs = [(int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in pairs)


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
