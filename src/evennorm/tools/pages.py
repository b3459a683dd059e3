"""Fill the template of an HTML page, with every text escaped for browsers and terminals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from evennorm import __version__
from evennorm.errors import printable


def filled(package: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Return `page.html.j2` of a package, filled with `values`, the version and the time.

    Text is escaped, but not what the template marks as `safe`.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= filters
    template = environment.from_string((files(package) / "page.html.j2").read_text("utf-8"))
    return template.render(version=__version__, now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **values)


def _shown(value: Any) -> Any:
    """Return text without control characters; markup from the template itself stays as it is."""
    return printable(value) if type(value) is str else value
