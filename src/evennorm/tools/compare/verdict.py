"""Say in short lines what the intervals of a comparison show, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from evennorm.tools.compare.racing import Race, unlearned
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.statistics import Difference
from evennorm.tools.compare.train import Record

WORTH_REPEATING = 100
"""The most repeats that are proposed."""

NOTHING_LEARNED = (
    "No run learned: all ended no better than guessing, so that placements cannot be compared.\n"
    "Train longer (--epochs) or at other rates (--learning-rates)."
)


def verdict(settings: Settings, records: Mapping[Run, Record], race: Race) -> str:
    """Return a line for each pair of placements, what is best in one sentence, and what to do.

    It claims what the intervals show and nothing else; of placements that did not learn, that alone.
    """
    mute = unlearned(settings, records)
    if mute.issuperset(settings.placements):
        return NOTHING_LEARNED
    if not race.pairs:
        return f"Only {settings.placements[0]} was trained, so there is nothing to compare it with."
    if settings.repeats == 1:
        return "One repeat tells nothing about chance, so no difference can be claimed: use --repeats 5 or more."
    pairs = [pair for pair in race.differences if not {pair.better, pair.worse} <= mute]
    lines = [_line(pair, settings) for pair in pairs]
    if mute:
        names = [placement for placement in settings.placements if placement in mute]
        lines.append(f"no run with {listed(names)} learned anything")
    lines += ["", _headline(settings, race, mute), _advice(settings, race, pairs, mute)]
    return "\n".join(lines)


def leaders(settings: Settings, race: Race, mute: frozenset[str] = frozenset()) -> list[str]:
    """Return the placements that no other one is shown to be better than, the most accurate by validation first.

    Example:
        >>> from evennorm.tools.compare.racing import Race
        >>> from evennorm.tools.compare.statistics import Difference
        >>> from evennorm.tools.compare.settings import Settings
        >>> settings = Settings("digits", "paper-mlp", ("none", "before"), 3, (0.1,), 1, 32, "jax", 0, "out")
        >>> pair = Difference("before", "none", 0.2, 0.1, 0.3, True, None, 3)
        >>> leaders(settings, Race([], {}, {}, {("none", "before"): pair}))
        ['before']
    """
    worse = {pair.worse for pair in race.pairs.values() if pair.shown}
    wins = Counter(pair.better for pair in race.pairs.values())
    kept = [name for name in settings.placements if name not in worse | mute]
    return sorted(kept, key=lambda name: -wins[name])


def _headline(settings: Settings, race: Race, mute: frozenset[str]) -> str:
    best = leaders(settings, race, mute)
    others = [name for name in settings.placements if name not in best]
    if not others:
        among = [race.pairs[pair] for pair in race.pairs]
        if all(pair.equivalent for pair in among):
            return f"All placements are {_equally(settings).replace(' within', ', within')}."
        return f"No difference between {listed(best)} could be shown."
    if len(best) == 1:
        return f"Best is {best[0]}, {settings.measure.better} {listed(others)}{_in_metric(settings)}."
    between = [pair for names, pair in race.pairs.items() if set(names) <= set(best)]
    if all(pair.equivalent for pair in between):
        return f"Best are {listed(best)}, {_equally(settings)}."
    return f"Best are {listed(best)}, which could not be told apart."


def _line(pair: Difference, settings: Settings) -> str:
    """Return one pair in a line that is short enough for a terminal."""
    metric = settings.measure
    ends = f"({metric.text(pair.low)} to {metric.text(pair.high)})"
    counted = f"{pair.repeats} repeats"
    if pair.shown:
        return f"{pair.better} {metric.better} {pair.worse} by {metric.text(pair.difference)}{metric.unit} {ends}, {counted}"
    if pair.equivalent:
        within = f"{metric.text(settings.equivalent)}{metric.unit}"
        return f"{pair.better} and {pair.worse} equal within {within} {ends}, {counted}"
    return f"{pair.better} and {pair.worse} not told apart: {metric.text(pair.difference)} {ends}, {counted}{_needs(pair)}"


def _equally(settings: Settings) -> str:
    metric = settings.measure
    how = "equally accurate" if metric.is_share else "equal"
    return f"{how} within {metric.text(settings.equivalent)}{metric.unit}"


def _in_metric(settings: Settings) -> str:
    return "" if settings.metric == "accuracy" else f" in {settings.measure.title}"


def _needs(pair: Difference) -> str:
    return f"; {pair.repeats_needed} may do" if pair.repeats_needed else ""


def _advice(settings: Settings, race: Race, pairs: Sequence[Difference], mute: frozenset[str]) -> str:
    best = leaders(settings, race, mute)
    open_pairs = [pair for pair in pairs if not (pair.shown or pair.equivalent) and {pair.better, pair.worse} <= set(best)]
    name = best[0]
    told = f"Use {name}, at learning rate {race.chosen[name]:g}"
    if len(best) > 1:
        others = [f"{other} at {race.chosen[other]:g}" for other in best[1:]]
        told += f".\nAs far as is known, {listed(others, 'or')} will do too"
    needed = max((pair.repeats_needed or 0 for pair in open_pairs), default=0)
    if needed > WORTH_REPEATING:
        told += f".\nThey are so close that telling them apart may take {needed} repeats"
    elif needed:
        option = "--max-repeats" if settings.sequential else "--repeats"
        told += f".\nTo tell more apart: {option} {needed}"
    return told + "."


def points(accuracy: float | None) -> str:
    """Format a fraction in percentage points.

    Example:
        >>> points(0.0123)
        '1.2'
    """
    return f"{100 * (accuracy or 0):.1f}"


def listed(parts: Sequence[str], last: str = "and") -> str:
    """List words in a sentence.

    Example:
        >>> listed(["none", "before", "after"])
        'none, before and after'
    """
    return ", ".join(parts[:-1]) + f" {last} " * (len(parts) > 1) + parts[-1]
