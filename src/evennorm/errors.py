"""The errors evennorm raises: each names the rule that was broken, what arrived and what to do. Others', as one line."""


class EvennormError(Exception):
    """Base of every error evennorm raises on purpose; its text is one line, fit for a terminal."""


class ShapeError(EvennormError, ValueError):
    """A shape, an axis, a mask or an array that does not fit the others."""


class ArgumentError(EvennormError, ValueError):
    """An argument outside its range, or two that contradict each other."""


class InputError(EvennormError, ValueError):
    """Data, a model or a file handed to a tool that cannot be used as it is."""


class MissingExtra(EvennormError, ImportError):
    """A part of evennorm was asked for whose framework is not installed."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs a package that is not installed; install it with: pip install 'evennorm[{extra}]'")


def reason_of(error: BaseException) -> str:
    """What an error of a library says, as one line: the first of its text that says something; else its class."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:300] for line in lines if line), type(error).__name__)


def first_line(error: BaseException) -> str:
    """The same behind the name of its class.

    Example:
        >>> first_line(ValueError("not so\\nbut so")), first_line(KeyError())
        ('ValueError: not so', 'KeyError')
    """
    name, reason = type(error).__name__, reason_of(error)
    return name if reason == name else f"{name}: {reason}"
