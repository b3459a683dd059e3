"""Draw an array as an SVG figure in which the cells that are normalized together have one colour."""

from __future__ import annotations

from textwrap import wrap

from evennorm.errors import ShapeError
from evennorm.explanation import Explanation
from evennorm.tools.explain.axes import DrawnAxis, GroupColours, drawn_axes, named_axes
from evennorm.tools.explain.cells import draw_blocks, draw_table
from evennorm.tools.svg import Canvas, text_width

_MOST_CELLS = {1: (7,), 2: (5, 7), 3: (4, 4, 4), 4: (3, 3, 3, 2), 5: (3, 3, 3, 2, 2)}
"""Cells drawn before an axis is shortened, by the number of axes: those of a block first, then its repetitions."""
_SWATCH = 14.0
_LEGEND_STEP = 20.0
_LINE = 90
"""Characters of a line above the figure."""


def draw(explanation: Explanation) -> str:
    """Return the figure as the text of an SVG file: valid XML, no outside references, for light and dark pages.

    One axis is a row of cells, two are a table, three a block, four a row of blocks, five a table of blocks. Long axes are
    shortened to their first cells and the last one; neighbouring axes of one kind are drawn as one where there are more
    than five.

    Raises:
        ShapeError: an axis of size 0, which has no cells to draw.

    Example:
        >>> from evennorm.tools.explain.drawing import draw
        >>> from evennorm.tools.explain import explain
        >>> figure = draw(explain((2, 2), axis=-1))
        >>> figure.count('fill="#4f8fd0"'), figure.count('fill="#f0953f"')  # two cells of each channel, and the legend
        (3, 3)
    """
    geometry = explanation.geometry
    if 0 in geometry.shape:
        empty = geometry.shape.index(0)
        raise ShapeError(
            f"a figure needs cells to draw; axis {empty} has size 0; give the size of a batch that holds values"
        )
    axes = drawn_axes(explanation)
    block, repeated = _arranged(axes, explanation.data_format.channel_axis)
    most = _MOST_CELLS[len(axes)]
    block = [axis.shortened(n) for axis, n in zip(block, most, strict=False)]
    repeated = [axis.shortened(n, gap=0.25) for axis, n in zip(repeated, most[len(block) :], strict=True)]
    colours = GroupColours(block + repeated)
    canvas = Canvas()
    if len(block) < 3:
        draw_table(canvas, block, colours)
    else:
        draw_blocks(canvas, block, repeated, colours)
    _draw_legend(canvas, colours)
    left, _, _, bottom = canvas.bounds
    left_out = any(axis.gap is not None for axis in block + repeated)
    note = "Numbers are indices" + ("; dots stand for the cells left out." if left_out else ".")
    canvas.text((left, bottom + 26), note, "soft")
    title, *lines = _header(explanation, axes)
    wrong = [line for finding in explanation.findings for line in wrap(f"Looks wrong: {finding.message}", _LINE)]
    _draw_header(canvas, title, lines, wrong)
    return canvas.document(title, ". ".join([*lines, *(finding.message for finding in explanation.findings)]))


def _arranged(axes: list[DrawnAxis], channel_axis: int) -> tuple[list[DrawnAxis], list[DrawnAxis]]:
    """Return the axes of one block as (vertical, horizontal, depth), with the channels in depth, and those along which it
    repeats."""
    if len(axes) < 3:
        return axes, []
    depth = next((axis for axis in axes if channel_axis in axis.axes), axes[-1])
    others = [axis for axis in axes if axis is not depth]
    return [*others[-2:], depth], others[:-2]


def _header(explanation: Explanation, axes: list[DrawnAxis]) -> list[str]:
    """Return title and lines above the figure."""
    geometry = explanation.geometry
    shape = ", ".join("?" if size is None else str(size) for size in geometry.shape)
    axis = ", ".join(map(str, geometry.axis))
    groups = f"{geometry.channel:,} group{'' if geometry.channel == 1 else 's'}"
    averaged = ", ".join(a.label for a in named_axes(explanation) if not a.kept) or "nothing"
    lines = [
        f"shape ({shape}{',' if geometry.rank == 1 else ''}), axis {axis if len(geometry.axis) == 1 else f'({axis})'}",
        f"One colour: one mean and one variance. Values per mean: {explanation.count_text}",
        f"{groups}, averaged over {averaged}",
    ]
    merged = [f"axes {', '.join(map(str, a.axes))}" for a in axes if len(a.axes) > 1]
    if merged:
        lines.append(f"Drawn as one axis: {'; '.join(merged)}")
    if axes[0].axes[0] > 0:
        lines.append(f"Drawn at index 0 of the first {axes[0].axes[0]} axes")
    return lines


def _draw_header(canvas: Canvas, title: str, lines: list[str], wrong: list[str]) -> None:
    left, top, _, _ = canvas.bounds
    y = top - 26 - 18 * (len(lines) + len(wrong))
    canvas.text((left, y), title, "title")
    styles = [*("warning" for _ in wrong), "", *("soft" for _ in lines[1:])]
    for number, (line, style) in enumerate(zip([*wrong, *lines], styles, strict=True), start=1):
        canvas.text((left, y + 5 + 18 * number), line, style)


def _draw_legend(canvas: Canvas, colours: GroupColours) -> None:
    """Draw the legend: a row of swatches for one kept axis, a table for two; for more a sentence."""
    left, _, _, bottom = canvas.bounds
    y = bottom + 36
    if len(colours.kept) > 2:
        names = ", ".join(axis.role for axis in colours.kept)
        canvas.text((left, y), f"Each combination of {names} has a colour of its own.", "soft")
        return
    *rows, columns = colours.kept
    heads = [columns.role, *(row.at(cell) for row in rows for cell in row.cells)]
    xs = [left + 16 + max(text_width(head) for head in heads)]
    for cell in columns.cells:
        xs.append(xs[-1] + 2 * _SWATCH + 4 + text_width(cell.label))
    canvas.text((left, y), columns.role, "strong")
    for x, cell in zip(xs, columns.cells, strict=False):
        canvas.text((x + (0 if rows else _SWATCH + 5), y), cell.label)
        if not rows:
            _draw_swatch(canvas, x, y, colours.of({columns.axes: cell.label}))
    for row in rows:
        for number, row_cell in enumerate(row.cells, start=1):
            below = y + number * _LEGEND_STEP
            canvas.text((left, below), row.at(row_cell), "strong")
            for x, cell in zip(xs, columns.cells, strict=False):
                _draw_swatch(canvas, x, below, colours.of({row.axes: row_cell.label, columns.axes: cell.label}))


def _draw_swatch(canvas: Canvas, x: float, baseline: float, colour: str) -> None:
    top, bottom = baseline - _SWATCH + 2, baseline + 2
    canvas.polygon([(x, top), (x + _SWATCH, top), (x + _SWATCH, bottom), (x, bottom)], colour)
