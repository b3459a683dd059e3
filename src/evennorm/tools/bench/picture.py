"""Draw the bandwidth of every contestant below that of a copy, one panel per pass."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from secrets import token_hex

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from evennorm.errors import InputError
from evennorm.tools.bench.cases import PASSES, Case
from evennorm.tools.bench.contestants import LIMIT, OUR_LAYER, OUR_MODULE, OURS
from evennorm.tools.bench.report import Benchmark
from evennorm.tools.bench.rows import ALONE, IN_TURNS

OUR_STYLES = {OURS: ("#0072B2", "o"), OUR_LAYER: ("#56B4E9", "s"), OUR_MODULE: ("#332288", "h")}
"""Colours that differ for colour-blind eyes too; markers tell them apart in grey."""

OTHER_STYLES = (("#D55E00", "^"), ("#E69F00", "v"), ("#009E73", "D"), ("#CC79A7", "P"), ("#999999", "X"))
WIDTH = 0.72
"""Width of the markers of one case, where the next case is 1 away."""

IN_WORDS = {IN_TURNS: "in turns in one process", ALONE: "each in a process of its own"}


def draw(
    found: Benchmark, path: str | os.PathLike[str], protocol: str = IN_TURNS, only: Collection[Case] | None = None
) -> None:
    """Write a PNG: for each case the GB/s of each family's best, with quartiles, under the roof that a copy sets.

    The scale is logarithmic: equal distances are equal ratios.

    Cases below 1 MB are left out where there are others: they show what a call costs, not what memory allows.

    Raises:
        InputError: the file cannot be written.
    """
    asked = [case for case in found.settings.cases if only is None or case in only]
    cases = [case for case in asked if case.large] or asked
    panels = [passes for passes in found.settings.passes if any(row.passes == passes for row in found.rows)]
    width = max(6.4, 1.6 + 1.25 * len(cases))
    figure = Figure(figsize=(width, 1.7 + 3.0 * len(panels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False).flatten()
    for panel, passes in zip(axes, panels, strict=True):
        _draw_panel(panel, found, protocol, cases, passes)
    axes[-1].set_xticks(range(len(cases)), [_label(case) for case in cases], fontsize=8)
    versions = found.environment["versions"]
    machine = f"{found.environment['device']}, threads: {found.settings.threads}"
    engine = f"{found.settings.engine} {versions.get(found.settings.engine, '')}"
    figure.suptitle(f"Batch normalization in training, {engine}, {IN_WORDS[protocol]}\n{machine}", fontsize=10)
    handles = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=max(2, int(width / 2.6)),
        frameon=False,
        fontsize=9,
    )
    _save(figure, Path(path))


def _draw_panel(panel: Axes, found: Benchmark, protocol: str, cases: list[Case], passes: str) -> None:
    styles = styles_of(found)
    for i, case in enumerate(cases):
        rows = found.measured(protocol, case, passes)
        limit = found.limit(protocol, case)
        if limit is not None:
            roof = 2 * case.bytes / limit.median / 1e6
            panel.hlines(roof, i - 0.46, i + 0.46, color="black", lw=1.6, label="a copy of x into fresh memory")
        for j, (family, (colour, marker)) in enumerate(styles.items()):
            row = min((row for row in rows if row.family == family), key=lambda row: row.median, default=None)
            if row is None:
                continue
            x = i + WIDTH * ((j + 0.5) / len(styles) - 0.5)
            slow, fast = (row.bandwidth * row.median / quartile for quartile in reversed(row.quartiles))
            panel.vlines(x, slow, fast, color=colour, lw=1.6)
            panel.plot(x, row.bandwidth, marker, color=colour, ms=6, ls="none", label=family)
    panel.set_title(PASSES[passes], fontsize=10)
    panel.set_ylabel("GB/s of necessary traffic", fontsize=9)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.yaxis.set_minor_locator(NullLocator())
    for i in range(1, len(cases)):
        panel.axvline(i - 0.5, color="black", lw=0.5, alpha=0.15)
    panel.set_xlim(-0.6, len(cases) - 0.4)
    panel.grid(axis="y", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def styles_of(found: Benchmark) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each family that was measured, ours first."""
    families = dict.fromkeys(row.family for row in found.rows if row.family != LIMIT and row.milliseconds)
    others = [family for family in families if family not in OUR_STYLES]
    ours = {family: style for family, style in OUR_STYLES.items() if family in families}
    return ours | {family: OTHER_STYLES[i % len(OTHER_STYLES)] for i, family in enumerate(others)}


def _label(case: Case) -> str:
    """Return the label of a case, on several lines, so that neighbours have room."""
    shape = case.place.replace(":first", "\nchannels first")
    return "\n".join([shape, *case.variant.split(", "), f"{case.bytes / 1e6:.3g} MB"]).replace("\n\n", "\n")


def _save(figure: Figure, path: Path) -> None:
    partial = path.with_name(f".{token_hex(8)}.part")
    try:
        figure.savefig(partial, format="png")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another place for the picture") from error
    finally:
        partial.unlink(missing_ok=True)
