"""Measure whole training steps of networks on a GPU: in turns, with the host's time, the first step and the peak of memory.

The networks of ImageNet train as they usually do on a GPU, channels last in memory and in bfloat16 by autocast; the small
ones in float32, as torch has them by default. The optimizer is SGD with momentum.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from evennorm.errors import EvennormError, reason_of
from evennorm.tools.bench.contestants import OURS
from evennorm.tools.bench.network_cases import NetworkCase
from evennorm.tools.bench.networks import build
from evennorm.tools.bench.steps import COMPILED, EAGER, OURS_COMPILED, WITHOUT, Step
from evennorm.tools.bench.training import CHANGES, Change, Training
from evennorm.tools.bench_gpu import clock as clocks
from evennorm.tools.bench_gpu.clock import Clock
from evennorm.torch import convert, recompute_outputs, report

TURN = 20.0
"""The least milliseconds of a turn, by the step of the quickest."""

IMAGENET = ("resnet18", "resnet50", "mobilenet")

WARM_UP = 2
"""Steps after the first that do not count."""


def leaky(model: nn.Module) -> nn.Module:
    """Replace each ReLU by LeakyReLU, since ReLU has no inverse."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.LeakyReLU(inplace=True))
    return model


def in_place(model: nn.Module) -> nn.Module:
    """Convert a model, and write outputs over inputs where an activation with an inverse follows, and no sum."""
    model = convert(leaky(model))
    for layer in report(model).layers:
        if layer.steps == ("leaky_relu",):
            model.get_submodule(layer.name).memory = "inplace"
    return model


class Recomputing(nn.Module):
    """A model whose forward pass is inside `recompute_outputs`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with recompute_outputs():
            return self.model(x)


RECOMPUTED = "evennorm, recompute_outputs"
LEAKY_EAGER, LEAKY_CONVERTED, LEAKY_IN_PLACE = (
    "LeakyReLU: torch eager",
    "LeakyReLU: evennorm",
    "LeakyReLU: evennorm, in place",
)

RECOMPUTING: Mapping[str, Change] = {RECOMPUTED: lambda model, x: Recomputing(convert(model))}
LEAKY: Mapping[str, Change] = {
    LEAKY_EAGER: lambda model, x: leaky(model),
    LEAKY_CONVERTED: lambda model, x: convert(leaky(model)),
    LEAKY_IN_PLACE: lambda model, x: in_place(model),
}

SAVED = ((EAGER, OURS, 0.2), (EAGER, RECOMPUTED, 0.2), (LEAKY_EAGER, LEAKY_IN_PLACE, 0.3))
"""A contestant, one that needs less memory, and by what fraction it has to need less."""


def contestants(case: NetworkCase, compiled: bool = True, with_leaky: bool = False) -> dict[str, Change]:
    """Return the contestants: how each changes a model with torch's layers, in the order of tables.

    Args:
        case: the network.
        compiled: whether torch.compile takes part, which takes minutes to compile a large network.
        with_leaky: whether ResNet-50 also trains with LeakyReLU, by which `memory="inplace"` is possible.

    Example:
        >>> list(contestants(NetworkCase("mlp", 16), compiled=False))
        ['torch eager', 'evennorm', 'evennorm, recompute_outputs', 'without normalization']
    """
    eager = {EAGER: CHANGES[EAGER], OURS: CHANGES[OURS], **RECOMPUTING, WITHOUT: CHANGES[WITHOUT]}
    if compiled:
        eager |= {name: CHANGES[name] for name in (COMPILED, OURS_COMPILED)}
    return eager | (dict(LEAKY) if with_leaky and case.name == "resnet50" else {})


def batch_of(case: NetworkCase, device: Any) -> tuple[Tensor, Tensor]:
    """Return random input, with images channels last in memory, and labels."""
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(case.shape, device=device, generator=generator)
    labels = torch.randint(case.network.classes, (case.batch,), device=device, generator=generator)
    return (x.contiguous(memory_format=torch.channels_last) if case.name in IMAGENET else x), labels


def training(case: NetworkCase, change: Change, device: str = "cuda") -> Training:
    """Return the training of a contestant's model on the device, whose weights are those of all the others."""
    torch.manual_seed(0)
    x, labels = batch_of(case, device)
    model = build(case)[0].train().to(device)
    if case.name in IMAGENET:
        model = model.to(memory_format=torch.channels_last)
    return Training(change(model, x), x, labels, momentum=0.9, autocast=case.name in IMAGENET)


def title(case: NetworkCase) -> str:
    """Describe what was trained, whose network it is, and how."""
    with torch.device("meta"):
        source = build(case)[1]
    how = "channels last, bfloat16 by autocast" if case.name in IMAGENET else "float32"
    return f"{case.title}, of {source}, {how}"


def steps(
    case: NetworkCase,
    changes: Mapping[str, Change],
    rounds: int = 9,
    device: str = "cuda",
    clock: Clock = clocks.on_device,
    late: Callable[[], bool] = lambda: False,
) -> list[Step]:
    """Measure the steps of one network by every contestant, in turns; a row says what its contestant cannot do.

    Args:
        case: the network.
        changes: the contestants, as `contestants` gives them.
        rounds: samples of each figure.
        device: another one than a GPU has no peak of memory.
        clock: of the device.
        late: whether time is up: those who were not prepared by then are left out, and their rows say so.
    """
    found: dict[str, Step] = {}
    ready: dict[str, Training] = {}
    _start(device)
    torch.compiler.reset()  # dynamo limits recompilations for one program, not for a list of networks
    for name, change in changes.items():
        found[name] = Step(case, name)
        if late():
            found[name] = replace(found[name], reason="time was up")
            continue
        try:
            train = training(case, change, device)
            first = _seconds(train, device)
            for _ in range(WARM_UP):
                train()
            if not isfinite(loss := float(train())):
                raise EvennormError(f"the loss is {loss}, and such numbers take a time of their own")
            found[name] = replace(found[name], first=round(first, 4), memory=peak_of(train, device))
            ready[name] = train
        except Exception as error:  # of frameworks, which raise what they like
            found[name] = replace(found[name], reason=reason_of(error))
    if ready:
        times = clocks.in_turns(_turns(ready, clock), rounds, clock)
        hosts = host_times(list(ready.values()), rounds, device)
        for name, host in zip(ready, hosts, strict=True):
            samples = tuple(round(milliseconds, 5) for milliseconds in times[name])
            found[name] = replace(found[name], milliseconds=samples, host=host)
    ready.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return list(found.values())


def _turns(ready: Mapping[str, Training], clock: Clock) -> dict[str, clocks.Turn]:
    """Return turns in which everyone takes the same number of steps."""
    quickest = min(median(sample[0] for sample in clock([[train]] * 3)) for train in ready.values())
    repeats = max(1, round(TURN / quickest)) if quickest > 0 else 1
    return {name: clocks.queued([train], repeats) for name, train in ready.items()}


def host_times(calls: Sequence[Callable[[], Any]], rounds: int, device: str) -> list[tuple[float, ...]]:
    """Time in milliseconds until the host has queued what a call starts, while the device has nothing else to do."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for samples, call in zip(found, calls, strict=True):
            _wait(device)
            begin = perf_counter()
            result = call()
            samples.append(round(1000 * (perf_counter() - begin), 5))
            del result
    _wait(device)
    return [tuple(samples) for samples in found]


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Time one call in seconds, until the device is done."""
    _wait(device)
    begin = perf_counter()
    call()
    _wait(device)
    return perf_counter() - begin


def _start(device: str) -> None:
    """Load what every network needs; otherwise the first contestant would wait for it."""
    x = torch.randn(2, 8, 8, 8, device=device, requires_grad=True)
    layer = nn.Conv2d(8, 8, 3).to(device)
    layer(x).flatten(1).matmul(torch.randn(288, 8, device=device)).sum().backward()
    _wait(device)


def peak_of(train: Training, device: str) -> int | None:
    """Return the bytes that a step takes beyond parameters, optimizer and inputs; None where the device does not count."""
    if device != "cuda":
        return None
    train.optimizer.zero_grad(set_to_none=True)
    _wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    _wait(device)
    return torch.cuda.max_memory_allocated() - before


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
