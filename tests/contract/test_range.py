"""Values far from 1: right as long as float32 holds the variance, and a word where it does not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from evennorm.numpy import batch_norm, batch_norm_gradient
from tests.cases import Case
from tests.contract import textbook
from tests.contract.engines import ENGINES

DIFFERENTIABLE = ("jax", "jax jit", "torch", "tensorflow", "tensorflow function, unknown sizes", "tensorflow xla")
RANGE = (1e-13, 1e13, 1e16, 1e18)


def scaled(scale: float, mask: bool) -> Case:
    return Case("far", (16, 9, 4), std=scale, epsilon=0.0 if scale < 1 else 1e-3, mask="positions" if mask else None)


def relative(name: str, got: np.ndarray, expected: np.ndarray, bound: float) -> None:
    error = np.abs(np.asarray(got, np.float64).reshape(expected.shape) - expected).max() / np.abs(expected).max()
    assert error < bound, f"derivative by {name} off by {error:.1e} of its size"


@pytest.mark.parametrize("mask", [False, True], ids=["all count", "masked"])
@pytest.mark.parametrize("scale", RANGE)
@pytest.mark.parametrize("engine", DIFFERENTIABLE)
def test_gradients(engine: str, scale: float, mask: bool) -> None:
    case = scaled(scale, mask)
    arrays = {**case.make(), "residual": None}
    arrays["x"] = np.nan_to_num(arrays["x"])
    expected = textbook.backward(case, **arrays)
    got = ENGINES[engine].backward(case, arrays, "float32")
    for name, a, b in zip(("x", "gamma", "beta"), got, expected, strict=False):
        relative(name, a, b, 1e-3 if scale == 1e18 else 1e-5)  # the compiled kernels keep 1 / variance as a float32


@pytest.mark.parametrize("scale", [1e13, 1e-13])
def test_tangents_on_jax(scale: float) -> None:
    import jax
    import jax.numpy as jnp

    from evennorm.jax import batch_norm as on_jax

    rng = np.random.default_rng(0)
    x, tx = (rng.normal(0, scale, (32, 3)).astype("float32") for _ in range(2))
    _, moved = jax.jvp(lambda x: on_jax(x, epsilon=0.0)[0], (x,), (tx,))
    wide, t = x.astype(np.float64), tx.astype(np.float64)
    centred, deviation = wide - wide.mean(0), wide.std(0)
    t_deviation = (t * centred).mean(0) / deviation
    expected = (t - t.mean(0)) / deviation - centred * t_deviation / deviation**2
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-5)
    assert jnp.isfinite(moved).all()


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_a_variance_of_1e_40(engine: str) -> None:
    """Below the smallest normal float32; JAX and TensorFlow take it for 0 (docs/numpy.md)."""
    case = Case("tiny", (64, 4), std=1e-20, epsilon=0.0)
    arrays = {**case.make(), "residual": None}
    expected = textbook.backward(case, **arrays)
    if engine == "torch":
        got = ENGINES["torch"].backward(case, arrays, "float32")
    else:
        x, gamma, beta, dy = (arrays[name].astype("float32") for name in ("x", "gamma", "beta", "dy"))
        y, moments = batch_norm(x, gamma, beta, epsilon=0.0)
        relative("nothing", y, textbook.forward(case, arrays["x"], arrays["gamma"], arrays["beta"]), 1e-4)
        got = list(batch_norm_gradient(dy, x, moments, gamma, beta, epsilon=0.0))[:3]
    for name, a, b in zip(("x", "gamma", "beta"), got, expected, strict=False):
        relative(name, a, b, 1e-4)


@pytest.mark.parametrize(
    ("engine", "axis"),
    [(engine, axis) for engine in (*DIFFERENTIABLE, "numpy") for axis in (-1, 1) if "unknown" not in engine or axis == -1],
)
def test_a_value_alone_in_its_channel_has_no_gradient(engine: str, axis: int) -> None:
    case = Case("alone", (1, 5) if axis == -1 else (1, 5, 1), axis, mean=1e4, std=3.0)
    arrays = {**case.make(), "residual": None}
    if engine == "numpy":
        x, gamma, dy = (arrays[name].astype("float32") for name in ("x", "gamma", "dy"))
        got = batch_norm_gradient(dy, x, batch_norm(x, gamma, axis=axis)[1], gamma, axis=axis).x
    else:
        got = ENGINES[engine].backward(case, arrays, "float32")[0]
    np.testing.assert_array_equal(got, 0.0)


def test_a_value_alone_behind_a_mask_has_none_either() -> None:
    case = Case("alone", (5, 3), mask="one left")
    arrays = {**case.make(), "residual": None}
    arrays["dy"] = np.where(case.full_mask(arrays["mask"]), arrays["dy"], 0.0)
    for engine in ("jax jit", "torch", "tensorflow"):
        np.testing.assert_array_equal(ENGINES[engine].backward(case, arrays, "float32")[0], 0.0)


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("engine", ["numpy", "jax", "torch", "tensorflow"])
def test_a_variance_out_of_range_is_told_of(engine: str, outlier: bool) -> None:
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    if outlier:
        x[3, 1] = 1e20
    else:
        x *= 2e19
    under_test = ENGINES[engine]
    with pytest.warns(RuntimeWarning, match="variance of a channel is beyond the range of float32"):
        _, moments = under_test.module.batch_norm(under_test._tensor(x, "float32"))
    assert np.isinf(under_test._numpy(moments.variance)[1])
    scaled_down, _ = batch_norm(x * np.float32(2.0**-70), epsilon=0.0)
    expected = (x - x.mean(0, dtype=np.float64)) / x.std(0, dtype=np.float64)
    np.testing.assert_allclose(scaled_down[:, 1], expected[:, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["numpy", "jax", "torch", "tensorflow"])
def test_infinities_in_the_data_are_told_of_by_what_comes_out(engine: str) -> None:
    under_test = ENGINES[engine]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, _ = under_test.module.batch_norm(under_test._tensor(np.array([[np.inf, 1.0], [0.0, 2.0]]), "float32"))
    assert np.isnan(under_test._numpy(y)[:, 0]).any()
