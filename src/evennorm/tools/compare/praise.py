"""Report what was measured of the advantages that articles praise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evennorm.tools.compare.advantages import TOLERANCE, Advantages, Measure
from evennorm.tools.compare.settings import Settings
from evennorm.tools.compare.statistics import Difference
from evennorm.tools.compare.verdict import listed


def told(
    settings: Settings, found: Sequence[Advantages], at_rates: Mapping[float, Sequence[Difference]] | None = None
) -> list[str]:
    """Return the measures in lines, a paragraph for each advantage; nothing where nothing was learned."""
    if not found:
        return []
    lines = ["time: epochs until the test accuracy that none ends at, at the rates marked *"]
    lines += [f"  {each.placement}: {_time(each)}" for each in found if each.epochs_of_none is not None]
    if len(lines) == 1:
        lines[0] = "time: none did not learn, so that there is nothing to reach"
    if len(settings.learning_rates) > 1:
        lines.append(f"tolerance: learning rates within {100 * TOLERANCE:g} points of the best one, of those tried")
        lines += [f"  {each.placement}: {_rates(settings, each)}" for each in found]
        lines += [f"  at {rate:g} alone: {_ranking(pairs)}" for rate, pairs in (at_rates or {}).items()]
    lines.append("overfitting: training minus test accuracy in points")
    lines += [f"  {each.placement}: {_share(each.gap)}" for each in found]
    if any(each.scales for each in found):
        lines.append("initial weights: points of test accuracy that it costs to multiply them")
        lines += [
            f"  {each.placement}: " + "; ".join(f"by {scale:g}: {_share(cost)}" for scale, cost in each.scales)
            for each in found
        ]
    if any(each.median_travel for each in found):
        lines.append("steadiness: over training one hidden unit's median input moved by so many half-widths of its")
        lines.append("distribution (15th to 85th percentile), at its widest so many times as wide as at its narrowest")
        lines += [
            f"  {each.placement}: moved by {_plain(each.median_travel)}; {_plain(each.width_change)} times as wide"
            for each in found
            if each.median_travel and each.width_change
        ]
    return lines


def _time(each: Advantages) -> str:
    if each.epochs_to_none is None:
        return f"{each.reached} of {each.tried} repeats get there"
    seconds = "" if each.seconds_to_none is None else f", {each.seconds_to_none:.2g} s"
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


def _share(measure: Measure) -> str:
    low, high = (None if end is None else 100 * end for end in (measure.low, measure.high))
    return _plain(Measure(100 * measure.mean, low, high, measure.repeats))


def _plain(measure: Measure) -> str:
    ends = "" if measure.low is None or measure.high is None else f" ({measure.low:.1f} to {measure.high:.1f})"
    return f"{measure.mean:.1f}{ends}"
