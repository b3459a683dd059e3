"""Write what a comparison shows as one self-contained HTML page: figures, numbers, and what they come from."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evennorm.tools.compare.page_charts import groups
from evennorm.tools.compare.praise import told
from evennorm.tools.compare.settings import Settings
from evennorm.tools.pages import filled

if TYPE_CHECKING:
    from evennorm.tools.compare.report import Comparison
    from evennorm.tools.compare.table import Row

COLOURS = {
    "#000000": "#F2F5F8",
    "#0072B2": "#56B4E9",
    "#D55E00": "#FF8A4C",
    "#009E73": "#2FC79B",
    "#CC79A7": "#E39CC4",
    "#E69F00": "#F2B632",
    "#1F2933": "#E6EDF3",
    "#D5DCE3": "#35404B",
    "#7A8794": "#8593A0",
}
"""Colours of the figures on light pages, and their replacements on dark ones: Okabe and Ito's, then ink, grid and margin."""


def page(comparison: Comparison) -> str:
    """Return the text of the page. It loads nothing from outside, and names from data and model are escaped."""
    from plotly.offline import get_plotlyjs

    from evennorm.tools.compare.page_plotly import drawn
    from evennorm.tools.compare.page_still import still

    settings = comparison.settings
    pairs, _, conclusion = comparison.verdict.rpartition("\n\n")
    return filled(
        str(__package__),
        {"still": lambda chart: still(chart, COLOURS), "drawn": drawn},
        title=f"{Path(settings.model).name} on {Path(settings.data).name}",
        data=comparison.data,
        device=comparison.device,
        conclusion=conclusion.splitlines(),
        pairs=pairs.splitlines(),
        search=comparison.search.lines if comparison.search else [],
        best=comparison.best,
        metric=settings.measure,
        measured=settings.measure.short + (" %" if settings.measure.is_share else ""),
        rows=list(map(cells_of(comparison), comparison.table)),
        groups=groups(comparison),
        told=told(settings, comparison.advantages, comparison.at_rates),
        origin=list(_origin(comparison)),
        command=command(settings),
        file_names=comparison.file_names,
        colours=COLOURS,
        plotly=get_plotlyjs(),
    )


def cells_of(comparison: Comparison) -> Callable[[Row], dict[str, Any]]:
    """Return the function that makes the cells of a row of the comparison's table."""
    metric = comparison.settings.measure

    def cells(row: Row) -> dict[str, Any]:
        known = row.low is not None and row.high is not None
        return {
            "placement": row.placement,
            "rate": f"{row.learning_rate:g}",
            "chosen": bool(row.chosen),
            "mean": metric.text(row.test_accuracy),
            "interval": f"{metric.text(row.low)} to {metric.text(row.high)}" if known else "",
            "numbers": [
                "" if row.epochs_to_reference is None else str(row.epochs_to_reference),
                "" if row.seconds_per_epoch is None else f"{row.seconds_per_epoch:.2f}",
                metric.text(row.gap),
                f"{row.epochs:.3g}",
                str(row.repeats),
                str(row.at_chance or ""),
                str(row.diverged or ""),
            ],
        }

    return cells


def _origin(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Yield what was run where."""
    settings = comparison.settings
    yield "device", comparison.device
    for name, value in comparison.fingerprint.items():
        yield name, str(value)
    yield "placements", ", ".join(settings.placements)
    yield "learning rates", ", ".join(f"{rate:g}" for rate in settings.learning_rates)
    yield "repeats", f"{settings.repeats} at most, as pairs need" if settings.sequential else str(settings.repeats)
    yield "runs", str(len(comparison.records) + len(comparison.scaled))
    yield "counts as equal", f"differences below {settings.measure.text(settings.equivalent)}{settings.measure.unit}"
    yield "study", f"{settings.study or settings.default_study}, in {settings.place}"


def command(settings: Settings) -> str:
    """Return the shell command that leads to the same runs, without the password of a database.

    Example:
        >>> command(Settings("digits", "paper-mlp", ("none", "before"), 3, (0.1,), 5, 60, "jax", 0, "out"))
        'evennorm compare --data digits --model paper-mlp --placements none,before --repeats 3 ... --out out'
    """
    placements = [name for name in settings.placements if not (settings.search and name.startswith("mix:"))]
    placements = [f"search:{settings.search}"] * (settings.search > 0) + placements
    epochs = f"auto:{settings.epochs}" if settings.until_flat else str(settings.epochs)
    share = settings.measure.is_share
    options: dict[str, Any] = {
        "data": settings.data,
        "model": settings.model,
        "placements": ",".join(placements),
        "max-repeats" if settings.sequential else "repeats": settings.repeats,
        "learning-rates": ",".join(map(repr, settings.learning_rates)),
        "epochs": epochs,
        "batch-size": settings.batch_size,
        "engine": settings.engine,
        "seed": settings.seed,
        "equivalent": repr(round(100 * settings.equivalent, 12)) if share else repr(settings.equivalent),
        "task": settings.task,
        "metric": settings.metric,
        "device": settings.device,
        "storage": settings.place if settings.storage else None,
        "study": settings.study,
        "out": settings.out,
    }
    words = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return shlex.join(["evennorm", "compare", *words, *["--advantages"] * settings.advantages])
