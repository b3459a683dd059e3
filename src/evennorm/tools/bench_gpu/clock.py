"""Time calls on a GPU by its own clock, in turns, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from statistics import median
from typing import Any, NamedTuple, Protocol

Call = Callable[[], Any]

ROUNDS = 25
"""Samples of each figure, unless time is short; odd, so that the median is one of them."""

FEWEST = 9

TURN = 1.0
"""The least milliseconds of a turn: shorter ones repeat their calls."""


class Turn(NamedTuple):
    """Something to start on the device, which does several calls at once."""

    start: Call
    calls: int


class Clock(Protocol):
    """A function that starts each turn of each round, and returns the milliseconds between its start and end on the
    device."""

    def __call__(self, rounds: Sequence[Sequence[Call]]) -> list[list[float]]: ...


def on_device(rounds: Sequence[Sequence[Call]]) -> list[list[float]]:
    """Time by CUDA events, which the device records. It is waited for after every round, so that no turn waits in line."""
    import torch

    found = []
    for turns in rounds:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in turns]
        for (begin, end), start in zip(events, turns, strict=True):
            begin.record()
            start()
            end.record()
        torch.cuda.synchronize()
        found.append([begin.elapsed_time(end) for begin, end in events])
    return found


def in_turns(turns: Mapping[str, Turn], rounds: int = ROUNDS, clock: Clock = on_device) -> dict[str, list[float]]:
    """Time one call of each in milliseconds, once per round, A B C A B C, so that disturbances affect all alike.

    Example:
        >>> def hours(rounds):
        ...     return [[3600.0 * (1 + i) for i, _ in enumerate(turns)] for turns in rounds]
        >>> in_turns({"a": Turn(list, 1), "b": Turn(list, 2)}, rounds=2, clock=hours)
        {'a': [3600.0, 3600.0], 'b': [3600.0, 3600.0]}
    """
    samples = clock([[turn.start for turn in turns.values()]] * rounds)
    return {name: [sample[place] / turn.calls for sample in samples] for place, (name, turn) in enumerate(turns.items())}


def repeats(one: Turn, clock: Clock = on_device) -> int:
    """Return how often a turn repeats its calls to take `TURN`.

    Example:
        >>> repeats(Turn(list, 2), clock=lambda rounds: [[0.25]] * len(rounds))
        4
    """
    took = median(sample[0] for sample in clock([[one.start]] * 3))
    return max(1, ceil(TURN / took)) if took > 0 else 1


def recorded(calls: Sequence[Call], times: int) -> Turn:
    """Record all `calls` in sequence, a number of times, as one CUDA graph: the device alone, without the cost of Python.

    Raises what the framework raises where a call cannot be recorded.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    return Turn(graph.replay, times * len(calls))


def queued(calls: Sequence[Call], times: int) -> Turn:
    """Return the same calls as a program makes them: Python passes one after the other to the device."""

    def start() -> None:
        for _ in range(times):
            for call in calls:
                call()

    return Turn(start, times * len(calls))
