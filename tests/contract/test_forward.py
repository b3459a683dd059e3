"""Every engine, eager and compiled, gives the textbook's y and moments over the whole case table."""

import numpy as np
import pytest

from tests.cases import CASES, SHAPES, Case
from tests.contract import textbook
from tests.contract.engines import ENGINES
from tests.grids import mostly, pairwise

ROUNDING = {"float64": 1e-11, "float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""What y may be off by, for values of about 1; the half precisions round the result to their own last place, twice."""


def check_forward(name: str, case: Case, dtype: str, activation: str | None = None) -> None:
    engine, arrays = ENGINES[name], case.make()
    del arrays["dy"], arrays["residual"]
    if dtype in ("float16", "bfloat16"):
        arrays["x"] = engine._numpy(engine._tensor(arrays["x"], dtype))  # what the engine will really read
    y, moments = engine.forward(case, arrays, dtype, activation=activation)
    expected = textbook.forward(case, arrays["x"], arrays["gamma"], arrays["beta"], None, arrays["mask"], activation)
    seen = np.ones(case.shape, bool) if arrays["mask"] is None else case.full_mask(arrays["mask"])
    largest = max(1.0, np.abs(expected[seen]).max(initial=0.0) / 2)
    assert y.shape == case.shape
    np.testing.assert_allclose(y[seen], expected[seen], rtol=0, atol=ROUNDING[dtype] * largest)
    if case.group is None:
        check_moments(case, arrays, moments, dtype)


def check_moments(case: Case, arrays: dict, moments, dtype: str) -> None:
    count, mean, variance = textbook.statistics(case, arrays["x"], arrays["mask"])
    rounding = 1e-12 if dtype == "float64" else 5e-7
    got_count = np.broadcast_to(moments.count, case.parameter_shape)
    np.testing.assert_array_equal(got_count, count.reshape(case.parameter_shape))
    deviation = np.sqrt(variance).reshape(case.parameter_shape)
    mean_error = np.abs((moments.mean + moments.mean_low) - mean.reshape(case.parameter_shape))
    assert (mean_error <= rounding * (deviation + np.abs(moments.mean_low)) + 1e-30).all()
    np.testing.assert_allclose(moments.variance, variance.reshape(case.parameter_shape), rtol=10 * rounding, atol=1e-30)


EAGER = ["numpy", "jax", "torch", "tensorflow"]
COMPILED = ["jax jit", "tensorflow function", "tensorflow xla"]
RUNS = [(engine, "float32") for engine in EAGER + COMPILED] + [
    (engine, "float64") for engine in ["numpy", "jax jit", "torch", "tensorflow"]
]
SLOW = [("jax", "float32"), ("jax jit", "float64"), ("tensorflow function", "float32"), ("tensorflow xla", "float32")]
"""They compile or trace each case anew, by a formula that the other runs hold to every case."""


@pytest.mark.parametrize(
    *mostly(
        lambda engine, dtype, case: (engine, dtype) not in SLOW or case.name in SHAPES,
        "engine, dtype, case",
        [(*run, case) for run in RUNS for case in CASES],
    )
)
def test_normalized_values_and_moments(engine: str, case: Case, dtype: str) -> None:
    check_forward(engine, case, dtype)


HALF = ["dense", "images, channels first", "mean 1e3", "mask over time", "ghost batches", "empty batch", "two axes apart"]


@pytest.mark.parametrize(
    *pairwise(
        engine=["jax jit", "torch", "tensorflow", "tensorflow xla"],
        case=[c for c in CASES if c.name in HALF],
        dtype=["float16", "bfloat16"],
    )
)
def test_half_precision_is_read_and_written_as_it_is(engine: str, case: Case, dtype: str) -> None:
    check_forward(engine, case, dtype)


UNKNOWN = [
    "dense",
    "images, channels last",
    "mean 1e5",
    "mean 1e5, long",
    "empty batch",
    "empty image",
    "one value per channel",
]


@pytest.mark.parametrize("case", [c for c in CASES if c.name in UNKNOWN], ids=str)
def test_sizes_that_a_graph_does_not_know(case: Case) -> None:
    check_forward("tensorflow function, unknown sizes", case, "float32")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("images, channels first", "mean 1e5")], ids=str)
def test_torch_compile(case: Case) -> None:
    check_forward("torch compile", case, "float32", activation="relu")


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("engine", EAGER)
def test_activation_after_residual(engine: str, activation: str) -> None:
    case = Case("images", (8, 7, 6, 5))
    arrays = case.make()
    del arrays["dy"]
    arrays["gamma"] = arrays["gamma"] * textbook.spread(activation)
    y, _ = ENGINES[engine].forward(case, arrays, "float32", activation=activation)
    expected = textbook.forward(case, **arrays, activation=activation)
    np.testing.assert_allclose(y, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("engine", EAGER)
def test_nan_in_shows_as_nan_out(engine: str, activation: str) -> None:
    """A relu that compared with 0 the other way round would turn the NaN of a broken batch into a healthy 0."""
    case = Case("dense", (6, 2))
    arrays = case.make()
    arrays["x"][2, 1] = np.nan
    y, moments = ENGINES[engine].forward(
        case, {name: arrays[name] for name in ("x", "gamma", "beta")}, "float32", activation=activation
    )
    assert np.isnan(y[:, 1]).all()
    assert np.isnan(moments.variance[1])
    assert np.isfinite(y[:, 0]).all()


def test_torch_compile_with_batches_of_several_sizes() -> None:
    """From the second size on, torch compiles for a symbol in its place."""
    import torch

    from evennorm.torch import batch_norm

    torch.compiler.reset()
    compiled = torch.compile(lambda x: batch_norm(x, axis=1, epsilon=1e-3, activation="relu")[0], fullgraph=True)
    for batch in (8, 5, 3):
        case = Case("images", (batch, 4, 6, 6), 1, mean=1e4)
        x = case.make()["x"]
        expected = textbook.forward(case, x, np.ones(4), np.zeros(4), activation="relu")
        got = compiled(torch.tensor(x, dtype=torch.float32)).double().numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
