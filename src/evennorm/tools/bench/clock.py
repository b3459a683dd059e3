"""Time calls in turns, in seconds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from math import ceil
from time import perf_counter
from typing import Any

Call = Callable[[], Any]

WARM_UP = 3
"""Rounds that do not count, in which compilers compile, and allocators and caches settle."""

FEWEST, MOST = 9, 101
"""Rounds where their number is chosen by time; odd, so that the median is one of them."""

TURN = 5e-4
"""The least seconds of a turn: short calls are repeated in it, since the first finds the caches full of others' data."""

SECONDS = 2.0
"""Seconds for the rounds of one case and pass, where their number is chosen."""


def in_turns(
    calls: Mapping[str, Call],
    rounds: int | None = None,
    seconds: float = SECONDS,
    warm_up: int = WARM_UP,
    turn: float = TURN,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Time each call once per round, A B C A B C, so that disturbances affect all alike; return seconds.

    A call returns when its result is there. Giving the result back is part of the time: memory that was taken anew has to be
    returned, too. The garbage collector waits outside. Where a call of the quickest takes less than `turn`, a turn is
    several calls, and a sample is their mean.

    Args:
        turn: seconds that a turn takes at least.
        rounds: None is as many as fit into `seconds`, by the last round of warming up, but at least 9 and at most 101.

    Example:
        >>> times = in_turns({"a": list, "b": dict}, rounds=5)
        >>> {name: len(values) for name, values in times.items()}
        {'a': 5, 'b': 5}
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        last: list[float] = []
        for _ in range(warm_up):
            last = [_timed(call, 1, clock) for call in calls.values()]
        repeats = ceil(turn / min(last)) if last and 0 < min(last) < turn else 1
        if rounds is None:
            fitting = ceil(seconds / (repeats * sum(last))) if sum(last) else MOST
            rounds = min(MOST, max(FEWEST, fitting)) | 1
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(_timed(call, repeats, clock))
    finally:
        if collecting:
            gc.enable()
    return times


def _timed(call: Call, repeats: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(repeats):
        call()  # its result is freed here, inside the measured time
    return (clock() - begin) / repeats
