"""A kernel and the class of its arrays go in; tile and number of programs come out, timed once on the device, or usual.

Triton's autotuner times the candidates and keeps its answer on disk, beside its compiled kernels. What is keyed is a class
of arrays, not a shape: the number of lines to a factor of 4, that of channels to a factor of 2, dtypes, alignment,
activation and which arrays there are. So training on batches of many sizes soon stops tuning, and compiles for no size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from inspect import signature
from typing import Any, Literal, NamedTuple

import triton
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from evennorm.kernels.triton.layout import Cut


class Choice(NamedTuple):
    """How a kernel cuts its arrays, in bytes of their elements."""

    width: int
    """Of a line at most; the lines of planes are as `layout` cuts them."""
    span: int
    """Of one line of every slot: 16 for each thread let a thread keep the 8 lines of its slots to itself."""
    programs: int
    """For each multiprocessor."""
    warps: int
    stages: int
    """1 reads a tile when it is needed; 3 has the next two on their way, in shared memory."""


ROWS = (
    Choice(128, 4096, 2, 8, 3),
    Choice(64, 4096, 2, 8, 3),
    Choice(128, 4096, 1, 8, 3),
    Choice(256, 4096, 2, 8, 3),
    Choice(128, 4096, 2, 8, 1),
    Choice(256, 8192, 1, 16, 1),
)
PLANES = (
    Choice(0, 4096, 4, 8, 1),
    Choice(0, 4096, 2, 8, 3),
    Choice(0, 2048, 8, 4, 1),
    Choice(0, 8192, 2, 16, 1),
)

WORTH_TIMING = 4 << 20
"""Bytes of an array below which a launch takes longer than the kernel."""

KEY = ["size_class", "ACTIVATION", "UNIT"]
SETTINGS = {"enable_fp_fusion": False}
"""Of every launch: products and sums are rounded as they are written, the same in forward and backward."""

_chosen: dict[Hashable, dict[str, Any]] = {}


Timing = Literal["now", "before", "never"]
"""Whether candidates may be timed now; or what was timed before may be used, while a CUDA graph is recorded; or neither,
where bits must not depend on time."""


class Stream(NamedTuple):
    """Arrays of one view on one device, to launch kernels on that go through them tile by tile."""

    how: Cut
    item: int
    """Bytes of an element."""
    device: Hashable
    processors: int
    timing: Timing

    def launch(self, kernel: Any, names: Hashable, arguments: tuple[Any, ...], constants: dict[str, Any]) -> int:
        """Runs a kernel once, on a grid of blocks and splits, and tells the number of splits.

        Args:
            names: what tells this call from others on arrays of the same class, which may need another choice.
        """

        def run(configured: Any, **settings: Any) -> None:
            configured[self.grid](*arguments, **constants, **SETTINGS, **settings)

        how = self.how
        arrays = how.planes, how.lanes, how.unit, size_class(how), self.item, self.device
        key = kernel, constants.get("ACTIVATION"), names, arrays
        found = None if self.timing == "never" else _chosen.get(key)
        if found is not None:
            run(kernel, **found)
        elif self.timing == "now" and self.how.view.elements * self.item >= WORTH_TIMING:
            tuner = _tuner(kernel, self.how.planes, self.how.lanes, self.item)
            run(tuner)
            found = _chosen[key] = tuner.best_config.all_kwargs()
        else:
            found = self._untimed(lambda settings: run(kernel, **settings))
        return self.grid(found)[1]

    def grid(self, meta: dict[str, Any]) -> tuple[int, int]:
        """Blocks of all groups, and the programs that share a block, for the sizes that a configuration names."""
        lanes, slots = meta["LANES"], max(1, meta["SPAN"] // meta["LANES"])
        splits = self.how.splits(lanes, slots, self.processors * meta["PROGRAMS"])
        return self.how.blocks(lanes) * self.how.view.groups, splits

    @property
    def most_splits(self) -> int:
        """Of all candidates."""
        return max(self.grid(config.kwargs)[1] for config in candidates(self.how.planes, self.how.lanes, self.item))

    def _untimed(self, run: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """The first candidate that leaves the fewest multiprocessors idle, and has room on them."""

        def idle(settings: dict[str, Any]) -> int:
            blocks, splits = self.grid(settings)
            return max(0, self.processors - blocks * splits)

        every = [config.all_kwargs() for config in candidates(self.how.planes, self.how.lanes, self.item)]
        *others, last = sorted(every, key=idle)
        for settings in others:
            try:
                run(settings)
            except OutOfResources:  # fewer registers or less shared memory than a data center's GPU has
                continue
            return settings
        run(last)
        return last


def size_class(how: Cut) -> int:
    """One number for the class of an array.

    Example:
        >>> from evennorm.kernels.triton.layout import View, cut
        >>> classes = [size_class(cut(View(1, rows, 256, 1), 4, 132, False)) for rows in (100352, 99000, 6272)]
        >>> classes[0] == classes[1] != classes[2]
        True
    """
    lines = how.lines * how.view.groups
    return (lines.bit_length() + 1) // 2 * 64 + how.view.channel.bit_length()


@cache
def candidates(planes: bool, lanes: int, item: int) -> list[Any]:
    """Configurations for arrays whose lines have so many lanes at most, each once."""
    found = {}
    for choice in PLANES if planes else ROWS:
        sizes = {
            "LANES": lanes if planes else min(lanes, choice.width // item),
            "SPAN": choice.span // item,
            "PROGRAMS": choice.programs,
            "STAGES": choice.stages,
        }
        found[*sizes.values(), choice.warps] = triton.Config(sizes, num_warps=choice.warps)
    return list(found.values())


@cache
def _tuner(kernel: Any, planes: bool, lanes: int, item: int) -> Any:
    key = [name for name in KEY if name in kernel.arg_names]
    on_disk = {"cache_results": True} if "cache_results" in signature(triton.autotune).parameters else {}  # since Triton 3.4
    return triton.autotune(candidates(planes, lanes, item), key, do_bench=_timed, **on_disk)(kernel)


def _timed(call: Callable[[], Any], quantiles: Any) -> Any:
    """Shorter than Triton's usual tenth of a second: a network has some hundred calls to tune."""
    return do_bench(call, warmup=5, rep=25, quantiles=quantiles)
