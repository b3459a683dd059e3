"""The float64 oracle itself: textbook examples worked by hand, the paper's formulas, numerical differentiation."""

import numpy as np
import pytest

from evennorm.core.activation import activation_of
from evennorm.core.call import Call
from evennorm.core.geometry import Geometry
from evennorm.kernels import reference
from evennorm.numpy import xp
from tests.cases import CASES, Case
from tests.contract import textbook
from tests.oracle import batch_norm, normalize


def test_an_example_worked_by_hand() -> None:
    """2, 4, 4, 4, 5, 5, 7, 9 have mean 5 and variance 4."""
    x = np.array([2.0, 4, 4, 4, 5, 5, 7, 9])[:, None]
    y, moments = batch_norm(x, gamma=np.array([3.0]), beta=np.array([10.0]), epsilon=0.0)
    assert moments.count == 8
    assert moments.mean + moments.mean_low == 5.0
    assert moments.variance == 4.0
    np.testing.assert_array_equal(y.ravel(), 3 * np.array([-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2]) + 10)


def test_what_the_paper_promises_of_xhat() -> None:
    """Section 3: over the batch xhat has mean 0 and variance variance / (variance + epsilon)."""
    x = np.random.default_rng(0).normal(7.0, 3.0, (400, 5))
    y, moments = batch_norm(x, epsilon=0.1)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-14)
    np.testing.assert_allclose(y.var(0), moments.variance / (moments.variance + 0.1), rtol=1e-12)


def test_what_the_paper_promises_of_scale_and_shift() -> None:
    """Section 3.3: BN((a u) + b) = BN(u), and its derivative by u is that of BN(u), so that scale does not matter."""
    u = np.random.default_rng(1).normal(size=(50, 4))
    plain, _ = batch_norm(u, epsilon=0.0)
    scaled, _ = batch_norm(1000 * u - 20, epsilon=0.0)
    np.testing.assert_allclose(scaled, plain, atol=1e-12)


def test_inference_by_the_population_formula() -> None:
    """Algorithm 2: y = gamma / sqrt(Var + epsilon) x + (beta - gamma E / sqrt(Var + epsilon))."""
    rng = np.random.default_rng(2)
    x, (mean, variance, gamma, beta) = rng.normal(size=(6, 3, 4)), rng.uniform(1, 2, (4, 3))
    y = normalize(x, mean, variance, gamma, beta, axis=1, epsilon=0.01)
    a = gamma / np.sqrt(variance + 0.01)
    expected = a[:, None] * x + (beta - a * mean)[:, None]
    np.testing.assert_allclose(y, expected, rtol=1e-13)


SMALL = [case for case in CASES if 0 < np.prod(case.shape) <= 200 and case.std in (0.0, 1.0) and case.mask is None]


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_textbook_gradients_by_numerical_differentiation(case: Case, activation: str | None) -> None:
    """The yardstick of the contract tests, against central differences of its own forward pass."""
    arrays = case.make(5)
    names = ("x", "gamma", "beta", "residual")
    gradients = textbook.backward(case, arrays["dy"], *(arrays[n] for n in names), None, activation)
    step = 1e-5

    def loss(values: dict) -> float:
        y = textbook.forward(case, *(values[n] for n in names), None, activation)
        return float((y * arrays["dy"]).sum())

    rng = np.random.default_rng(0)
    for name, gradient in zip(names, gradients, strict=True):
        direction = rng.standard_normal(arrays[name].shape)
        plus = loss({**arrays, name: arrays[name] + step * direction})
        minus = loss({**arrays, name: arrays[name] - step * direction})
        expected = (plus - minus) / (2 * step)
        scale = np.abs(gradient * direction).sum() + 1
        assert abs((gradient * direction).sum() - expected) < 1e-5 * scale, name


@pytest.mark.parametrize("case", [c for c in CASES if c.mask != "all masked" and c.masked_value != 0], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_oracle_gives_the_textbooks_gradients(case: Case, activation: str | None) -> None:
    arrays = case.make()
    if arrays["mask"] is not None:
        arrays["x"] = np.nan_to_num(arrays["x"], nan=case.mean + 0.5)
    geometry = Geometry(case.shape, case.axis)
    view = {n: geometry.view(xp, arrays[n], case.group) for n in ("x", "dy", "residual")}
    flat = {n: arrays[n].reshape(geometry.channel) for n in ("gamma", "beta")}
    mask = None if arrays["mask"] is None else geometry.mask_view(xp, arrays["mask"], case.shape, case.group)
    call = Call(geometry, "float64", case.epsilon, activation_of(activation), case.group)
    options = {**flat, "residual": view["residual"], "mask": mask}
    _, moments = reference.forward(xp, call, view["x"], **options)
    got = reference.backward(xp, call, view["dy"], view["x"], moments, **options)
    expected = textbook.backward(case, **arrays, activation=activation)
    for a, b in zip(got, expected, strict=True):
        bound = 1e-9 * max(1.0, np.abs(b).max(initial=0.0))
        b = geometry.view(xp, b, case.group) if a.ndim == 4 else b.reshape(a.shape)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def test_derivatives_that_reach_the_moments_on_another_way() -> None:
    """A loss on the moments alone: d mean / dx = 1 / n, d variance / dx = 2 (x - mean) / n."""
    x = np.random.default_rng(3).normal(size=(1, 7, 3, 1))
    call = Call(Geometry((7, 3)), "float64")
    _, moments = reference.forward(xp, call, x, None, None, None, None)
    d_mean, d_variance = np.array([[1.0, 2.0, 3.0]]), np.array([[-1.0, 0.5, 2.0]])
    g = reference.backward(xp, call, 0 * x, x, moments, None, None, None, None, d_mean, d_variance)
    centred = x - x.mean(1, keepdims=True)
    expected = (d_mean[:, None, :, None] + 2 * d_variance[:, None, :, None] * centred) / 7
    np.testing.assert_allclose(g.x, expected, atol=1e-15)
