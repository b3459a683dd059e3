"""Measure in a process of its own: settings come as JSON on stdin, each case goes to stdout as a line of JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from evennorm.errors import EvennormError, reason_of
from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.clock import in_turns
from evennorm.tools.bench.contestants import LIMIT, Calls, Contestant, Data, draw, module_of
from evennorm.tools.bench.rows import Row
from evennorm.tools.bench.settings import Settings


def measure(settings: Settings, protocol: str, only: str | None = None) -> Iterator[list[Row]]:
    """Yield the rows of one case after the other, of all contestants or of `only` one, in this process.

    Raises:
        EvennormError: one of ours could not take a case; others that could not have rows that say why.
    """
    engine = module_of(settings.engine)
    everyone = wanted(engine.contestants(), settings.families)
    for case in settings.cases:
        data = engine.place(case, draw(case))
        taking_part = [one for one in everyone if only in (None, one.name)]
        yield list(_rows(settings, protocol, case, data, taking_part))


def wanted(everyone: list[Contestant], families: tuple[str, ...] | None) -> list[Contestant]:
    """Return the layers of the families that were asked for, ours that they are compared with, and the limit.

    Raises:
        EvennormError: a family that the engine does not have.
    """
    if families is None:
        return everyone
    known = dict.fromkeys(one.family for one in everyone if one.ours)
    for family in families:
        if family not in known:
            raise EvennormError(f"on this engine evennorm is measured against {', '.join(known)}; received {family!r}")
    ours = {one.ours for one in everyone if one.family in families}
    return [one for one in everyone if one.family in (*families, LIMIT) or one.name in ours]


def _rows(settings: Settings, protocol: str, case: Case, data: Data, everyone: list[Contestant]) -> Iterator[Row]:
    """Yield the rows pass by pass, in the order of contestants."""
    ready: dict[Contestant, Calls] = {}
    reasons: dict[Contestant, str] = {}
    for one in everyone:
        try:
            ready[one] = _prepared(one, case, data, settings.passes)
        except Exception as error:  # of frameworks, which raise what they like
            reasons[one] = reason_of(error)
            if one.ours is None and one.family != LIMIT:
                raise EvennormError(f"{one.name} failed on {case}: {reasons[one]}") from error
    saved = {one: calls.saved() for one, calls in ready.items() if calls.saved is not None}
    for passes in settings.passes:
        calls = {one: ready[one].forward if passes == "forward" or one.family == LIMIT else ready[one].both for one in ready}
        compared = [call for one, call in calls.items() if one.family != LIMIT]
        if compared and not any(compared):
            continue  # the engine has no such pass
        times = in_turns({one.name: call for one, call in calls.items() if call is not None}, settings.rounds)
        for one in everyone:
            samples = tuple(round(1000 * seconds, 5) for seconds in times.get(one.name, ()))
            if samples or one in reasons:
                row = Row(protocol, case, passes, one.name, one.family, one.ours)
                yield replace(row, milliseconds=samples, saved_bytes=saved.get(one), reason=reasons.get(one))


def _prepared(one: Contestant, case: Case, data: Data, passes: tuple[str, ...]) -> Calls:
    """Return the calls of a contestant, made once: a case that it cannot take fails here."""
    calls = one.prepare(case, data)
    calls.forward()
    if calls.both is not None and "both" in passes:
        calls.both()
    return calls


def contestant_names(settings: Settings) -> list[str]:
    return [one.name for one in wanted(module_of(settings.engine).contestants(), settings.families)]


def main(read: Callable[[], str] = sys.stdin.readline) -> None:
    answer(_measured, read)


def _measured(task: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    settings = Settings.from_dict(task["settings"])
    yield "contestants", contestant_names(settings)
    for rows in measure(settings, task["protocol"], task["only"]):
        yield "rows", [row.as_dict() for row in rows]
    from evennorm.tools.bench.machine import served_by

    yield "kernels", served_by(settings)


def answer(
    work: Callable[[dict[str, Any]], Iterator[tuple[str, Any]]], read: Callable[[], str] = sys.stdin.readline
) -> None:
    """Read a task as a line of JSON, and print what `work` yields for it, a line each; an error of evennorm comes last.

    Frameworks may print what they like: stdout belongs to the lines of JSON, and theirs goes to stderr.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(event: str, detail: Any) -> None:
        print(json.dumps([event, detail]), file=out, flush=True)

    task = json.loads(read())
    try:
        for event, detail in work(task):
            tell(event, detail)
    except EvennormError as error:
        tell("error", str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
