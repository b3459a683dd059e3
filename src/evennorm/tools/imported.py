"""Import `module:function`, the user's own code, and return the object it names."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from evennorm.errors import InputError, first_line


def imported(name: str, label: str, absent: str) -> Any:
    """Return the object `function` of `module`, imported from the current folder as `python -m` does; `function` may have
    dots.

    Args:
        name: "module:function".
        label: what errors begin with.
        absent: how the error of a module without such an object ends, after "MODULE has no ".

    Raises:
        InputError: there is no such module or object, or importing it fails.

    Example:
        >>> imported("math:floor", "--data", "'floor'")(2.5)
        2
    """
    module, _, function = name.partition(":")
    if hint := misnamed(name):
        raise InputError(f"{label}: {hint}")
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


def misnamed(text: str) -> str:
    """Return what to write instead of a text that was meant as `module:function`; "" where it may be one, or is something
    else.

    Example:
        >>> misnamed("nets/small.py:build")
        'a module is named as in an import, without .py and with dots for folders; write nets.small:build'
        >>> misnamed("nets.small:build")
        ''
    """
    path, _, function = text.rpartition(":")
    if function and path.endswith(".py"):
        module = ".".join(part for part in Path(path).with_suffix("").parts if part not in (".", os.sep))
        return f"a module is named as in an import, without .py and with dots for folders; write {module}:{function}"
    file = Path(text.replace(".", os.sep) if re.fullmatch(r"\w+(\.\w+)*", text) and not text.endswith(".py") else text)
    file = file if file.suffix == ".py" else file.with_name(f"{file.name}.py")
    if text and not path and file.is_file():
        module = ".".join(file.with_suffix("").parts)
        return f"{file} is a module; name the function in it too, as in {module}:build"
    return ""
