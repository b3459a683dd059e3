"""Measure the time of each contestant on the device, array by array."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from evennorm.errors import EvennormError, reason_of
from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import LIMIT, Data
from evennorm.tools.bench.rows import IN_TURNS, Row
from evennorm.tools.bench_gpu import clock as clocks
from evennorm.tools.bench_gpu.cases import sets_of
from evennorm.tools.bench_gpu.clock import Clock, Turn
from evennorm.tools.bench_gpu.contestants import Both, Contestant

MODES = {"recorded": clocks.recorded, "queued": clocks.queued}
"""Modes: as CUDA graphs, which is the time of the kernels; or one call after the other, as eager programs do."""


class Plan(NamedTuple):
    """How to measure. Tests measure nothing, with a clock of their own."""

    mode: str = "recorded"
    passes: tuple[str, ...] = ("forward", "both")
    rounds: int = clocks.ROUNDS
    clock: Clock = clocks.on_device
    place: Callable[[Case, int], Data] | None = None

    def turn(self, calls: Sequence[Callable[[], Any]]) -> Turn:
        """Prepare all calls in sequence, repeated until they take as long as a turn has to."""
        prepare = MODES[self.mode]
        once = prepare(calls, 1)
        times = clocks.repeats(once, self.clock)
        return once if times == 1 else prepare(calls, times)


def measure(cases: Iterable[Case], everyone: Sequence[Contestant], plan: Plan) -> Iterator[list[Row]]:
    """Yield all rows of one case, then those of the next.

    Raises:
        EvennormError: one of ours could not take a case; others that could not have rows that say why.
    """
    for case in cases:
        yield list(_rows(case, everyone, plan))
        gc.collect()
        _give_back()


def _rows(case: Case, everyone: Sequence[Contestant], plan: Plan) -> Iterator[Row]:
    from evennorm.tools.bench_gpu.contestants import place

    make = place if plan.place is None else plan.place
    sets = [make(case, seed) for seed in range(sets_of(case))]
    ready: dict[str, list[Both]] = {}
    reasons: dict[str, str] = {}
    for one in everyone:
        try:
            ready[one.name] = _prepared(one, case, sets, plan)
        except Exception as error:  # of frameworks, which raise what they like
            reasons[one.name] = _reason(one, case, error)
    for passes in plan.passes:
        turns: dict[str, Turn] = {}
        for one in everyone:
            calls = [_call(both, passes, one.family) for both in ready.get(one.name, ())]
            if not calls or None in calls:
                continue
            try:
                turns[one.name] = plan.turn(calls)
            except Exception as error:
                reasons[one.name] = _reason(one, case, error)
        times = clocks.in_turns(turns, plan.rounds, plan.clock) if turns else {}
        for one in everyone:
            samples = tuple(round(milliseconds, 5) for milliseconds in times.get(one.name, ()))
            if samples or one.name in reasons:
                reason = None if samples else reasons[one.name]
                yield Row(IN_TURNS, case, passes, one.name, one.family, one.ours, samples, reason=reason)


def _call(both: Both, passes: str, family: str) -> Any:
    """Return a call for a pass; a copy has one for either pass."""
    forward, backward_too = both
    return forward if passes == "forward" or family == LIMIT else backward_too


def _prepared(one: Contestant, case: Case, sets: Sequence[Data], plan: Plan) -> list[Both]:
    """Return the calls of a contestant, made once: compilers compile, tuners tune, and a case that it cannot take fails
    here."""
    found = one.prepare(case, sets)
    for forward, both in found:
        forward()
        if both is not None and "both" in plan.passes:
            both()
    return found


def _reason(one: Contestant, case: Case, error: Exception) -> str:
    reason = reason_of(error)
    if one.ours is None and one.family not in (LIMIT, "evennorm, module"):
        raise EvennormError(f"{one.name} failed on {case}: {reason}") from error
    return reason


def _give_back() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
