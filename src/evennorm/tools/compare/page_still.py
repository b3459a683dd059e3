"""Draw the charts of a comparison's page as SVG, for print and for readers without JavaScript."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from evennorm.tools.compare.page_charts import Chart, Series
from evennorm.tools.compare.page_plotly import INK, LINE, MARGIN


def still(chart: Chart, colours: Mapping[str, str]) -> str:
    """Return the `<svg>` element; each of `colours`, those for light pages, becomes a CSS variable, `--` and its digits.

    Example:
        >>> series = Series("before", [1, 2], [50, 60], [None, 55], [None, 65], ["a", "b"], ("#0072B2", "s", "-"))
        >>> text = still(Chart("curves", "", "epoch", "accuracy", [series], "band"), {"#0072B2": "#56B4E9"})
        >>> text[:4], "var(--0072b2)" in text
        ('<svg', True)
    """
    height = 1.5 + 0.3 * max(len(chart.y_names), 3) if chart.kind == "forest" else 3.6
    style = {"svg.fonttype": "none", "svg.hashsalt": chart.name, "font.family": "sans-serif", "font.size": 10}
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(style | dict.fromkeys(ink, INK)):
        figure = Figure(figsize=(4.8 if chart.kind == "band" else 6.4, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        _draw(axes, chart)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 4), frameon=False, fontsize=9)
        written = io.StringIO()
        figure.savefig(
            written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _embedded(written.getvalue(), chart, colours)


def _draw(axes: Axes, chart: Chart) -> None:
    for series in chart.series:
        _draw_series(axes, chart, series)
    axes.set_title(_plain(chart.title), fontsize=11, loc="left")
    axes.set_xlabel(_plain(chart.x))
    axes.set_ylabel(_plain(chart.y))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LINE, lw=0.7, axis="x" if chart.kind == "forest" else "both")
    axes.set_axisbelow(True)
    if chart.x_ticks:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(chart.x_ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(chart.x_ticks, [f"{tick:g}" for tick in chart.x_ticks])
    elif chart.kind == "band":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart.y_range:
        axes.set_ylim(*chart.y_range)
    if chart.kind == "forest":
        axes.set_yticks(range(len(chart.y_names)), [_plain(name) for name in chart.y_names])
        axes.set_ylim(-0.6, len(chart.y_names) - 0.4)
        axes.axvline(0, color=INK, lw=0.9, zorder=1)
        if chart.margin:
            axes.axvspan(-chart.margin, chart.margin, color=MARGIN, alpha=0.18, lw=0, zorder=0)


def _draw_series(axes: Axes, chart: Chart, series: Series) -> None:
    colour, marker, dash = series.style
    low, high = (np.array([np.nan if end is None else end for end in ends], float) for ends in (series.low, series.high))
    x, y = np.array(series.x, float), np.array(series.y, float)
    if chart.kind == "band":
        every = max(1, len(x) // 10)
        axes.plot(x, y, dash, color=colour, marker=marker, markevery=every, ms=4.5, lw=1.8, label=_plain(series.name))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        return
    middle = x if chart.kind == "forest" else y
    bars = np.nan_to_num(np.array([middle - low, high - middle])).clip(min=0)
    where = {"xerr": bars, "linestyle": "none"} if chart.kind == "forest" else {"yerr": bars, "linestyle": dash}
    axes.errorbar(x, y, color=colour, marker=marker, ms=6, lw=1.5, capsize=3, label=_plain(series.name), **where)


def _plain(text: str) -> str:
    """Escape text so that nothing in it begins a formula."""
    return text.replace("$", r"\$")


def _embedded(text: str, chart: Chart, colours: Mapping[str, str]) -> str:
    """Return only the element, scaled to the page, with identifiers that differ from those of other figures."""
    text = text[text.index("<svg") :]
    label = html.escape(f"{chart.title}: {chart.y or 'pairs'} against {chart.x}").replace("\\", "/")
    text = re.sub(r'<svg ([^>]*?)width="[^"]*pt" ?', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*pt" ?', rf'<svg \1role="img" aria-label="{label}" ', text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{chart.name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{chart.name}-", text)
    for colour in colours:
        text = re.sub(colour, f"var(--{colour[1:].lower()})", text, flags=re.IGNORECASE)
    return text.strip()
