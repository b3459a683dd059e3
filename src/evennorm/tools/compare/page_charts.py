"""Describe the figures of a comparison, independent of the library that draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evennorm.errors import printable
from evennorm.tools.compare.curves import style_of
from evennorm.tools.compare.racing import cell
from evennorm.tools.compare.statistics import Difference, interval
from evennorm.tools.compare.table import curve, longest

if TYPE_CHECKING:
    from evennorm.tools.compare.report import Comparison

SHOWN, EQUIVALENT, OPEN = ("#0072B2", "s", "-"), ("#009E73", "D", "-"), ("#000000", "o", "-")
"""Styles of the three kinds of differences."""


@dataclass(frozen=True)
class Series:
    """Points with one name, each with an interval where it is known."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None]
    """The ends of the intervals of `y`, or of `x` where the chart is horizontal."""

    high: Sequence[float | None]
    hover: Sequence[str]
    """The text of each point."""

    style: tuple[str, str, str]
    """Colour, marker and dash, in matplotlib's words."""


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    name: str
    """Lower case and hyphens: it is part of the page's identifiers."""

    title: str
    x: str
    y: str
    """What the axes show, with units."""

    series: Sequence[Series]
    kind: str
    """`band`: lines, intervals as bands; `bars`: lines, intervals as bars; `forest`: points, horizontal bars."""

    y_range: tuple[float, float] | None = None
    x_ticks: Sequence[float] = ()
    """Positions of the only ticks, where the axis is logarithmic."""

    y_names: Sequence[str] = ()
    """The rows of a forest plot, from below."""

    margin: float | None = None
    """The margin of a forest plot: a smaller difference counts as none."""


@dataclass(frozen=True)
class Group:
    """Charts that belong together, and what they show."""

    title: str
    caption: str
    charts: Sequence[Chart]


def groups(comparison: Comparison) -> list[Group]:
    """Return the figures of a comparison for which there is something to draw."""
    found = (_curves(comparison), _forest(comparison), _tolerance(comparison), _drift(comparison))
    return [group for group in found if group is not None and group.charts]


def _curves(comparison: Comparison) -> Group | None:
    charts = [
        Chart(
            f"curves-{number}",
            f"learning rate {rate:g}",
            "epoch",
            _measured(comparison),
            [_learning(comparison, name, rate) for name in comparison.settings.placements],
            "band",
        )
        for number, rate in enumerate(comparison.settings.learning_rates, 1)
    ]
    drawn = [value for chart in charts for series in chart.series for ends in (series.low, series.high, series.y)
             for value in ends if value is not None and math.isfinite(value)]  # fmt: skip
    if not drawn:
        return None
    space = 0.04 * (max(drawn) - min(drawn)) or 1.0
    same = (min(drawn) - space, max(drawn) + space)
    caption = (
        "Means over repeats after each epoch, and their 95 % intervals as bands; a run that ended early keeps its last "
        "value. The vertical scale is the same at all rates."
    )
    return Group("Learning curves", caption, [Chart(**{**vars(chart), "y_range": same}) for chart in charts])


def _learning(comparison: Comparison, placement: str, rate: float) -> Series:
    settings, runs = comparison.settings, cell(comparison.records, placement, rate)
    most = longest(comparison.records.values())
    columns = np.array([curve(run, most) for run in runs]).T if runs else np.empty((0, 0))
    with np.errstate(invalid="ignore", over="ignore"):  # an error may overflow; it is left out below
        ends = [settings.measure.inside(interval(column)) or (None, None) for column in columns]
        means = [float(column.mean()) for column in columns]
    hover = [
        f"{placement}, epoch {epoch}: {_value(comparison, mean, *end)}, {_counted(len(runs))}"
        for epoch, (mean, end) in enumerate(zip(means, ends, strict=True), 1)
    ]
    return _series(comparison, placement, list(range(1, len(means) + 1)), means, ends, hover)


def _series(comparison: Comparison, placement: str, x: list[float], means: list[float], ends: list, hover: list) -> Series:
    low, high = (_scaled(comparison, values) for values in (zip(*ends, strict=True) if ends else ((), ())))
    y = [math.nan if value is None else value for value in _scaled(comparison, means)]
    return Series(placement, x, y, low, high, hover, style_of(placement))


def _tolerance(comparison: Comparison) -> Group | None:
    rates = comparison.settings.learning_rates
    if len(rates) < 2:
        return None
    found = []
    for name in comparison.settings.placements:
        rows = sorted((row for row in comparison.table if row.placement == name), key=lambda row: row.learning_rate)
        ends = [(row.low, row.high) for row in rows]
        hover = [
            f"{name}, learning rate {row.learning_rate:g}{', chosen by validation' if row.chosen else ''}: "
            f"{_value(comparison, row.test_accuracy, row.low, row.high)}, {_counted(row.repeats)}"
            for row in rows
        ]
        x, y = [row.learning_rate for row in rows], [row.test_accuracy for row in rows]
        found.append(_series(comparison, name, x, y, ends, hover))
    chart = Chart(
        "tolerance", "After the last epoch", "learning rate (logarithmic)", _measured(comparison), found, "bars",
        x_ticks=sorted(rates),
    )  # fmt: skip
    caption = (
        "What each placement reaches at each learning rate, with 95 % intervals of the means: the flatter the line, the "
        "less depends on the rate. Lines between the rates are guides for the eye; nothing was trained there."
    )
    return Group("Tolerance of learning rates", caption, [chart])


def _forest(comparison: Comparison) -> Group | None:
    pairs = list(reversed(comparison.differences))
    kinds = (
        ("difference shown", SHOWN, lambda pair: pair.shown),
        ("equal within the margin", EQUIVALENT, lambda pair: pair.equivalent and not pair.shown),
        ("not told apart", OPEN, lambda pair: not (pair.shown or pair.equivalent)),
    )
    series = []
    for name, style, belongs in kinds:
        chosen = [(row, pair) for row, pair in enumerate(pairs) if belongs(pair)]
        if not chosen:
            continue
        low, high, values = (
            _scaled(comparison, [getattr(pair, field) for _, pair in chosen]) for field in ("low", "high", "difference")
        )
        hover = [_told(comparison, pair) for _, pair in chosen]
        found = [math.nan if value is None else value for value in values]
        series.append(Series(name, found, [row for row, _ in chosen], low, high, hover, style))
    unit = comparison.settings.measure.unit.strip() or "its own unit"
    chart = Chart(
        "differences",
        "How much better the first one is",
        f"difference in {_name(comparison)} ({unit})",
        "",
        series,
        "forest",
        y_names=[f"{pair.better} – {pair.worse}" for pair in pairs],  # noqa: RUF001
        margin=_scaled(comparison, [comparison.settings.equivalent])[0],
    )
    caption = (
        "Differences between paired repeats, each placement at the rate that validation chose. The intervals hold for all "
        "pairs and all looks together with 95 % confidence: one that stays clear of 0 shows a difference, one within the "
        "shaded margin shows that there is none worth counting."
    )
    return Group("Paired differences", caption, [chart] if pairs else [])


def _drift(comparison: Comparison) -> Group | None:
    """Return the charts of drift, for the first repeat only, as in the paper: a mean over repeats would hide how each unit
    moved."""
    charts: list[Chart] = []
    for placement in comparison.settings.placements:
        rate = comparison.race.chosen.get(placement)
        runs = [] if rate is None else cell(comparison.records, placement, rate)
        kept = [three for three in (runs[0].unit_input if runs else ()) if three and all(map(_is_finite, three))]
        if not kept:
            continue
        low, middle, high = (list(values) for values in zip(*kept, strict=True))
        hover = [
            f"{placement}, epoch {epoch}: median {at:.3g} (15th percentile {under:.3g}, 85th {over:.3g})"
            for epoch, (under, at, over) in enumerate(kept, 1)
        ]
        epochs = list(range(1, len(kept) + 1))
        series = Series("median, 15th to 85th percentile", epochs, middle, low, high, hover, style_of(placement))
        title = f"{placement}, learning rate {rate:g}"
        charts.append(Chart(f"drift-{len(charts) + 1}", title, "epoch", "input of one hidden unit", [series], "band"))
    caption = (
        "How the input of the first unit of the last hidden layer is distributed after each epoch of the first repeat: the "
        "median, and the 15th to 85th percentile as a band (figure 1b of the paper). Each panel has its own scale."
    )
    return Group("Drift of a hidden unit's input", caption, charts)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _told(comparison: Comparison, pair: Difference) -> str:
    metric = comparison.settings.measure
    ends = "" if pair.low is None else f" ({metric.text(pair.low)} to {metric.text(pair.high)})"
    text = f"{pair.better} {metric.better} {pair.worse} by {metric.text(pair.difference)}{metric.unit}{ends}"
    return f"{text}, {_counted(pair.repeats)}"


def _value(comparison: Comparison, value: float, low: float | None, high: float | None) -> str:
    metric = comparison.settings.measure
    ends = "" if low is None or high is None else f" ({metric.text(low)} to {metric.text(high)})"
    return f"{metric.text(value)}{' %' if metric.is_share else ''}{ends}"


def _counted(repeats: int) -> str:
    return "1 repeat" if repeats == 1 else f"{repeats} repeats"


def _name(comparison: Comparison) -> str:
    return printable(f"test {comparison.settings.measure.title}")


def _measured(comparison: Comparison) -> str:
    return f"{_name(comparison)}{' (%)' if comparison.settings.measure.is_share else ''}"


def _scaled(comparison: Comparison, values: Iterator[float | None] | Sequence[float | None]) -> list[float | None]:
    """Return shares in percent, everything else as it is; None where a number is not known or not finite."""
    factor = 100.0 if comparison.settings.measure.is_share else 1.0
    return [None if value is None or not math.isfinite(value) else factor * value for value in values]
