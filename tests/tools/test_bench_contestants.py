"""Everyone that `evennorm bench` measures computes the same values, those of float64, in the passes that are timed."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import EPSILON, KERAS, LIMIT, OUR_LAYER, Data, NotServed, draw, module_of
from tests.grids import mostly

ENGINES = ("numpy", "torch", "jax", "tensorflow")
KERAS_NAMES = (KERAS, OUR_LAYER)
"""Which need Keras's backend to be the engine: tests/keras/test_bench_layers.py."""

CASES = (
    Case((6, 5, 4, 8)),
    Case((6, 8, 5, 4), "first", residual=True),
    Case((6, 8, 5, 4), "first", activation="none"),
    Case((12, 8), activation="none", residual=True),
    Case((6, 8, 9), "first"),
    Case((6, 5, 4, 8), dtype="float64", residual=True),
    Case((6, 8, 5, 4), "first", dtype="bfloat16"),
    Case((6, 5, 4, 8), dtype="float16", residual=True),
)
ACCURACY = {"float32": 2e-6, "float64": 1e-14, "bfloat16": 2**-7, "float16": 2**-10}
"""Of the largest value."""


def drawn(case: Case) -> tuple[Data, list[np.ndarray]]:
    """Values that the dtype has, and y and the gradients in float64. Where z is 0 within rounding, no gradient comes in."""
    data = draw(case)
    x, residual = (None if a is None else stored(a, case.dtype) for a in (data.x, data.residual))
    axes = tuple(a for a in range(len(case.shape)) if a != case.axis % len(case.shape))
    row = tuple(1 if a in axes else case.channels for a in range(len(case.shape)))
    gamma, beta = (a.astype(np.float64).reshape(row) for a in (data.gamma, data.beta))
    inverse = 1 / np.sqrt(x.var(axes, keepdims=True) + EPSILON)
    xhat = (x - x.mean(axes, keepdims=True)) * inverse
    z = gamma * xhat + beta + (0 if residual is None else residual)
    dy = stored(np.where(np.abs(z) < 100 * ACCURACY[case.dtype], 0, data.dy), case.dtype)
    dz = np.where(z > 0, dy, 0) if case.relu else dy
    d_beta, d_gamma = dz.sum(axes), (dz * xhat).sum(axes)
    count = x.size // case.channels
    dx = gamma * inverse * (dz - d_beta.reshape(row) / count - xhat * d_gamma.reshape(row) / count)
    expected = [np.maximum(z, 0) if case.relu else z, dx, d_gamma, d_beta] + [dz] * (residual is not None)
    return data._replace(dy=dy.astype(np.float32)), expected


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """As float64, after rounding to the dtype."""
    if dtype == "bfloat16":
        import ml_dtypes

        return values.astype(ml_dtypes.bfloat16).astype(np.float64)
    return values.astype(dtype).astype(np.float64)


def check(engine: str, name: str, case: Case) -> None:
    module = module_of(engine)
    [one] = [one for one in module.contestants() if one.name == name]
    data, expected = drawn(case)
    try:
        calls = one.prepare(case, module.place(case, data))
    except NotServed as reason:
        pytest.skip(str(reason))
    if one.family == LIMIT:
        [copied] = calls.values(calls.forward())
        np.testing.assert_array_equal(copied, stored(data.x, case.dtype))
        return
    close(calls.values(calls.forward()), expected[:1], case.dtype)
    if calls.both is not None:
        close(calls.values(calls.both()), expected, case.dtype)


def close(found: list[np.ndarray], expected: list[np.ndarray], dtype: str) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=ACCURACY[dtype] * max(1, np.abs(b).max()))


def everyone(engine: str) -> list[tuple[str, str, Case]]:
    """With every case, but for what takes seconds to compile."""
    names = [one.name for one in module_of(engine).contestants()] if find_spec(engine) else []
    return [
        (engine, name, case)
        for name in names
        if name not in KERAS_NAMES
        for case in (CASES[1:2] if name == "torch.compile" else CASES)
    ]


def crossed(engine: str, name: str, case: Case) -> bool:
    """Ours with every case, the others with every other one."""
    return "evennorm" in name or "compile" in name or (CASES.index(case) + len(name)) % 2 == 0


@pytest.mark.parametrize(*mostly(crossed, "engine, name, case", [one for engine in ENGINES for one in everyone(engine)]))
def test_the_values(engine: str, name: str, case: Case) -> None:
    if engine == "jax" and case.dtype == "float64":
        import jax

        with jax.enable_x64(True):
            check(engine, name, case)
    else:
        check(engine, name, case)


def test_draws_are_the_same_every_time() -> None:
    first, second = draw(CASES[1]), draw(CASES[1])
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert first.x.dtype == np.float32
    assert abs(first.x.mean() - 1) < 0.2


@pytest.mark.parametrize(("relu", "residual", "sizes"), [(True, False, 2), (False, False, 1), (True, True, 2)])
def test_what_eager_torch_keeps_for_backward(relu: bool, residual: bool, sizes: int) -> None:
    """x, and the output of the activation: its own storage, or that which it was written over."""
    case = Case((64, 8, 10, 10), "first", activation="relu" if relu else "none", residual=residual)
    assert saved("torch", "F.batch_norm, relu", case) == pytest.approx(sizes, abs=0.01)


@pytest.mark.parametrize("engine", ["torch", "jax"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize(("residual", "sizes"), [(False, 1), (True, 1 + 1 / 32)])
def test_what_ours_keeps_for_backward(engine: str, layout: str, residual: bool, sizes: float) -> None:
    """One tensor of the input's size; with a residual one bit per element more."""
    from evennorm.kernels import choose

    if choose(engine, "float32") != "cpu":
        pytest.skip("of the compiled kernels")
    case = Case((64, 8, 16, 16) if layout == "first" else (64, 16, 16, 8), layout, residual=residual)
    assert saved(engine, "evennorm", case) == pytest.approx(sizes, abs=0.005)


def saved(engine: str, name: str, case: Case) -> float:
    """In sizes of x."""
    module = module_of(engine)
    [one] = [one for one in module.contestants() if one.name == name]
    calls = one.prepare(case, module.place(case, draw(case)))
    assert calls.saved is not None
    return calls.saved() / case.bytes
