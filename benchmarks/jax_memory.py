"""Measure what JAX gains on the CPU from memory that the C library keeps: whole training steps, and the layer alone.

Writes benchmarks/results/jax-memory.json and, from it, docs/jax-memory.md. A setting holds for a process, so each way of
treating freed memory has processes of its own; within one, Keras's layer and ours take their steps in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment, sentence

from evennorm.tools.bench.machine import load
from evennorm.tools.spread import Median, ratio, ratio_apart, together

RESULT = ROOT / "benchmarks" / "results" / "jax-memory.json"
PAGE = ROOT / "docs" / "jax-memory.md"

WAYS: dict[str, dict[str, str]] = {
    "returned": {},
    "kept": {},
    "environment": {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_ARENA_MAX": "1"},
}
"""What happens to freed memory: what glibc does by itself; `keep_memory()`; variables when the process starts."""

MISSING = """\
Whole training steps have not been measured yet on an idle machine: `python benchmarks/jax_memory.py`
measures them and writes this page. [limits.md](limits.md#jax) has the layer alone, with memory kept by the environment."""

HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Has glibc ask for huge pages, from the start of a process on."""

LAYERS = {"keras": "Keras's layer", "ours": "evennorm's layer"}
NETWORKS = {"article": "The articles' network", "mlp": "MLP", "resnet": "Small ResNet"}
INPUTS = {"article": (8, 48, 48, 1), "mlp": (512, 784), "resnet": (16, 32, 32, 3)}
QUICK = {"article": (2, 24, 24, 1), "mlp": (4, 8), "resnet": (2, 8, 8, 3)}
CLASSES = 10
SHAPES = "all"
MOVED = {False: 8, True: 5}
"""How often both passes read or write an array of the size of x that no cache holds: channels last, and channels first,
where one channel's values stay in the cache. See docs/limits.md."""
COPIED = 2
BEYOND_CACHES = 16 << 20
TARGETS = {"returned": (2.3, 1.5), "kept": (3.5, 2.2)}
"""How many times as fast as Keras's layer ours should be: the geometric mean, and at worst."""


def mlp(shape: tuple[int, ...]) -> Any:
    """Two hidden layers of 1024, normalized."""
    from keras import Input, Sequential, layers

    hidden = [[layers.Dense(1024, use_bias=False), layers.BatchNormalization(), layers.ReLU()] for _ in range(2)]
    return Sequential([Input(shape), *(layer for block in hidden for layer in block), layers.Dense(CLASSES, "softmax")])


def resnet(shape: tuple[int, ...]) -> Any:
    """Three stages of one block each, as He et al. have for images of 32 pixels, with twice the width."""
    from keras import Input, Model, layers

    def normalized(x: Any, width: int, stride: int, size: int = 3) -> Any:
        x = layers.Conv2D(width, size, strides=stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    x = inputs = Input(shape)
    x = layers.ReLU()(normalized(x, 32, 1))
    for width, stride in ((32, 1), (64, 2), (128, 2)):
        inner = normalized(layers.ReLU()(normalized(x, width, stride)), width, 1)
        beside = x if stride == 1 else normalized(x, width, stride, 1)
        x = layers.ReLU()(layers.Add()([inner, beside]))
    return Model(inputs, layers.Dense(CLASSES, "softmax")(layers.GlobalAveragePooling2D()(x)))


def steps(name: str, shape: tuple[int, ...]) -> dict[str, Callable[[], float]]:
    """A training step of a network with each layer, from equal weights."""
    import keras

    from evennorm.keras import convert, revert
    from evennorm.tools.compare.networks import article_cnn

    keras.utils.set_random_seed(0)
    if name == "article":
        ours = article_cnn(shape[1:], CLASSES)
        models = {"keras": revert(ours), "ours": ours}
    else:
        theirs = {"mlp": mlp, "resnet": resnet}[name](shape[1:])
        models = {"keras": theirs, "ours": convert(theirs)}
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal(shape, dtype=np.float32), rng.integers(0, CLASSES, shape[0])
    for model in models.values():
        model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    return {layer: lambda model=model: float(model.train_on_batch(x, labels)) for layer, model in models.items()}


def layer_calls(case: Any) -> dict[str, Callable[[], Any]]:
    """Forward and backward of each layer alone, jitted, and a copy of x."""
    from evennorm.tools.bench import on_jax
    from evennorm.tools.bench.contestants import COPY, KERAS, OUR_LAYER, draw

    data = on_jax.place(case, draw(case))
    names = {KERAS: "keras", OUR_LAYER: "ours", COPY: "copy"}
    calls = {names[one.name]: one.prepare(case, data) for one in on_jax.contestants() if one.name in names}
    return {name: call.both or call.forward for name, call in calls.items()}


def measured(way: str, networks: dict[str, tuple[int, ...]], shapes: str, rounds: int) -> dict[str, Any]:
    """Milliseconds in this process, and what it holds of memory in the end."""
    from evennorm.jax import keep_memory
    from evennorm.tools.bench.cases import cases
    from evennorm.tools.bench.clock import in_turns

    said = str(keep_memory()) if way == "kept" else None
    before = load()
    found: dict[str, Any] = {}
    for name, shape in networks.items():
        found[name] = _milliseconds(in_turns(steps(name, shape), rounds, warm_up=2))
    resident = _resident()
    for case in cases(shapes) if shapes else ():
        found[case.place] = _milliseconds(in_turns(layer_calls(case), rounds, warm_up=2))
    return {"way": way, "said": said, "load before": before, "resident MB": resident, "milliseconds": found}


def _milliseconds(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(1000 * seconds, 4) for seconds in values] for name, values in times.items()}


def _resident() -> float | None:
    try:
        return round(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    except (OSError, IndexError):
        return None


def in_processes(options: list[str], processes: int, together: bool) -> list[dict[str, Any]]:
    """What processes of each way say: in turns, or all ways together, so that other work meets them alike."""
    runs = []
    for _ in range(processes):
        started = []
        for way, variables in WAYS.items():
            print(f"jax_memory: {way}", file=sys.stderr)
            around = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", **variables}
            command = [sys.executable, __file__, "--way", way, *options]
            started.append(subprocess.Popen(command, env=around, stdout=subprocess.PIPE, text=True))
            if not together:
                started[-1].wait()
        for process in started:
            out, _ = process.communicate()
            if process.returncode:
                sys.exit(process.returncode)
            runs.append(json.loads(out.splitlines()[-1]))
    return runs


def joined(runs: list[dict[str, Any]], way: str, what: str) -> dict[str, list[float]]:
    """The samples of all processes of one way."""
    of_way = [run["milliseconds"][what] for run in runs if run["way"] == way and what in run["milliseconds"]]
    return {name: [sample for samples in of_way for sample in samples[name]] for name in of_way[0]}


def page(result: dict[str, Any]) -> str:
    """docs/jax-memory.md."""
    return "\n".join([*_page(result), ""])


def _page(result: dict[str, Any]) -> Iterator[str]:
    runs = result["runs"]
    variables = " ".join(f"{name}={value}" for name, value in WAYS["environment"].items())
    yield from """# Reusing memory on JAX

On the CPU, XLA allocates results and intermediate values with malloc and frees them after the step. glibc returns large
pieces to the system. The next step then gets new pages, which the system fills with zeros first. One call keeps the memory
in the process:

```python
from evennorm.jax import keep_memory

print(keep_memory())
```

It returns `glibc 2.36 keeps the memory that this process frees`, or the reason why it could not. It sets four options of
glibc (`mallopt`: `M_MMAP_MAX`, `M_TRIM_THRESHOLD`, `M_TOP_PAD`, `M_ARENA_MAX`) for the whole process. It does nothing with
another C library (musl, macOS, Windows) or another malloc (jemalloc by `LD_PRELOAD`). Call it before the first
computation: a thread that has allocated memory before keeps its own heap, which cannot hold arrays above 64 MB. The result
then says so (`late`). `memory_kept()` says whether memory is kept. `keep_memory(False)` undoes it and returns free memory
at once. **It costs resident memory**: the process stays as large as it was at its peak, also during smaller steps.
""".splitlines()
    yield ""
    yield from _figures(result) if runs else MISSING.splitlines()
    yield from f"""
## Other ways

- **Environment variables** do the same without a change to the program. Set them before it starts:
  `{variables}`. `mallopt` limits such
  thresholds to 32 MB by its manual, so `keep_memory` sets `M_MMAP_MAX` instead.
- **Huge pages**: set `GLIBC_TUNABLES={HUGE["GLIBC_TUNABLES"]}` before the process starts, and glibc requests them. You can
  combine this with `keep_memory`. The kernels request huge pages for their own results anyway.
- **Donated arguments** (`donate_argnums`) are no substitute. XLA can use a donated dy for dx only if the call declares the
  two as aliases (`operand_output_aliases`); otherwise it copies dy first, and a step takes longer. Within a jitted program
  the alias changes nothing: XLA already shares the memory of intermediate arrays, and a program of several layers requests
  the same number of bytes with the alias and without. y must be new in any case, because the backward pass reads x again.
- **A scratch result** of the call is a result like any other: XLA allocates it for each step and frees it.
""".splitlines()
    if runs:
        yield ""
        yield sentence(result)


def _figures(result: dict[str, Any]) -> Iterator[str]:
    runs = result["runs"]
    alone = [what for what in runs[0]["milliseconds"] if what not in NETWORKS]
    loads = [run["load before"] for run in runs if run["load before"] is not None]
    order = "all ran at the same time" if result["together"] else "they alternate"
    yield from f"""\
`python benchmarks/jax_memory.py` writes this page from `benchmarks/results/jax-memory.json`. Memory is *returned*, the
default; *kept* by `keep_memory`; or kept by variables of the *environment*. Times are medians in milliseconds with their
95 % intervals. Each of the three has its own process, and {order}. Within a process, Keras's layer and
evennorm's take turns, and their ratio is taken within each turn: above 1 evennorm is faster. Load average before:
{min(loads)} to {max(loads)} on {os.cpu_count()} cores. If it exceeds the number of cores, other programs ran at
the same time: then times are several times as long as on an idle machine, intervals are wide, and ratios are more reliable.

## Whole training steps

Keras's `train_on_batch` on JAX, float32, SGD:
""".splitlines()
    yield ""
    columns = ["returned", "kept", "ratio, returned", "ratio, kept"]
    yield (
        "| network, input | "
        + " | ".join(
            [*(f"{layer}, {way}" for way in columns[:2] for layer in LAYERS.values()), *columns[2:], "gain by keeping"]
        )
        + " |"
    )
    yield "| --- |" + " ---: |" * 7
    for name, title in NETWORKS.items():
        if name in runs[0]["milliseconds"]:
            times = {way: joined(runs, way, name) for way in ("returned", "kept")}
            cells = [Median.of(times[way][layer]).text(".4g") for way in times for layer in LAYERS]
            cells += [ratio(times[way]["keras"], times[way]["ours"]).text(".2f") for way in times]
            cells.append(ratio_apart(times["returned"]["ours"], times["kept"]["ours"]).text(".2f"))
            yield f"| {title}, {'x'.join(map(str, INPUTS[name]))} | " + " | ".join(cells) + " |"
    yield from ("", "MB that a process holds after these steps:", "", "| way | MB |", "| --- | ---: |")
    for way in WAYS:
        held = [run["resident MB"] for run in runs if run["way"] == way and run["resident MB"] is not None]
        yield f"| {way} | {median(held):.0f} |" if held else f"| {way} | - |"
    if alone:
        yield from (
            "",
            "## The layer alone",
            "",
            "Forward and backward, jitted, with ReLU: the time of Keras's layer divided by evennorm's:",
            "",
        )
        yield from _layer_table(runs, alone)
        yield ""
        yield from _targets(runs, alone)


def _layer_table(runs: list[dict[str, Any]], alone: list[str]) -> Iterator[str]:
    yield "| shape | " + " | ".join(WAYS) + " |"
    yield "| --- |" + " ---: |" * len(WAYS)
    for what in alone:
        times = [joined(runs, way, what) for way in WAYS]
        yield f"| {what} | " + " | ".join(ratio(t["keras"], t["ours"]).text(".2f") for t in times) + " |"


def _targets(runs: list[dict[str, Any]], alone: list[str]) -> Iterator[str]:
    """What was to be reached, and whether it is; arrays below 1 MB measure what a call costs, and do not count."""
    from evennorm.tools.bench.cases import LARGE, cases

    large = {case.place for case in cases("all") if case.bytes >= LARGE}
    counted = [what for what in alone if what in large] or alone
    for way, (mean, worst) in TARGETS.items():
        found = {what: ratio(t["keras"], t["ours"]).value for what in counted for t in [joined(runs, way, what)]}
        slowest = min(found, key=found.__getitem__)
        got = geometric_mean(found.values())
        verdict = "reached" if got >= mean and found[slowest] >= worst else "missed"
        yield (
            f"- Memory {way}, arrays from 1 MB on: geometric mean {got:.2f}, worst {found[slowest]:.2f} ({slowest}). "
            f"The aim was {mean} and {worst}: {verdict}."
        )
        if verdict == "missed":
            yield from _limit(runs, [case for case in cases("all") if case.place in counted], way, mean)


def _limit(runs: list[dict[str, Any]], shapes: list[Any], way: str, aim: float) -> Iterator[str]:
    """How fast memory is used by arrays that no cache holds, and how fast the aim would have to use it."""
    large = [
        (joined(runs, way, case.place), MOVED[case.place.endswith(":first")])
        for case in shapes
        if case.bytes >= BEYOND_CACHES
    ]
    if not large:
        return
    now = together([ratio([t * moved / COPIED for t in times["copy"]], times["ours"]) for times, moved in large])
    aimed = together([ratio([t * moved / COPIED * aim for t in times["copy"]], times["keras"]) for times, moved in large])
    yield (
        f"- What stands in the way is memory. Arrays from {BEYOND_CACHES >> 20} MB on do not stay in the caches: both "
        f"passes read or write arrays of the size of x {MOVED[False]} times with channels last, {MOVED[True]} times with "
        f"channels first, and a copy {COPIED} times. evennorm's layer moves {now.text('.2f')} times as many bytes per "
        f"second as the copy. To be {aim} times as fast as Keras's layer, it would have to move {aimed.text('.2f')} times "
        "as many."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the file that is there")
    parser.add_argument("--quick", action="store_true", help="tiny arrays; prints the page and writes nothing")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process, and print JSON")
    parser.add_argument("--rounds", type=int, default=7, help="samples per process (default 7)")
    parser.add_argument("--shapes", default=SHAPES, help="of the layer alone, as evennorm bench takes them")
    parser.add_argument("--together", action="store_true", help="run the ways at the same time, not one after the other")
    parser.add_argument("--processes", type=int, default=2, help="of each way (default 2)")
    asked = parser.parse_args()
    if asked.way:
        networks, shapes = (QUICK, "4x3x2x5") if asked.quick else (INPUTS, asked.shapes)
        print(json.dumps(measured(asked.way, networks, shapes, asked.rounds)))
        return
    if asked.page:
        PAGE.write_text(page(json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": []}))
        return
    options = ["--rounds", str(asked.rounds), "--shapes", asked.shapes, *(["--quick"] if asked.quick else [])]
    runs = in_processes(options, 1 if asked.quick else asked.processes, asked.together)
    result = {**environment(), "together": asked.together, "runs": runs}
    if asked.quick:
        print(page(result))
        return
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
