"""The protocol of `evennorm bench`, with a clock that tests wind: turns, samples, their number, repeated short calls."""

import gc
from collections.abc import Callable

import pytest

from evennorm.tools.bench.clock import FEWEST, MOST, TURN, in_turns


class Clock:
    """Stands still but for the calls that it makes, which take as long as they are told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, *seconds: float) -> Callable[[], str]:
        """Takes `seconds` in turn, the last of them from then on."""
        left = list(seconds)

        def run() -> str:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return name

        return run


def test_everyone_in_turns() -> None:
    clock = Clock()
    calls = {name: clock.call(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    times = in_turns(calls, rounds=3, warm_up=2, clock=clock)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}
    assert "".join(clock.calls) == "abc" * (2 + 3)


def test_warming_up_does_not_count() -> None:
    clock = Clock()
    times = in_turns({"a": clock.call("a", 60.0, 8.0, 1.0, 1.0, 3.0, 2.0)}, rounds=3, warm_up=3, clock=clock)
    assert times == {"a": [1.0, 3.0, 2.0]}


@pytest.mark.parametrize(("call", "rounds"), [(0.5, FEWEST), (0.1, 21), (0.01, MOST)])
def test_as_many_rounds_as_fit(call: float, rounds: int) -> None:
    clock = Clock()
    times = in_turns({"a": clock.call("a", call)}, seconds=2.0, clock=clock)
    assert len(times["a"]) == rounds


def test_short_calls_are_repeated_and_a_sample_is_their_mean() -> None:
    clock = Clock()
    calls = {"quick": clock.call("quick", TURN / 4), "slow": clock.call("slow", TURN * 4)}
    times = in_turns(calls, rounds=2, warm_up=1, clock=clock)
    assert times["quick"] == pytest.approx([TURN / 4] * 2)
    assert times["slow"] == pytest.approx([TURN * 4] * 2)
    assert clock.calls == ["quick", "slow", *(["quick"] * 4 + ["slow"] * 4) * 2]


def test_results_are_given_back_within_the_time() -> None:
    clock = Clock()

    class Memory:
        def __del__(self) -> None:
            clock.now += 5.0

    def call() -> Memory:
        clock.now += 1.0
        return Memory()

    assert in_turns({"a": call}, rounds=2, clock=clock) == {"a": [6.0, 6.0]}


def test_the_garbage_collector_waits() -> None:
    seen = []
    in_turns({"a": lambda: seen.append(gc.isenabled())}, rounds=1)
    assert not any(seen)
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        in_turns({"a": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled()
