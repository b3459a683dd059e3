"""Let machines take part in a study that another one has begun: `evennorm compare --worker` and `--serve`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import click

from evennorm.errors import InputError, printable
from evennorm.tools.interrupts import INTERRUPTED

Bar = Callable[[], AbstractContextManager[tuple[Callable[[float, int], None], Callable[[str], None]]]]


def _only(ctx: click.Context, what: str, allowed: tuple[str, ...]) -> None:
    """Refuse options that would have no effect."""
    given = [
        max(option.opts, key=len)
        for option in ctx.command.params
        if option.name not in allowed
        and ctx.get_parameter_source(str(option.name)) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        others = ", ".join(f"--{name}" for name in allowed[1:])
        raise InputError(f"{what} goes with {others} alone; leave out {', '.join(given)}")


def _given(ctx: click.Context, options: dict[str, Any], name: str) -> Any:
    """Return an option that the user named on the command line; None for a default, which is not the study's."""
    return options[name] if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE else None


def take_part(ctx: click.Context, url: str, options: dict[str, Any], bar: Bar) -> None:
    """Train runs of a study that was begun elsewhere: `--worker`."""
    _only(ctx, "--worker", ("worker", "study", "data", "model", "jobs"))
    from evennorm.tools.compare.join import join

    try:
        with bar() as (progress, notice):
            data, model = (_given(ctx, options, name) for name in ("data", "model"))
            name, runs = join(url, options["study"], data, model, options["jobs"], progress, notice)
    except KeyboardInterrupt:
        click.echo("evennorm: interrupted; finished runs are kept, the same command continues from there", err=True)
        ctx.exit(INTERRUPTED)
    click.echo(f"the study {printable(name)} is complete with {runs} runs; the machine that started it has the results")


def pass_on(ctx: click.Context, address: str, storage: str | None) -> None:
    """Act as the gRPC proxy of a database: `--serve`."""
    _only(ctx, "--serve", ("serve", "storage"))
    from evennorm.tools.compare.storage import serve

    if storage is None:
        raise InputError("--serve passes on to a database; name it by --storage postgresql://USER@HOST/NAME")
    try:
        serve(address, storage, ready=lambda: click.echo(f"serving {printable(address)}; Ctrl-C ends it", err=True))
    except KeyboardInterrupt:
        ctx.exit(INTERRUPTED)
