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
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment, sentence

RESULT = ROOT / "benchmarks" / "results" / "monitor.json"
PAGE = ROOT / "docs" / "monitor.md"
BEGIN, END = "<!-- measured: benchmarks/monitor.py -->\n", "<!-- end -->"
STEPS = 100
"""Of a turn: at the default interval one record is taken in it."""
ROUNDS = 21
Turns = tuple[Callable[[], None], Callable[[], None]]


def torch_turns(name: str, folder: Path) -> Turns:
    """A turn without a monitor, and one with it."""
    from evennorm.tools.bench.contestants import OURS
    from evennorm.tools.bench.network_cases import parsed_networks
    from evennorm.tools.bench_gpu import network
    from evennorm.torch import monitor

    (case,) = parsed_networks(name)

    def training(watched: bool) -> Callable[[], None]:
        train = network.training(case, network.contestants(case, compiled=False)[OURS], "cpu")
        train.autocast = False
        if watched:
            monitor(train.model, folder)

        def turn() -> None:
            for _ in range(STEPS):
                train()

        return turn

    return training(watched=False), training(watched=True)


def keras_turns(folder: Path) -> Turns:
    """The same for Keras's fit."""
    import keras
    import numpy as np

    from evennorm.keras import BatchNormalization, StatisticsMonitor

    random = np.random.default_rng(0)
    x, y = random.normal(size=(128 * STEPS, 256)).astype("float32"), random.integers(0, 10, 128 * STEPS)

    def training(callbacks: list[Any]) -> Callable[[], None]:
        blocks = [layer for _ in range(4) for layer in (keras.layers.Dense(256), BatchNormalization(activation="relu"))]
        model = keras.Sequential([keras.Input((256,)), *blocks, keras.layers.Dense(10, activation="softmax")])
        model.compile("sgd", "sparse_categorical_crossentropy")
        return lambda: model.fit(x, y, batch_size=128, shuffle=False, verbose=0, callbacks=callbacks)

    return training([]), training([StatisticsMonitor(str(folder))])


def measured(turns: Turns) -> list[list[float]]:
    """Seconds of CPU per step of each round, without and with; who goes first takes turns.

    The time of the CPU, on one thread: other programs of the machine have little part in it.
    """
    for turn in turns:
        turn()
    rows = []
    for number in range(ROUNDS):
        row = [0.0, 0.0]
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start = process_time()
            turns[which]()
            row[which] = (process_time() - start) / STEPS
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

    lines = ["| training | ms per step, without | with a monitor | the monitor adds |", "| --- | ---: | ---: | ---: |"]
    for title, rows in result["seconds"].items():
        without, watched = (Median.of([1000 * row[which] for row in rows]).value for which in (0, 1))
        added = Median.of([100 * (row[1] / row[0] - 1) for row in rows])
        interval = f"{added.value:.1f} % ({added.low:.1f} to {added.high:.1f})"
        lines.append(f"| {title} | {without:.2f} | {watched:.2f} | {interval} |")
    rounds = {len(rows) for rows in result["seconds"].values()}
    lines.append(
        "\nCPU time on one thread, with TensorBoard records: medians of "
        f"{max(rounds)} turns of {result['steps']} steps, with 95 % intervals. {sentence(result['environment'])}"
    )
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any], text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(result) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    os.environ |= {"KERAS_BACKEND": "jax", "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    RESULT.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULT.read_text()), PAGE.read_text()))
