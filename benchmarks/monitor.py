"""What a monitor costs: the CPU time that `evennorm.torch.monitor` and `StatisticsMonitor` take themselves, beside steps.

A difference of whole steps with and without a monitor drowns in what else the machine does. So the parts are measured where
they run: a step, a step's visit to a monitor that records nothing, and a record. Writes benchmarks/results/monitor.json and,
from it, the table in docs/monitor.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time, thread_time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment, sentence

RESULT = ROOT / "benchmarks" / "results" / "monitor.json"
PAGE = ROOT / "docs" / "monitor.md"
BEGIN, END = "<!-- measured: benchmarks/monitor.py -->\n", "<!-- end -->"
VISITS = 10_000
ROUNDS = 15


class Clock:
    """Takes the time of a monitor's records while a model trains.

    That of the training thread, which runs the monitor; of writing that of the whole process, up to the disk, since
    TensorBoard's files are written by threads of their own.
    """

    def __init__(self, recorder: Any):
        self.milliseconds: list[float] = []
        self._before, self._after, self._write = recorder.before, recorder.after, recorder._writer.write
        self._file = recorder._writer._file
        self._begun = 0.0
        recorder.before, recorder.after, recorder._writer.write = self.before, self.after, self.write

    def before(self, steps: int = 1) -> None:
        start = thread_time()
        self._before(steps)
        self._begun = thread_time() - start

    def after(self, steps: int = 1) -> None:
        self._written = 0.0
        start = thread_time()
        self._after(steps)
        if self._written:
            self.milliseconds.append(1000 * (self._begun + thread_time() - start + self._written))

    def write(self, step: int, layers: Any) -> None:
        whole, own = process_time(), thread_time()
        self._write(step, layers)
        self._file.flush()
        self._written = (process_time() - whole) - (thread_time() - own)  # `after` counts its own thread


def torch_parts(name: str, steps: int, folder: Path) -> tuple[Callable[[], None], Clock, Callable[[], float]]:
    """A turn of `steps` with one record, the clock of that, and microseconds of a visit between records."""
    import torch

    from evennorm.tools.bench.contestants import OURS
    from evennorm.tools.bench.network_cases import parsed_networks
    from evennorm.tools.bench_gpu import network
    from evennorm.torch import monitor

    (case,) = parsed_networks(name)
    train = network.training(case, network.contestants(case, compiled=False)[OURS], "cpu")
    train.autocast = False
    clock = Clock(monitor(train.model, folder, every=steps)._recorder)
    plain, watched, x = torch.nn.Identity(), torch.nn.Identity(), torch.zeros(1)
    monitor(watched, lambda *record: None, every=10**9)

    def turn() -> None:
        for _ in range(steps):
            train()

    return turn, clock, lambda: each(lambda: watched(x)) - each(lambda: plain(x))


def keras_parts(steps: int, folder: Path) -> tuple[Callable[[], None], Clock, Callable[[], float]]:
    """The same for Keras's fit."""
    import keras
    import numpy as np

    from evennorm.keras import BatchNormalization, StatisticsMonitor

    random = np.random.default_rng(0)
    x, y = random.normal(size=(128 * steps, 256)).astype("float32"), random.integers(0, 10, 128 * steps)
    blocks = [layer for _ in range(4) for layer in (keras.layers.Dense(256), BatchNormalization(activation="relu"))]
    model = keras.Sequential([keras.Input((256,)), *blocks, keras.layers.Dense(10, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    see, idle = StatisticsMonitor(str(folder), every=steps), StatisticsMonitor(lambda *record: None, every=10**9)
    see.on_train_end = lambda logs=None: None  # one file for all turns
    clock = Clock(see._recorder)
    idle.set_model(model)
    idle.set_params({"steps": 10**9})
    return (
        lambda: model.fit(x, y, batch_size=128, shuffle=False, verbose=0, callbacks=[see]),
        clock,
        lambda: each(lambda: idle.on_train_batch_begin(0)),
    )


def each(call: Callable[[], Any]) -> float:
    """Microseconds."""
    call()
    start = thread_time()
    for _ in range(VISITS):
        call()
    return 1e6 * (thread_time() - start) / VISITS


def measured(turn: Callable[[], None], clock: Clock, visit: Callable[[], float], steps: int) -> dict[str, list[float]]:
    """Milliseconds of steps without the monitor's part, and of records; microseconds of visits."""
    turn()  # which compiles, and records twice
    found: dict[str, list[float]] = {"steps": [], "records": [], "visits": []}
    for _ in range(ROUNDS):
        clock.milliseconds.clear()
        start = process_time()
        turn()
        spent = 1000 * (process_time() - start)
        (record,) = clock.milliseconds
        found["visits"].append(visit())
        found["records"].append(record)
        found["steps"].append((spent - record) / steps - found["visits"][-1] / 1000)
    return found


def measure() -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, name, steps in (
            ("torch, MLP of 4 x 256, batch 128", "mlp:128", 100),
            ("torch, ResNet-18, 32 px, batch 4", "resnet18:4x32", 20),
        ):
            found[title] = measured(*torch_parts(name, steps, Path(folder, name)), steps)
        found["Keras on JAX, MLP of 4 x 256, batch 128"] = measured(*keras_parts(100, Path(folder, "keras")), 100)
    return {"measured": found, "environment": environment()}


def table(result: dict[str, Any]) -> str:
    from evennorm.monitor.recorder import EVERY
    from evennorm.tools.spread import Median

    lines = ["| training | ms per step | µs per step between records | ms per record | the monitor adds |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for title, parts in result["measured"].items():
        step, visit, record = (Median.of(parts[name]).value for name in ("steps", "visits", "records"))
        rounds = zip(parts["steps"], parts["visits"], parts["records"], strict=True)
        added = Median.of([100 * (visit / 1000 + record / EVERY) / step for step, visit, record in rounds])
        interval = f"{added.value:.2f} % ({added.low:.2f} to {added.high:.2f})"
        lines.append(f"| {title} | {step:.2f} | {visit:.1f} | {record:.2f} | {interval} |")
    lines.append(
        f"\nCPU time, with a TensorBoard record at every {EVERY}th step; the training on one thread. Medians of "
        f"{ROUNDS} turns, with 95 % intervals; without waits for the disk or a GPU. {sentence(result['environment'])}"
    )
    return "\n".join(lines) + "\n"


def page(result: dict[str, Any], text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(result) + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    os.environ |= {"KERAS_BACKEND": "jax", "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    RESULT.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULT.read_text()), PAGE.read_text()))
