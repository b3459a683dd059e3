"""What stands in the way of more speed: the kernels' stages one by one, with and without caches, beside a copy.

Writes benchmarks/results/limits.json and, from it, docs/limits.md. Each call is repeated by itself, float32 with ReLU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment, sentence

import evennorm
from evennorm.core.activation import RELU
from evennorm.core.call import Call
from evennorm.core.geometry import Geometry
from evennorm.kernels import cpu
from evennorm.tools.bench import bench
from evennorm.tools.bench.cases import Case, cases
from evennorm.tools.bench.machine import cores, last_cache
from evennorm.tools.spread import FEWEST, Median, ratio_apart, told
from evennorm.torch import engine
from evennorm.torch.kernels import cpu_kernel

RESULT = ROOT / "benchmarks" / "results" / "limits.json"
PAGE = ROOT / "docs" / "limits.md"
SHAPES = (
    "32x56x56x64,128x48x48x32,16x112x112x64,32x14x14x256,256x1024,32x64x112x112:first,128x32x48x48:first,32x256x14x14:first"
)

EPSILON = 1e-3
LARGE = 16 << 20
"""Bytes of x from which little of it stays in a cache."""

STAGES = {
    "copy": "copy of x",
    "moments": "moments",
    "normalize": "normalize",
    "forward": "forward",
    "backward": "backward",
}
"""Of the kernels, on memory that is there: the first leaves all arithmetic out, the next two leave a half of forward out."""

ARRAYS = {"copy": 2, "moments": 1, "normalize": 2, "forward": 3, "backward": 5}
"""Of x's size, that a stage reads or writes where nothing stays in a cache."""

JAX_SHAPES = "32x56x56x64,128x48x48x32,16x112x112x64,32x14x14x256,256x1024"
JAX_LAYERS = ("evennorm, Keras layer", "Keras's layer")
FREED: dict[str, dict[str, str]] = {
    "returned": {},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "100000000"},
}
"""What the C library does with memory that was freed, and what tells it so."""

MEMORIES = {
    "used": "memory that was used before",
    "huge": "fresh memory in huge pages",
    "library": "fresh memory as torch takes it",
}


def stages(case: Case) -> dict[str, Callable[[], Any]]:
    """Calls of the kernels; what they return is dropped, and comes from memory that was used before."""
    x, dy, gamma, beta = tensors(case)
    call = Call(Geometry(tuple(x.shape), case.axis), epsilon=EPSILON, activation=RELU)
    y = torch.empty_like(x)
    _, saved = cpu_kernel.forward(call, x, gamma, beta)
    mean, mean_low, variance = (statistic.reshape(-1) for statistic in saved[0])
    return {
        "copy": lambda: y.copy_(x),
        "moments": lambda: cpu_kernel.moments(call, x),
        "normalize": lambda: cpu_kernel.infer(call, x, mean, variance, gamma, beta, mean_low=mean_low, out=y),
        "forward": lambda: cpu_kernel.forward(call, x, gamma, beta, out=y),
        "backward": lambda: cpu_kernel.backward(call, dy, x, gamma, beta, saved, False),
    }


def step(case: Case) -> Callable[[], Any]:
    """Forward and backward as a user calls them."""
    x, dy, gamma, beta = tensors(case)
    leaves = [tensor.requires_grad_() for tensor in (x, gamma, beta)]
    call = Call(Geometry(tuple(x.shape), case.axis), epsilon=EPSILON, activation=RELU)

    def both() -> Any:
        y, _ = engine.train(call, x, gamma, beta)
        return y, torch.autograd.grad(y, leaves, dy)

    return both


def tensors(case: Case) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in (case.shape, case.shape, case.channels, case.channels)]


class Times(NamedTuple):
    """Of one call, in milliseconds."""

    samples: list[float]

    @property
    def ends(self) -> list[float]:
        """The median, and the interval that holds the true one."""
        found = Median.of(self.samples)
        return [round(value, 4) for value in (found.value, found.low, found.high) if value is not None]


def milliseconds(call: Callable[[], Any], seconds: float, between: Callable[[], Any] = lambda: None) -> Times:
    """As many calls as fit, at least 6; `between` is called before each, and is not part of the time."""
    times: list[float] = []
    for _ in range(2):
        call()
    while len(times) < FEWEST or sum(times) < seconds:
        between()
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return Times([1000 * time for time in times])


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Each stage with caches as the call before left them, and full of something else; a step with each kind of memory."""
    others = torch.zeros(max(4 * (last_cache() or 0), 1 << 20), dtype=torch.uint8)
    calls, both = stages(case), step(case)
    found: dict[str, Any] = {"case": case.place, "bytes": case.bytes}
    found["repeated"] = {name: milliseconds(call, seconds) for name, call in calls.items()}
    found["caches emptied"] = {name: milliseconds(call, seconds, lambda: others.add_(1)) for name, call in calls.items()}
    steps, limit, pooled = {"used": milliseconds(both, seconds)}, 256, cpu.HUGE
    try:
        evennorm.set_buffer_limit(0)
        steps["huge"] = milliseconds(both, seconds)
        cpu.HUGE = sys.maxsize
        steps["library"] = milliseconds(both, seconds)
    finally:
        cpu.HUGE = pooled
        evennorm.set_buffer_limit(limit)
    times = {**found, "steps": steps}
    kinds = ("repeated", "caches emptied", "steps")
    spreads = {kind: {name: each.ends for name, each in times[kind].items()} for kind in kinds}
    return {**times, **{kind: {name: ends[0] for name, ends in spreads[kind].items()} for kind in kinds}, "spreads": spreads}


def on_jax(shapes: str, rounds: int | None) -> dict[str, Any]:
    """Medians of Keras's layer and of ours, forward and backward, jitted, in turns, with each way to treat freed memory."""
    found = {}
    for name, variables in FREED.items():
        os.environ.update(variables)
        try:
            rows = bench("jax", shapes, passes=["both"], against=["Keras's layer"], rounds=rounds).rows
        finally:
            for variable in variables:
                del os.environ[variable]
        layers = [row for row in rows if row.contestant in JAX_LAYERS and row.milliseconds]
        places = dict.fromkeys(row.case.place for row in layers)
        by_place = {place: {row.contestant: row for row in layers if row.case.place == place} for place in places}
        found[name] = {place: {each: round(row.median, 4) for each, row in rows.items()} for place, rows in by_place.items()}
        ours, theirs = JAX_LAYERS
        for place, rows in by_place.items():
            spread = ratio_apart(rows[theirs].milliseconds, rows[ours].milliseconds)
            found.setdefault("ratios", {}).setdefault(name, {})[place] = [spread.value, spread.low, spread.high]
    return found


def stage_table(rows: list[dict[str, Any]], caches: str) -> Iterator[str]:
    """Milliseconds, and GB/s of what has to be read and written where nothing stays in a cache."""
    yield "| shape | MB | " + " | ".join(STAGES.values()) + " |"
    yield "| --- | ---: |" + " ---: |" * len(STAGES)
    for row in rows:
        cells = [f"{time:.3g} ({ARRAYS[name] * row['bytes'] / time / 1e6:.0f} GB/s)" for name, time in row[caches].items()]
        yield f"| {row['case']} | {row['bytes'] / 1e6:.3g} | " + " | ".join(cells) + " |"


def step_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| shape | kernels, caches emptied | " + " | ".join(MEMORIES.values()) + " |"
    yield "| --- |" + " ---: |" * (len(MEMORIES) + 1)
    for row in rows:
        kernels = sum(row["caches emptied"][name] for name in ("forward", "backward"))
        cells = [f"{row['steps'][name]:.3g}" for name in MEMORIES]
        yield f"| {row['case']} | {kernels:.3g} | " + " | ".join(cells) + " |"


def jax_table(found: dict[str, Any]) -> Iterator[str]:
    """Milliseconds, and how many times as fast ours is."""
    yield "| shape | " + " | ".join(f"evennorm, {name} | Keras's, {name} | ratio" for name in FREED) + " |"
    yield "| --- |" + " ---: | ---: | ---: |" * len(FREED)
    for place in found["returned"]:
        cells = []
        for name in FREED:
            ours, theirs = (found[name][place][layer] for layer in JAX_LAYERS)
            known = found.get("ratios", {}).get(name, {}).get(place)
            cells += [f"{ours:.3g}", f"{theirs:.3g}", told(known[0], Median(*known)) if known else "-"]
        yield f"| {place} | " + " | ".join(cells) + " |"


def jax_conclusion(found: dict[str, Any]) -> Iterator[str]:
    """Why ratios are missing, where they are."""
    if "ratios" not in found:
        yield "A ratio stands here once it was measured with its spread, which this run did not keep."
        yield ""


def conclusions(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the figures say, in sentences; ratios only where their spread is known."""
    large = [row for row in rows if row["bytes"] >= LARGE and "spreads" in row]
    if large:
        shares = []
        for row in large:
            times = row["spreads"]["caches emptied"]
            shares += [
                _part(times["copy"], times[stage], ARRAYS[stage] / ARRAYS["copy"]) for stage in ("forward", "backward")
            ]
        steps = [row["spreads"]["steps"] for row in large]
        huge, library = ([_part(each[name], each["used"]) for each in steps if name in each] for name in ("huge", "library"))
        yield (
            f"- From {LARGE >> 20} MB on, the forward and backward passes move {spread(shares)} times as many bytes per "
            f"second as "
            "the copy: memory is the limit."
        )
        yield (
            f"- For these arrays, fresh memory makes a step {spread(huge)} times as long with huge pages, and "
            f"{spread(library)} "
            "times as long with torch's own memory: the system first fills every new page with zeros."
        )
    for row in rows:
        if row["bytes"] < LARGE:
            kernels = sum(row["repeated"][stage] for stage in ("forward", "backward"))
            whole = row["steps"]["used"]
            yield (
                f"- {row['case']}: of the {whole:.3g} ms of a repeated step, the kernels alone take {kernels:.3g}; the "
                f"other "
                f"{whole - kernels:.2g} are calls through Python and autograd, and writing results that are not in a "
                f"cache yet."
            )


def setting() -> str:
    """How a shell is told to keep memory."""
    return "`" + " ".join(f"{name}={value}" for name, value in FREED["kept"].items()) + "`"


def _part(one: list[float], other: list[float], times: float = 1.0) -> Median:
    """A ratio of medians by their intervals."""
    (value, low, high), (below, below_low, below_high) = one, other
    return Median(times * value / below, times * low / below_high, times * high / below_low)


def spread(values: list[Median]) -> str:
    """From the least of several ratios to the largest, each with its interval."""
    ends = [min(values, key=lambda each: each.value), max(values, key=lambda each: each.value)]
    return " to ".join(told(each.value, each, ".2g") for each in ends)


def page(result: dict[str, Any]) -> str:
    """docs/limits.md."""
    rows = result["cases"]
    lines = [
        "# What limits the speed",
        "",
        "Batch normalization reads x to compute its moments, reads it again to normalize it, and writes y. If nothing",
        "stays in a cache, that moves three arrays of the size of x, and five in the backward pass. The tables show the",
        f"stages of the kernels alone: float32 with ReLU, on memory that was used before, with {result['threads']} threads.",
        "Each cell has milliseconds, and the bandwidth this takes if no cache helps. Where a stage reaches the bandwidth",
        "of the copy, memory is the limit, and only fewer bytes would help. `python benchmarks/limits.py` writes this page",
        "from `benchmarks/results/limits.json`.",
        "",
        "With emptied caches: before each call, other data four times as large as the last cache is written, as in a",
        "network whose other layers fill the caches:",
        "",
        *stage_table(rows, "caches emptied"),
        "",
        "Repeated, so that arrays that fit stay in the caches:",
        "",
        *stage_table(rows, "repeated"),
        "",
        "A step as a user calls it: forward and backward through torch, repeated. The memory of the results is allocated",
        "anew each time, as part of the step. The first column repeats the time of the kernels from the first table:",
        "",
        *step_table(rows),
        "",
        *conclusions(rows),
        "",
        "## A copy",
        "",
        "[kernels.md](kernels.md) compares the forward pass with a copy of x into fresh memory. Channels first, each",
        "channel is normalized while it is in the cache, so the forward pass reads and writes as much as the copy.",
        "Channels last, all of x must be read before the first value can be written, and then read again: half as many",
        "bytes more. Arrays smaller than the last cache are copied within it, much faster than through memory. For these,",
        "arithmetic and the cost of a call are the limit.",
        "",
        "## JAX",
        "",
        "XLA allocates the memory of each result with the C library and frees it. The C library returns large pieces to",
        "the system, and the next call gets new pages, which the system first fills with zeros. This happens with every",
        "kernel. The table shows Keras's layer and evennorm's, forward and backward, jitted, in turns, in milliseconds:",
        f"with memory returned, as by default, and with memory kept, by {setting()} (glibc):",
        "",
        *jax_table(result["jax"]),
        "",
        *jax_conclusion(result["jax"]),
        "[`evennorm.jax.keep_memory()`](jax-memory.md) keeps the memory from within a program, at the cost of resident",
        "memory.",
        "",
        sentence(result),
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the file that is there")
    parser.add_argument("--quick", action="store_true", help="a tiny array; prints the page and writes nothing")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(page(json.loads(RESULT.read_text())))
        return
    torch.set_num_threads(cores())
    which, seconds = ("8x4x6x5,8x5x4x6:first", 0.0) if arguments.quick else (SHAPES, 0.5)
    result = {**environment(), "threads": cores(), "load before": os.getloadavg()[0]}
    result["cases"] = [measure(case, seconds) for case in cases(which)]
    result["jax"] = on_jax(which, 3) if arguments.quick else on_jax(JAX_SHAPES, None)
    if arguments.quick:
        print(page(result))
        return
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
