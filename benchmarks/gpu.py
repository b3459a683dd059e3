"""Measure how fast networks train, layers are called and arrays are normalized on this machine's GPU.

Whole training steps come first: torch eager and compiled, evennorm, and without normalization. Then calls of layers, with
the host's time beside the device's, and the arrays of ResNet-50, with a copy as the limit. Writes
benchmarks/results/gpu-MODE.json after each network and array, so that a run that is cut short keeps what it has, and prints
tables. Needs torch, NumPy and Triton, and a source tree; nothing has to be built.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
from evennorm.errors import EvennormError
from evennorm.tools.bench.cases import PASSES, Case, checked
from evennorm.tools.bench.machine import environment
from evennorm.tools.bench.network_cases import NETWORKS, ON_GPU, NetworkCase, parsed_networks
from evennorm.tools.bench.report import Benchmark
from evennorm.tools.bench.settings import Settings
from evennorm.tools.bench_gpu.cases import BATCH, VARIANTS, resnet50
from evennorm.tools.bench_gpu.report import GpuBenchmark, table

RESULTS = Path(__file__).resolve().parent / "results"

CALL_ROUNDS = 15
"""Samples of a call's figures at most; each of them is the mean of many calls."""


PARTS = ("networks", "calls", "arrays")

QUICK = {
    "networks": "mlp,resnet50",
    "compile": "",
    "variants": "bn+relu",
    "dtypes": "bfloat16",
    "layouts": "last",
    "rounds": 9,
    "network_rounds": 5,
    "against": "torch eager",
}
"""What --quick chooses: two to three minutes on a large GPU. Options that are given as well win."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, measured in this order")
    parser.add_argument("--networks", default="all", help=f"of {', '.join(NETWORKS)}, as in mlp:16,resnet50:32x224; or all")
    parser.add_argument("--compile", default="mlp,article,resnet50", help="the networks that torch.compile trains, too")
    parser.add_argument("--network-rounds", type=int, default=9, help="samples of each network's figures")
    parser.add_argument(
        "--mode", choices=("recorded", "queued"), default="recorded", help="arrays by CUDA graphs, or by calls"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="of the arrays")
    parser.add_argument("--variants", default=",".join(("bn+relu", "bn+add+relu", "bn")), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--layouts", default="last,first", help="channels last, channels first, or both")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--against", default="", help="families of other layers, such as torch eager; all of them if empty")
    parser.add_argument("--rounds", type=int, default=25, help="samples of each figure of calls and arrays")
    parser.add_argument("--minutes", type=float, default=None, help="start nothing else after so long")
    parser.add_argument("--quick", action="store_true", help="a few of all, without torch.compile")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file, else benchmarks/results/gpu-MODE.json")
    if parser.parse_args(given).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(given)


def gpu() -> dict[str, Any]:
    """What a figure needs beside it."""
    import torch

    device = torch.cuda.get_device_properties(0)
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory": device.total_memory,
        "cache": getattr(device, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": getattr(torch._C, "_cuda_getDriverVersion", lambda: None)(),
    }


def where() -> dict[str, Any]:
    found = environment()
    for package in ("triton", "torchvision", "timm"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "gpu": gpu()}


def wanted(families: str, everyone: list[Any]) -> list[Any]:
    """The layers of the families, ours and the copy.

    Raises:
        InputError: a family that there is not.
    """
    chosen = words(families)
    others = dict.fromkeys(one.family for one in everyone if one.ours)
    checked("against", chosen, others, may_be_empty=True)
    return [one for one in everyone if not chosen or one.ours is None or one.family in chosen]


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


class Deadline:
    """Say whether the minutes that were granted are over."""

    def __init__(self, minutes: float | None):
        self.minutes, self.begin = minutes, time.monotonic()

    def __call__(self) -> bool:
        return self.minutes is not None and (time.monotonic() - self.begin) / 60 > self.minutes


def run(asked: argparse.Namespace) -> Iterator[GpuBenchmark]:
    """Yield what is known after each network, after the calls, and after each array."""
    from evennorm.kernels import choose

    late = Deadline(asked.minutes)
    parts = words(asked.parts)
    checked("parts", parts, PARTS)
    checked("compile", words(asked.compile), NETWORKS, may_be_empty=True)
    networks = parsed_networks(asked.networks, ON_GPU)
    dtypes, passes = words(asked.dtypes), words(asked.passes)
    cases = resnet50(asked.batch, words(asked.variants), dtypes, words(asked.layouts))
    kernels = {dtype: choose("torch", dtype, device="cuda") for dtype in dtypes}
    settings = Settings("torch", tuple(cases), passes, rounds=asked.rounds)
    found = GpuBenchmark(asked.mode, Benchmark(settings, where(), kernels, ()))
    measures = {"networks": partial(with_networks, networks=networks), "calls": with_calls, "arrays": with_arrays}
    for part in (part for part in PARTS if part in parts):
        for more in measures[part](found, asked, late):
            found = more
            yield found


def with_networks(
    found: GpuBenchmark, asked: argparse.Namespace, late: Deadline, networks: list[NetworkCase]
) -> Iterator[GpuBenchmark]:
    from evennorm.tools.bench_gpu import network

    for case in networks:
        changes = network.contestants(case, case.name in words(asked.compile), with_leaky=not asked.quick)
        steps = network.steps(case, changes, asked.network_rounds, late=late)
        found = replace(found, steps=(*found.steps, *steps), networks={**found.networks, str(case): network.title(case)})
        medians = ", ".join(
            f"{step.contestant} {f'{step.median:.2f}' if step.milliseconds else step.reason}" for step in steps
        )
        print(f"gpu: {case}, training step, ms: {medians}", file=sys.stderr, flush=True)
        yield found


def with_calls(found: GpuBenchmark, asked: argparse.Namespace, late: Deadline) -> Iterator[GpuBenchmark]:
    from evennorm.tools.bench_gpu.calls import calls
    from evennorm.tools.bench_gpu.measure import Plan

    if late():
        print("gpu: time was up before the calls", file=sys.stderr)
        return
    plan = Plan("recorded", words(asked.passes), min(asked.rounds, CALL_ROUNDS))
    yield replace(found, calls=tuple(calls(plan)))


def with_arrays(found: GpuBenchmark, asked: argparse.Namespace, late: Deadline) -> Iterator[GpuBenchmark]:
    from evennorm.tools.bench_gpu.contestants import contestants
    from evennorm.tools.bench_gpu.measure import Plan, measure

    everyone = wanted(asked.against, contestants())
    settings = found.arrays.settings
    plan = Plan(asked.mode, settings.passes, asked.rounds)
    for done, case in enumerate(settings.cases):
        if late():
            print(f"gpu: {done} of {len(settings.cases)} arrays measured; for the others time was up", file=sys.stderr)
            return
        [new] = measure([case], everyone, plan)
        found = replace(found, arrays=replace(found.arrays, rows=(*found.arrays.rows, *new)))
        tell(done, list(settings.cases), case, found)
        yield found


def tell(done: int, cases: list[Case], case: Case, found: GpuBenchmark) -> None:
    for passes in found.arrays.settings.passes:
        rows = found.rows(case, passes)
        medians = ", ".join(f"{name} {1000 * row.median:.1f}" for name, row in rows.items())
        print(f"gpu: {done + 1} of {len(cases)}: {case}, {PASSES[passes]}, us: {medians}", file=sys.stderr, flush=True)


def main(given: list[str] | None = None) -> int:
    asked = arguments(given)
    try:
        import torch

        there = torch.cuda.is_available()
    except ImportError:
        there = False
    if not there:
        print(
            "bench-gpu measures on a CUDA device, and torch sees none here; run it on a machine that has one.",
            file=sys.stderr,
        )
        return 2
    # Kernels that an earlier program left on disk would make first steps look short.
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, tempfile.mkdtemp(prefix="evennorm-bench-"))
    path = asked.out or RESULTS / f"gpu-{asked.mode}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    last = None
    try:
        for last in run(asked):
            last.write(path)
    except EvennormError as error:
        print(f"evennorm: {error}", file=sys.stderr)
        return 2
    if last is not None:
        print(table(last))
        print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
