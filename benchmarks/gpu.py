"""How fast batch normalization is on this machine's GPU: evennorm beside torch, eager and compiled, and a copy.

Arrays are those of ResNet-50; then its whole training step, with its time and its memory. Writes
benchmarks/results/gpu-MODE.json after every array, so that a run that is cut short keeps what it has, and prints a table.
Needs torch, NumPy and Triton, and a source tree; nothing has to be built.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))
from evennorm.errors import EvennormError
from evennorm.tools.bench.cases import PASSES, Case, checked
from evennorm.tools.bench.machine import environment
from evennorm.tools.bench.report import Benchmark
from evennorm.tools.bench.rows import Row
from evennorm.tools.bench.settings import Settings
from evennorm.tools.bench_gpu.cases import BATCH, VARIANTS, resnet50
from evennorm.tools.bench_gpu.report import GpuBenchmark, table

RESULTS = Path(__file__).resolve().parent / "results"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("recorded", "queued"), default="recorded", help="CUDA graphs, or call by call")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--variants", default=",".join(("bn+relu", "bn+add+relu", "bn")), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--layouts", default="last,first", help="channels last, channels first, or both")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--against", default="", help="families of rivals, such as torch eager; all of them if empty")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--minutes", type=float, default=None, help="start no other array after so long")
    parser.add_argument("--network", choices=("yes", "no", "only"), default="yes", help="ResNet-50's training step")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file, else benchmarks/results/gpu-MODE.json")
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
    """The rivals of the families, ours and the copy.

    Raises:
        InputError: a family that there is not.
    """
    chosen = tuple(family.strip() for family in families.split(",") if family.strip())
    rivals = dict.fromkeys(one.family for one in everyone if one.ours)
    checked("against", chosen, rivals, may_be_empty=True)
    return [one for one in everyone if not chosen or one.ours is None or one.family in chosen]


def run(asked: argparse.Namespace) -> Iterator[GpuBenchmark]:
    """What is known after each array, and at last after the network."""
    from evennorm.kernels import choose
    from evennorm.tools.bench_gpu import network
    from evennorm.tools.bench_gpu.contestants import contestants
    from evennorm.tools.bench_gpu.measure import Plan, measure

    begin = time.monotonic()
    dtypes, passes = tuple(asked.dtypes.split(",")), tuple(asked.passes.split(","))
    cases = resnet50(asked.batch, asked.variants.split(","), dtypes, asked.layouts.split(","))
    place, kernels = where(), {dtype: choose("torch", dtype, device="cuda") for dtype in dtypes}
    settings = Settings("torch", tuple(cases), passes, rounds=asked.rounds)
    rows: list[Row] = []
    steps: tuple[Any, ...] = ()

    def found() -> GpuBenchmark:
        return GpuBenchmark(asked.mode, Benchmark(settings, place, kernels, tuple(rows)), steps)

    everyone = wanted(asked.against, contestants())
    for done, case in enumerate([] if asked.network == "only" else cases):
        minutes = (time.monotonic() - begin) / 60
        if asked.minutes is not None and minutes > asked.minutes:
            print(
                f"gpu: {done} of {len(cases)} arrays measured in {minutes:.1f} minutes; the others are left out",
                file=sys.stderr,
            )
            break
        [new] = measure([case], everyone, Plan(asked.mode, passes, asked.rounds))
        rows.extend(new)
        tell(done, cases, case, found())
        yield found()
    if asked.network != "no":
        steps = tuple(network.steps(asked.batch))
        yield found()


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
