"""Show a progress bar on stderr for the tools, if a person watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evennorm.tools.interrupts import stop_if_interrupted


@contextmanager
def bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function that moves the bar: what is being done, how much of it is done, and of how much, where that is
    known."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Removed when it is done, so that an error is one line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task("loading", total=None)

        def move(what: str, done: int, total: int | None) -> None:
            stop_if_interrupted()
            progress.update(task, description=what, completed=done, total=total)

        yield move
