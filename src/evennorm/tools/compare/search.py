"""Look for a mixture of places, site by site, that is better than one place for the whole model.

The search trains placements of the whole model first, then mixtures that Optuna's tree-structured Parzen estimator proposes
(Bergstra et al. 2011), and scores them on validation samples, all from one seed that no other run has. What it finds is one
mixture, which is then compared with the simple placements in fresh paired repeats on test samples, as if it had been named
beforehand. So the runs that chose it are not those that judge it, and having looked at many costs nothing but one more
placement, for which the intervals of all pairs allow.

Proposals are a function of the finished runs alone, round by round: an interrupted search goes on where it stopped, and
several processes search as one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from evennorm.errors import ArgumentError
from evennorm.tools.compare.settings import SEARCH_REPEAT, Run, Settings
from evennorm.tools.compare.statistics import Difference
from evennorm.tools.compare.train import Record
from evennorm.tools.compare.variants import LETTERS, mixture_name, variant
from evennorm.tools.compare.verdict import listed

Pairs = Mapping[tuple[str, str], Difference]

DEFAULT_BUDGET = 30
PER_ROUND = 4
"""Mixtures that are proposed at once, so that several processes have something to train."""

ATTEMPTS = 50
"""Proposals for an untried mixture, before the next untried one in order is taken."""


@dataclass(frozen=True)
class Search:
    """The state of a search."""

    runs: list[Run]
    """All runs that it asks for so far."""

    mixture: str | None = None
    """The best mixture, once all runs have been trained."""


def budget_of(placements: list[str]) -> tuple[list[str], int]:
    """Return the placements without `search`, and how many runs it may train; 0 where it is not among them.

    Raises:
        ArgumentError: the budget is no number.

    Example:
        >>> budget_of(["search:40", "none"]), budget_of(["before"])
        ((['none'], 40), (['before'], 0))
    """
    rest = [name for name in placements if name.partition(":")[0] != "search"]
    asked = [name for name in placements if name not in rest]
    if not asked:
        return rest, 0
    _, colon, number = asked[0].partition(":")
    if len(asked) > 1 or (colon and not (number.isdecimal() and len(number) < 7 and int(number))):
        raise ArgumentError(
            f"search is named once, as search or search:BUDGET with a whole number; received {listed(asked)}"
        )
    return rest, int(number or DEFAULT_BUDGET)


def check(settings: Settings) -> None:
    """Refuse a search that cannot find anything.

    Raises:
        ArgumentError: too few sites for a mixture, or a budget that the placements of the whole model use up.
    """
    if settings.search and settings.sites < 2:
        raise ArgumentError(
            f"search mixes places at two activations or more, and this model has {settings.sites} that can be told apart; "
            "leave search out"
        )
    least = 3 * len(settings.learning_rates) + 1
    if settings.search and settings.search < least:
        raise ArgumentError(
            f"a search begins with 3 placements of the whole model at each learning rate; its budget must be at least "
            f"{least}; received {settings.search}"
        )


def search(settings: Settings, records: Mapping[Run, Record]) -> Search:
    """Return the state of the search, by the finished runs."""
    runs = [Run(name, rate, SEARCH_REPEAT) for rate in settings.learning_rates for name in LETTERS.values()]
    combinations = 3**settings.sites * len(settings.learning_rates)
    most = min(settings.search, combinations)
    while all(run in records for run in runs):
        if len(runs) >= most:
            return Search(runs, _best(settings, runs, records))
        runs += _proposed(settings, runs, records, min(PER_ROUND, most - len(runs)))
    return Search(runs)


def resolved(settings: Settings, records: Mapping[Run, Record]) -> Settings | None:
    """Return the settings with the search's result among the placements; None where the search is not over."""
    if not settings.search:
        return settings
    found = search(settings, records).mixture
    if found is None:
        return None
    return replace(settings, placements=(*settings.placements, found), search=0)


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    mixture: str
    layers: dict[str, str]
    """The place at each site: none, before or after."""

    tried: int
    """Runs that were trained to find it."""

    lines: list[str]


def outcome(settings: Settings, records: Mapping[Run, Record], sites: list[str], pairs: Pairs) -> Found:
    """Return the result of a finished study's search.

    Args:
        settings: with the search.
        records: of all runs.
        sites: the names of the layers.
        pairs: the differences of the comparison that followed.
    """
    ended = search(settings, records)
    assert ended.mixture is not None
    layers = layers_of(ended.mixture, sites)
    return Found(ended.mixture, layers, len(ended.runs), said(pairs, ended.mixture, layers))


def said(differences: Pairs, mixture: str, layers: Mapping[str, str]) -> list[str]:
    """Say which layers the mixture normalizes, and whether it is shown to be better than all simple placements.

    Only a mixture that beats each of them beats the best of them, whichever that is.
    """
    pairs = [pair for names, pair in differences.items() if mixture in names]
    places = {place: [name for name, found in layers.items() if found == place] for place in LETTERS.values()}
    parts = [f"{place} {listed(names)}" for place, names in places.items() if names and place != "none"]
    lines = [f"{mixture} normalizes {'; '.join(parts)}" + (f"; not {listed(places['none'])}" if places["none"] else "")]
    if pairs and all(pair.shown and pair.better == mixture for pair in pairs):
        return [*lines, "This mixture is above every simple placement."]
    unbeaten = [
        ({pair.better, pair.worse} - {mixture}).pop() for pair in pairs if not (pair.shown and pair.better == mixture)
    ]
    return [
        *lines,
        f"No mixture is shown to beat the best simple placement: this one is not shown above {listed(unbeaten)}.",
    ]


def layers_of(mixture: str, sites: list[str]) -> dict[str, str]:
    """Return the place of each layer in the mixture."""
    return dict(zip(sites, variant(mixture).mixture, strict=True))


def _best(settings: Settings, runs: list[Run], records: Mapping[Run, Record]) -> str:
    """Return the mixture that is best on validation samples; the first, where several are."""
    mixtures = [run for run in runs if variant(run.placement).mixture]
    return max(mixtures, key=lambda run: settings.measure.score(records[run].validation_accuracy)).placement


def _proposed(settings: Settings, runs: list[Run], records: Mapping[Run, Record], count: int) -> list[Run]:
    """Return the next runs, as a function of those before."""
    import optuna
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [f"site {number}" for number in range(1, settings.sites + 1)]
    ranges: dict[str, Any] = {name: CategoricalDistribution(tuple(LETTERS.values())) for name in names}
    ranges["learning rate"] = CategoricalDistribution(settings.learning_rates)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=settings.seed + len(runs)))
    for run in runs:
        places = variant(run.placement).mixture or (run.placement,) * settings.sites
        score = settings.measure.score(records[run].validation_accuracy)
        values = {**dict(zip(names, places, strict=True)), "learning rate": run.learning_rate}
        study.add_trial(create_trial(params=values, distributions=ranges, value=score))
    found: list[Run] = []
    for _ in range(ATTEMPTS):
        asked = study.ask(ranges).params
        run = _run([asked[name] for name in names], asked["learning rate"])
        if run not in runs and run not in found:
            found.append(run)
        if len(found) == count:
            return found
    left = (
        _run(places, rate) for places in product(LETTERS.values(), repeat=len(names)) for rate in settings.learning_rates
    )
    for run in left:
        if len(found) == count:
            break
        if run not in runs and run not in found:
            found.append(run)
    return found


def _run(places: Any, rate: float) -> Run:
    """Return one run of the search; places that are the same everywhere get the name of the whole model's placement."""
    name = places[0] if len(set(places)) == 1 else mixture_name(places)
    return Run(name, rate, SEARCH_REPEAT)
