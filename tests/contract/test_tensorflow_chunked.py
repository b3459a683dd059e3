"""Training on TensorFlow in pieces and in one: exact at any mean, in any layout, whatever a graph knows of sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from evennorm.core.geometry import Geometry
from evennorm.kernels import choose
from evennorm.tensorflow import batch_norm, chunks
from tests.cases import Case
from tests.contract import textbook

pytestmark = pytest.mark.skipif(choose("tensorflow", "float32") != "chunked", reason="the kernel is not wanted")

EPSILON = 1e-3
CASES = [
    Case("images, channels last", (9, 13, 7, 6)),
    Case("images, channels first", (67, 4, 5, 7), 1),
    Case("mean 1e4", (16, 20, 9, 4), mean=1e4),
    Case("mean 1e5", (700, 8), mean=1e5),
    Case("mean 1e5, channels first", (64, 4, 9, 9), 1, mean=1e5),
    Case("two axes apart", (6, 50, 4, 3), (0, 2), mean=10.0),
    Case("fewer rows than pieces", (40, 30)),
]


@pytest.fixture(params=["one piece", "pieces"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Arrays of a test are small: pieces of 200 elements make some of them."""
    if request.param == "pieces":
        monkeypatch.setattr(chunks, "LEAST", 1)
        monkeypatch.setattr(chunks, "ELEMENTS", 200)
    return request.param == "pieces"


def run(case: Case, arrays: dict[str, Any], mode: str, activation: str | None, dtype: str = "float32") -> list[np.ndarray]:
    """y, the moments without their count, and the derivatives of sum(y * dy) by x, gamma, beta and residual."""
    names = [name for name in ("x", "gamma", "beta", "residual", "dy") if arrays.get(name) is not None]
    whole = {name for name in names if name not in ("gamma", "beta")}
    tensors = [tf.constant(arrays[name], dtype if name in whole else "float32") for name in names]

    def compute(*values: tf.Tensor) -> Any:
        given = dict(zip(names, values, strict=True))
        dy = given.pop("dy")
        with tf.GradientTape() as tape:
            tape.watch(list(given.values()))
            y, moments = batch_norm(**given, axis=case.axis, epsilon=EPSILON, activation=activation)
        return (y, *moments[1:], *tape.gradient(y, list(given.values()), output_gradients=dy))

    results = compiled(compute, mode, case.axes, tensors)(*tensors)
    return [tf.cast(result, tf.float64).numpy() for result in results]


def compiled(compute: Callable[..., Any], mode: str, axes: tuple[int, ...], tensors: list[tf.Tensor]) -> Callable[..., Any]:
    if mode == "eager":
        return compute
    if mode != "unknown sizes":
        return tf.function(compute, jit_compile=mode == "xla", autograph=False)
    rank = tensors[0].shape.rank
    specs = [
        tf.TensorSpec([n if a in axes or t.shape.rank < rank else None for a, n in enumerate(t.shape)], t.dtype)
        for t in tensors
    ]
    return tf.function(compute, input_signature=specs, autograph=False)


def hold_to_float64(case: Case, arrays: dict[str, Any], got: list[np.ndarray], activation: str | None) -> None:
    y, mean, mean_low, variance, *gradients = got
    names = [name for name in ("x", "gamma", "beta", "residual") if arrays[name] is not None]
    given = {name: arrays[name] for name in names}
    expected = textbook.forward(case, **given, activation=activation)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * max(1.0, np.abs(expected).max() / 2))
    _, true_mean, true_variance = textbook.statistics(case, arrays["x"], None)
    deviation = np.sqrt(true_variance).reshape(mean.shape)
    assert (np.abs(mean + mean_low - true_mean.reshape(mean.shape)) <= 5e-7 * deviation + 1e-30).all()
    np.testing.assert_allclose(variance, true_variance.reshape(variance.shape), rtol=5e-6)
    derivatives = textbook.backward(case, arrays["dy"], **given, activation=activation)
    for name, a, b in zip(names, gradients, derivatives, strict=False):
        largest = max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b.reshape(a.shape), rtol=0, atol=1e-5 * largest, err_msg=f"derivative by {name}")


def made(case: Case, activation: str | None, residual: bool) -> dict[str, Any]:
    arrays = case.make()
    arrays = {name: None if a is None else a.astype(np.float32).astype(np.float64) for name, a in arrays.items()}
    arrays["residual"] = arrays["residual"] if residual else None
    z = textbook.forward(case, arrays["x"], arrays["gamma"], arrays["beta"], arrays["residual"])
    if activation:
        arrays["dy"] = np.where(np.abs(z) > 1e-4, arrays["dy"], 0.0)  # at the kink the side is a matter of rounding
    return arrays


@pytest.mark.parametrize("mode", ["eager", "function", "unknown sizes", "xla"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, mode: str, cut: bool) -> None:
    arrays = made(case, "relu", residual=False)
    hold_to_float64(case, arrays, run(case, arrays, mode, "relu"), "relu")


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("mode", ["function", "unknown sizes"])
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_residual(case: Case, mode: str, activation: str | None, cut: bool) -> None:
    arrays = made(case, activation, residual=True)
    hold_to_float64(case, arrays, run(case, arrays, mode, activation), activation)


def sorted_rows(x: np.ndarray) -> np.ndarray:
    return np.sort(x, axis=0)


def constant_at_first(x: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(x))[:, None] < 300, 5.0, x)


def outlier(x: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(x))[:, None] == 0, 3e6, x)


@pytest.mark.parametrize("mode", ["function", "xla"])
@pytest.mark.parametrize("arranged", [sorted_rows, constant_at_first, outlier])
def test_values_whose_first_rows_tell_nothing_of_the_rest(arranged: Callable[..., Any], mode: str, cut: bool) -> None:
    case = Case("rows", (4096, 3), mean=1e4)
    arrays = made(case, None, residual=False)
    arrays["x"] = arranged(arrays["x"]).astype(np.float32).astype(np.float64)
    hold_to_float64(case, arrays, run(case, arrays, mode, None), None)


@pytest.mark.parametrize("mode", ["function", "xla"])
def test_derivatives_of_one_sign(mode: str, cut: bool) -> None:
    """Sums of many equal terms, one by one in float32, would be off by 1e-5 and more."""
    case = Case("many rows", (200_000, 2), mean=100.0)
    arrays = made(case, None, residual=False)
    arrays["dy"] = (1 + 0.01 * arrays["dy"]).astype(np.float32).astype(np.float64)
    *_, dx, dgamma, dbeta = run(case, arrays, mode, None)
    expected = textbook.backward(case, arrays["dy"], arrays["x"], arrays["gamma"], arrays["beta"])
    np.testing.assert_allclose(dx, expected[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(dbeta, expected[2], rtol=2e-7)
    np.testing.assert_allclose(dgamma, expected[1], rtol=0, atol=1e-9 * len(dx))  # 200,000 terms, which cancel


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str, cut: bool) -> None:
    case = Case("images", (9, 13, 7, 6), mean=30.0, std=4.0)
    arrays = made(case, None, residual=True)
    for name in ("x", "dy", "residual"):
        arrays[name] = tf.cast(tf.constant(arrays[name], dtype), tf.float64).numpy()
    y, *_, dx, dgamma, dbeta, dr = run(case, arrays, "function", None, dtype)
    rounding = 2e-3 if dtype == "float16" else 1.6e-2
    expected = textbook.forward(case, arrays["x"], arrays["gamma"], arrays["beta"], arrays["residual"])
    np.testing.assert_allclose(y, expected, rtol=rounding, atol=rounding)
    derivatives = textbook.backward(case, arrays["dy"], arrays["x"], arrays["gamma"], arrays["beta"], arrays["residual"])
    np.testing.assert_allclose(dx, derivatives[0], rtol=rounding, atol=rounding)
    np.testing.assert_allclose(dgamma, derivatives[1], rtol=1e-5, atol=1e-5 * np.abs(derivatives[1]).max())
    np.testing.assert_allclose(dbeta, derivatives[2], rtol=1e-5, atol=1e-5 * np.abs(derivatives[2]).max())
    np.testing.assert_allclose(dr, derivatives[3], rtol=rounding)


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_second_derivatives(activation: str | None, compile_it: bool, cut: bool) -> None:
    """Those of the kernel are those of the formulas, moments included, taken in float64."""
    case = Case("images", (9, 7, 5, 4), mean=3.0)
    arrays = made(case, activation, residual=False)
    w = np.random.default_rng(7).standard_normal(case.shape)

    def second(dtype: str) -> list[np.ndarray]:
        x, gamma, beta, dy, weight = (tf.constant(a, dtype) for a in (*(arrays[n] for n in ("x", "gamma", "beta", "dy")), w))

        def compute() -> Any:
            with tf.GradientTape() as outer:
                outer.watch([x, gamma, beta])
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y, m = batch_norm(x, gamma, beta, epsilon=EPSILON, activation=activation)
                    loss = tf.reduce_sum(y * dy) + tf.reduce_sum(tf.sin(m.variance))
                    loss += tf.reduce_sum(tf.sin(3 * (m.mean + m.mean_low)))
                weighted = tf.reduce_sum(inner.gradient(loss, x) * weight)
            return outer.gradient(weighted, [x, gamma, beta], unconnected_gradients="zero")

        return [g.numpy() for g in (tf.function(compute, autograph=False) if compile_it else compute)()]

    assert choose("tensorflow", "float64") == "reference"
    for a, b in zip(second("float32"), second("float64"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, np.abs(b).max()))


def test_number_of_pieces_is_a_matter_of_sizes() -> None:
    assert chunks.number(Geometry((256, 1024))) == 1
    assert chunks.number(Geometry((32, 14, 14, 256))) == 1
    assert chunks.number(Geometry((25, 56, 56, 64))) == 8
    assert chunks.number(Geometry((16, 112, 112, 64))) == 8
    assert chunks.number(Geometry((None, 56, 56, 64))) == 4
    assert chunks.number(Geometry((None, 1024))) == 1
    assert chunks.number(Geometry((4, 64, 1000, 1000), 1)) == 4
    assert chunks.number(Geometry((None, 64, None, None), 1)) == 4
    assert chunks.number(Geometry((20, 1 << 20))) == 1  # fewer rows than a block


def test_the_callers_program_may_be_compiled_around_a_graph_that_was_traced_before() -> None:
    """Whether XLA will compile is not always told to the trace; values do not depend on it."""
    case = Case("rows", (4096, 3), mean=1e5)
    x = tf.constant(case.make()["x"], tf.float32)
    inside = tf.function(lambda x: batch_norm(x, epsilon=EPSILON)[0], autograph=False)
    first = inside(x)
    around = tf.function(lambda x: inside(x), jit_compile=True, autograph=False)(x)
    np.testing.assert_allclose(around, first, rtol=0, atol=2e-6)
