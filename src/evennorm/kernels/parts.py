"""Remember why a compiled part cannot be used, and warn its users once."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import NamedTuple

from evennorm.errors import reason_of

__all__ = ["BUILD", "PARTS", "Problem", "keep", "problem", "warn_once"]

PARTS = {"numpy": "_cpu", "torch": "_cpu", "jax": "_xla", "tensorflow": "_tensorflow"}
"""The compiled part, a module in this folder, that each engine uses on the CPU."""

BUILD = "run pip install . in evennorm's source tree"


class Problem(NamedTuple):
    """Why a part cannot be used, and what to do about it."""

    why: str
    remedy: str


_problems: dict[str, Problem] = {}
_warned: set[str] = set()


def keep(part: str, error: BaseException | str, remedy: str = BUILD) -> None:
    """Remember why `part` cannot be used: the error of its import, or a reason in words.

    Example:
        >>> keep("_none", ImportError("cannot import name '_none'"))
        >>> problem("_none").why
        'evennorm.kernels._none is not built for this Python'
        >>> keep("_none", "_none is out of date", "update it")
        >>> problem("_none")
        Problem(why='_none is out of date', remedy='update it')
    """
    if isinstance(error, str):
        why = error
    elif find_spec(f"evennorm.kernels.{part}") is None:
        why = f"evennorm.kernels.{part} is not built for this Python"
    else:
        why = f"evennorm.kernels.{part} cannot be loaded: {reason_of(error)}"
    _problems[part] = Problem(why, remedy)


def problem(part: str) -> Problem | None:
    """Return why a part cannot be used; None if no problem is known."""
    return _problems.get(part)


def warn_once(engine: str) -> None:
    """Warn, once, that an engine computes without its compiled kernels, unless the user turned them off."""
    from evennorm.kernels import FORCED

    found = problem(PARTS[engine])
    if found is None or FORCED is not None or engine in _warned:
        return
    _warned.add(engine)
    warnings.warn(
        f"evennorm.{engine} computes without its compiled kernels, and slower: {found.why}. To fix it, {found.remedy}; "
        "`evennorm doctor` says more; EVENNORM_KERNEL=reference turns the kernels and this warning off",
        stacklevel=3,
    )
