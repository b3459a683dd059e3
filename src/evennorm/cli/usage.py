"""Say in one line what is wrong with the words of a command: the rule, what was received, and where to read more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import IO, Any

import click
from click.core import ParameterSource

from evennorm.errors import printable

_UNFIT = re.compile(r"(.+?) is not (?:one of|in the range|a valid) .*", re.DOTALL)
"""What click says of a value that does not fit its type."""
_SIMILAR = 0.7
"""How similar a name must be to be suggested, from 0 to 1."""
_EXTRA = re.compile(r"Got unexpected extra arguments? \((.*)\)", re.DOTALL)
"""What click says of more arguments than a command takes."""


class UsageLine(click.ClickException):
    """A mistake in the words of a command, which click shows in one line on stderr before it exits with 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"evennorm: {printable(self.message)}", file=file, err=file is None)


@contextmanager
def usage_in_one_line(group: click.Context | None = None) -> Iterator[None]:
    """Turn the usage errors of click, which have several lines, into a `UsageLine`.

    Args:
        group: the context of the group, while it runs one of its commands.

    Raises:
        UsageLine: an option, argument or command that does not exist, is missing, or has a value that does not fit.
    """
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise UsageLine(f"{_mistake(error)}{_advice(error)} see `{_command(error, group)} --help`") from error


class NoSuchCommand(click.UsageError):
    """A command that does not exist."""

    def __init__(self, name: str, known: Iterable[str], ctx: click.Context):
        super().__init__(f"there is no command {name!r}; there are {', '.join(sorted(known))}", ctx)
        self.similar = get_close_matches(name, known, 1, _SIMILAR)


def _mistake(error: click.UsageError) -> str:
    if isinstance(error, click.MissingParameter) and error.param is not None and error.ctx is not None:
        return f"{error.ctx.info_name} needs {_written(error.param)}, which is missing"
    if isinstance(error, click.NoSuchOption):
        return f"there is no option {error.option_name}"
    if isinstance(error, click.BadOptionUsage):
        needs = "needs a value, which is missing" if "requires" in error.message else "takes no value"
        return f"{error.option_name} {needs}"
    if isinstance(error, click.BadParameter) and error.param is not None:
        rule, received = _rule(error.param.type), _UNFIT.fullmatch(error.message)
        where = _name(error.param) + (" in pyproject.toml" if _is_configured(error) else "")
        return f"{where} takes {rule}; received {received[1]}" if rule and received else f"{where}: {_plain(error.message)}"
    extra = _EXTRA.match(error.message)
    if extra is not None and error.ctx is not None:
        taken = [_name(parameter) for parameter in error.ctx.command.params if isinstance(parameter, click.Argument)]
        return f"{error.ctx.info_name} takes {' and '.join(taken) or 'options only'}; received {extra[1]!r} too"
    return _plain(error.format_message())


def _advice(error: click.UsageError) -> str:
    """Return what to write instead, where that can be guessed."""
    similar = error.similar if isinstance(error, NoSuchCommand) else []
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        options = (each for each in error.ctx.command.get_params(error.ctx) if isinstance(each, click.Option))
        similar = get_close_matches(error.option_name, [name for option in options for name in option.opts], 1, _SIMILAR)
    return f"; write {similar[0]}, or" if similar else ";"


def _command(error: click.UsageError, group: click.Context | None) -> str:
    """Return the command whose words are wrong; click's parser does not say it."""
    if error.ctx is not None:
        return error.ctx.command_path
    return "evennorm" if group is None else f"{group.command_path} {group.invoked_subcommand}"


def _rule(kind: click.ParamType) -> str:
    """Return what values of this type are, as in "a whole number of 1 or more"."""
    if isinstance(kind, click.Choice):
        return f"one of {', '.join(map(str, kind.choices))}"
    number = {"integer": "a whole number", "float": "a number"}.get(kind.name.split()[0], "")
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    if low is not None:
        return f"{number} of {low:g} or more" if high is None else f"{number} from {low:g} to {high:g}"
    return number


def _plain(message: str) -> str:
    """Return click's sentence as a part of one."""
    text = message.strip().removesuffix(".")
    return text[:1].lower() + text[1:]


def _name(parameter: click.Parameter) -> str:
    if isinstance(parameter, click.Option):
        return max(parameter.opts, key=len)
    return parameter.human_readable_name


def _written(parameter: click.Parameter) -> str:
    """Return a parameter as it is written in a command, as in "--data DATA"."""
    return f"{_name(parameter)} {parameter.metavar}" if isinstance(parameter, click.Option) else _name(parameter)


def _is_configured(error: click.BadParameter) -> bool:
    if error.ctx is None or error.param is None or error.param.name is None:
        return False
    return error.ctx.get_parameter_source(error.param.name) is ParameterSource.DEFAULT_MAP
