"""Read and write the names of placements: of the whole model, of another normalization, of a mixture site by site.

    before            batch normalization before each activation
    before:layer      layer normalization there
    mix:b2na          batch normalization before the first two activations, at the third nowhere, after the fourth

A name says all there is to know, so that a study's runs can be read without anything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from evennorm.errors import ArgumentError

PLACEMENTS = ("none", "before", "after", "input", "as-is")
"""Without batch normalization, between each layer and its activation, after each activation, as first layer, as given."""

NORMS = ("batch", "layer", "group", "rms", "none")
NORMALIZED = ("before", "after", "input")
"""Placements at which other normalizations may stand."""

LETTERS = {"n": "none", "b": "before", "a": "after"}
_MIXTURE = re.compile(r"mix:(?:[nba][0-9]*)+")


class Variant(NamedTuple):
    """Where the normalization stands, and which one it is."""

    where: str
    norm: str = "batch"
    mixture: tuple[str, ...] = ()
    """The place at each site; empty where `where` says it for the whole model."""


def variant(name: str) -> Variant:
    """Return the variant that a placement's name describes.

    Raises:
        ArgumentError: it is none.

    Example:
        >>> variant("before"), variant("after:group")
        (Variant(where='before', norm='batch', mixture=()), Variant(where='after', norm='group', mixture=()))
        >>> variant("mix:b2n").mixture
        ('before', 'before', 'none')
    """
    if _MIXTURE.fullmatch(name):
        parts = re.findall(r"([nba])([0-9]*)", name.removeprefix("mix:"))
        return Variant("mix", mixture=tuple(LETTERS[letter] for letter, count in parts for _ in range(int(count or 1))))
    where, _, norm = name.partition(":")
    if name in PLACEMENTS:
        return Variant(name)
    if where in NORMALIZED and norm in NORMS[1:4]:
        return Variant(where, norm)
    raise ArgumentError(
        f"placements are {', '.join(PLACEMENTS)}, or before:layer and the like with layer, group or rms normalization; "
        f"received {name!r}"
    )


def mixture_name(places: Sequence[str]) -> str:
    """Return the name of a mixture.

    Example:
        >>> mixture_name(["before", "before", "none", "after"])
        'mix:b2na'
    """
    letters = {place: letter for letter, place in LETTERS.items()}
    runs = [(letter, len(list(group))) for letter, group in groupby(letters[place] for place in places)]
    return "mix:" + "".join(f"{letter}{count if count > 1 else ''}" for letter, count in runs)


def expanded(placements: Iterable[str], norms: Iterable[str]) -> tuple[str, ...]:
    """Return the placements with each of these normalizations.

    Raises:
        ArgumentError: a word that is no normalization, or none at all.

    Example:
        >>> expanded(["none", "before"], ["batch", "layer"])
        ('none', 'before', 'before:layer')
        >>> expanded(["before"], ["rms", "none"])
        ('none', 'before:rms')
    """
    asked = list(norms)
    wrong = [norm for norm in asked if norm not in NORMS]
    if wrong or not asked or len(set(asked)) < len(asked):
        raise ArgumentError(
            f"norms are one or more of {', '.join(NORMS)}, each named once; "
            f"received {', '.join(wrong or asked) or 'nothing'}"
        )
    names = [] if "none" not in asked else ["none"]
    for placement in placements:
        if placement not in NORMALIZED:
            names += [placement] * (placement != "none" or "none" not in asked)
        else:
            names += [placement if norm == "batch" else f"{placement}:{norm}" for norm in asked if norm != "none"]
    return tuple(names)


def parameters(name: str) -> dict[str, str]:
    """Return the name as parameters of an Optuna trial; a parameter has one range in all studies of all versions.

    Example:
        >>> parameters("before:layer"), parameters("mix:bn")
        ({'placement': 'before', 'normalization': 'layer'}, {'site 1': 'before', 'site 2': 'none'})
    """
    found = variant(name)
    if found.mixture:
        return {f"site {number}": place for number, place in enumerate(found.mixture, 1)}
    return {"placement": found.where} | ({} if found.norm == "batch" else {"normalization": found.norm})


def choices(parameter: str) -> tuple[str, ...]:
    """Return the range of one of these parameters."""
    return {"placement": PLACEMENTS, "normalization": NORMS[:4]}.get(parameter, tuple(LETTERS.values()))


def where_of(found: Variant, sites: Sequence[str]) -> str | Mapping[str, str | None]:
    """Return the `where` argument of `place`.

    Raises:
        ArgumentError: a mixture of another number of sites.
    """
    if not found.mixture:
        return found.where
    if len(found.mixture) != len(sites):
        raise ArgumentError(f"the mixture is of {len(found.mixture)} sites, and the model has {len(sites)}")
    return {site: None if place == "none" else place for site, place in zip(sites, found.mixture, strict=True)}


def options_of(found: Variant, **batch: Any) -> dict[str, Any]:
    """Return the other arguments of `place`: those of batch normalization go to batch normalization only."""
    return batch if found.norm == "batch" else {"norm": found.norm}
