"""Report what was measured of the advantages that articles praise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from evennorm.tools.compare.advantages import TOLERANCE, Advantages, Measure
from evennorm.tools.compare.measure import Metric, rounded
from evennorm.tools.compare.settings import Settings
from evennorm.tools.compare.statistics import Difference
from evennorm.tools.compare.verdict import listed


def told(
    settings: Settings, found: Sequence[Advantages], at_rates: Mapping[float, Sequence[Difference]] | None = None
) -> list[str]:
    """Return the measures in lines, a paragraph for each advantage; nothing where nothing was learned."""
    if not found:
        return []
    metric = settings.measure
    lines = [f"time: epochs until the test {metric.title} that none ends at, at the rates marked *"]
    lines += [f"  {each.placement}: {_time(each)}" for each in found if each.epochs_of_none is not None]
    if len(lines) == 1:
        why = "did not learn" if "none" in settings.placements else "is not among the placements"
        lines[0] = f"time: none {why}, so that there is nothing to reach"
    if len(settings.learning_rates) > 1:
        near = f"{100 * TOLERANCE:g} {'points' if metric.is_share else '%'}"
        lines.append(f"tolerance: learning rates within {near} of the best one, of those tried")
        lines += [f"  {each.placement}: {_rates(settings, each)}" for each in found]
        lines += [f"  at {rate:g} alone: {_ranking(pairs)}" for rate, pairs in (at_rates or {}).items()]
    gap = f"how much better the {metric.title} is on training than on test samples"
    gap = "training minus test accuracy" if metric.name == "accuracy" else gap
    lines.append(f"overfitting: {gap}{' in points' if metric.is_share else ''}")
    lines += [f"  {each.placement}: {_value(metric, each.gap)}" for each in found]
    if any(each.scales for each in found):
        unit = "points of " if metric.is_share else ""
        lines.append(f"initial weights: {unit}test {metric.title} that it costs to multiply them")
        lines += [
            f"  {each.placement}: " + "; ".join(f"by {scale:g}: {_value(metric, cost)}" for scale, cost in each.scales)
            for each in found
        ]
    return lines + _steadiness(settings, found)


def _steadiness(settings: Settings, found: Sequence[Advantages]) -> list[str]:
    lines = []
    if any(each.median_travel for each in found):
        lines.append("steadiness: over training one hidden unit's median input moved by so many half-widths of its")
        lines.append("distribution (15th to 85th percentile), at its widest so many times as wide as at its narrowest")
        lines += [
            f"  {each.placement}: moved by {_plain(each.median_travel)}; {_plain(each.width_change)} times as wide"
            for each in found
            if each.median_travel and each.width_change
        ]
    unseen = [each.placement for each in found if not each.median_travel] if settings.advantages else []
    if unseen:
        lines.append(f"steadiness is not known of {listed(unseen)}: no hidden unit was found, or its input stood still")
    return lines


def _time(each: Advantages) -> str:
    if each.epochs_to_none is None:
        return f"{each.reached} of {each.tried} repeats get there"
    seconds = "" if each.seconds_to_none is None else f", {rounded(each.seconds_to_none, 2)} s"
    return f"{_plain(each.epochs_to_none)} epochs of {each.epochs_of_none:.3g}{seconds}"


def _rates(settings: Settings, each: Advantages) -> str:
    unknown = [rate for rate in settings.learning_rates if rate not in each.tolerated + each.costly]
    parts = [f"{', '.join(f'{rate:g}' for rate in each.tolerated)}"]
    parts += [f"{', '.join(f'{rate:g}' for rate in each.costly)} cost more"] if each.costly else []
    parts += [f"{', '.join(f'{rate:g}' for rate in unknown)} not known"] if unknown else []
    return "; ".join(parts)


def _ranking(pairs: Sequence[Difference]) -> str:
    """Return what is shown at one rate, in the order of placements."""
    above: dict[str, list[str]] = {}
    for pair in sorted((pair for pair in pairs if pair.shown), key=lambda pair: -pair.difference):
        above.setdefault(pair.better, []).append(pair.worse)
    return "; ".join(f"{better} above {listed(worse)}" for better, worse in above.items()) or "no difference is shown"


def _value(metric: Metric, measure: Measure) -> str:
    return _written(measure, metric.text)


def _plain(measure: Measure) -> str:
    return _written(measure, "{:.1f}".format)


def _written(measure: Measure, text: Callable[[float], str]) -> str:
    ends = "" if measure.low is None or measure.high is None else f" ({text(measure.low)} to {text(measure.high)})"
    return f"{text(measure.mean)}{ends}"
