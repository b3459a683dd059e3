"""How long a training step of the articles' network takes with Keras's layer, with ours, and without normalization.

Writes benchmarks/results/layer-step.json and, from it, docs/performance.md. Three processes per engine, since memory may lie
better in one than in another; in each the three networks take their steps in turns, so that whatever else the machine does
meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from math import comb
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _engines import ENGINES, on_each_engine
from _environment import ROOT, environment, sentence

from evennorm.tools.spread import Median, told

RESULT = ROOT / "benchmarks" / "results" / "layer-step.json"
PAGE = ROOT / "docs" / "performance.md"

SIDE, CLASSES, BATCH = 48, 7, 64
WARM_UP, ROUNDS, PROCESSES = 3, 10, 3
NETWORKS = {"none": "no normalization", "keras": "Keras's layer", "ours": "evennorm's layer"}


def networks(side: int) -> dict[str, Any]:
    """The articles' network three times, from the same weights, each compiled as Keras does by default."""
    import keras

    from evennorm.keras import place, revert
    from evennorm.tools.compare.networks import article_cnn

    keras.utils.set_random_seed(0)
    ours = article_cnn((side, side, 1), CLASSES)
    models = {"none": place(ours, "none"), "keras": revert(ours), "ours": ours}
    for model in models.values():
        model.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    return models


def times_in_turns(steps: dict[str, Callable[[], Any]], warm_up: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, one per round; the first of a round is another one each time."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            begin = perf_counter()
            steps[name]()
            times[name].append(round(1000 * (perf_counter() - begin), 3))
    return times


def measure(quick: bool) -> dict[str, Any]:
    """Times on the engine of this process; `train_on_batch` returns the loss as a number, so a step is over when it does."""
    side, batch, warm_up, rounds = (12, 4, 1, 2) if quick else (SIDE, BATCH, WARM_UP, ROUNDS)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, side, side, 1), dtype=np.float32)
    y = rng.integers(0, CLASSES, batch)
    models = networks(side)
    steps = {name: lambda model=model: float(model.train_on_batch(x, y)) for name, model in models.items()}
    load = os.getloadavg()[0]
    times = times_in_turns(steps, warm_up, rounds)
    return {
        "shape": list(x.shape),
        "dtype": "float32",
        "compiled": bool(models["ours"].jit_compile),
        "load average before": round(load, 2),
        "milliseconds": times,
    }


def joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What several processes measured on one engine, as one."""
    times = {name: [time for run in runs for time in run["milliseconds"][name]] for name in NETWORKS}
    loads = [run["load average before"] for run in runs]
    return {**runs[0], "processes": len(runs), "load average before": loads, "milliseconds": times}


def quartiles(values: np.ndarray, form: str) -> str:
    low, middle, high = (form.format(value) for value in np.percentile(values, [25, 50, 75]))
    return f"{middle} ({low} to {high})"


def ratio(times: dict[str, list[float]], name: str, base: str) -> np.ndarray:
    """Of two networks' steps, round by round, so that a slow moment of the machine meets both."""
    return np.array(times[name]) / times[base]


def by_chance(ratios: np.ndarray) -> float:
    """The two-sided sign test: how likely rounds agree on a direction as much as these do where there is no difference."""
    rarer = int(min((ratios < 1).sum(), (ratios > 1).sum()))
    return min(1.0, 2 * sum(comb(len(ratios), k) for k in range(rarer + 1)) / 2 ** len(ratios))


def verdict(engine: str, times: dict[str, list[float]]) -> str:
    """One sentence, which claims a difference only where chance would hardly make it."""
    ratios = ratio(times, "ours", "keras")
    middle, spread = np.median(ratios), Median.of(list(ratios))
    times_as_long = f"{told(float(middle), spread)} times as long"
    if by_chance(ratios) >= 0.05 or middle == 1:
        return f"On {engine} no difference shows: a step takes {times_as_long} with evennorm as with Keras's layer."
    direction = "slower" if middle > 1 else "faster"
    return f"On {engine} evennorm is {direction}: a step takes {times_as_long} as with Keras's layer."


def page(result: dict[str, Any]) -> str:
    """docs/performance.md."""
    engines = result["engines"]
    some = next(iter(engines.values()))
    lines = [
        "# Performance",
        "",
        "One training step (`train_on_batch`) of the articles' network, which has three batch normalizations, with Keras's",
        f"defaults on each engine: inputs {tuple(some['shape'])}, {some['dtype']}, Adam. Figures are medians of",
        f"{len(some['milliseconds']['ours'])} steps in milliseconds with their quartiles, from {some['processes']}",
        "processes, in each of which the three networks take turns. Ratios are taken within each round. `python",
        "benchmarks/layer_step.py` writes this page from `benchmarks/results/layer-step.json`.",
        "",
        *(f"- {verdict(engine, found['milliseconds'])}" for engine, found in engines.items()),
        "",
        "| engine | " + " | ".join(NETWORKS.values()) + " | evennorm's / Keras's |",
        "| --- |" + " ---: |" * (len(NETWORKS) + 1),
    ]
    for engine, found in engines.items():
        times = found["milliseconds"]
        cells = [quartiles(times[name], "{:.1f}") for name in NETWORKS] + [
            quartiles(ratio(times, "ours", "keras"), "{:.2f}")
        ]
        lines.append(f"| {engine}{' (compiled)' if found['compiled'] else ''} | " + " | ".join(cells) + " |")
    lines += ["", "What the three layers add to a step without normalization:", ""]
    lines += ["| engine | Keras's layer | evennorm's layer |", "| --- | ---: | ---: |"]
    for engine, found in engines.items():
        added = [100 * (ratio(found["milliseconds"], name, "none") - 1) for name in ("keras", "ours")]
        lines.append(f"| {engine} | " + " | ".join(quartiles(values, "{:.0f} %") for values in added) + " |")
    return "\n".join([*lines, "", sentence(result), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, help="measure on KERAS_BACKEND, which is this one, and print JSON")
    parser.add_argument("--quick", action="store_true", help="tiny images, two rounds; prints the page and writes nothing")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON as well; with --quick, instead of the page"
    )
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(measure(arguments.quick)))
        return
    options = ["--quick"] if arguments.quick else []
    runs = [on_each_engine(__file__, *options) for _ in range(1 if arguments.quick else PROCESSES)]
    result = {**environment(), "engines": {engine: joined([run[engine] for run in runs]) for engine in ENGINES}}
    if not arguments.quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(page(result))
    if arguments.json:
        print(json.dumps(result))
    elif arguments.quick:
        print(page(result))


if __name__ == "__main__":
    main()
