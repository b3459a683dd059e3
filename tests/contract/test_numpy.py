"""NumPy arrays that lie in memory in every way, y in the caller's memory: values against long doubles; what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evennorm import ArgumentError, Geometry, ShapeError
from evennorm.kernels import choose
from evennorm.numpy import batch_norm, batch_norm_gradient, engine, moments, normalize
from evennorm.numpy import cpu as numpy_cpu
from tests.contract import textbook

DTYPES = {"float32": 4e-6, "float64": 1e-11, "bfloat16": 2**-7, "float16": 2**-9}
compiled = pytest.mark.skipif(choose("numpy", "float32") != "cpu", reason="the compiled kernels do not serve here")


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@st.composite
def layouts(draw, rank):
    """How an array lies: the order of its axes in memory, steps between elements (backwards, too), an offset in bytes."""
    order = draw(st.permutations(range(rank)))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3, -1, -2]), min_size=rank, max_size=rank))
    return order, steps, draw(st.sampled_from([0, 0, 4, 8, 1])), draw(st.booleans()) and draw(st.booleans())


def lying(values: np.ndarray, layout, dtype: np.dtype) -> np.ndarray:
    """`values` as an array that lies in memory as `layout` says."""
    order, steps, offset, swapped = layout
    spread = [values.shape[a] * abs(steps[a]) for a in order]
    if swapped and dtype.name != "bfloat16":
        dtype = dtype.newbyteorder()
    room = np.zeros(offset + int(np.prod(spread)) * dtype.itemsize, np.uint8)[offset:].view(dtype).reshape(spread)
    room = room[tuple(slice(None, None, steps[a]) for a in order)].transpose(np.argsort(order))
    room[...] = values.astype(dtype)
    return room


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 5))
    most = {1: 3000, 2: 200, 3: 40, 4: 18, 5: 7}[rank]
    shape = tuple(draw(st.lists(st.integers(1, most), min_size=rank, max_size=rank)))
    axis = tuple(draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=min(rank, 2), unique=True)))
    plain = (tuple(range(rank)), [1] * rank, 0, False)
    return {
        "shape": shape,
        "axis": axis,
        "dtype": draw(st.sampled_from(list(DTYPES))),
        "activation": draw(st.sampled_from(list(textbook.BENDS))),
        "residual": draw(st.booleans()),
        "affine": draw(st.booleans()),
        "mean": draw(st.sampled_from([0.0, 3.0, 1e3, 1e5])),
        "layouts": [draw(layouts(rank)) if draw(st.booleans()) else plain for _ in range(4)],
        "out": draw(st.sampled_from([None, "other", "x", "residual", "overlap"])),
        "seed": draw(st.integers(0, 2**31)),
    }


class Textbook:
    """Long doubles: at mean 1e5, float64 statistics are less exact than those of the kernels."""

    def __init__(self, shape, axis, x, gamma, beta, residual, activation):
        self.geometry, self.gamma, self.activation = Geometry(shape, axis), gamma, activation
        exact = [None if a is None else a.astype(np.float64).astype(np.longdouble) for a in (x, gamma, beta, residual)]
        x, gamma, beta, residual = exact
        reduced, broadcast = self.geometry.reduced, self.geometry.broadcast_shape
        self.mean = x.mean(reduced, keepdims=True)
        self.variance = ((x - self.mean) ** 2).mean(reduced, keepdims=True)
        self.inverse = 1 / np.sqrt(self.variance + 1e-3)
        self.xhat = (x - self.mean) * self.inverse
        self.scale = np.longdouble(1) if gamma is None else gamma.reshape(broadcast)
        z = self.scale * self.xhat + (0 if beta is None else beta.reshape(broadcast))
        self.z = z if residual is None else z + residual
        self.y = textbook.activated(self.z, activation)

    def flat(self, statistic):
        return statistic.reshape(self.geometry.parameter_shape)

    def gradient(self, dy):
        """dx, dgamma, dbeta, dresidual."""
        reduced = self.geometry.reduced
        dz = dy.astype(np.float64) * textbook.derivative(self.z, self.activation)
        sum_dz, sum_xhat = dz.sum(reduced, keepdims=True), (dz * self.xhat).sum(reduced, keepdims=True)
        count = self.geometry.count
        dx = self.scale * self.inverse * (dz - sum_dz / count - self.xhat * sum_xhat / count)
        return dx, self.flat(sum_xhat), self.flat(sum_dz), dz


@settings(max_examples=300)
@given(problems())
def test_any_memory(problem) -> None:
    """Output, statistics and gradients, in any layout, into any memory."""
    rng = np.random.default_rng(problem["seed"])
    shape, axis, dtype = problem["shape"], problem["axis"], dtype_of(problem["dtype"])
    bound, activation, half = DTYPES[dtype.name], problem["activation"], dtype.itemsize == 2
    mean = min(problem["mean"], 3.0) if half else problem["mean"]
    x, dy, residual = (
        lying(rng.standard_normal(shape) + m, layout, dtype)
        for m, layout in zip((mean, 0, 0), problem["layouts"], strict=False)
    )
    size = Geometry(shape, axis).parameter_shape
    spread = textbook.spread(activation)
    gamma, beta = (rng.uniform(low, 1.5, size) * spread if problem["affine"] else None for low in (0.5, -1.0))
    if dtype.name != "float64" and gamma is not None:
        gamma, beta = gamma.astype("float32"), beta.astype("float32")
    residual = residual if problem["residual"] else None
    expected = Textbook(shape, axis, x, gamma, beta, residual, activation)
    options = {"axis": axis, "epsilon": 1e-3, "activation": problem["activation"]}

    before = x.copy(), None if residual is None else residual.copy()
    out, base = None, None
    if problem["out"] == "other":
        out = lying(np.zeros(shape), problem["layouts"][3], dtype)
        base = out.base
    elif problem["out"] == "overlap":  # x and out share all but a first row
        room = np.zeros((shape[0] + 1, *shape[1:]), dtype)
        room[:-1] = x
        x, out = room[:-1], room[1:]
    elif problem["out"] is not None:
        out = {"x": x, "residual": residual}[problem["out"]]
    around = None if base is None else untouched(base, out)
    y, found = batch_norm(x, gamma, beta, residual=residual, out=out, **options)
    assert y is out or out is None
    assert around is None or np.array_equal(around, untouched(base, out))
    assert y.dtype.name == dtype.name
    np.testing.assert_allclose(y.astype(float), expected.y, rtol=bound, atol=3 * bound)
    x, residual = before
    assert found.count == x.size // max(1, gamma.size if gamma is not None else int(np.prod(size)))
    exact = dtype.name == "float64"
    for got in (found, moments(x, axis=axis)):
        total = got.mean.astype(np.longdouble) + got.mean_low
        np.testing.assert_allclose(total, expected.flat(expected.mean), rtol=0, atol=1e-10 if exact else 3e-7)
        np.testing.assert_allclose(got.variance, expected.flat(expected.variance), rtol=2e-6, atol=2e-6)
    given_mean = found.mean.astype(np.float64) + found.mean_low
    y = normalize(x, given_mean, found.variance, gamma, beta, residual=residual, **options)
    # A mean that is given has been rounded once: to float64, though not to float32.
    rounded = float(2**-53 * np.abs(expected.mean * expected.scale * expected.inverse).max())
    np.testing.assert_allclose(y.astype(float), expected.y, rtol=bound, atol=3 * bound + rounded)

    if textbook.to_a_bend(expected.z, activation).min() < 4 * bound * max(1.0, np.abs(expected.z).max() / 8):
        return  # a sign that rounding decides
    gradients = batch_norm_gradient(dy, x, found, gamma, beta, residual=residual, **options)
    # Of a few values with a variance near epsilon, dx is a difference of numbers up to |dy| / sqrt(epsilon).
    scale = np.abs(expected.inverse).max() * (1 + np.abs(dy.astype(float)).max()) * max(1.0, found.count**0.5 / 8) * spread
    for got, wanted, leaf in zip(gradients, expected.gradient(dy), (x, gamma, beta, residual), strict=True):
        assert (got is None) == (leaf is None)
        if leaf is not None:
            assert got.dtype.name == leaf.dtype.name
            assert got.shape == leaf.shape
            np.testing.assert_allclose(got.astype(float), wanted, rtol=bound, atol=4 * bound * scale)


def untouched(base: np.ndarray, out: np.ndarray) -> np.ndarray:
    """The bytes around an array that lies in a larger one."""
    inside = np.zeros(base.shape, bool)
    start = base.ctypes.data
    offsets = np.add.outer(
        sum(np.ix_(*(np.arange(n) * s for n, s in zip(out.shape, out.strides, strict=True)))).ravel(),
        np.arange(out.itemsize),
    )
    inside[out.ctypes.data - start + offsets.ravel()] = True
    return base[~inside]


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_kernels_serve(dtype: str) -> None:
    assert numpy_cpu.supports(dtype_of(dtype))


def test_the_reference_kernel_can_be_forced() -> None:
    code = "import numpy as np; from evennorm.numpy import cpu; print(cpu.supports(np.dtype('float32')))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "EVENNORM_KERNEL": "reference"},
    )
    assert run.stdout.strip() == "False"


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"residual": True}, {"group": 4}, {"axis": (1, 3)}, {"activation": "leaky_relu"}])
def test_the_reference_gives_the_same(options: dict, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    shape, axis = (8, 6, 5, 3), options.get("axis", 1)
    x, dy, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    size = Geometry(shape, axis).parameter_shape
    gamma, beta = rng.uniform(0.5, 1.5, size), rng.uniform(-1, 1, size)
    options = {
        "axis": axis,
        "activation": options.get("activation", "relu"),
        "residual": residual if "residual" in options else None,
        "virtual_batch_size": options.get("group"),
    }

    def results() -> list[np.ndarray]:
        out = np.empty_like(x)
        y, found = batch_norm(x, gamma, beta, out=out, **options)
        assert y is out
        return [y, *found[1:], *batch_norm_gradient(dy, x, found, gamma, beta, **options)]

    compiled = results()
    monkeypatch.setattr(numpy_cpu, "supports", lambda dtype: False)
    bound = 1e-12 if dtype == "float64" else 1e-5
    for a, b in zip(compiled, results(), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def test_large_results_are_ordinary_arrays() -> None:
    """Those of 4 MB or more come from memory that was used before; they can be written, and outlive everything."""
    x = np.random.default_rng(0).standard_normal((1 << 20, 2), dtype=np.float32)
    y, _ = batch_norm(x)
    kept = y[5:]
    expected = y[5:].copy()
    y += 1
    del y
    batch_norm(-x)
    np.testing.assert_array_equal(kept, expected + 1)
    for order in ("C", "F"):
        assert batch_norm(np.asarray(x, order=order))[0].flags[f"{order}_CONTIGUOUS"]


def test_views_of_one_value() -> None:
    """Strides of 0."""
    rows = np.broadcast_to(np.arange(4, dtype=np.float32), (9, 4))
    y, found = batch_norm(rows, epsilon=1.0)
    np.testing.assert_array_equal(y, np.zeros((9, 4)))
    np.testing.assert_array_equal(found.mean, [0, 1, 2, 3])
    columns = np.broadcast_to(np.array([1.0, 3.0])[:, None], (2, 5))
    np.testing.assert_allclose(batch_norm(columns, epsilon=0.0)[0], np.repeat([[-1.0], [1.0]], 5, 1), atol=1e-15)


def test_fields_of_records() -> None:
    """Unaligned, and strides that are no multiple of an element."""
    records = np.zeros(50, dtype=[("id", "u1"), ("value", "f4"), ("weight", "f8")])
    records["value"], records["weight"] = np.arange(50), np.arange(50) ** 2
    for name in ("value", "weight"):
        x = records[name][:, None]
        wanted = (x - x.mean(dtype=float)) / x.std(dtype=float)
        out = np.zeros(50, records.dtype)
        np.testing.assert_allclose(batch_norm(x, epsilon=0.0)[0], wanted, atol=1e-6)
        batch_norm(x, epsilon=0.0, out=out[name][:, None])
        np.testing.assert_allclose(out[name][:, None], wanted, atol=1e-6)
        assert not out["id"].any()


def test_lists_are_arrays() -> None:
    y, found = batch_norm([[1.0], [3.0]], gamma=[2.0], beta=[1], epsilon=0.0)
    assert y.tolist() == [[-1.0], [3.0]]
    assert normalize([[1.0], [3.0]], [1.0], [4], epsilon=0.0).tolist() == [[0.0], [1.0]]
    assert batch_norm_gradient([[1.0], [1.0]], [[1.0], [3.0]], found, [2.0], epsilon=0.0).x.tolist() == [[0.0], [0.0]]


def test_a_mean_in_float64_is_used_as_exactly_as_it_is_given() -> None:
    """float32 has nothing between 100000 and 100000.0078."""
    x = (np.random.default_rng(1).standard_normal((100, 2)) + 1e5).astype(np.float32)
    mean, variance = np.array([100000.003, 99999.998]), np.array([1.0, 2.0])
    y = normalize(x, mean, variance, epsilon=0.0)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, (x.astype(float) - mean) / np.sqrt(variance), atol=1e-6)


@pytest.mark.parametrize("axis", [-1, 0])
def test_out_may_be_a_memmap(axis: int, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    read = np.load(tmp_path / "x.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, read.shape)
    y, _ = batch_norm(read, axis=axis, out=out)
    assert y is out
    out.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), batch_norm(x, axis=axis)[0])


def test_parameters_that_lie_where_y_is_written() -> None:
    """A program that keeps everything in one array."""
    rng = np.random.default_rng(6)
    room = rng.uniform(0.5, 1.5, (50, 4))
    gamma, beta, mean, variance = room[:4].copy()
    x = rng.standard_normal((50, 4))
    batch_norm(x, room[0], room[1], out=room)
    np.testing.assert_array_equal(room, batch_norm(x, gamma, beta)[0])
    room[:4] = gamma, beta, mean, variance
    normalize(x, room[2], room[3], room[0], room[1], out=room)
    np.testing.assert_array_equal(room, normalize(x, mean, variance, gamma, beta))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (2, 0, 3), (0, 0)])
@pytest.mark.parametrize("axis", [-1, 0])
def test_nothing_at_all(shape: tuple[int, ...], axis: int) -> None:
    x, size = np.empty(shape, np.float32), (shape[axis],)
    y, found = batch_norm(x, axis=axis, out=x)
    assert y is x
    assert found.mean.tolist() == found.variance.tolist() == [0.0] * size[0]
    assert moments(x, axis=axis).count == found.count == np.prod(shape[1:] if axis == 0 else shape[:-1])
    assert normalize(x, np.zeros(size), np.ones(size), axis=axis).shape == shape
    g = batch_norm_gradient(x, x, found, np.ones(size), axis=axis)
    assert (g.x.shape, g.gamma.tolist()) == (shape, [0.0] * size[0])


X = np.zeros((4, 5, 3), np.float32)


@pytest.mark.parametrize(
    ("out", "error", "text"),
    [
        (X[:2].copy(), ShapeError, "writable array of x's shape and dtype, (4, 5, 3); received shape (2, 5, 3)"),
        (X.astype(float), ArgumentError, "writable array of x's shape and dtype, float32; received dtype float64"),
        (np.broadcast_to(X[:1], X.shape), ArgumentError, "received one that is read-only"),
        (X.tolist(), ArgumentError, "received a list; leave it out to have y in new memory"),
        (np.ma.array(X), ArgumentError, "received a MaskedArray"),
    ],
)
@pytest.mark.parametrize("kernel", ["compiled", "reference"])
def test_where_y_cannot_be_written(out, error: type, text: str, kernel: str) -> None:
    mask = np.ones((4, 5), bool) if kernel == "reference" else None
    with pytest.raises(error, match=re.escape(text)):
        batch_norm(X, mask=mask, out=out)
    with pytest.raises(error, match=re.escape(text)):
        normalize(X, np.zeros(3), np.ones(3), out=out)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "longdouble", "object"])
def test_dtypes_that_are_not_served(dtype: str) -> None:
    x = np.ones((4, 3), dtype)
    text = f"x is an array of float32, float64, bfloat16, float16; received dtype {x.dtype}; convert it"
    for call in (lambda: batch_norm(x), lambda: normalize(x, [0.0] * 3, [1.0] * 3), lambda: moments(x)):
        with pytest.raises(ArgumentError, match=re.escape(text)):
            call()
    with pytest.raises(ArgumentError, match="residual is an array of float32"):
        batch_norm(np.ones((4, 3)), residual=x)


def test_complex_arrays_are_not_served() -> None:
    x = np.ones((4, 3), "complex64")
    for call in (lambda: batch_norm(x), lambda: normalize(x, [0.0] * 3, [1.0] * 3), lambda: moments(x)):
        with pytest.raises(ArgumentError, match=r"of real numbers.*; x is of dtype complex64; pass real"):
            call()
    with pytest.raises(ArgumentError, match="residual is of dtype complex64"):
        batch_norm(np.ones((4, 3)), residual=x)


def test_masked_arrays_are_not_read_without_their_mask() -> None:
    x = np.ma.masked_invalid([[1.0], [np.nan], [3.0]])
    with pytest.raises(
        ArgumentError, match=re.escape("received a masked one; pass x.data, and to hide values mask=~x.mask")
    ):
        batch_norm(x)
    y, found = batch_norm(x.data, mask=~x.mask[:, 0], epsilon=0.0)
    assert found.count.tolist() == [2]
    np.testing.assert_array_equal(y, [[-1.0], [np.nan], [1.0]])


def test_ghost_batches_of_channels_that_lie_apart() -> None:
    x = np.random.default_rng(0).standard_normal((6, 5, 4, 3))
    y, found = batch_norm(x, axis=(1, 3), virtual_batch_size=2)
    parts = [batch_norm(part, axis=(1, 3)) for part in np.split(x, 3)]
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), atol=1e-13)
    assert found.mean.shape == (3, 5, 3)
    with pytest.raises(ShapeError, match="ghost batches divide the first axis"):
        batch_norm(x, axis=(0, 2), virtual_batch_size=2)


def test_the_engine_of_keras_takes_layers_arrays() -> None:
    """`train` and `infer`, with moments of (groups, channel)."""
    x = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    geometry = Geometry((None, 4, 3), (1, 2))
    y, found = engine.train(engine.make_call(geometry, x.dtype.name, 1e-3), x, None, None)
    assert found.mean.shape == (1, 12)
    call = engine.make_call(geometry, x.dtype.name, 1e-3, fixed_stats=True)
    inferred = engine.infer(call, x, found.mean.reshape(4, 3), found.variance.reshape(4, 3), None, None)
    np.testing.assert_allclose(inferred, y, atol=2e-6)
