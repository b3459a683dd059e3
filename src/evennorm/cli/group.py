"""Define the group of all commands: how each of them ends, whatever happens in it."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from evennorm.cli.configuration import configured
from evennorm.cli.progress import quiet_option
from evennorm.cli.tensorflow_log import QuietTensorFlow
from evennorm.cli.usage import NoSuchCommand, usage_in_one_line
from evennorm.errors import EvennormError, first_line, printable
from evennorm.tools.extras import missing
from evennorm.tools.interrupts import INTERRUPTED, LINE, interrupted, remembered

# Set before a command imports TensorFlow: the logs of absl, oneDNN and XLA tell users of a command nothing.
for _name, _value in {"TF_CPP_MIN_LOG_LEVEL": "3", "GLOG_minloglevel": "2", "GRPC_VERBOSITY": "ERROR"}.items():
    os.environ.setdefault(_name, _value)
sys.meta_path.insert(0, QuietTensorFlow())

_DEBUG = "evennorm.debug"

_NARROWEST, _NARROW = 30, 60
"""Columns of help: the fewest, and those below which options take a third of them."""

_ENDINGS = (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError)
"""Exceptions by which click ends a command; the last is that of `evennorm ... | head`."""


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta[_DEBUG] = True


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_remember,
        help="Show the traceback of an error.",
    )


force_option = click.option("--force", is_flag=True, help="Overwrite files of other kinds too, but never an input.")


class _Help(click.HelpFormatter):
    """Help that fits narrow terminals too: click writes 50 columns or more, of which options take up to 30."""

    def __init__(self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None) -> None:
        terminal = shutil.get_terminal_size().columns
        super().__init__(indent_increment, width or max(min(terminal, max_width or 80) - 2, _NARROWEST), max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, col_max if self.width >= _NARROW else self.width // 3, col_spacing)


class _Context(click.Context):
    formatter_class = _Help


class Group(click.Group):
    """A group that turns every failure of a tool into one line on stderr and exit code 2, and Ctrl-C into one line and
    130. Wrong words of a command are one line too."""

    context_class = _Context

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [_debug_option(), quiet_option()]

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.params += [_debug_option(), quiet_option()]
        cmd.context_class = _Context
        super().add_command(cmd, name)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with usage_in_one_line():
            return super().make_context(info_name, args, parent, **extra)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            raise NoSuchCommand(args[0], self.commands, ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with remembered():
            try:
                ctx.default_map = configured(self, Path.cwd())
                with usage_in_one_line(ctx):
                    value = super().invoke(ctx)
            except click.exceptions.Exit as ending:
                if interrupted() and ending.exit_code != INTERRUPTED:
                    _end(ctx, LINE, INTERRUPTED)
                raise
            except BaseException as error:
                if interrupted() or isinstance(error, KeyboardInterrupt):
                    _end(ctx, LINE, INTERRUPTED)
                if isinstance(error, _ENDINGS) or not isinstance(error, Exception):
                    raise
                if ctx.meta.get(_DEBUG):
                    traceback.print_exception(error)
                _end(ctx, f"evennorm: {printable(_in_words(error))}", 2)
            if interrupted():
                _end(ctx, LINE, INTERRUPTED)
            return value


def _in_words(error: Exception) -> str:
    if isinstance(error, EvennormError | OSError):
        return str(error)
    if isinstance(error, ImportError) and (absent := missing("evennorm", error)) is not None:
        return str(absent)
    if isinstance(error, UnicodeError):
        return f"a name cannot be written as text: {first_line(error)}; give it another"
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({first_line(error)}); take smaller batches or a larger machine"
    return (
        f"this is a fault of evennorm's, not of yours: {first_line(error)}; repeat the command with --debug and report what "
        "that shows"
    )


def _end(ctx: click.Context, line: str, code: int) -> None:
    click.echo(line, err=True)
    ctx.exit(code)
