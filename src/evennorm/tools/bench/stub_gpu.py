"""Replace a GPU: record every launch of a Triton kernel instead of running it, on tensors in CPU memory.

What a call costs on the host is the same as with a GPU, but for the launch itself and the allocator, and the same on every
machine. `python -m evennorm.tools.bench.stub_gpu` prints it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from time import thread_time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from evennorm.torch import gpu, kernels, native

if TYPE_CHECKING:
    from evennorm.kernels.triton.kernel import TritonKernel

PROCESSORS = 132
STREAM = 7
DEVICE = 99
"""A number that no device has, which separates these kernels from those compiled for real devices."""


class Launched(NamedTuple):
    """A launch as the driver would have seen it."""

    compiled: Any
    """The kernel, compiled for the arguments' types, alignments and constants: the same object for the same ones."""
    grid: tuple[int, int, int]
    stream: int
    arguments: tuple[Any, ...]
    """The arguments without constants, with addresses in place of tensors."""

    @property
    def name(self) -> str:
        """Name of the kernel."""
        found: str = self.compiled.name
        return found


class _Driver:
    """The answers of a Hopper GPU's driver to what Triton asks before it launches."""

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def stub_gpu(records: bool = True) -> Iterator[tuple[TritonKernel, list[Launched]]]:
    """Yield kernels for CPU tensors that launch nothing, and the list to which each launch is added if `records`.

    Raises:
        RuntimeError: Triton's interpreter runs kernels in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Triton's interpreter launches nothing; start without TRITON_INTERPRET=1")
    import triton
    from triton.compiler import CompiledKernel

    class Compiled(CompiledKernel):
        def __init__(self, source: Any, options: dict[str, Any], launched: list[Launched]):
            self.src, self.name, self.options = source, source.fn.fn.__name__, options
            self.function, self.packed_metadata, self.module = object(), object(), None
            is_constant = [kind == "constexpr" for kind in source.signature.values()]

            def run(x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
                assert (function, packed) == (self.function, self.packed_metadata)
                arguments = zip(rest[3:], is_constant, strict=True)
                values = tuple(_address(value) for value, constant in arguments if not constant)
                launched.append(Launched(self, (x, y, z), stream, values))

            self._run = run if records else lambda *_: None

        def launch_metadata(self, *_: Any) -> None:
            return None

    launched: list[Launched] = []
    kernel = gpu.triton_kernel()
    answers: dict[str, Any] = {
        "processors": lambda device: PROCESSORS,
        "stream": lambda device: STREAM,
        "current_device": lambda: -1,  # torch's number for CPU memory
        "is_recording": lambda: False,
    }
    kernel = replace(kernel, gpu=kernel.gpu._replace(**answers))
    functions = _functions()
    compilers = [getattr(function, "compile", None) for function in functions]
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver())
    try:
        for function in functions:
            function.device_caches[DEVICE] = function.create_binder()
            function.compile = lambda source, target, options, **_: Compiled(source, options, launched)
        yield kernel, launched
    finally:
        triton.runtime.driver._active = active
        for function, compiler in zip(functions, compilers, strict=True):
            function.compile = compiler
            del function.device_caches[DEVICE]


def _functions() -> list[Any]:
    from triton.runtime.jit import JITFunction

    from evennorm.kernels.triton import backward, forward, running

    every = {id(value): value for module in (forward, backward, running) for value in vars(module).values()}
    return [value for value in every.values() if isinstance(value, JITFunction)]


def _address(value: Any) -> Any:
    return value.data_ptr() if hasattr(value, "data_ptr") else value


@contextmanager
def on_stub_gpu(records: bool = True) -> Iterator[list[Launched]]:
    """Make `evennorm.torch` normalize CPU tensors by the kernels that launch nothing."""
    before = kernels.cpu_kernel, kernels.ON_CPU, native.AVAILABLE
    with stub_gpu(records) as (kernel, launched):
        kernels.cpu_kernel, kernels.ON_CPU, native.AVAILABLE = kernel, gpu.SUPPORTED, False  # type: ignore[assignment]
        try:
            yield launched
        finally:
            kernels.cpu_kernel, kernels.ON_CPU, native.AVAILABLE = before


SHAPES = {"on chip": (8, 16), "two launches": (6272, 512)}


def host_microseconds(rounds: int = 200, calls: int = 10) -> dict[str, float]:
    """Measure the cost of calls on the host, medians in microseconds of one thread: of the kernels alone, and of modules."""
    from evennorm.core.activation import RELU
    from evennorm.core.call import Call
    from evennorm.core.geometry import Geometry
    from evennorm.torch import BatchNorm1d

    todo: dict[str, Callable[[], Any]] = {}
    with on_stub_gpu(records=False):
        for name, shape in SHAPES.items():
            kernel: Any = kernels.cpu_kernel
            x, gamma, call = torch.randn(shape), torch.ones(shape[1]), Call(Geometry(shape), activation=RELU)
            count = torch.zeros((), dtype=torch.int64)
            running = (
                torch.zeros_like(gamma),
                torch.zeros_like(gamma),
                torch.ones_like(gamma),
                0.9,
                True,
                count,
                count.clone(),
            )
            _, saved = kernel.forward(call, x, gamma, gamma, running=running)
            todo[f"kernel, {name}, forward"] = partial(kernel.forward, call, x, gamma, gamma, running=running)
            todo[f"kernel, {name}, backward"] = partial(kernel.backward, call, x, x, gamma, gamma, saved, False)
            module: Any = BatchNorm1d(shape[1], activation="relu")
            leaf = x.clone().requires_grad_()
            todo[f"module, {name}, forward"] = partial(module, leaf)
            todo[f"module, {name}, forward and backward"] = partial(_both, module, leaf, x)
        for run in todo.values():
            run()
        found: dict[str, list[float]] = {name: [] for name in todo}
        for _ in range(rounds):
            for name, run in todo.items():
                start = thread_time()
                for _ in range(calls):
                    run()
                found[name].append((thread_time() - start) / calls * 1e6)
    return {name: median(times) for name, times in found.items()}


def _both(module: torch.nn.Module, x: Tensor, dy: Tensor) -> None:
    torch.autograd.grad(module(x), (x, *module.parameters()), dy)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, microseconds in host_microseconds().items():
        print(f"{name:45}{microseconds:7.1f} us")
