"""The compiled CPU kernels on tensors that lie in memory in every way, against float64; their threads, forks and buffers."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import evennorm
from evennorm.core import running
from evennorm.core.call import Call
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.kernels import cpu
from evennorm.kernels.contract import UnfitError
from evennorm.numpy import xp as numpy_xp
from evennorm.torch import batch_norm, engine, normalize
from evennorm.torch.kernels import cpu_kernel, kernel_for
from tests.contract import textbook
from tests.contract.near_6 import check_values_near_6

pytestmark = pytest.mark.skipif(not cpu.AVAILABLE, reason="built without the compiled kernels")

_cpu = cpu._cpu
DTYPES = {"float32": 4e-6, "float64": 1e-11, "bfloat16": 2**-7, "float16": 2**-9}
INSTRUCTION_SETS = ["baseline"] if _cpu is None else ["baseline", *{_cpu.instruction_set()} - {"baseline"}]


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    _cpu.use_instruction_set("")
    _cpu.write_past_cache_from(_cpu.PAST_CACHE)
    _cpu.set_num_threads(0)
    evennorm.set_buffer_limit(256)


@st.composite
def layouts(draw, rank):
    """How an array lies: the order of its axes in memory, steps between elements, an offset."""
    order = draw(st.permutations(range(rank)))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=rank, max_size=rank))
    return order, steps, draw(st.integers(0, 3))


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 5))
    most = {1: 3000, 2: 200, 3: 40, 4: 18, 5: 7}[rank]
    shape = tuple(draw(st.lists(st.integers(1, most), min_size=rank, max_size=rank)))
    width = draw(st.sampled_from([1, 1, 1, 2])) if rank > 1 else 1
    first = draw(st.integers(0, rank - width))
    axis = tuple(range(first, first + width))
    plain = (tuple(range(rank)), [1] * rank, 0)
    lies = [draw(layouts(rank)) if draw(st.booleans()) else plain for _ in range(3)]
    return {
        "shape": shape,
        "axis": axis,
        "dtype": draw(st.sampled_from(list(DTYPES))),
        "activation": draw(st.sampled_from(list(textbook.BENDS))),
        "residual": draw(st.booleans()),
        "affine": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, 3.0, 1e3, 1e5])),
        "layouts": lies,
        "instruction_set": draw(st.sampled_from(INSTRUCTION_SETS)),
        "past_cache": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def lying(values: np.ndarray, layout, dtype: str) -> torch.Tensor:
    """`values` as a tensor that lies in memory as `layout` says."""
    order, steps, offset = layout
    spread = [values.shape[a] * step for a, step in zip(order, [steps[a] for a in order], strict=True)]
    room = torch.zeros(offset + int(np.prod(spread)), dtype=getattr(torch, dtype))[offset:].view(spread)
    room = room[tuple(slice(None, None, steps[a]) for a in order)].permute(tuple(np.argsort(order)))
    return room.copy_(torch.tensor(values))


@settings(max_examples=300, deadline=None)
@given(problems())
@example(
    {
        "shape": (1, 2, 2),
        "axis": (0,),
        "dtype": "float32",
        "activation": "relu",
        "residual": True,
        "affine": False,
        "mean": 0.0,
        "layouts": [((0, 1, 2), [1, 1, 1], 0), ((0, 1, 2), [1, 1, 1], 0), ([0, 1, 2], [1, 2, 1], 0)],  # gaps in the residual
        "instruction_set": "baseline",
        "past_cache": False,
        "seed": 0,
    }
)
def test_any_memory(problem) -> None:
    """Output, statistics and gradients."""
    rng = np.random.default_rng(problem["seed"])
    shape, dtype, half = problem["shape"], problem["dtype"], problem["dtype"] in ("bfloat16", "float16")
    mean = min(problem["mean"], 3.0) if half else problem["mean"]
    x, dy, residual = (
        lying(rng.standard_normal(shape) + m, layout, dtype)
        for m, layout in zip((mean, 0, 0), problem["layouts"], strict=True)
    )
    geometry = Geometry(shape, problem["axis"])
    wide = torch.float64 if dtype == "float64" else torch.float32
    spread = textbook.spread(problem["activation"])
    gamma, beta = (
        torch.tensor(rng.uniform(low, 1.5, geometry.parameter_shape) * spread, dtype=wide) if problem["affine"] else None
        for low in (0.5, -1.0)
    )
    residual = residual if problem["residual"] else None
    leaves = [t for t in (x, gamma, beta, residual) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    _cpu.use_instruction_set(problem["instruction_set"])
    _cpu.write_past_cache_from(0 if problem["past_cache"] else _cpu.PAST_CACHE)
    assert kernel_for(x, gamma, beta, residual) is cpu_kernel
    y, moments = batch_norm(
        x, gamma, beta, axis=problem["axis"], epsilon=1e-3, activation=problem["activation"], residual=residual
    )
    gradients = torch.autograd.grad(y, leaves, dy)

    activation, bound = problem["activation"], DTYPES[dtype]
    # Long doubles: at mean 1e5, float64 statistics are less exact than those of the kernel.
    exact = [
        None if t is None else t.detach().double().numpy().astype(np.longdouble) for t in (x, dy, gamma, beta, residual)
    ]
    x64, dy64, gamma64, beta64, residual64 = exact
    count, mean64 = geometry.count, x64.mean(geometry.reduced, keepdims=True)
    variance64 = ((x64 - mean64) ** 2).mean(geometry.reduced, keepdims=True)
    inverse = 1 / np.sqrt(variance64 + 1e-3)
    xhat = (x64 - mean64) * inverse
    g = 1.0 if gamma64 is None else gamma64.reshape(geometry.broadcast_shape)
    z = g * xhat + (0 if beta64 is None else beta64.reshape(geometry.broadcast_shape))
    z = z + (0 if residual64 is None else residual64)
    np.testing.assert_allclose(y.detach().double(), textbook.activated(z, activation), rtol=bound, atol=3 * bound)
    # The rounding of x itself: a mean of 1e5 leaves float32 1e-3 of it between neighbours, which float64 sees too.
    found = moments.mean.double() + moments.mean_low.detach().double()
    np.testing.assert_allclose(
        found, mean64.reshape(geometry.parameter_shape), rtol=0, atol=3e-7 if dtype != "float64" else 1e-10
    )
    np.testing.assert_allclose(
        moments.variance.detach().double(), variance64.reshape(geometry.parameter_shape), rtol=2e-6, atol=2e-6
    )

    if textbook.to_a_bend(z, activation).min() < 4 * bound * max(1.0, np.abs(z).max() / 8):
        return  # a sign that rounding decides
    dz = dy64 * textbook.derivative(z, activation)
    sum_dz, sum_xhat = dz.sum(geometry.reduced, keepdims=True), (dz * xhat).sum(geometry.reduced, keepdims=True)
    expected = [g * inverse * (dz - sum_dz / count - xhat * sum_xhat / count)]
    if gamma64 is not None:
        expected += [sum_xhat.reshape(geometry.parameter_shape), sum_dz.reshape(geometry.parameter_shape)]
    if residual64 is not None:
        expected.append(dz)
    # Of a few values with a variance near epsilon, dx is a difference of numbers up to |dy| / sqrt(epsilon).
    scale = np.abs(inverse).max() * (1 + np.abs(dy64).max()) * spread
    for found, wanted, leaf in zip(gradients, expected, leaves, strict=True):
        assert found.dtype == leaf.dtype
        assert found.shape == leaf.shape
        np.testing.assert_allclose(found.double(), wanted, rtol=bound, atol=4 * bound * scale * max(1.0, count**0.5 / 8))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 60), st.integers(1, 80)),
    channels_last=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    activation=st.sampled_from(list(textbook.BENDS)),
    has_residual=st.booleans(),
    offset=st.integers(0, 40),
    instruction_set=st.sampled_from(INSTRUCTION_SETS),
    past_cache=st.booleans(),
    in_place=st.booleans(),
)
def test_inference(
    sizes, channels_last, dtype, activation, has_residual, offset, instruction_set, past_cache, in_place
) -> None:
    """Planes that end anywhere in a vector, or in a cache line."""
    outer, channel, inner = sizes
    rng = np.random.default_rng(offset)
    order = (0, 2, 1) if channels_last else (0, 1, 2)
    x, residual, y = (lying(rng.standard_normal(sizes) + m, (order, [1] * 3, offset), dtype) for m in (3, 0, 0))
    y = x if in_place else y
    wide = torch.float64 if dtype == "float64" else torch.float32
    gamma, mean, variance = (torch.tensor(rng.uniform(0.5, 2, channel), dtype=wide) for _ in range(3))
    m, v, g = (t.double()[:, None] for t in (mean, variance, gamma))
    z = g * (x.double() - m) / torch.sqrt(v + 1e-3) + (residual.double() if has_residual else 0)

    strides = (outer * channel * inner, *x.stride())
    kernel = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}[dtype]
    slope, limit = textbook.BENDS[activation]
    _cpu.use_instruction_set(instruction_set)
    _cpu.write_past_cache_from(0 if past_cache else _cpu.PAST_CACHE)
    plan = _cpu.ForwardPlan(kernel, (1, *sizes), strides, strides if has_residual else (0,) * 4, strides, 1e-3, slope, limit)
    arrays = [None if t is None else t.data_ptr() for t in (x, residual if has_residual else None, y, gamma, None)]
    assert plan.normalize(*arrays, mean.data_ptr(), None, variance.data_ptr(), None) == 0
    expected = textbook.activated(z.numpy(), activation)
    np.testing.assert_allclose(y.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    assert not torch.as_strided(y, (offset,), (1,), 0).any(), "nothing is written beside y"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((64, 30, 31, 17), -1),
        ((64, 17, 30, 31), 1),
        ((3, 2, 90_001), 1),
        ((300, 1024), -1),
        ((700, 3, 300), 1),
        ((16, 40, 6, 5, 64), 1),
    ],
)
@pytest.mark.parametrize("group", [None, 1])
def test_any_number_of_threads_gives_the_same_bits(shape, axis, dtype, group) -> None:
    rng = np.random.default_rng(5)
    x, dy, residual = (torch.tensor(rng.standard_normal(shape) + m).to(getattr(torch, dtype)) for m in (5, 0, 0))
    gamma = torch.rand(shape[axis], dtype=torch.float64 if dtype == "float64" else torch.float32)

    def results(threads):
        evennorm.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, gamma, residual)]
        y, moments = batch_norm(
            leaves[0],
            leaves[1],
            axis=axis,
            activation="relu",
            residual=leaves[2],
            virtual_batch_size=group and shape[0] // 2,
        )
        return [t.detach().clone() for t in (y, *moments[1:], *torch.autograd.grad(y, leaves, dy))]

    one = results(1)
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(one, results(threads), strict=True)), threads


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_are_taken_again_for_those_of_many_channels_whose_first_values_lie_apart(dtype) -> None:
    rng = np.random.default_rng(6)
    x = torch.tensor(rng.standard_normal((90, 2100))).to(getattr(torch, dtype))
    x[:16, 700:705] += 1e4
    x[:16, 2099] += 1e4

    def results(threads):
        evennorm.set_num_threads(threads)
        y, moments = batch_norm(x, epsilon=1e-3)
        return [y, *moments[1:]]

    one = results(1)
    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(one, results(threads), strict=True)), threads
    exact = x.double()
    y = (exact - exact.mean(0)) / torch.sqrt(exact.var(0, correction=0) + 1e-3)
    assert (one[0].double() - y).abs().max() < DTYPES[dtype]
    apart, _ = batch_norm(x[:, 690:710].contiguous(), epsilon=1e-3)
    np.testing.assert_allclose(one[0][:, 690:710], apart, rtol=0, atol=DTYPES[dtype])


def test_signs_near_zero_agree_in_forward_and_backward() -> None:
    """Where the gradient is let through, so was the value: the sign is recomputed to the last bit."""
    x = torch.randn(50_000, 7, dtype=torch.float32).requires_grad_()
    beta = torch.full((7,), 1e-7)
    y, _ = batch_norm(x, None, beta, activation="relu")
    zeros, ones = torch.zeros(7), torch.ones(7)
    (dx,) = torch.autograd.grad(normalize(x, zeros, ones, activation="relu").sum(), x)
    open_gate = normalize(x.detach(), zeros, ones, activation="relu") > 0
    assert torch.equal(dx != 0, open_gate)
    residual = torch.zeros_like(x).requires_grad_()
    y_residual, _ = batch_norm(x, None, beta, activation="relu", residual=residual)
    (share,) = torch.autograd.grad(y_residual.sum(), residual)
    assert torch.equal(share == 1, y_residual > 0)
    assert torch.equal(y > 0, y_residual > 0)


def test_values_near_6_agree_in_forward_and_backward() -> None:
    check_values_near_6((50_000, 7), "cpu")


def test_the_caller_keeps_what_is_theirs() -> None:
    x, gamma, residual = torch.randn(40, 6, 5), torch.rand(6), torch.randn(40, 6, 5)
    before = [t.clone() for t in (x, gamma, residual)]
    batch_norm(x, gamma, axis=1, activation="relu", residual=residual)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, gamma, residual), strict=True))


FORKED = """
import multiprocessing, numpy, torch, evennorm
from evennorm.torch import batch_norm

def compute(queue):
    torch.set_num_threads(1)  # as a data loader's worker does: torch's own threads do not survive a fork either
    evennorm.set_num_threads(2)
    y, _ = batch_norm(torch.from_numpy(numpy.arange(4_000_000, dtype=numpy.float32).reshape(-1, 4)))
    queue.put(float(y.mean()))

batch_norm(torch.randn(1000, 1000))  # the parent has started threads
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
child = context.Process(target=compute, args=(queue,), daemon=True)
child.start()
child.join(60)
print(child.exitcode, queue.get() if child.exitcode == 0 else None)
"""


def test_a_forked_child_computes() -> None:
    """With threads of its own, since those of its parent are not there."""
    code, mean = run(FORKED).split()
    assert code == "0"
    assert abs(float(mean)) < 1e-6


def test_calls_from_many_threads_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(64, 33, 3000)
    alone, _ = batch_norm(x, axis=1)
    with ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda _: batch_norm(x, axis=1)[0], range(24)))
    assert all(torch.equal(result, alone) for result in results)


def run(code: str, **environment: str) -> str:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.strip()


def test_the_number_of_threads() -> None:
    code = "import evennorm; print(evennorm.num_threads())"
    assert run(code, EVENNORM_NUM_THREADS="3") == "3"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert run(code, EVENNORM_NUM_THREADS="") == str(cores)
    assert run("import evennorm; evennorm.set_num_threads(7); " + code) == "7"
    assert run("import evennorm; evennorm.set_num_threads(7); evennorm.set_num_threads(0); " + code) == str(cores)
    if sys.platform == "linux":  # whose torch has GNU's OpenMP
        assert run("import torch, evennorm; torch.set_num_threads(5); " + code) == "5"
    for wrong in (-1, 1.5, "two"):
        with pytest.raises(evennorm.ArgumentError, match=f"0 or more.*received threads={wrong!r}"):
            evennorm.set_num_threads(wrong)


def test_the_reference_kernel_can_be_forced() -> None:
    code = (
        "import torch, evennorm.torch as e; from evennorm.torch.kernels import kernel_for; x = torch.ones(2, 3);"
        "print(kernel_for(x) is not None, float(e.batch_norm(x)[0].sum()))"
    )
    assert run(code, EVENNORM_KERNEL="reference") == "False 0.0"
    assert run(code, EVENNORM_KERNEL="") == "True 0.0"
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(code, EVENNORM_KERNEL="fast")
    assert "EVENNORM_KERNEL is unset, or reference to compare with; received EVENNORM_KERNEL=fast" in failed.value.stderr


def test_buffers_are_used_again_and_given_back() -> None:
    evennorm.set_buffer_limit(0)
    evennorm.set_buffer_limit(64)
    x = torch.randn(1 << 20)
    y, _ = batch_norm(x[:, None])
    address, expected = y.data_ptr(), y.clone()
    view = y[5:]
    del y
    gc.collect()
    assert _cpu.buffered_bytes() == 0, "a view holds the buffer"
    assert torch.equal(view, expected[5:])
    del view
    gc.collect()
    assert _cpu.buffered_bytes() == 4 << 20
    again, _ = batch_norm(x[:, None])
    assert again.data_ptr() == address
    del again
    evennorm.set_buffer_limit(0)
    assert _cpu.buffered_bytes() == 0
    with pytest.raises(evennorm.ArgumentError, match="0 or more; received megabytes=-1"):
        evennorm.set_buffer_limit(-1)


STATISTICS = [
    # groups, count, decay, unbiased
    (1, 50, 0.99, False),
    (1, 50, 0.0, True),
    (3, 7, 0.3, True),
    (1, 1, 0.9, False),
    (1, 0, 0.9, False),
    (4, 2, 1.0, False),
]


@pytest.mark.parametrize(("groups", "count", "decay", "unbiased"), STATISTICS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("poison", [None, "mean", "variance"])
def test_running_statistics_follow_as_the_core_defines(groups, count, decay, unbiased, dtype, poison) -> None:
    rng = np.random.default_rng(8)
    mean, low, variance = rng.normal(1e4, 1, (groups, 5)), rng.normal(0, 1e-4, (groups, 5)), rng.uniform(0.5, 2, (groups, 5))
    if poison is not None:
        (mean if poison == "mean" else variance)[0, 3] = np.nan if poison == "mean" else np.inf
    statistics = [values.astype(dtype) for values in (mean, low, variance)]
    kept = [rng.normal(1e4, 1, 5).astype(dtype), rng.normal(0, 1e-3, 5).astype(dtype), rng.uniform(0.5, 2, 5).astype(dtype)]

    with np.errstate(invalid="ignore"):
        batch = running.summary(numpy_xp, Moments(count, *statistics), unbiased)
        followed = running.updated_mean(numpy_xp, running.RunningMean(*kept[:2]), batch, decay)
        expected = [*followed, running.updated(numpy_xp, kept[2], batch.variance, decay, batch.has_variance)]

    tensors = tuple(torch.tensor(values) for values in kept)
    accepted = engine.update_running_stats(tensors, Moments(count, *map(torch.tensor, statistics)), decay, unbiased)
    assert accepted is bool(batch.accepted)
    for found, wanted in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6 if dtype == "float32" else 1e-14, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9, 70, 5), (3, 4, 5, 1), (1, 1, 6, 1), (1, 0, 4, 3), (2, 7, 0, 3)])
@pytest.mark.parametrize("decay", [0.9, 0.0, None])
@pytest.mark.parametrize("poisoned", [False, True])
def test_running_statistics_are_updated_inside_the_call(dtype, shape, decay, poisoned) -> None:
    """To the bits of an update afterwards."""
    groups, outer, channel, inner = shape
    wide = torch.float64 if dtype == "float64" else torch.float32
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn((groups * outer, channel, inner), generator=generator) + 50).to(getattr(torch, dtype))
    if poisoned and x.numel():
        x[-1, -1, -1] = torch.inf
    kept = [torch.randn(channel, generator=generator).to(wide) for _ in range(3)]
    batches, skipped = torch.tensor(7), torch.tensor(3)
    call = Call(Geometry(tuple(x.shape), 1), dtype, 1e-3, group_size=outer if groups > 1 else None)

    running = [t.clone() for t in kept]
    _, (statistics, _) = cpu_kernel.forward(call, x, None, None, running=(*running, decay, True, batches, skipped))
    accepted = x.numel() > 0 and not poisoned
    counts = accepted or decay is not None  # the plain average counts what has a part in it
    assert (int(batches), int(skipped)) == (8 if counts else 7, 3 if accepted else 4)
    before = torch.tensor(7, dtype=wide)
    expected = [t.clone() for t in kept]
    weight = float(before / (before + 1)) if decay is None else decay
    moments = Moments(outer * inner, *statistics)
    assert cpu_kernel.update_running_stats((*expected, weight, True, None, None), moments) is accepted
    assert all(torch.equal(a, b) for a, b in zip(running, expected, strict=True))


def test_what_a_kernel_cannot_read_is_refused_before_anything_is_written() -> None:
    call, x, row = Call(Geometry((9, 4))), torch.randn(9, 4), torch.ones(4)
    for unfit in (row[:3], row.double(), torch.ones(8)[::2], torch.ones(4, dtype=torch.cfloat).conj().imag, row.to("meta")):
        running, count = [torch.zeros(4), torch.zeros(4), torch.ones(4)], torch.tensor(0)
        with pytest.raises(UnfitError):
            cpu_kernel.forward(call, x, unfit, None, running=(*running, 0.9, True, count, None))
        with pytest.raises(UnfitError):
            cpu_kernel.forward(call, x, None, None, running=(running[0], unfit, running[2], 0.9, True, count, None))
        assert [float(t.sum()) for t in running] == [0, 0, 4]
        assert int(count) == 0
    with pytest.raises(UnfitError):
        cpu_kernel.forward(call, x, None, None, running=(*running, 0.9, True, torch.tensor(0, dtype=torch.int32), None))


def test_gradients_are_those_of_what_there_is() -> None:
    call, x = Call(Geometry((9, 4))), torch.randn(9, 4)
    y, saved = cpu_kernel.forward(call, x, None, None)
    dx, *others = cpu_kernel.backward(call, x, x, None, None, saved, False)
    assert others == [None, None, None]
    assert y.shape == dx.shape
