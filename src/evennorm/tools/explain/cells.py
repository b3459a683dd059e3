"""Draw the cells of an array, and the names of its axes, on a canvas."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from evennorm.tools.explain.axes import DrawnAxis, GroupColours
from evennorm.tools.svg import Canvas, Point, mixed

_CELL = 26.0
_HORIZONTAL = (0.866 * _CELL, 0.5 * _CELL)
_DEPTH = (0.866 * _CELL, -0.5 * _CELL)
_BETWEEN = 34.0
_ROW_NAMES = -66.0
_NO_AXIS = DrawnAxis((), "", 1, False).shortened(1)

Index = dict[tuple[int, ...], str]
"""The label on each drawn axis, which identifies a cell."""


def draw_table(canvas: Canvas, axes: list[DrawnAxis], colours: GroupColours) -> None:
    """Draw one axis as a row of cells, two as rows and columns."""
    rows, columns = [_NO_AXIS, *axes][-2:]
    for row, column in product(rows.cells, columns.cells):
        x, y = column.at * _CELL, row.at * _CELL
        corners = [(x, y), (x + _CELL, y), (x + _CELL, y + _CELL), (x, y + _CELL)]
        canvas.polygon(corners, colours.of({rows.axes: row.label, columns.axes: column.label}))
    _label(canvas, columns, start=(0, rows.length * _CELL), step=(_CELL, 0), index=(0, 14), name=(0, 34), turn=0)
    if rows is not _NO_AXIS:
        _label(canvas, rows, start=(0, 0), step=(0, _CELL), index=(-8, 4), name=(-36, 4), turn=-90)


def draw_blocks(canvas: Canvas, block: list[DrawnAxis], repeated: list[DrawnAxis], colours: GroupColours) -> None:
    """Draw three axes as a block (vertical, horizontal, depth), repeated across for a fourth axis, and down for a fifth.

    The depth runs to the right and back, its index 0 in front.
    """
    vertical, horizontal, depth = block
    down, across = [_NO_AXIS, _NO_AXIS, *repeated][-2:]
    width, rise, drop = _block_extent(vertical, horizontal, depth)
    wide, high = width + _BETWEEN, rise + drop + _BETWEEN
    for row, column in product(down.cells, across.cells):
        x, y = column.at * wide, row.at * high
        place = {down.axes: row.label, across.axes: column.label}
        for cell, faces in _visible_faces(vertical, horizontal, depth):
            colour = colours.of(place | cell)
            for brightness, corners in faces:
                canvas.polygon([(x + a, y + b) for a, b in corners], mixed(colour, *brightness))
    middle = (drop - rise) / 2
    for column in across.cells if across is not _NO_AXIS else ():
        canvas.text((column.at * wide + width / 2, -rise - 16), across.at(column), "soft", "middle")
    for row in down.cells if down is not _NO_AXIS else ():
        canvas.text((_ROW_NAMES, row.at * high + middle), down.at(row), "soft", "end")
    if across.gap is not None:
        for row in down.cells:
            canvas.dots((across.gap * wide - _BETWEEN / 2, row.at * high + middle), (9, 0))
    if down.gap is not None:
        for column in across.cells:
            canvas.dots((column.at * wide + width / 2, down.gap * high - rise - _BETWEEN / 2), (0, 9))
    lowest = down.cells[-1].at * high
    bottom, corner = lowest + vertical.length * _CELL, _at(horizontal.length, vertical.length, 0)
    _label(canvas, vertical, start=(0, lowest), step=(0, _CELL), index=(-8, 4), name=(-36, 4), turn=-90)
    _label(canvas, horizontal, start=(0, bottom), step=_HORIZONTAL, index=(-7, 13), name=(-18, 34), turn=30)
    _label(canvas, depth, start=(corner[0], lowest + corner[1]), step=_DEPTH, index=(7, 13), name=(18, 34), turn=-30)


def _block_extent(vertical: DrawnAxis, horizontal: DrawnAxis, depth: DrawnAxis) -> tuple[float, float, float]:
    """Return width of a block, and its height above and below the corner it is drawn from."""
    width = horizontal.length * _HORIZONTAL[0] + depth.length * _DEPTH[0]
    return width, -depth.length * _DEPTH[1], vertical.length * _CELL + horizontal.length * _HORIZONTAL[1]


def _visible_faces(
    vertical: DrawnAxis, horizontal: DrawnAxis, depth: DrawnAxis
) -> Iterator[tuple[Index, list[tuple[tuple[str, float], list[Point]]]]]:
    """Yield the cells from back to front, each with those of its three faces that no neighbour covers, and their
    brightness."""
    square = ((0, 0), (1, 0), (1, 1), (0, 1))
    for d, h, v in product(reversed(depth.cells), horizontal.cells, reversed(vertical.cells)):
        faces = []
        if depth.begins(d):
            faces.append((("#ffffff", 0.0), [_at(h.at + i, v.at + j, d.at) for i, j in square]))
        if horizontal.ends(h):
            faces.append((("#000000", 0.16), [_at(h.at + 1, v.at + j, d.at + i) for i, j in square]))
        if vertical.begins(v):
            faces.append((("#ffffff", 0.22), [_at(h.at + i, v.at, d.at + j) for i, j in square]))
        if faces:
            yield {depth.axes: d.label, horizontal.axes: h.label, vertical.axes: v.label}, faces


def _at(horizontal: float, vertical: float, depth: float) -> Point:
    x = horizontal * _HORIZONTAL[0] + depth * _DEPTH[0]
    return x, horizontal * _HORIZONTAL[1] + depth * _DEPTH[1] + vertical * _CELL


def _label(canvas: Canvas, axis: DrawnAxis, *, start: Point, step: Point, index: Point, name: Point, turn: float) -> None:
    """Draw the indices beside an axis that runs from `start` by `step` per cell, and its name further out, turned along
    it."""

    def beside(position: float, shift: Point) -> Point:
        return start[0] + position * step[0] + shift[0], start[1] + position * step[1] + shift[1]

    upright = turn == -90
    shown = [(cell.at + 0.5, cell.label) for cell in axis.cells]
    if axis.gap is not None:
        shown.append((axis.gap, "⋮" if upright else "…"))
    for position, label in shown:
        canvas.text(beside(position, index), label, "tick", "end" if upright else "middle")
    canvas.text(beside(axis.length / 2, name), axis.label, "strong" if axis.kept else "soft", "middle", turn)
