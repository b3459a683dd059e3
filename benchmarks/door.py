"""Show where the microseconds of a call go: autograd, torch's layers, evennorm's, the kernels alone, and memory.

Prints a table, or JSON. Medians in turns, in one process, by one thread: to wait for another would hide what Python costs.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _environment import environment, sentence

import evennorm.torch
from evennorm.tools.bench.clock import in_turns
from evennorm.tools.bench.rows import quartiles

SHAPES = ((8, 16), (256, 1024), (32, 64, 14, 14))

EPSILON = 1e-5

TURN = 5e-4
"""Seconds that a turn of each call takes at least."""

Calls = dict[str, Callable[[], Any]]


class Nothing(torch.autograd.Function):
    """Costs what any operation written in Python costs: a call of `apply`, and of `backward` by autograd's thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(x, gamma, beta)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, gamma, beta = ctx.saved_tensors
        return dy, gamma, beta


def calls_of(shape: tuple[int, ...]) -> Calls:
    """Everything that is measured on one array, in the order of the table."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    leaf = x.clone().requires_grad_()
    dimensions = 1 if len(shape) == 2 else 2
    theirs = getattr(nn, f"BatchNorm{dimensions}d")(shape[1])
    ours = getattr(evennorm.torch, f"BatchNorm{dimensions}d")(shape[1], activation="relu")
    their_eval, our_eval = (copy.deepcopy(layer).eval() for layer in (theirs, ours))
    nothing = partial(Nothing.apply, leaf, theirs.weight, theirs.bias)
    return {
        "torch.empty_like": partial(torch.empty_like, x),
        "torch.clone": x.clone,
        **native_calls(x, dy),
        "an empty autograd.Function, forward": nothing,
        "an empty autograd.Function, both": lambda: torch.autograd.grad(nothing(), (leaf, theirs.weight, theirs.bias), dy),
        **passes("nn.BatchNorm, relu_", lambda x: torch.relu_(theirs(x)), theirs, leaf, dy),
        "nn.BatchNorm, relu_, eval": _ungraded(lambda x: torch.relu_(their_eval(x)), x),
        **passes("evennorm", ours, ours, leaf, dy),
        "evennorm, eval": _ungraded(our_eval, x),
    }


Layer = Callable[[Tensor], Tensor]


def passes(name: str, call: Layer, layer: nn.Module, x: Tensor, dy: Tensor) -> Calls:
    """A layer in training: forward, with the gradients by x, weight and bias, and without autograd."""
    return {
        f"{name}, forward": partial(call, x),
        f"{name}, both": lambda: torch.autograd.grad(call(x), (x, layer.weight, layer.bias), dy),
        f"{name}, no_grad": _ungraded(call, x.detach()),
    }


def _ungraded(call: Layer, x: Tensor) -> Callable[[], Tensor]:
    """A call under `torch.no_grad`, whose own time is part of it."""
    return torch.no_grad()(partial(call, x))


def native_calls(x: Tensor, dy: Tensor) -> Calls:
    """The compiled kernels, with memory and plans that were there before: arithmetic and a call from Python alone."""
    from evennorm.core.activation import RELU
    from evennorm.core.call import Call
    from evennorm.core.geometry import Geometry
    from evennorm.kernels import cpu
    from evennorm.torch.kernels import cpu_kernel

    if not cpu.AVAILABLE:
        return {}
    channels = x.shape[1]
    call = Call(Geometry(tuple(x.shape), 1), epsilon=EPSILON, activation=RELU)
    gamma, beta = torch.ones(channels), torch.zeros(channels)
    y, saved = cpu_kernel.forward(call, x, gamma, beta)
    gradients = cpu_kernel.backward(call, dy, x, gamma, beta, saved, False)
    forward, backward = call.plans[x.stride()].forward, call.plans[dy.stride(), x.stride(), True].backward
    statistics, _ = saved
    dx, d_gamma, d_beta, _ = gradients
    address = cpu_kernel.access.address or (lambda tensor: tensor)
    x, dy, y, dx = map(address, (x, dy, y, dx))
    rows = [address(row) for row in (gamma, beta, statistics, d_gamma, d_beta)]

    def forward_alone() -> None:
        forward(x, None, y, *rows[:3], *[None] * 4, 0.0, True, None, None)

    def backward_alone() -> None:
        backward(dy, x, dx, None, *rows[:3], *[None] * 3, *rows[3:])

    return {"the kernel alone, forward": forward_alone, "the kernel alone, backward": backward_alone}


def measure(shapes: tuple[tuple[int, ...], ...], rounds: int | None, seconds: float) -> list[dict[str, Any]]:
    """A row for each array and call, with its median in microseconds."""
    rows = []
    for shape in shapes:
        calls = calls_of(shape)
        counts = {name: repeats(call) for name, call in calls.items()}
        turns = {name: partial(repeated, call, counts[name]) for name, call in calls.items()}
        times = in_turns(turns, rounds, seconds, turn=0.0) if turns else {}
        for name, samples in times.items():
            each = tuple(1e6 * sample / counts[name] for sample in samples)
            figures = {"us": round(median(each), 3), "quartiles": [round(value, 3) for value in quartiles(each)]}
            rows.append({"shape": list(shape), "call": name, **figures})
    return rows


def repeats(call: Callable[[], Any]) -> int:
    """How often a call is to be made so that it takes `TURN`."""
    repeated(call, 3)
    begin = perf_counter()
    repeated(call, 3)
    return max(1, ceil(3 * TURN / (perf_counter() - begin)))


def repeated(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each call, a column for each array."""
    figures = {(row["call"], tuple(row["shape"])): row["us"] for row in rows}
    shapes = list(dict.fromkeys(shape for _, shape in figures))
    width = max(len(name) for name, _ in figures)
    lines = [f"{'us':{width}}" + "".join(f"{'x'.join(map(str, shape)):>14}" for shape in shapes)]
    for name in dict.fromkeys(name for name, _ in figures):
        cells = (figures.get((name, shape)) for shape in shapes)
        lines.append(f"{name:{width}}" + "".join(f"{'-' if cell is None else f'{cell:.2f}':>14}" for cell in cells))
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=None, help="samples of each figure; by time if not given")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each array, where rounds are not given")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)  # evennorm takes as many
    rows, where = measure(SHAPES, asked.rounds, asked.seconds), environment()
    if asked.json:
        print(json.dumps({**where, "threads": asked.threads, "rows": rows}, indent=1))
    else:
        print(table(rows))
        print(f"{asked.threads} thread{'s' * (asked.threads > 1)}. {sentence(where)}")


if __name__ == "__main__":
    main()
