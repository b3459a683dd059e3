"""Draw the charts of a comparison's page with plotly."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from evennorm.tools.compare.page_charts import Chart, Series

MARKERS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"}
MARKERS |= {"X": "x", "*": "star"}
DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
INK, LINE, MARGIN = "#1F2933", "#D5DCE3", "#7A8794"
"""Colours of text and axes, of the grid, and of the margin within which a difference counts as none."""

BAND, SHADE = "26", "2E"
"""Opacity of bands, in hexadecimal."""


def drawn(chart: Chart) -> dict[str, Any]:
    """Return the figure as JSON data, in colours for light pages; the page exchanges them where it is dark.

    Example:
        >>> series = Series("before", [1, 2], [50, 60], [None, 55], [None, 65], ["a", "b"], ("#0072B2", "s", "-"))
        >>> [trace["type"] for trace in drawn(Chart("curves", "", "epoch", "accuracy", [series], "band"))["data"]]
        ['scatter', 'scatter']
    """
    figure = go.Figure(layout=_layout(chart))
    for series in chart.series:
        if chart.kind == "band":
            _add_band(figure, series)
        figure.add_trace(_trace(chart, series))
    if chart.kind == "forest":
        if chart.margin:
            figure.add_vrect(-chart.margin, chart.margin, fillcolor=MARGIN + SHADE, line_width=0, layer="below")
        figure.add_vline(0, line_color=INK, line_width=1)
    found: dict[str, Any] = json.loads(figure.to_json())
    return found


def _layout(chart: Chart) -> dict[str, Any]:
    axis = {"gridcolor": LINE, "zeroline": False, "linecolor": MARGIN, "automargin": True, "showline": True}
    x: dict[str, Any] = axis | {"title": {"text": html.escape(chart.x), "standoff": 8}}
    y: dict[str, Any] = axis | {"title": {"text": html.escape(chart.y), "standoff": 6}}
    if chart.x_ticks:
        x |= {"type": "log", "tickvals": list(chart.x_ticks), "ticktext": [f"{tick:g}" for tick in chart.x_ticks]}
        low, high = math.log10(min(chart.x_ticks)), math.log10(max(chart.x_ticks))
        x["range"] = [low - 0.06 * (high - low), high + 0.06 * (high - low)]
    elif chart.kind == "band":
        x |= _whole_numbers(chart)
    if chart.y_range:
        y["range"] = list(chart.y_range)
    if chart.kind == "forest":
        rows = len(chart.y_names)
        y |= {"tickvals": list(range(rows)), "ticktext": [html.escape(name) for name in chart.y_names]}
        y |= {"range": [-0.6, rows - 0.4], "showgrid": False}
    height = 140 + 34 * max(len(chart.y_names), 3) if chart.kind == "forest" else 340
    return {
        "template": "none",
        "title": {"text": html.escape(chart.title), "font": {"size": 14}, "x": 0.02, "xanchor": "left", "y": 0.97},
        "xaxis": x,
        "yaxis": y,
        "height": height,
        "margin": {"l": 50, "r": 12, "t": 38, "b": 50},
        "font": {"family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "showlegend": True,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": MARGIN, "activecolor": INK},
        "hovermode": "closest",
        "dragmode": False,
    }


def _whole_numbers(chart: Chart) -> dict[str, Any]:
    """Return ticks at whole epochs, few enough for a phone."""
    last = max((int(max(series.x)) for series in chart.series if len(series.x)), default=1)
    return {"dtick": max(1, math.ceil(last / 8)), "tick0": 0 if last > 8 else 1}


def _trace(chart: Chart, series: Series) -> go.Scatter:
    colour, marker, dash = series.style
    few = len(series.x) <= 15
    bars = None if chart.kind == "band" else _bars(series, sideways=chart.kind == "forest")
    return go.Scatter(
        name=html.escape(series.name),
        x=list(series.x),
        y=_known(series.y),
        mode="markers" if chart.kind == "forest" else "lines+markers" if few or chart.kind == "bars" else "lines",
        line={"color": colour, "dash": DASHES[dash], "width": 2},
        marker={"color": colour, "symbol": MARKERS[marker], "size": 8},
        text=[html.escape(text) for text in series.hover],
        hovertemplate="%{text}<extra></extra>",
        legendgroup=html.escape(series.name),
        **({} if bars is None else {"error_x" if chart.kind == "forest" else "error_y": bars}),
    )


def _bars(series: Series, sideways: bool) -> dict[str, Any]:
    middle = series.x if sideways else series.y
    up = [0 if high is None else high - at for at, high in zip(middle, series.high, strict=True)]
    down = [0 if low is None else at - low for at, low in zip(middle, series.low, strict=True)]
    found = {"array": up, "arrayminus": down, "symmetric": False, "color": series.style[0], "thickness": 1.6, "width": 4}
    return {**found, "array": _known(up), "arrayminus": _known(down)}


def _add_band(figure: go.Figure, series: Series) -> None:
    ends = [
        (x, low, high) for x, low, high in zip(series.x, series.low, series.high, strict=True) if None not in (low, high)
    ]
    if not ends:
        return
    x, low, high = (list(values) for values in zip(*ends, strict=True))
    figure.add_trace(
        go.Scatter(
            x=x + x[::-1],
            y=high + low[::-1],
            fill="toself",
            fillcolor=series.style[0] + BAND,
            mode="none",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=html.escape(series.name),
        )
    )


def _known(values: Sequence[float]) -> list[float | None]:
    """Return values with None for NaN, which JSON lacks."""
    return [value if math.isfinite(value) else None for value in values]
