"""Which JAX programs call the compiled kernels, on any number of threads and devices; that the others compute the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from evennorm.core.activation import LINEAR
from evennorm.jax import batch_norm
from evennorm.jax.composed import Options
from evennorm.jax.primitives import STATISTICS, forward_p
from evennorm.kernels import choose, xla

CALL = "@evennorm_"
needs_kernels = pytest.mark.skipif(choose("jax", "float32") != "cpu", reason="the kernels are not built, or not wanted")


def arrays(shape: tuple[int, ...] = (8, 5, 5, 6), dtype: Any = "float32", channel: int = -1) -> list[Any]:
    rng = np.random.default_rng(2)
    wide = "float64" if dtype == "float64" else "float32"
    of_channels = [jnp.asarray(rng.uniform(0.5, 1.5, shape[channel]), wide) for _ in range(2)]
    x, residual = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    return [x, *of_channels, residual]


def loss(x: Any, gamma: Any, beta: Any, residual: Any, **options: Any) -> Any:
    y, _ = batch_norm(x, gamma, beta, residual=residual, **{"activation": "relu", **options})
    return jnp.sum(y.astype(gamma.dtype) ** 3)


gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)))


def assert_same(got: Any, expected: Any, rounding: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding * max(1.0, np.abs(b).max(initial=0.0)))


def lowered(platform: str) -> str:
    return gradient.trace(*arrays()).lower(lowering_platforms=(platform,)).as_text()


@needs_kernels
def test_kernels_are_called_on_cpu_alone() -> None:
    assert lowered("cpu").count(CALL) == 2
    assert CALL not in lowered("cuda")
    assert CALL not in lowered("tpu")


@needs_kernels
def test_a_mask_takes_the_composed_form() -> None:
    x = arrays()[0]
    masked = jax.jit(lambda x: batch_norm(x, mask=np.ones((8, 5, 5), bool))[0])
    assert CALL not in masked.lower(x).as_text()
    assert CALL in jax.jit(lambda x: batch_norm(x)[0]).lower(x).as_text()


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 300, 64, 1), (2, 6, 5, 9), (2, 3, 1, 4, 1), (1, 0, 3, 2)], ids=str)
def test_statistics_alone_are_those_of_the_whole_pass(shape: tuple[int, ...], dtype: str) -> None:
    """The same bits, without a y."""
    x = jnp.asarray(np.random.default_rng(0).normal(50, 2, shape), dtype)

    def run(*wanted: str) -> Any:
        options = Options(1e-3, LINEAR, "cpu")
        return jax.jit(lambda x: forward_p.bind(x, given=("x",), linear=(), options=options, wanted=wanted))

    alone = run(*STATISTICS)
    assert CALL in alone.lower(x).as_text()
    for a, b in zip(alone(x), run("y", *STATISTICS)(x)[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    mean, low, variance = (np.asarray(a, np.float64) for a in alone(x))
    exact = np.asarray(x, np.float64)
    if exact.size:
        np.testing.assert_allclose(mean + low, exact.mean((-3, -1)).reshape(mean.shape), rtol=1e-9)
        np.testing.assert_allclose(variance, exact.var((-3, -1)).reshape(mean.shape), rtol=1e-6)


def test_exported_programs_run_anywhere() -> None:
    """They hold no call of ours; the batch size, and that of images, may be a symbol."""
    for axis in (-1, 1):
        channels = (6,) if axis == -1 else ()
        x = jax.ShapeDtypeStruct(export.symbolic_shape("b, h, h, 6" if channels else "b, 6, h, h"), "float32")
        parameter = jax.ShapeDtypeStruct((6,), "float32")
        train = jax.jit(jax.grad(lambda *a, axis=axis: loss(*a, axis=axis), (0, 1, 2, 3)))
        exported = export.export(train, platforms=("cpu", "cuda", "tpu"))(x, parameter, parameter, x)
        assert f"custom_call {CALL}" not in exported.mlir_module()
        serve = export.deserialize(exported.serialize()).call
        inputs = arrays((4, 5, 5, 6) if channels else (4, 6, 5, 5), channel=axis)
        assert_same(serve(*inputs), train(*inputs))


@needs_kernels
def test_without_jit() -> None:
    with jax.disable_jit():
        got = jax.grad(loss, (0, 1, 2, 3))(*arrays())
    assert_same(got, gradient(*arrays()))


@pytest.fixture
def _threads_as_before() -> Iterator[None]:
    yield
    xla.set_num_threads(0)


@needs_kernels
@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize(
    ("shape", "axis"), [((64, 50, 50, 3), -1), ((16, 40, 30, 20), 1), ((300_001,), 0), ((7, 4, 9, 3001), 1)], ids=str
)
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...], axis: int) -> None:
    if axis == 0:
        shape = (*shape, 1)
        axis = -1
    inputs = arrays(shape, channel=axis)
    both = jax.jit(lambda *a: (batch_norm(*a[:3], axis=axis), jax.grad(loss_of(axis), (0, 1, 2, 3))(*a)))
    results = []
    for threads in (1, 2, 5):
        xla.set_num_threads(threads)
        results.append(jax.block_until_ready(both(*inputs)))
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


def loss_of(axis: int) -> Any:
    return lambda *a: loss(*a, axis=axis)


@needs_kernels
@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("size", [3, 64])
def test_examples_of_a_vmap_are_shared_among_threads(size: int) -> None:
    inputs = arrays((size, 32, 8, 8, 4))
    together = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2, 3)), (0, None, None, 0)))(*inputs)
    each = [gradient(inputs[0][i], *inputs[1:3], inputs[3][i]) for i in range(size)]
    assert_same(together, jax.tree.map(lambda *leaves: np.stack(leaves), *each), rounding=0)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "int32", "float8_e4m3fn"])
def test_which_dtypes_come_in_and_out(dtype: str, x64: bool) -> None:
    with jax.enable_x64(x64):
        x = jnp.asarray((np.arange(24).reshape(6, 4) % 7).astype(jnp.dtype(dtype)))
        wide = "float64" if x.dtype == "float64" else "float32"
        y, m = jax.jit(batch_norm)(x, np.ones(4, "float32"), np.zeros(4, "float32"))
        served = choose("jax", x.dtype.name)
        calls = CALL in jax.jit(batch_norm).lower(x).as_text()
    assert y.dtype == x.dtype
    assert {m.mean.dtype, m.mean_low.dtype, m.variance.dtype} == {np.dtype(wide)}
    assert calls == (served == "cpu")
    np.testing.assert_allclose(m.mean + m.mean_low, np.asarray(x, np.float64).mean(0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_in_half_precision(dtype: str) -> None:
    inputs = arrays(dtype=dtype)
    exact = gradient(*(a.astype("float32") for a in inputs))
    got = gradient(*inputs)
    assert [g.dtype for g in got] == [a.dtype for a in inputs]
    # y is rounded before it is cubed, and dx once more.
    assert_same(got, exact, rounding=8e-3 if dtype == "bfloat16" else 1e-3)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0), (3, 0, 5, 2), (0, 4, 1)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_empty_arrays(shape: tuple[int, ...], activation: str | None) -> None:
    x, gamma, beta, residual = arrays(shape)
    y, m = jax.jit(lambda x: batch_norm(x, activation=activation))(x)
    assert y.shape == shape
    assert (np.asarray(m.mean) == 0).all()
    assert (np.asarray(m.variance) == 0).all()
    every = jax.jit(jax.grad(lambda *a: loss(*a, activation=activation), (0, 1, 2, 3)))(x, gamma, beta, residual)
    assert [g.shape for g in every] == [a.shape for a in (x, gamma, beta, residual)]
    assert all((np.asarray(g) == 0).all() for g in every)
    none = jax.vmap(lambda a: batch_norm(a, activation=activation)[0])(jnp.zeros((0, 5, 3)))
    assert none.shape == (0, 5, 3)


SEVERAL_DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.contract.test_jax_programs import CALL, arrays, assert_same, choose, gradient, loss

inputs, (batch, whole) = arrays(), (P("d"), P())
mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
spread = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(inputs, (batch, whole, whole, batch))]

# Spread by XLA: statistics over all devices, by the composed form.
program = gradient.lower(*spread)
assert CALL not in program.as_text()
assert_same(program.compile()(*spread), gradient(*inputs))

# Under shard_map: each device by itself, derivatives of what they share added up.
specs = (batch, whole, whole, batch)
mapped = jax.jit(jax.shard_map(jax.grad(loss, (0, 1, 2, 3)), mesh=mesh, in_specs=specs, out_specs=specs))
program = mapped.lower(*spread)
assert (CALL in program.as_text()) == (choose("jax", "float32") == "cpu")
parts = [gradient(inputs[0][i:i + 2], *inputs[1:3], inputs[3][i:i + 2]) for i in range(0, 8, 2)]
dx, dgamma, dbeta, dresidual = zip(*parts)
expected = np.concatenate(dx), np.sum(dgamma, 0), np.sum(dbeta, 0), np.concatenate(dresidual)
assert_same(program.compile()(*spread), expected)
print("same")
"""


def test_several_devices() -> None:
    run = subprocess.run([sys.executable, "-c", SEVERAL_DEVICES], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "same", run.stderr


@needs_kernels
def test_what_reverse_mode_keeps() -> None:
    """x, the statistics, and a bit per element where a residual comes before the activation: nothing else of x's size."""
    x, gamma, beta, residual = arrays((64, 6, 6, 16))

    def kept(*inputs: Any, **options: Any) -> int:
        _, back = jax.vjp(lambda *a: batch_norm(*a[:3], residual=a[3] if a[3:] else None, **options)[0], *inputs)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(back))

    of_channels = 5 * 16 * 4
    assert kept(x, gamma, beta, activation="relu") <= x.nbytes + of_channels
    assert kept(x, gamma, beta, residual, activation="relu") <= x.nbytes + x.size // 8 + of_channels
