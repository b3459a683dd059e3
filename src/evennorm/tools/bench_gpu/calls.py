"""Measure what a call of a layer costs the host and what it costs the device, side by side."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from evennorm.errors import reason_of
from evennorm.tools.bench.cases import PASSES, Case, cases
from evennorm.tools.bench.contestants import OUR_MODULE
from evennorm.tools.bench_gpu import clock as clocks

if TYPE_CHECKING:
    from evennorm.tools.bench_gpu.contestants import Contestant
    from evennorm.tools.bench_gpu.measure import Plan

SHAPES = "8x16,256x1024,32x64x14x14:first,32x64x56x56:first"
"""Small arrays, where the host decides how long a call takes, and one of 26 MB, where the device may."""

QUEUED = 40
"""Calls that the host queues without waiting: with fifteen launches each, fewer than a device's queue holds."""


@dataclass(frozen=True)
class Call:
    """The calls of one layer, each once for every round: forward, or forward and backward.

    Args:
        case: its input.
        passes: "forward" or "both".
        contestant: whose layer.
        host: microseconds until the host has handed a call over.
        device: microseconds that a call takes on the device alone, recorded as a CUDA graph.
        reason: why a figure is missing.
    """

    case: Case
    passes: str
    contestant: str
    host: tuple[float, ...] = ()
    device: tuple[float, ...] = ()
    reason: str | None = None

    @property
    def medians(self) -> tuple[float | None, float | None]:
        """Medians of host and device."""
        return (median(self.host) if self.host else None), (median(self.device) if self.device else None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Call:
        """Make a call from what `as_dict` gave, perhaps read from JSON."""
        case = Case(**{**values["case"], "shape": tuple(values["case"]["shape"])})
        return cls(**{**values, "case": case, "host": tuple(values["host"]), "device": tuple(values["device"])})


def layers() -> list[Contestant]:
    """Return our layer, and torch's BatchNorm with ReLU in place."""
    from evennorm.tools.bench_gpu.contestants import THEIR_MODULES, contestants

    return [one for one in contestants() if one.name in (OUR_MODULE, THEIR_MODULES)]


def calls(plan: Plan, dtypes: Iterable[str] = ("float32",), everyone: Iterable[Contestant] | None = None) -> list[Call]:
    """Measure every layer on every array, in turns.

    Args:
        plan: rounds, passes, and the device's clock.
        dtypes: of the arrays; parameters are float32.
        everyone: the layers, those of `layers` by default.
    """
    from evennorm.tools.bench_gpu.contestants import place

    make = place if plan.place is None else plan.place
    everyone = layers() if everyone is None else list(everyone)
    found = []
    for case in cases(SHAPES, dtypes=dtypes):
        data = make(case, 0)
        ready: dict[str, Any] = {}
        reasons: dict[str, str] = {}
        for one in everyone:
            try:
                [ready[one.name]] = one.prepare(case, [data])
            except Exception as error:  # of frameworks, which raise what they like
                reasons[one.name] = reason_of(error)
        for passes in (passes for passes in PASSES if passes in plan.passes):
            chosen = {name: both[0] if passes == "forward" else both[1] for name, both in ready.items()}
            hosts = host_times(chosen, plan.rounds, str(data.x.device.type))
            devices, failed = device_times(chosen, plan)
            for one in everyone:
                reason = reasons.get(one.name) or failed.get(one.name)
                found.append(Call(case, passes, one.name, hosts.get(one.name, ()), devices.get(one.name, ()), reason))
    return found


def host_times(calls: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cuda") -> dict[str, tuple[float, ...]]:
    """Time calls in microseconds until the host has queued them: the mean of `QUEUED` calls, a sample per round, in
    turns."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                wait()
                begin = perf_counter()
                for _ in range(QUEUED):
                    call()
                found[name].append(round(1e6 * (perf_counter() - begin) / QUEUED, 3))
        wait()
    finally:
        if collecting:
            gc.enable()
    return {name: tuple(samples) for name, samples in found.items()}


def device_times(calls: Mapping[str, Callable[[], Any]], plan: Plan) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Time calls in microseconds on the device, and say why others could not be recorded."""
    turns: dict[str, clocks.Turn] = {}
    reasons: dict[str, str] = {}
    for name, call in calls.items():
        try:
            turns[name] = plan.turn([call])
        except Exception as error:
            reasons[name] = reason_of(error)
    times = clocks.in_turns(turns, plan.rounds, plan.clock) if turns else {}
    return {name: tuple(round(1000 * ms, 3) for ms in samples) for name, samples in times.items()}, reasons
