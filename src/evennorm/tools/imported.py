"""`module:function`, the user's own code, goes in; the object that it names comes out."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from evennorm.errors import InputError, first_line


def imported(name: str, label: str, absent: str) -> Any:
    """The object `function` of `module`, imported from the current folder as `python -m` does; `function` may have dots.

    Args:
        name: "module:function".
        label: what errors begin with.
        absent: how the error of a module without such an object ends, behind "MODULE has no ".

    Raises:
        InputError: there is no such module or object, or importing it fails.

    Example:
        >>> imported("math:floor", "--data", "'floor'")(2.5)
        2
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{label}: no module {error.name!r} can be imported from {os.getcwd()}") from error
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"{label}: importing {module} fails: {first_line(error)}") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise InputError(f"{label}: {module} has no {absent}")
        found = getattr(found, part)
    return found
