"""Write what reports show in a notebook: a title, paragraphs, lists and tables, with every text escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from evennorm.errors import printable

_CELL = ' style="text-align: left; white-space: normal"'


def escaped(text: object) -> str:
    """Text of unknown origin, such as a layer's name, for a page.

    Example:
        >>> escaped("<script>")
        '&lt;script&gt;'
    """
    return html.escape(printable(text))


def titled(title: str, *parts: str) -> str:
    """Return the whole output of a cell: a title, and what the functions below made.

    Example:
        >>> titled("net <1>", paragraphs(["a & b"]))
        '<div><p><strong>net &lt;1&gt;</strong></p><p>a &amp; b</p></div>'
    """
    return f"<div><p><strong>{escaped(title)}</strong></p>{''.join(parts)}</div>"


def paragraphs(lines: Iterable[str]) -> str:
    """Return a paragraph for each line that is not empty."""
    return "".join(f"<p>{escaped(line)}</p>" for line in lines if line)


def bullets(lines: Iterable[str]) -> str:
    """Return a list; nothing where it has no items."""
    items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; nothing where it has no rows."""
    body = "".join(f"<tr>{''.join(f'<td{_CELL}>{escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
    heads = "".join(f"<th{_CELL}>{escaped(name)}</th>" for name in head)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>" if body else ""
