"""Every engine's own differentiation, eager and compiled, gives the textbook's gradients; second derivatives are right."""

import numpy as np
import pytest

from tests.cases import CASES, SHAPES, Case
from tests.contract import textbook
from tests.contract.engines import ENGINES
from tests.grids import mostly, pairwise

DIFFERENTIABLE_CASES = [case for case in CASES if case.name != "variance below the smallest float32"]


def check_backward(engine: str, case: Case, dtype: str, activation: str | None, residual: bool) -> None:
    arrays = case.make()
    if not residual:
        arrays["residual"] = None
    if arrays["mask"] is not None:  # a NaN behind the mask is normalized to NaN, whose derivative nobody could compare
        arrays["x"] = np.nan_to_num(arrays["x"], nan=case.mean + 0.5)
    arrays["gamma"] = arrays["gamma"] * textbook.spread(activation)
    z = textbook.forward(case, arrays["x"], arrays["gamma"], arrays["beta"], arrays["residual"], arrays["mask"])
    near = textbook.to_a_bend(z, activation) < 1e-4
    arrays["dy"] = np.where(near, 0.0, arrays["dy"])
    got = ENGINES[engine].backward(case, arrays, dtype, activation=activation)
    expected = textbook.backward(case, **arrays, activation=activation)
    bound = 1e-9 if dtype == "float64" else 1e-5
    for name, a, b in zip(("x", "gamma", "beta", "residual"), got, expected, strict=False):
        largest = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b.reshape(a.shape), rtol=0, atol=bound * largest, err_msg=f"derivative by {name}")


RUNS = [(engine, "float32") for engine in ("jax jit", "torch", "tensorflow", "tensorflow xla")]
RUNS += [(engine, "float64") for engine in ("jax jit", "torch", "tensorflow function")]


SLOW = [("jax jit", "float64"), ("tensorflow xla", "float32"), ("tensorflow function", "float64")]
"""They compile or trace each case anew, by a formula that the other runs hold to every case."""


@pytest.mark.parametrize(
    *mostly(
        lambda engine, dtype, case: (engine, dtype) not in SLOW or case.name in SHAPES,
        "engine, dtype, case",
        [(*run, case) for run in RUNS for case in DIFFERENTIABLE_CASES],
    )
)
def test_gradients(engine: str, case: Case, dtype: str) -> None:
    check_backward(engine, case, dtype, None, residual=False)


FUSED = ["images, channels last", "mean 1e4, channels first", "mask over time", "ghost batches", "two axes apart"]


@pytest.mark.parametrize(
    *pairwise(
        engine=["jax", "torch", "tensorflow", "tensorflow xla"],
        case=[c for c in CASES if c.name in FUSED],
        activation=["relu", "relu6", "leaky_relu"],
    )
)
def test_gradients_through_residual_and_activation(engine: str, case: Case, activation: str) -> None:
    check_backward(engine, case, "float32", activation, residual=True)


def test_gradients_under_torch_compile() -> None:
    check_backward("torch compile", Case("mean 1e4", (16, 4, 9, 9), 1, mean=1e4), "float32", "relu", residual=True)
