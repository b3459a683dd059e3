"""`batch_norm_gradient` over the case table against the textbook, by numerical differentiation; what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from evennorm import ArgumentError, ShapeError
from evennorm.numpy import Gradients, batch_norm, batch_norm_gradient, merge, moments
from tests.cases import CASES, Case
from tests.contract import textbook
from tests.contract.test_backward import DIFFERENTIABLE_CASES


def check(case: Case, dtype: str, activation: str | None, residual: bool) -> None:
    arrays = case.make()
    if not residual:
        arrays["residual"] = None
    if arrays["mask"] is not None:  # a NaN behind the mask is normalized to NaN, whose derivative nobody could compare
        arrays["x"] = np.nan_to_num(arrays["x"], nan=case.mean + 0.5)
    arrays["gamma"] = arrays["gamma"] * textbook.spread(activation)
    z = textbook.forward(case, arrays["x"], arrays["gamma"], arrays["beta"], arrays["residual"], arrays["mask"])
    near = textbook.to_a_bend(z, activation) < 1e-4
    arrays["dy"] = np.where(near, 0.0, arrays["dy"])
    names = ("x", "gamma", "beta", "residual", "dy")
    given: dict[str, Any] = {name: None if arrays[name] is None else arrays[name].astype(dtype) for name in names}
    dy = given.pop("dy")
    options = {
        "axis": case.axis,
        "epsilon": case.epsilon,
        "virtual_batch_size": case.group,
        "activation": activation,
        "mask": arrays["mask"],
    }
    _, found = batch_norm(**given, **options)
    got = batch_norm_gradient(dy, given.pop("x"), found, **given, **options)
    assert isinstance(got, Gradients)
    expected = textbook.backward(case, **arrays, activation=activation)
    bound = 1e-9 if dtype == "float64" else 1e-5
    for name, a, b in zip(Gradients._fields, got, expected, strict=True):
        if arrays[name] is None:
            assert a is None
            continue
        largest = max(1.0, np.abs(b).max(initial=0.0))
        assert (a.dtype, a.shape) == (dtype, arrays[name].shape)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * largest, err_msg=f"derivative by {name}")


@pytest.mark.parametrize("case", DIFFERENTIABLE_CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients(case: Case, dtype: str) -> None:
    check(case, dtype, None, residual=False)


@pytest.mark.parametrize("case", [c for c in CASES if c.std == 1.0], ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_gradients_through_residual_and_activation(case: Case, activation: str) -> None:
    check(case, "float32", activation, residual=True)
    check(case, "float32", activation, residual=False)


SMALL = {
    "dense": {},
    "channels first, relu": {"axis": 1, "activation": "relu"},
    "two axes apart, leaky relu": {"axis": (0, 2), "activation": "leaky_relu"},
    "ghost batches": {"virtual_batch_size": 2},
    "residual, relu": {"residual": True, "activation": "relu"},
    "mask": {"mask": np.array([[1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0]], bool)},
}


@pytest.mark.parametrize("name", SMALL)
def test_gradients_by_numerical_differentiation(name: str) -> None:
    """Of a loss that looks at y and at the moments, along random directions."""
    rng = np.random.default_rng(11)
    options = dict(SMALL[name])
    x, residual = rng.normal(3, 1, (4, 3, 5)), rng.standard_normal((4, 3, 5))
    axis = options.get("axis", -1)
    size = tuple(x.shape[a] for a in ((axis,) if isinstance(axis, int) else axis))
    arrays = {"x": x, "gamma": rng.uniform(0.5, 1.5, size), "beta": rng.uniform(-1, 1, size)}
    if options.pop("residual", False):
        arrays["residual"] = residual
    _, found = batch_norm(**arrays, epsilon=1e-2, **options)
    dy = rng.standard_normal(x.shape)
    d_mean, d_variance = rng.standard_normal((2, *found.mean.shape))

    def loss(values: dict[str, np.ndarray]) -> float:
        y, m = batch_norm(**values, epsilon=1e-2, **options)
        return float((y * dy).sum() + ((m.mean + m.mean_low) * d_mean).sum() + (m.variance * d_variance).sum())

    rest = {name: value for name, value in arrays.items() if name != "x"}
    got = batch_norm_gradient(dy, x, found, **rest, epsilon=1e-2, **options, d_mean=d_mean, d_variance=d_variance)
    for key, value in arrays.items():
        for _ in range(3):
            way = rng.standard_normal(value.shape)
            step = 1e-6
            ahead, behind = ({**arrays, key: value + sign * step * way} for sign in (1, -1))
            measured = (loss(ahead) - loss(behind)) / (2 * step)
            assert abs(measured - (getattr(got, key) * way).sum()) < 1e-6 * (1 + abs(measured)), key


def test_moments_in_float64_serve_for_float32_data() -> None:
    """As `moments` and `merge` give them: what float32 cannot hold of the mean is taken along."""
    x = (np.random.default_rng(2).standard_normal((60, 3)) + 1e5).astype(np.float32)
    dy = np.random.default_rng(3).standard_normal((60, 3)).astype(np.float32)
    _, taken = batch_norm(x)
    for found in (moments(x), merge([moments(x[:13]), moments(x[13:])])):
        a, b = batch_norm_gradient(dy, x, found), batch_norm_gradient(dy, x, taken)
        np.testing.assert_allclose(a.x, b.x, rtol=0, atol=1e-6)


X = np.zeros((4, 3), np.float32)
_, FOUND = batch_norm(X)
ONE = np.ones(1)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((X[:2], X, FOUND), ShapeError, "dy has the shape of x, (4, 3); received shape (2, 3)"),
        (
            (X, X, FOUND, np.ones(4)),
            ShapeError,
            "shape (3,) for an array of shape (4, 3) with axis=(1,); received shape (4,)",
        ),
        (
            (X, X, moments(X[:, :2])),
            ShapeError,
            "moments.mean has the shape of batch_norm's moments, (3,); received shape (2,)",
        ),
        ((X, X, moments(X[:2])), ArgumentError, "for this x, of 4 values per channel; received a count of 2"),
        (
            (X.astype(int), X, FOUND),
            ArgumentError,
            "dy is an array of float32, float64, bfloat16, float16; received dtype int",
        ),
    ],
)
def test_what_does_not_fit(arguments: tuple, error: type, text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        batch_norm_gradient(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"residual": X[:2]}, ShapeError, "residual has the shape of x, (4, 3); received shape (2, 3)"),
        ({"d_mean": ONE}, ShapeError, "d_mean has the shape of batch_norm's moments, (3,); received shape (1,)"),
        ({"activation": "gelu"}, ArgumentError, "received 'gelu'"),
        ({"epsilon": -1}, ArgumentError, "received epsilon=-1"),
        ({"virtual_batch_size": 3}, ShapeError, "received 4 samples and virtual_batch_size=3"),
    ],
)
def test_options_that_do_not_fit(options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        batch_norm_gradient(X, X, FOUND, **options)
