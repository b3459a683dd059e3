"""Read the options that a project's `pyproject.toml` sets for the commands."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from evennorm.errors import InputError

_NEVER = ("force", "help", "debug", "version", "explain", "worker", "serve")
"""Options that can be given on the command line only."""


def configured(group: click.Group, folder: Path) -> dict[str, Any]:
    """Return the tables `[tool.evennorm.COMMAND]` of the nearest `pyproject.toml` that has one, as defaults of click's
    options.

    Names are those of the options, with - or _. A list stands for an option whose values are separated by commas.

    Raises:
        InputError: a file that is no TOML, or a name that no command or option has.
    """
    for path in (each / "pyproject.toml" for each in (folder, *folder.parents)):
        if not path.is_file():
            continue
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("evennorm")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid TOML: {error}") from error
        if tables is not None:
            return _defaults(group, path, tables)
    return {}


def _defaults(group: click.Group, path: Path, tables: Any) -> dict[str, Any]:
    where = f"{path}, [tool.evennorm]"
    if not isinstance(tables, dict):
        raise InputError(f"{where} must be a table with one table per command; received {tables!r}")
    defaults: dict[str, Any] = {}
    for name, table in tables.items():
        command = group.commands.get(name)
        if command is None or not isinstance(table, dict):
            raise InputError(f"{where} holds one table per command, as [tool.evennorm.check]; received {name!r}; "
                             f"there are {', '.join(sorted(group.commands))}")  # fmt: skip
        options = {
            str(parameter.name): parameter
            for parameter in command.params
            if isinstance(parameter, click.Option) and parameter.name not in _NEVER
        }
        defaults[name] = {}
        for key, value in table.items():
            option = options.get(_parameter(command, key))
            if option is None:
                known = ", ".join(sorted(max(each.opts, key=len).lstrip("-") for each in options.values()))
                raise InputError(f"{path}, [tool.evennorm.{name}]: no option {key!r} can be set here; there are {known}")
            defaults[name][option.name] = _value(value, option)
    return defaults


def _parameter(command: click.Command, key: str) -> str:
    """Return the parameter of an option's name: that of `--json` is `as_json`."""
    written = "--" + key.replace("_", "-")
    return next((str(parameter.name) for parameter in command.params if written in parameter.opts), "")


def _value(value: Any, option: click.Option) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) and not option.multiple else value
