"""Launch the kernels of a plan: once through Triton, which compiles them, and then directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources

from evennorm.kernels.triton.choices import SETTINGS, Option

KNOWN = (3, 3), (3, 9)
"""The first and the last version of Triton whose compiled kernels `Launch` is known to launch correctly."""

_version = tuple(int(part) for part in triton.__version__.split(".")[:2])
_hooks: Any = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel


class Launch:
    """A kernel with a grid and constants, to be launched on arrays of the same dtypes and alignments each time.

    Args:
        kernel: a kernel of this package: what its arguments `names` stand for differs from call to call.
        names: of all arguments of a pass, in the order in which calls have them.
        numbers: the kernel's other arguments.
    """

    def __init__(self, kernel: Any, names: Sequence[str], numbers: dict[str, Any]):
        self.kernel, self.numbers = kernel, numbers
        varying = [name for name in kernel.arg_names if name in names]
        assert kernel.arg_names[: len(varying)] == varying, "what varies comes first"
        self._pick = itemgetter(*map(names.index, varying))
        self._rest: tuple[Any, ...] = ()
        self._run: Callable[..., Any] | None = None
        self.option = Option((0, 0), {}, 0)

    def first(self, options: Sequence[Option], arrays: tuple[Any, ...]) -> Option:
        """Launch by the first option for which the device has room, and keep it."""
        for option in options[:-1]:
            try:
                self.through_triton(option, arrays)
            except OutOfResources:
                continue
            break
        else:
            option = options[-1]
            self.through_triton(option, arrays)
        return option

    def through_triton(self, option: Option, arrays: tuple[Any, ...]) -> Any:
        """Launch by an option through Triton, and prepare to launch directly."""
        self.option, constants = option, {**self.numbers, **option.constants}
        self._rest = tuple(constants[name] for name in self.kernel.arg_names if name in constants)
        compiled = self.kernel[option.grid](*self._pick(arrays), *self._rest, num_warps=option.warps, **SETTINGS)
        if isinstance(compiled, CompiledKernel) and KNOWN[0] <= _version <= KNOWN[1]:  # not in the interpreter
            self._compiled = compiled
            self._run, self._function, self._packed = compiled.run, compiled.function, compiled.packed_metadata
        return compiled

    def __call__(self, stream: int, addresses: tuple[Any, ...], arrays: tuple[Any, ...]) -> None:
        """Launch on `arrays`, which are at `addresses`, on the current stream, whose handle this is."""
        if self._run is None or _observed():
            self.through_triton(self.option, arrays)
            return
        blocks, splits = self.option.grid
        self._run(
            *(blocks, splits, 1, stream, self._function, self._packed, None, None, None),
            *self._pick(addresses),
            *self._rest,
        )


def _observed() -> bool:
    """Return whether a tool, such as a profiler, observes launches."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
