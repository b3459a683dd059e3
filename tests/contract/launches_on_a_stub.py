"""Test which kernels are launched, with which arguments, on a stub of a GPU.

Triton's interpreter launches nothing: `test_triton_launches` runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evennorm.core.activation import RELU, Activation
from evennorm.core.call import Call
from evennorm.core.geometry import Geometry
from evennorm.kernels.triton import choices, launch
from evennorm.kernels.triton.kernel import TritonKernel
from evennorm.tools.bench.stub_gpu import STREAM, Launched, host_microseconds, on_stub_gpu, stub_gpu
from evennorm.torch import BatchNorm2d
from evennorm.torch.tensors import NAMES, acc_dtype

Stub = tuple[TritonKernel, list[Launched]]


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stub_gpu() as found:
        yield found


class Setting(NamedTuple):
    """What plans are made for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory: str
    group: int | None
    residual: bool
    slope: float
    gamma: torch.dtype | None
    beta: bool
    updates: bool
    counts: bool
    decay: float | None


@st.composite
def settings_of(draw: Any) -> Setting:
    rank = draw(st.integers(2, 4))
    sizes = st.sampled_from([1, 2, 3, 7, 8, 16, 33, 64])
    shape = (2 * draw(sizes), *(draw(sizes) for _ in range(rank - 1)))
    if draw(st.booleans()):  # more than stays on the chip
        shape = (4 * 7_000, *shape[1:2], *(1 for _ in shape[2:]))
    dtype = draw(st.sampled_from(list(NAMES)))
    return Setting(
        shape,
        dtype,
        draw(st.sampled_from(["contiguous", "channels last", "gaps"])),
        draw(st.sampled_from([None, shape[0] // 2])),
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 0.0, 0.1])),
        draw(st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16])),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([0.9, None])),
    )


def array_of(shape: tuple[int, ...], dtype: torch.dtype, offset: int, memory: str = "contiguous") -> torch.Tensor:
    """So many elements from where memory is aligned."""
    if memory == "gaps":
        return torch.zeros(2 * prod(shape) + offset, dtype=dtype)[offset::2].reshape(shape)
    if memory == "channels last" and len(shape) > 2:
        turned = array_of((shape[0], *shape[2:], shape[1]), dtype, offset)
        return turned.permute(0, len(shape) - 1, *range(1, len(shape) - 1))
    return torch.zeros(prod(shape) + offset, dtype=dtype)[offset:].reshape(shape)


class Arrays:
    """Tensors for a setting, each as far from where memory is aligned as a list says."""

    def __init__(self, setting: Setting, offsets: list[int]):
        def row(dtype: torch.dtype | None, at: int, size: int = setting.shape[1]) -> torch.Tensor | None:
            return None if dtype is None else array_of((size,), dtype, offsets[at])

        acc = acc_dtype(torch.empty(0, dtype=setting.dtype))
        self.x = array_of(setting.shape, setting.dtype, offsets[0], setting.memory)
        self.dy = array_of(setting.shape, setting.dtype, offsets[1], setting.memory)
        self.residual = array_of(setting.shape, setting.dtype, offsets[2], setting.memory) if setting.residual else None
        self.gamma, self.beta = row(setting.gamma, 3), row(acc if setting.beta else None, 4)
        count = torch.int64 if setting.counts else None
        self.running = (
            *(row(acc, at) for at in (5, 6, 7)),
            *(setting.decay, True),
            *(row(count, at, 1) for at in (8, 9)),
        )


def launches_of(stub: Stub, call: Call, setting: Setting, arrays: Arrays) -> list[list[str]]:
    """Run a forward and a backward pass, inference, and an update alone; the names of the kernels of each."""
    kernel, launched = stub
    found = []

    def note(result: Any) -> Any:
        found.append([one.name for one in launched])
        launched.clear()
        return result

    launched.clear()
    running = arrays.running if setting.updates else None
    _, saved = note(kernel.forward(call, arrays.x, arrays.gamma, arrays.beta, arrays.residual, running=running))
    note(kernel.backward(call, arrays.dy, arrays.x, arrays.gamma, arrays.beta, saved, setting.residual))
    mean, _, variance = arrays.running[:3]
    if setting.group is None:
        note(kernel.infer(call, arrays.x, mean, variance, arrays.gamma, arrays.beta, arrays.residual))
    return found


@given(
    setting=settings_of(), offsets=st.lists(st.lists(st.integers(0, 9), min_size=10, max_size=10), min_size=1, max_size=3)
)
@settings(deadline=None, max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck))
def test_what_is_launched_directly_is_what_triton_would_launch(
    stub: Stub, setting: Setting, offsets: list[list[int]]
) -> None:
    """Grid, stream, arguments by value, and the very kernel: types, alignments, constants."""
    _, launched = stub
    call = Call(Geometry(setting.shape, 1), NAMES[setting.dtype], 1e-5, Activation(setting.slope), setting.group)
    direct = launch.Launch.__call__
    compared = []

    def both(self: launch.Launch, stream: int, addresses: tuple[Any, ...], arrays: tuple[Any, ...]) -> None:
        assert self._run is not None
        direct(self, stream, addresses, arrays)
        option = self.option
        self.kernel[option.grid](*self._pick(arrays), *self._rest, num_warps=option.warps, **choices.SETTINGS)
        by_triton, by_us = launched.pop(), launched[-1]
        assert by_triton == by_us
        assert by_us.stream == STREAM
        compared.append(by_us)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launch, "__call__", both)
        for some in [*offsets, offsets[0], [0] * 10]:
            names = launches_of(stub, call, setting, Arrays(setting, some))
        first = len(compared)
        assert launches_of(stub, call, setting, Arrays(setting, [0] * 10)) == names
    assert len(compared) - first == sum(map(len, names))


@pytest.mark.parametrize("updates", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((8, 16), ["forward_on_chip"], ["backward_on_chip"]),
        ((128, 512, 7, 7), ["forward_on_chip"], ["backward_on_chip"]),
        ((50_000, 64), ["moment_sums", "normalize"], ["gradient_sums", "input_gradient"]),
        ((16, 64, 56, 56), ["moment_sums", "normalize"], ["gradient_sums", "input_gradient"]),
    ],
)
def test_launches_of_a_layer(stub: Stub, shape, forward, backward, residual, updates) -> None:
    """Two each way, or one where a channel stays on the chip: running statistics and counters take none of their own."""
    setting = Setting(shape, torch.float32, "contiguous", None, residual, 0.0, torch.float32, True, updates, True, 0.9)
    call, arrays = Call(Geometry(shape, 1), activation=RELU), Arrays(setting, [0] * 10)
    for _ in range(2):
        assert launches_of(stub, call, setting, arrays)[:2] == [forward, backward]


def test_launches_of_a_module() -> None:
    with on_stub_gpu() as launched:
        module, x = BatchNorm2d(64, activation="relu"), torch.randn(8, 64, 56, 56, requires_grad=True)
        for _ in range(3):
            launched.clear()
            module(x).sum().backward()
            names = [one.name for one in launched]
            assert names == ["moment_sums", "normalize", "gradient_sums", "input_gradient"]
        module.eval()
        launched.clear()
        with torch.no_grad():
            module(x)
        assert [one.name for one in launched] == ["normalize"]


def test_whoever_watches_launches_is_told(stub: Stub) -> None:
    """A profiler's hooks hang on Triton's own way."""
    hook = pytest.importorskip("triton").knobs.runtime.launch_enter_hook
    if not hasattr(hook, "add"):
        pytest.skip("this version of Triton has no chain of hooks")
    call, x, seen = Call(Geometry((8, 16))), torch.randn(8, 16), []
    with pytest.MonkeyPatch.context() as patch:
        through = launch.Launch.through_triton
        patch.setattr(launch.Launch, "through_triton", lambda *given: (seen.append(given), through(*given))[1])
        stub[0].forward(call, x, None, None)
        stub[0].forward(call, x, None, None)
        assert len(seen) == 1

        def watch(*_: Any) -> None:
            pass

        hook.add(watch)
        try:
            stub[0].forward(call, x, None, None)
        finally:
            hook.remove(watch)
    assert len(seen) == 2


def test_host_cost_is_measured() -> None:
    found = host_microseconds(rounds=1, calls=1)
    assert len(found) == 8
    assert all(microseconds > 0 for microseconds in found.values())
