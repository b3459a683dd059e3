"""Define the errors that evennorm raises, each naming the rule, what arrived and what to do, and shorten those of other
libraries."""

import json
import unicodedata
from typing import Any

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control and format characters, lone surrogates, and line and paragraph separators."""

_COMMANDS = (("::", ":\\x3a"), ("##[", "#\\x23["), ("##vso[", "#\\x23vso["), ("##teamcity[", "#\\x23teamcity["))
"""Commands that CI services obey wherever they appear in a log, and what is written instead."""


class EvennormError(Exception):
    """Base class of every error that evennorm raises on purpose. Its text is one line that a terminal can show."""


class ShapeError(EvennormError, ValueError):
    """A shape, an axis, a mask or an array that does not fit the others."""


class ArgumentError(EvennormError, ValueError):
    """An argument outside its range, or two that contradict each other."""


class InputError(EvennormError, ValueError):
    """Data, a model or a file that a tool was given and cannot use."""


class SynchronizationError(EvennormError, RuntimeError):
    """Processes that share statistics disagree, or one of them is missing."""


class MissingExtra(EvennormError, ImportError):
    """The framework or package that a part of evennorm needs is not installed."""

    def __init__(self, what: str, extra: str, package: str | None = None, instead: str | None = None):
        needed = "a package that" if package is None else f"the package {package}, which"
        other = "" if instead is None else f", or {instead}"
        super().__init__(f"{what} needs {needed} is not installed; install it with: pip install 'evennorm[{extra}]'{other}")


def printable(text: object) -> str:
    """Return text of unknown origin, such as a name in a file, as one line that no terminal and no CI service interprets.

    Control characters, line breaks, characters without a width or that turn the direction of writing, and lone surrogates
    become escapes; so do the words by which CI services are commanded in their logs. All other text stays.

    Example:
        >>> print(printable("conv\\x1b[2J\\n::error::x, größer"))
        conv\\x1b[2J\\n:\\x3aerror:\\x3ax, größer
    """
    shown = "".join(_escaped(c) if unicodedata.category(c) in _HIDDEN else c for c in str(text))
    for command, harmless in _COMMANDS:
        shown = shown.replace(command, harmless)
    return shown


def printable_json(value: Any) -> str:
    """Return `value` as JSON text in ASCII that no CI service interprets. Reading it gives `value` again.

    Example:
        >>> print(printable_json({"layer": "##[error]"}))
        {
          "layer": "#\\u0023[error]"
        }
    """
    text = json.dumps(value, indent=2)
    for command, _ in _COMMANDS:
        text = text.replace(command, f"{command[0]}\\u{ord(command[1]):04x}{command[2:]}")
    return text


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def reason_of(error: BaseException) -> str:
    """Return what an error of a library says, as one line: the first of its text that says something; else its class."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:300] for line in lines if line), type(error).__name__)


def first_line(error: BaseException) -> str:
    """Return the name of an error's class, followed by the line that `reason_of` gives.

    Example:
        >>> first_line(ValueError("not so\\nbut so")), first_line(KeyError())
        ('ValueError: not so', 'KeyError')
    """
    name, reason = type(error).__name__, reason_of(error)
    return name if reason == name else f"{name}: {reason}"
