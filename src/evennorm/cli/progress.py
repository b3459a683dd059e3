"""Show what a command is doing and how much time is left: on stderr, if that is a terminal, unless --quiet is given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from evennorm.tools.interrupts import stop_if_interrupted

_QUIET = "evennorm.quiet"
_BAR, _TIMES, _NARROW = 20, 24, 64
"""Columns of a terminal: of the bar, of the spinner and the times, and below which there is no bar."""


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta[_QUIET] = True


def quiet_option() -> click.Option:
    """Make the option --quiet, which every command has."""
    return click.Option(
        ["--quiet"], is_flag=True, expose_value=False, is_eager=True, callback=_remember, help="Show no progress."
    )


class Progress:
    """Show the progress of one command; `bar` makes one."""

    def __init__(self, console: Any, shown: Any):
        self._console, self._shown, self._task = console, shown, shown.tasks[0]

    def __call__(self, what: str, done: float = 0, total: float | None = None) -> None:
        """Say what is being done, how much of it is done, and of how much, if that is known.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, and a library has swallowed it.
        """
        stop_if_interrupted()
        self._task.total = total or None  # which update() takes for no change
        self._shown.update(self._task.id, description=what, completed=done)

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self._console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(first: str = "loading", period: float = 30) -> Iterator[Progress]:
    """Show a bar until the block ends.

    Args:
        first: what is being done at first.
        period: the seconds whose speed tells the time left.
    """
    from rich import progress as rich
    from rich.table import Column
    from rich.text import Text

    class TimeLeft(rich.TimeRemainingColumn):
        def render(self, task: rich.Task) -> Any:
            left = task.time_remaining
            return Text() if left is None else Text.assemble(super().render(task), " left")

    console = terminal()
    ctx = click.get_current_context(silent=True)
    quiet = ctx is not None and ctx.find_root().meta.get(_QUIET, False)
    middle = [] if console.width < _NARROW else [rich.BarColumn(_BAR)]
    room = console.width - _TIMES - len(middle) * (_BAR + 1)
    name = rich.TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=room))
    columns = (rich.SpinnerColumn(), name, *middle, rich.TimeElapsedColumn(), TimeLeft(compact=True))
    # The bar is removed at the end, so that an error is one line.
    disabled = quiet or not console.is_interactive
    with rich.Progress(*columns, console=console, speed_estimate_period=period, transient=True, disable=disabled) as shown:
        shown.add_task(first, total=None)
        yield Progress(console, shown)


def terminal() -> Any:
    """Return the console of stderr. FORCE_COLOR colours a log, and does not make it a terminal on which a bar can move."""
    from rich.console import Console

    return Console(stderr=True, force_interactive=None if sys.stderr.isatty() else False)
