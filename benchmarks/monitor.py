"""What a monitor costs: steps of training with `evennorm.torch.monitor` or `StatisticsMonitor`, and without, in turns.

Writes benchmarks/results/monitor.json and, from it, the table in docs/monitor.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment, sentence

RESULT = ROOT / "benchmarks" / "results" / "monitor.json"
PAGE = ROOT / "docs" / "monitor.md"
BEGIN, END = "<!-- measured: benchmarks/monitor.py -->\n", "<!-- end -->"
STEPS = 200
"""Of a turn; at the usual interval three records are taken in it, and the first step's is one too many."""
ROUNDS = 15


def torch_turns(name: str, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """A turn without a monitor, and one with it."""
    from evennorm.tools.bench.contestants import OURS
    from evennorm.tools.bench.network_cases import parsed_networks
    from evennorm.tools.bench_gpu import network
    from evennorm.torch import monitor

    (case,) = parsed_networks(name)
    train = network.training(case, network.contestants(case, compiled=False)[OURS], "cpu")
    train.autocast = False

    def turn() -> None:
        for _ in range(STEPS):
            train()

    def watched() -> None:
        with monitor(train.model, folder):
            turn()

    return turn, watched


def keras_turns(folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """The same for Keras's fit."""
    import keras
    import numpy as np

    from evennorm.keras import BatchNormalization, StatisticsMonitor

    blocks = [layer for _ in range(4) for layer in (keras.layers.Dense(256), BatchNormalization(activation="relu"))]
    model = keras.Sequential([keras.Input((256,)), *blocks, keras.layers.Dense(10, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(128 * STEPS, 256)).astype("float32"), random.integers(0, 10, 128 * STEPS)

    def turn(callbacks: list[Any] | None = None) -> None:
        model.fit(x, y, batch_size=128, shuffle=False, verbose=0, callbacks=callbacks)

    return turn, lambda: turn([StatisticsMonitor(str(folder))])


def measured(turns: tuple[Callable[[], None], Callable[[], None]]) -> list[list[float]]:
    """Seconds per step of each round, without and with; who goes first takes turns."""
    rows = []
    for turn in turns:
        turn()
    for number in range(ROUNDS):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        row = [0.0, 0.0]
        for which in order:
            start = perf_counter()
            turns[which]()
            row[which] = (perf_counter() - start) / STEPS
        rows.append(row)
    return rows


def measure() -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, name in (
            ("torch, MLP of 4 x 256, batch 128", "mlp:128"),
            ("torch, ResNet-18, 32 px, batch 4", "resnet18:4x32"),
        ):
            found[title] = measured(torch_turns(name, Path(folder, "torch")))
        found["Keras on JAX, MLP of 4 x 256, batch 128"] = measured(keras_turns(Path(folder, "keras")))
    return {"seconds": found, "steps": STEPS, "environment": environment()}


def table(result: dict[str, Any]) -> str:
    from evennorm.tools.spread import Median

    lines = ["| training | ms per step | with a monitor | the monitor adds |", "| --- | ---: | ---: | ---: |"]
    for title, rows in result["seconds"].items():
        without, watched = (Median.of([1000 * row[which] for row in rows]).value for which in (0, 1))
        added = Median.of([100 * (row[1] / row[0] - 1) for row in rows])
        interval = f"{added.value:.1f} % ({added.low:.1f} to {added.high:.1f})"
        lines.append(f"| {title} | {without:.2f} | {watched:.2f} | {interval} |")
    lines.append(
        "\nMedians of "
        + f"{ROUNDS} turns of {result['steps']} steps, with 95 % intervals. "
        + sentence(result["environment"])
    )
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any], text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(result) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    os.environ["KERAS_BACKEND"] = "jax"
    RESULT.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULT.read_text()), PAGE.read_text()))
