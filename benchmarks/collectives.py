"""Measure what synchronized statistics cost: the two collectives alone, and training steps, with 2 to 5 processes.

Writes benchmarks/results/collectives-torch.json and, from it, docs/scaling.md. The processes are on this machine and speak
by gloo over loopback; what they need on other networks is worked out by `evennorm.tools.bench.exchange_cost`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, environment
from _scaling import CHANNELS, WIDTHS, page

from evennorm.tools.bench.machine import cores, load

RESULT = ROOT / "benchmarks" / "results" / "collectives-torch.json"
PAGE = ROOT / "docs" / "scaling.md"

SIZES = (2, 3, 4, 5)
BATCH, SIDE = 8, 32
PATIENCE = 120
"""Seconds until processes that do not answer are given up."""


def measure(rounds: int, steps: int, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    where = {**environment(), "cores": cores(), "load before": load()}
    runs = []
    for size in sizes:
        print(f"collectives: {size} processes", file=sys.stderr)
        runs.append(_run(size, rounds, steps))
    return {"environment": where, "rounds": rounds, "steps": steps, "runs": runs, "network": resnet50_widths()}


def _run(size: int, rounds: int, steps: int) -> dict[str, Any]:
    """What rank 0 of so many processes has measured. A process that fails ends the others."""
    port = _free_port()
    given = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    command = [sys.executable, __file__, "--rounds", str(rounds), "--steps", str(steps), "--serve"]
    started = [
        subprocess.Popen(command, env={**given, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    try:
        answers = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(started) if process.returncode]
    if failed:
        sys.exit(f"collectives: of {size} processes, those of rank {failed} failed; what they said stands above")
    return json.loads(answers[0].splitlines()[-1])


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(rounds: int, steps: int) -> None:
    """Take part as one process; rank 0 prints what it has measured."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE / 2))
    found = {"processes": dist.get_world_size(), "collectives": _collectives(rounds), "step": _training_steps(steps)}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _collectives(rounds: int) -> list[dict[str, Any]]:
    """Seconds of each, in turns: all processes begin one when they have ended the one before."""
    import torch

    from evennorm.torch import collectives

    contestants: dict[tuple[str, int], Callable[[], Any]] = {}
    for channels in CHANNELS:
        row, sums = torch.rand(3 * channels + 1), torch.rand(2 * channels)
        contestants["all_gather", channels] = lambda row=row: collectives.gathered(row, None)
        contestants["all_reduce", channels] = lambda sums=sums: collectives.added(sums, None)
    times = in_turns(contestants, rounds)
    return [{"collective": name, "channels": channels, **spread(times[name, channels])} for name, channels in times]


def _training_steps(steps: int) -> dict[str, Any]:
    """Seconds of whole steps, in turns: forward pass, loss, backward pass, gradients averaged, SGD.

    Beside them the seconds of the synchronized step in which its layers were within a collective.
    """
    from evennorm.torch import BatchNorm2d, SyncBatchNorm, collectives

    within: list[float] = []
    collectives.gathered = _timed(collectives.gathered, within)
    collectives.added = _timed(collectives.added, within)
    times = in_turns({"alone": _step(BatchNorm2d), "synchronized": _step(SyncBatchNorm)}, steps)
    calls = 2 * len(WIDTHS)  # per step, one forward and one backward
    exchange = [sum(within[i : i + calls]) for i in range(0, len(within), calls)][-steps:]
    return {name: spread(values) for name, values in {**times, "exchange": exchange}.items()}


def _timed(run: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def timed(*given: Any) -> Any:
        start = time.perf_counter()
        result = run(*given)
        times.append(time.perf_counter() - start)
        return result

    return timed


def _step(norm: Callable[..., Any]) -> Callable[[], None]:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, width in zip((3, *WIDTHS), WIDTHS, strict=False):
        layers += [nn.Conv2d(inputs, width, 3, 2, 1, bias=False), norm(width, activation="relu")]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, labels = torch.rand(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % 10

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), labels).backward()
        gradients = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
        dist.all_reduce(gradients)
        parts = gradients.split([parameter.numel() for parameter in model.parameters()])
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.grad.copy_(part.reshape(parameter.shape) / dist.get_world_size())
        optimizer.step()

    return step


def in_turns(contestants: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    times: dict[Any, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + max(3, rounds // 10)):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if i + 1 == max(3, rounds // 10):  # warm now
            times = {name: [] for name in contestants}
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles, in seconds."""
    low, median, high = statistics.quantiles(times, n=4)
    return {"low": low, "median": median, "high": high}


def resnet50_widths() -> list[int]:
    """Channels of each normalization of ResNet-50."""
    from torch import nn

    from evennorm.tools.bench.networks import resnet50

    return [module.num_features for module in resnet50().modules() if isinstance(module, nn.BatchNorm2d)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300, help="samples of each collective")
    parser.add_argument("--steps", type=int, default=60, help="samples of each training step")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the file that is there")
    parser.add_argument("--quick", action="store_true", help="few samples with 2 and 3 processes; writes nothing")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.rounds, asked.steps)
        return
    if asked.quick:
        print(page({**measure(20, 5, SIZES[:2]), "before": []}))
        return
    if not asked.page:
        before = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
        found = {**measure(asked.rounds, asked.steps), "before": before}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
