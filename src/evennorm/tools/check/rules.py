"""Collect all rules, and select some by code or name."""

from __future__ import annotations

from collections.abc import Iterable

from evennorm.errors import ArgumentError
from evennorm.tools.check import averages, axis, channels, drift, epsilon, neighbours, training
from evennorm.tools.check.rule import Rule

_MODULES = (axis, neighbours, averages, epsilon, channels, training, drift)
RULES: tuple[Rule, ...] = tuple(
    sorted(
        (found for module in _MODULES for found in vars(module).values() if isinstance(found, Rule)),
        key=lambda found: found.code,
    )
)


def selected(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Return the rules that `select` names (all, if none) without those that `ignore` names: by code, its beginning, or
    name.

    Raises:
        ArgumentError: a word that means no rule.

    Example:
        >>> from evennorm.tools.check.rules import selected
        >>> [rule.code for rule in selected(["BN1", "few-values"], ["BN101"])]
        ['BN102', 'BN505']
    """
    wanted = _meant(select, "--select") or set(RULES)
    unwanted = _meant(ignore, "--ignore")
    return tuple(found for found in RULES if found in wanted and found not in unwanted)


def _meant(words: Iterable[str], option: str) -> set[Rule]:
    found: set[Rule] = set()
    for word in words:
        meant = {each for each in RULES if each.code.startswith(word.upper()) or each.name == word}
        if not meant or len(word) < 3:
            codes = ", ".join(each.code for each in RULES)
            raise ArgumentError(
                f"{option} takes codes, their beginnings or names of findings; received {word!r}; there are {codes}"
            )
        found |= meant
    return found
