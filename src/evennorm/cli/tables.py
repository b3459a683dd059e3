"""Print tables of which no figure is cut, however narrow the terminal is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_LEAST, _GAP = 12, 2
"""Columns of the terminal: the fewest for cells that may be folded, and those between two cells."""


def plain_table(header_style: str) -> Table:
    """Return a table without lines. Of its columns, those that are not `no_wrap` are folded where there is little room."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style=header_style)


def print_table(console: Console, table: Table) -> None:
    """Print a table as wide as the console, or as its figures need: rich would cut them, a terminal wraps the lines."""
    from rich.measure import Measurement

    unlimited = console.options.update(max_width=10_000)
    needed = -_GAP
    for column in table.columns:
        widths = [Measurement.get(console, unlimited, cell).maximum for cell in (column.header, *column.cells)]
        widest = max(*widths, column.min_width or 0)
        needed += _GAP + (widest if column.no_wrap else min(widest, _LEAST))
    width = console.width
    console.width = max(width, needed)
    console.print(table, crop=False)
    console.width = width
