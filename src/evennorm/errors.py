"""The errors evennorm raises: each names the rule that was broken, what arrived, and what to do."""


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
