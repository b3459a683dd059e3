"""The results of figure1.py as a picture and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from _environment import sentence
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from evennorm.tools.atomic import replacing, write_text
from evennorm.tools.compare.statistics import interval

GREY, COLOURS = "#808080", {True: "#2a8bd2", False: "#e0702a"}
"""Neither white nor black, since the page behind may be either; blue and orange differ for colour-blind eyes too."""
NAMES = {True: "with batch normalization", False: "without"}
SHOWN_SEED, TABLE_STEPS = 0, (1_000, 5_000, 10_000, 50_000)


def write(results: dict[str, Any], folder: Path) -> None:
    """figure-1.svg and figure-1.md."""
    with replacing(folder / "figure-1.svg") as path:
        draw(results, path)
    write_text(folder / "figure-1.md", page(results))


def chosen(results: dict[str, Any], rate: float, normalized: bool) -> list[dict[str, Any]]:
    """The runs of one curve, by seed; seeds that lack another run are left out."""
    kinds = len({(run["rate"], run["normalized"]) for run in results["runs"]})
    seeds = [run["seed"] for run in results["runs"]]
    whole = {seed for seed in seeds if seeds.count(seed) == kinds}
    runs = [run for run in results["runs"] if (run["rate"], run["normalized"]) == (rate, normalized)]
    return sorted((run for run in runs if run["seed"] in whole), key=lambda run: run["seed"])


def rates(results: dict[str, Any]) -> list[float]:
    return sorted({run["rate"] for run in results["runs"]})


def draw(results: dict[str, Any], path: Path) -> None:
    """A row per learning rate: (a) test accuracy of every seed, (b) and (c) the typical unit without and with."""
    style = {"svg.hashsalt": "figure 1", "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY}
    with rc_context(style | {"xtick.color": GREY, "ytick.color": GREY, "font.size": 9}):
        figure = Figure(figsize=(9.6, 2.9 * len(rates(results))), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(len(rates(results)), 3, sharex=True, squeeze=False)
        for row, rate in zip(panels, rates(results), strict=True):
            _draw_rate(row, results, rate)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _draw_rate(row: Any, results: dict[str, Any], rate: float) -> None:
    for normalized, panel, letter in ((False, row[1], "b"), (True, row[2], "c")):
        runs = chosen(results, rate, normalized)
        steps = np.arange(len(runs[0]["accuracy"])) * results["every"] / 1000
        for run in runs:
            label = NAMES[normalized] if run is runs[0] else None
            row[0].plot(steps, run["accuracy"], "-" if normalized else "--", color=COLOURS[normalized], lw=1, label=label)
        low, middle, high = runs[SHOWN_SEED]["percentiles"]
        panel.fill_between(steps, low, high, color=COLOURS[normalized], alpha=0.25, lw=0)
        for line, width in ((low, 0.9), (middle, 1.6), (high, 0.9)):
            panel.plot(steps, line, color=COLOURS[normalized], lw=width)
        panel.set_title(f"({letter}) input to a unit, {NAMES[normalized]}", fontsize=9)
    limits = [panel.get_ylim() for panel in row[1:]]
    for panel in row[1:]:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    row[0].set_ylim(0.8, 1)
    row[0].set_ylabel("test accuracy")
    row[0].set_title(f"(a) learning rate {rate:g}", fontsize=9)
    row[0].legend(frameon=False, fontsize=8, loc="lower right")
    for panel in row:
        panel.set_xlabel("thousand steps")
        panel.grid(alpha=0.2, color=GREY)
        panel.patch.set_alpha(0)
        panel.spines[["top", "right"]].set_visible(False)


def page(results: dict[str, Any]) -> str:
    """docs/figure-1.md."""
    number = len(chosen(results, rates(results)[0], True))
    return "\n".join(
        [
            "# The paper's figure 1, on MNIST",
            "",
            "Ioffe & Szegedy ([arXiv 1502.03167](https://arxiv.org/abs/1502.03167), section 4.1) trained a network of three",
            "layers of 100 sigmoid units on MNIST, with and without batch normalization before the sigmoids. This page",
            f"repeats it: binarized images, batches of {results['batch']}, 50,000 steps of plain gradient descent, {number}",
            "seeds. Each seed has the same initial weights and the same batches with and without normalization. `python",
            "benchmarks/figure1.py` trains, draws and writes this page. `--mnist DIR` reads the four IDX files; without",
            "it, Keras downloads them.",
            "",
            "![Test accuracy over steps for two learning rates, and the 15th, 50th and 85th percentiles of the input to a",
            "unit of the last hidden layer, without and with batch normalization](figure-1.svg)",
            "",
            "| | claim of the paper | measured here |",
            "| --- | --- | --- |",
            f"| (a) | the network with batch normalization trains faster | {_faster(results)} |",
            f"| (a) | it ends at a higher test accuracy | {_higher(results)} |",
            "| (b, c) | the distribution of a sigmoid's input is more stable while the network trains | "
            f"{_stable(results)} |",
            "",
            f"Test accuracy in percent, as the mean of {number} seeds, and the mean paired difference in points with its 95",
            "% interval. If the interval contains 0, no difference is shown.",
            "",
            "| learning rate | after steps | without | with | difference |",
            "| ---: | ---: | ---: | ---: | ---: |",
            *_rows(results),
            "",
            "The paper does not give its learning rate, so there are two here. It does not say how small its Gaussian",
            f"weights are; here their standard deviation is {results['deviation']:g}. In training, the network normalizes",
            "by batches; for the test and in (b) and (c), by moving averages with momentum 0.99. (b) and (c) show the",
            "inputs of one unit for 1,000 test images, in the run with the first seed. It is the unit with the median",
            "drift of the 100 units in its layer. Drift is the range of the median input over the whole training, in units",
            "of the distance between the 15th and the 85th percentile at the end.",
            "",
            f"{sentence(results['environment'])} Every run's measurements are in benchmarks/results/figure1.json.",
            "",
        ]
    )


def _faster(results: dict[str, Any]) -> str:
    """Steps until the accuracy that the run without normalization of the same seed ends at."""
    parts = []
    for rate in rates(results):
        reached = []
        for without, with_it in zip(chosen(results, rate, False), chosen(results, rate, True), strict=True):
            there = np.flatnonzero(np.array(with_it["accuracy"]) >= without["accuracy"][-1])
            reached.append(f"{there[0] * results['every']:,}" if len(there) else "never")
        parts.append(f"at rate {rate:g} it reaches what the other one ends at after {', '.join(reached)} steps")
    return "; ".join(parts)


def _differences(results: dict[str, Any], rate: float, step: int) -> np.ndarray:
    at = step // results["every"]
    pairs = zip(chosen(results, rate, True), chosen(results, rate, False), strict=True)
    return np.array([100 * (a["accuracy"][at] - b["accuracy"][at]) for a, b in pairs])


def _shown(differences: np.ndarray) -> str:
    low, high = interval(differences)
    return f"{differences.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def _higher(results: dict[str, Any]) -> str:
    return "; ".join(f"at rate {rate:g} by {_shown(_differences(results, rate, 50_000))} points" for rate in rates(results))


def _stable(results: dict[str, Any]) -> str:
    parts = []
    for rate in rates(results):
        without, with_it = (
            np.mean([run["drift"][1] for run in chosen(results, rate, normalized)]) for normalized in (False, True)
        )
        jumps = [
            np.mean([_jump(run["percentiles"]) for run in chosen(results, rate, normalized)]) for normalized in (True, False)
        ]
        parts.append(
            f"at rate {rate:g} the median unit drifts by {with_it:.2f} with and {without:.2f} without; from one measurement "
            f"to the next, {results['every']} steps later, by {jumps[0]:.3f} with and {jumps[1]:.3f} without"
        )
    return "; ".join(parts)


def _jump(percentiles: list[list[float]]) -> float:
    """The mean distance between two medians that follow each other, in the units of the drift."""
    low, middle, high = percentiles
    return float(np.mean(np.abs(np.diff(middle)))) / (high[-1] - low[-1])


def _rows(results: dict[str, Any]) -> list[str]:
    lines = []
    for rate in rates(results):
        for step in TABLE_STEPS:
            at = step // results["every"]
            without, with_it = (
                100 * np.mean([run["accuracy"][at] for run in chosen(results, rate, normalized)])
                for normalized in (False, True)
            )
            lines.append(
                f"| {rate:g} | {step:,} | {without:.2f} | {with_it:.2f} | {_shown(_differences(results, rate, step))} |"
            )
    return lines
