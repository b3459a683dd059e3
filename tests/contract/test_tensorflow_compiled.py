"""Training on TensorFlow by the compiled kernels: exact at any mean, whatever a graph knows of sizes, and XLA."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import evennorm
from evennorm.core.engine import Engine
from evennorm.core.moments import moments as core_moments
from evennorm.kernels import choose, reference
from evennorm.tensorflow import batch_norm, compiled, engine, xp
from tests.cases import Case
from tests.contract import textbook
from tests.grids import mostly, pairwise

serves = compiled.AVAILABLE and choose("tensorflow", "float32") == "cpu"
pytestmark = pytest.mark.skipif(not serves, reason="the kernel is not there, or not wanted")

EPSILON = 1e-3
MODES = ["eager", "function", "unknown sizes", "xla", "xla around a graph"]
CASES = [
    Case("images, channels last", (9, 13, 7, 6)),
    Case("images, channels first", (67, 4, 5, 7), 1),
    Case("mean 1e4", (16, 20, 9, 4), mean=1e4),
    Case("mean 1e5", (700, 8), mean=1e5),
    Case("mean 1e5, channels first", (64, 4, 9, 9), 1, mean=1e5),
    Case("two axes apart", (6, 50, 4, 3), (0, 2), mean=10.0),
    Case("one channel", (40, 30, 1)),
    Case("ghost batches", (12, 7, 5), mean=1e3, group=4),
]
CROSSED = ("images, channels last", "mean 1e5, channels first", "two axes apart", "ghost batches")
"""Cases that every mode runs; eager mode and functions run all."""


def differentiated(call: Any, x: tf.Tensor, gamma: Any, beta: Any, residual: Any, mask: Any) -> Any:
    statistics = core_moments(xp, reference.wide(xp, x), mask)
    return reference.infer(xp, call, x, statistics, gamma, beta, residual), statistics


FORMULAS = Engine("tensorflow", xp, differentiated)
"""Those of core, differentiated by TensorFlow itself: what the kernels and their derivatives are compared with."""


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
            y, moments = batch_norm(
                **given, axis=case.axis, epsilon=EPSILON, activation=activation, virtual_batch_size=case.group
            )
        return (y, *moments[1:], *tape.gradient(y, list(given.values()), output_gradients=dy))

    results = as_run(compute, mode, case.axes, tensors)(*tensors)
    return [tf.cast(result, tf.float64).numpy() for result in results]


def as_run(compute: Callable[..., Any], mode: str, axes: tuple[int, ...], tensors: list[tf.Tensor]) -> Callable[..., Any]:
    if mode == "eager":
        return compute
    if mode == "xla around a graph":  # traced before, by who knew nothing of XLA
        inside = tf.function(compute, autograph=False)
        inside(*tensors)
        return tf.function(lambda *values: inside(*values), jit_compile=True, autograph=False)
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
    groups = arrays["x"].reshape((-1, case.group or len(arrays["x"]), *case.shape[1:]))
    parts = [textbook.statistics(Case(case.name, x.shape, case.axis), x, None) for x in groups]
    true_mean, true_variance = (np.stack([part[i] for part in parts]) for i in (1, 2))
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
    arrays["gamma"] *= textbook.spread(activation)
    arrays["residual"] = arrays["residual"] if residual else None
    z = textbook.forward(case, arrays["x"], arrays["gamma"], arrays["beta"], arrays["residual"])
    arrays["dy"] = np.where(textbook.to_a_bend(z, activation) > 1e-4, arrays["dy"], 0.0)
    return arrays


@pytest.mark.parametrize(
    *mostly(
        lambda case, mode: mode in ("eager", "function") or case.name in CROSSED,
        "case, mode",
        [(case, mode) for case in CASES for mode in MODES],
    )
)
def test_values_and_gradients(case: Case, mode: str) -> None:
    arrays = made(case, "relu", residual=False)
    hold_to_float64(case, arrays, run(case, arrays, mode, "relu"), "relu")


@pytest.mark.parametrize(*pairwise(case=[CASES[0], CASES[1], CASES[-1]], mode=MODES, activation=list(textbook.BENDS)))
def test_residual(case: Case, mode: str, activation: str | None) -> None:
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
def test_values_whose_first_rows_tell_nothing_of_the_rest(arranged: Callable[..., Any], mode: str) -> None:
    case = Case("rows", (4096, 3), mean=1e4)
    arrays = made(case, None, residual=False)
    arrays["x"] = arranged(arrays["x"]).astype(np.float32).astype(np.float64)
    hold_to_float64(case, arrays, run(case, arrays, mode, None), None)


@pytest.mark.parametrize("mode", ["function", "xla"])
def test_derivatives_of_one_sign(mode: str) -> None:
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
def test_half_precision(dtype: str) -> None:
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


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("mode", ["eager", "unknown sizes"])
def test_double_precision(mode: str, activation: str | None) -> None:
    case = Case("images", (9, 13, 7, 6), mean=1e5)
    arrays = made(case, activation, residual=True)
    names = ["x", "gamma", "beta", "residual", "dy"]
    got = run(case, arrays, mode, activation, "float64")
    given = [arrays[name] for name in names[:4]]
    np.testing.assert_allclose(got[0], textbook.forward(case, *given, activation=activation), rtol=0, atol=1e-10)
    derivatives = textbook.backward(case, arrays["dy"], *given, activation=activation)
    for name, a, b in zip(names, got[4:], derivatives, strict=False):
        rounding = 1e-6 if name in ("gamma", "beta") else 1e-10  # parameters are float32 here
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding * max(1.0, np.abs(b).max()), err_msg=name)


@pytest.mark.parametrize(
    *pairwise(group=[None, 3], activation=list(textbook.BENDS), residual=[False, True], compile_it=[False, True])
)
def test_second_derivatives(group: int | None, activation: str | None, residual: bool, compile_it: bool) -> None:
    """Those of the kernel are those of the formulas, moments included, as TensorFlow differentiates them in float64."""
    case = Case("images", (9, 7, 5, 4), mean=3.0, group=group)
    arrays = made(case, activation, residual)
    w = np.random.default_rng(7).standard_normal(case.shape)
    names = [name for name in ("x", "gamma", "beta", "residual") if arrays[name] is not None]

    def second(engine: Any, dtype: str) -> list[np.ndarray]:
        given = {name: tf.constant(arrays[name], dtype) for name in names}
        dy, weight = tf.constant(arrays["dy"], dtype), tf.constant(w, dtype)

        def compute() -> Any:
            with tf.GradientTape() as outer:
                outer.watch(list(given.values()))
                with tf.GradientTape() as inner:
                    inner.watch(given["x"])
                    y, m = engine.batch_norm(**given, epsilon=EPSILON, activation=activation, virtual_batch_size=group)
                    loss = tf.reduce_sum(y * dy) + tf.reduce_sum(tf.sin(m.variance))
                    loss += tf.reduce_sum(tf.sin(3 * (m.mean + m.mean_low)))
                weighted = tf.reduce_sum(inner.gradient(loss, given["x"]) * weight)
            return outer.gradient(weighted, list(given.values()), unconnected_gradients="zero")

        return [g.numpy() for g in (tf.function(compute, autograph=False) if compile_it else compute)()]

    for a, b in zip(second(engine, "float32"), second(FORMULAS, "float64"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_the_number_of_threads_does_not_change_a_bit(axis: int, mode: str) -> None:
    case = Case("images", (17, 24, 23, 26), axis, mean=3.0)
    arrays = made(case, "relu", residual=True)
    try:
        results = []
        for threads in (1, 2, 5):
            evennorm.set_num_threads(threads)
            results.append(run(case, arrays, mode, "relu"))
    finally:
        evennorm.set_num_threads(0)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def nodes(function: Any) -> set[str]:
    """The operations of a graph and of the functions that it calls."""
    graph = function.graph.as_graph_def()
    return {node.op for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes}


def test_a_graph_for_xla_holds_nothing_that_xla_does_not_know() -> None:
    def compute(x: tf.Tensor) -> Any:
        return batch_norm(x)[0]

    spec = tf.TensorSpec((None, 3), tf.float32)
    assert "EvennormForward" in nodes(tf.function(compute, autograph=False).get_concrete_function(spec))
    around = tf.function(tf.function(compute, autograph=False), jit_compile=True, autograph=False)
    around(tf.zeros((4, 3)))
    traced = tf.function(compute, jit_compile=True, autograph=False)
    traced(tf.zeros((4, 3)))
    assert "EvennormForward" not in nodes(traced.get_concrete_function(tf.zeros((4, 3))))


def test_masks_and_falling_slopes_take_the_composed_form() -> None:
    def compute(x: tf.Tensor) -> Any:
        y, _ = batch_norm(x, mask=tf.ones(tf.shape(x)[:1], tf.bool))
        return y + batch_norm(x, activation="leaky_relu", negative_slope=-0.5)[0]

    graph = tf.function(compute, autograph=False).get_concrete_function(tf.TensorSpec((None, 3), tf.float32))
    assert "EvennormForward" not in nodes(graph)


def test_loops_branches_and_replicas() -> None:
    """Graphs inside of graphs, and threads of TensorFlow that call at the same time."""
    x = tf.constant(np.random.default_rng(0).standard_normal((50, 3)) + 1e4, tf.float32)
    once = batch_norm(x)[0]

    @tf.function(autograph=False)
    def repeated(x: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor, y: tf.Tensor) -> Any:
            return i + 1, tf.cond(i >= 0, lambda: batch_norm(x)[0] + 0 * y, lambda: y)

        return tf.while_loop(lambda i, _: i < 3, body, (0, x))[1]

    np.testing.assert_array_equal(repeated(x), once)
    many = tf.map_fn(lambda one: batch_norm(one)[0], tf.stack([x] * 8), parallel_iterations=4)
    for y in many:
        np.testing.assert_array_equal(y, once)


@pytest.mark.parametrize("inner", ["eager", "function"])
def test_second_derivatives_of_a_function_that_knows_of_none(inner: str) -> None:
    """As a gradient penalty takes them of a model that is a tf.function; gamma is a variable."""
    x = tf.constant(np.random.default_rng(0).standard_normal((6, 3)), tf.float32)
    gamma = tf.Variable([0.5, 1.0, 2.0])

    def second(engine: Any) -> Any:
        def model(x: tf.Tensor) -> Any:
            return tf.reduce_sum(engine.batch_norm(x, gamma, activation="relu", residual=tf.sin(x))[0] ** 3)

        traced = tf.function(model, autograph=False)

        def first(x: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = traced(x)
            return tape.gradient(loss, x)

        with tf.GradientTape() as tape:
            tape.watch(x)
            penalty = tf.reduce_sum((first if inner == "eager" else tf.function(first, autograph=False))(x) ** 2)
        return tape.gradient(penalty, [x, gamma])

    for a, b in zip(second(engine), second(FORMULAS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_forward_mode_around_a_function_is_refused_rather_than_wrong() -> None:
    x = tf.constant(np.random.default_rng(0).standard_normal((6, 3)), tf.float32)
    traced = tf.function(lambda x: batch_norm(x)[0], autograph=False)
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)), pytest.raises(NotImplementedError, match="move it inside"):
        traced(x)


@pytest.mark.parametrize("where", ["eager", "inside"])
def test_forward_mode(where: str) -> None:
    rng = np.random.default_rng(0)
    x, direction = (tf.constant(rng.standard_normal((7, 3)), tf.float32) for _ in range(2))

    def along(compute: Callable[..., Any]) -> Any:
        with tf.autodiff.ForwardAccumulator(x, direction) as accumulator:
            y = compute(x)
        return accumulator.jvp(y)

    def moved(engine: Any) -> Any:
        def compute(x: tf.Tensor) -> Any:
            return engine.batch_norm(x, tf.ones(3), activation="relu", residual=tf.sin(x))[0]

        if where == "inside":
            return tf.function(lambda: along(compute), autograph=False)()
        return along(compute)

    np.testing.assert_allclose(moved(engine), moved(FORMULAS), rtol=0, atol=2e-6)


@pytest.mark.parametrize("where", ["eager", "function", "xla"])
def test_vectorized_maps_and_jacobians(where: str) -> None:
    rng = np.random.default_rng(0)
    many, gamma = tf.constant(rng.standard_normal((4, 7, 3)), tf.float32), tf.constant([0.5, 1.0, 2.0])

    def results(engine: Any) -> Any:
        traced = tf.function(lambda x: engine.batch_norm(x, gamma, residual=x, activation="relu")[0], autograph=False)
        traced(many[0])

        def compute() -> Any:
            mapped = [tf.vectorized_map(f, many) for f in (lambda x: engine.batch_norm(x, gamma)[0], traced)]
            with tf.GradientTape() as tape:
                tape.watch([many, gamma])
                y = engine.batch_norm(many[0], gamma, residual=many[1], activation="relu")[0]
            return mapped + tape.jacobian(y, [many, gamma])

        return (compute if where == "eager" else tf.function(compute, autograph=False, jit_compile=where == "xla"))()

    for a, b in zip(results(engine), results(FORMULAS), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"x": (2, 5)}, "Shape must be rank 4|a view has groups"),
        ({"gamma": (4,)}, "one value per channel"),
        ({"residual": (1, 2, 3, 4)}, "as many values as x"),
    ],
)
def test_the_operation_refuses_what_does_not_fit(change: dict[str, Any], rule: str) -> None:
    sizes: dict[str, Any] = {"x": (1, 6, 3, 2), "gamma": (0,), "beta": (0,), "residual": (0,), **change}
    arrays = {name: tf.zeros(size) for name, size in sizes.items()}
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=rule):
        compiled._operations.evennorm_forward(**arrays, keep_mask=0, epsilon="0.001", negative_slope="1.0", limit="inf")


LOAD = """
import sys, numpy as np, tensorflow as tf
import evennorm.tensorflow
y = tf.saved_model.load(sys.argv[1]).train(tf.constant(np.load(sys.argv[2])))
np.save(sys.argv[3], y)
"""


def test_a_saved_training_step_is_served_where_evennorm_is_imported(tmp_path: Path) -> None:
    module = tf.Module()
    module.train = tf.function(
        lambda x: batch_norm(x)[0], input_signature=[tf.TensorSpec((None, 3), tf.float32)], autograph=False
    )
    x = np.random.default_rng(0).normal(5.0, 1.0, (20, 3)).astype(np.float32)
    expected = module.train(x).numpy()
    tf.saved_model.save(module, tmp_path / "model")
    np.save(tmp_path / "x.npy", x)
    files = [str(tmp_path / name) for name in ("model", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)
