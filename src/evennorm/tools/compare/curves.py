"""Draw test accuracy against epochs, one panel per learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evennorm.errors import printable
from evennorm.tools.compare.racing import cell
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.statistics import interval
from evennorm.tools.compare.table import curve, longest
from evennorm.tools.compare.train import Record
from evennorm.tools.compare.variants import variant

STYLES = {
    # Okabe and Ito's colours, which differ for colour-blind eyes too; marker and dash tell them apart in grey.
    "none": ("#000000", "o", "-"),
    "before": ("#0072B2", "s", "-"),
    "after": ("#D55E00", "^", "--"),
    "input": ("#009E73", "D", "-."),
    "as-is": ("#CC79A7", "v", ":"),
}
NORM_STYLES = {"batch": None, "layer": ("v", ":"), "group": ("P", "--"), "rms": ("X", "-.")}
"""Other normalizations have the colour of their place, with a marker and dash of their own."""

MIXED = ("#E69F00", "*", "-")
PANELS_PER_ROW = 3


def style_of(placement: str) -> tuple[str, str, str]:
    """Return colour, marker and dash.

    Example:
        >>> style_of("before"), style_of("before:layer"), style_of("mix:b2n")
        (('#0072B2', 's', '-'), ('#0072B2', 'v', ':'), ('#E69F00', '*', '-'))
    """
    found = variant(placement)
    if found.mixture:
        return MIXED
    colour, *own = STYLES[found.where]
    marker, dash = NORM_STYLES[found.norm] or own
    return colour, marker, dash


def draw_curves(settings: Settings, records: Mapping[Run, Record], title: str, path: Path) -> None:
    """Write a PNG: for each placement the mean over repeats as a line, and its 95 % interval as a band."""
    rates = settings.learning_rates
    columns = min(PANELS_PER_ROW, len(rates))
    lines = -(-len(rates) // columns)
    figure = Figure(figsize=(1.2 + 4.0 * columns, 1.3 + 3.2 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, rate in zip(axes, rates, strict=False):
        for placement in settings.placements:
            _draw_placement(panel, settings, records, placement, rate)
        panel.set_title(f"learning rate {rate:g}", fontsize=11)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if settings.measure.is_share:
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("epoch")
    for panel in axes[len(rates) :]:
        panel.remove()
    for panel in axes[::columns]:
        panel.set_ylabel(printable(f"test {settings.measure.title}"))
    counts = sorted({len(cell(records, name, rate)) for name in settings.placements for rate in rates})
    over = f"{counts[0]} repeats" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]} repeats"
    shown = "one repeat" if counts == [1] else f"mean and 95 % interval over {over}"
    plain = printable(title).replace("$", r"\$")  # a dollar sign would begin a formula
    figure.suptitle(f"{plain}\n{shown}", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, title="batch normalization")
    figure.savefig(path, format="png")


def _draw_placement(panel: Axes, settings: Settings, records: Mapping[Run, Record], placement: str, rate: float) -> None:
    colour, marker, dash = style_of(placement)
    runs, most = cell(records, placement, rate), longest(records.values())
    curves = np.array([curve(record, most) for record in runs])
    epochs = np.arange(1, most + 1)
    every = max(1, most // 10)
    panel.plot(
        epochs, curves.mean(axis=0), dash, color=colour, marker=marker, markevery=every, ms=4.5, lw=1.8, label=placement
    )
    if len(runs) > 1:
        low, high = np.array([settings.measure.inside(interval(column)) for column in curves.T]).T
        panel.fill_between(epochs, low, high, color=colour, alpha=0.13, lw=0)
