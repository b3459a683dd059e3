"""Choose tile and number of programs for kernels that stream: the shipped choice, or one that was measured on request.

The shipped choice is a function of the array and of the number of the device's multiprocessors, so that bits depend on
nothing else. What `measuring` finds holds for a class of arrays, not a shape: the number of lines to a factor of 4, that
of channels to a factor of 2, dtypes, alignment, activation and which arrays there are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from evennorm.kernels.triton.tiling import DEPTH, Tiling

SETTINGS = {"enable_fp_fusion": False}
"""Settings of every launch: products and sums are rounded as they are written, the same in forward and backward."""


class Choice(NamedTuple):
    """How a kernel goes through its arrays, in bytes of their elements."""

    width: int
    """Bytes of a line at most; `tiling` divides planes into lines."""
    span: int
    """Bytes of one line of every slot: with 16 for each thread, a thread holds the 8 lines of its slots alone."""
    programs: int
    """Programs for each multiprocessor."""
    warps: int
    stages: int
    """Stages of loading: 1 loads a tile when it is needed; 3 has the next two on their way, in shared memory."""


ROWS = (
    Choice(128, 4096, 2, 8, 3),
    Choice(64, 4096, 2, 8, 3),
    Choice(128, 4096, 1, 8, 3),
    Choice(256, 4096, 2, 8, 3),
    Choice(128, 4096, 2, 8, 1),
    Choice(256, 8192, 1, 16, 1),
    Choice(128, 2048, 4, 4, 1),
    Choice(64, 1024, 8, 2, 1),
)
PLANES = (
    Choice(0, 4096, 4, 8, 1),
    Choice(0, 4096, 2, 8, 1),
    Choice(0, 4096, 2, 8, 3),
    Choice(0, 2048, 8, 4, 1),
    Choice(0, 8192, 2, 16, 1),
    Choice(0, 1024, 8, 2, 1),
)

SHARED = 227 << 10
"""Bytes of a multiprocessor's shared memory, in which tiles wait; that of a Hopper GPU."""

BALANCED = 1.15
"""How much more the busiest multiprocessor may have to do than with the best balance."""


class Option(NamedTuple):
    """One way to launch a kernel."""

    grid: tuple[int, int]
    """Blocks of all groups, and the programs that share a block."""
    constants: dict[str, Any]
    warps: int
    programs: int = 1
    """Programs for each multiprocessor, at most."""

    @property
    def setting(self) -> tuple[Any, ...]:
        """Everything but the grid, which follows from the setting and the array."""
        return (*self.constants.values(), self.warps, self.programs)


def options(tiling: Tiling, item: int, processors: int, arrays: int = 1) -> list[Option]:
    """Return the ways to launch a kernel that streams so many arrays of `item` bytes at once, the best first.

    That is the first candidate whose busiest multiprocessor has hardly more to do than in the best balanced one. No more
    programs are asked for than run at once: what has to wait for shared memory begins with merging sums while nothing else
    is read. The other candidates are for devices on which the first finds no room: fewer registers or less shared memory
    than a data center's GPU has.

    Example:
        >>> from evennorm.kernels.triton.tiling import View, tiling_of
        >>> large, small = (tiling_of(View(1, rows, 64, 1), 2, 132, with_dy=False) for rows in (1605632, 8000))
        >>> options(large, 2, 132)[0].grid  # in lines of 64 bytes; those of 128 would leave half of them idle
        (2, 128)
        >>> options(small, 2, 132)[0].constants["SPAN"] < options(large, 2, 132)[0].constants["SPAN"]
        True
    """
    found, loads = [], []
    for lanes, span, programs, stages, warps in _candidates(tiling.planes, tiling.lanes, item):
        slots, staged = max(1, span // lanes), (stages - 1) * arrays * span * item * DEPTH
        programs = min(programs, max(1, SHARED // staged)) if staged else programs
        splits = tiling.splits(lanes, slots, processors * programs)
        blocks = tiling.blocks(lanes) * tiling.view.groups
        steps = -(-tiling.lines // (DEPTH * slots))
        loads.append(-(-blocks * splits // processors) * -(-steps // splits) * slots * lanes)
        found.append(Option((blocks, splits), {"LANES": lanes, "SPAN": span, "STAGES": stages}, warps, programs))
    least = min(loads)
    order = sorted(zip(loads, found, strict=True), key=lambda pair: pair[0] > BALANCED * least)
    return [option for _, option in order]


@cache
def _candidates(planes: bool, lanes: int, item: int) -> list[tuple[int, int, int, int, int]]:
    """Return lanes, span, programs, stages and warps of each candidate for lines of at most `lanes`, each once."""
    every = (
        (lanes if planes else min(lanes, c.width // item), c.span // item, c.programs, c.stages, c.warps)
        for c in (PLANES if planes else ROWS)
    )
    return list(dict.fromkeys(every))


def size_class(tiling: Tiling) -> int:
    """Return a number for the class of an array.

    Example:
        >>> from evennorm.kernels.triton.tiling import View, tiling_of
        >>> classes = [size_class(tiling_of(View(1, rows, 256, 1), 4, 132, False)) for rows in (100352, 99000, 6272)]
        >>> classes[0] == classes[1] != classes[2]
        True
    """
    lines = tiling.lines * tiling.view.groups
    return (lines.bit_length() + 1) // 2 * 64 + tiling.view.channel.bit_length()


class Measured(NamedTuple):
    """What was measured for one kernel on one class of arrays."""

    kernel: str
    sizes: tuple[int, ...]
    """Groups, outer, channel and inner of the array that was measured."""
    chosen: Option
    milliseconds: float
    shipped: Option
    shipped_milliseconds: float


WORTH_MEASURING = 4 << 20
"""Bytes of an array below which a launch takes longer than the kernel."""

_measured: dict[Hashable, tuple[Any, ...]] = {}
_state: dict[str, Any] = {"generation": 0, "clock": None, "report": []}


def generation(is_deterministic: Callable[[], bool]) -> int:
    """Return a number that changes when plans have to be made again; 0 where the shipped choices apply."""
    found: int = _state["generation"]
    return 0 if found and is_deterministic() else found


@contextmanager
def measuring(clock: Callable[[Callable[[], Any]], float]) -> Iterator[list[Measured]]:
    """Make plans that are built inside measure their options by `clock`, and keep the fastest for the process."""
    report: list[Measured] = []
    _state.update(generation=_state["generation"] + 1, clock=clock, report=report)
    try:
        yield report
    finally:
        _state.update(generation=_state["generation"] + 1, clock=None, report=[])


def is_measuring() -> bool:
    return _state["clock"] is not None


def forget() -> None:
    """Return to the shipped choices."""
    _measured.clear()
    _state["generation"] = 0


def chosen(
    kernel: str, key: Hashable, tiling: Tiling, ways: list[Option], run: Callable[[Option], Any], worth_measuring: bool
) -> list[Option]:
    """Return options, the measured one for arrays of this class first; measure it if that was requested.

    Args:
        key: what tells this kernel on its arrays from others on arrays of the same class.
        run: launches the kernel by an option, on arrays that may be written to again and again.
        worth_measuring: whether the arrays are large enough.
    """
    key = kernel, key, tiling.planes, tiling.lanes, tiling.unit, size_class(tiling)
    clock = _state["clock"]
    if clock is not None and worth_measuring and key not in _measured:
        times = [(_timed(clock, run, option), index) for index, option in enumerate(ways)]
        best, index = min(times)
        if best < float("inf"):
            _measured[key] = ways[index].setting
            _state["report"].append(Measured(kernel, tuple(tiling.view), ways[index], best, ways[0], times[0][0]))
    found = _measured.get(key)
    return sorted(ways, key=lambda option: option.setting != found)


def _timed(clock: Callable[[Callable[[], Any]], float], run: Callable[[Option], Any], option: Option) -> float:
    from triton.runtime.errors import OutOfResources

    try:
        return clock(lambda: run(option))
    except OutOfResources:
        return float("inf")
