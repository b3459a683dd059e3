"""The gradient of torch's inference, by given statistics: a frozen layer's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

from evennorm.core.moments import Moments
from evennorm.torch import engine, normalize
from tests.contract import textbook

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    data=st.data(),
    dtype=st.sampled_from(list(ROUNDING)),
    activation=st.sampled_from(list(textbook.BENDS)),
    has_residual=st.booleans(),
    permuted=st.booleans(),
    seed=st.integers(0, 999),
)
def test_gradients(sizes, data, dtype, activation, has_residual, permuted, seed) -> None:
    axis = data.draw(st.integers(0, len(sizes) - 1))
    rng = np.random.default_rng(seed)
    order = list(rng.permutation(len(sizes))) if permuted else list(range(len(sizes)))

    def tensor(mean: float = 0.0) -> torch.Tensor:
        drawn = torch.tensor(rng.normal(mean, 1, [sizes[a] for a in order]), dtype=dtype)
        return drawn.permute([order.index(a) for a in range(len(sizes))]).requires_grad_()

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy, residual = tensor(3.0), tensor().detach(), tensor() if has_residual else None
    mean, variance, gamma, beta = (torch.tensor(rng.uniform(0.5, 2, sizes[axis]), dtype=wide) for _ in range(4))

    gamma = gamma * textbook.spread(activation)
    rows = tuple(a for a in range(len(sizes)) if a != axis)
    m, v, g, b = (np.expand_dims(array(t), rows) for t in (mean, variance, gamma, beta))
    xhat = (array(x) - m) / np.sqrt(v + 1e-5)
    z = g * xhat + b + (array(residual) if has_residual else 0)
    dy = dy * torch.tensor(textbook.to_a_bend(z, activation) > 1e-3)
    dz = array(dy) * textbook.derivative(z, activation)
    expected = [dz * g / np.sqrt(v + 1e-5), (dz * xhat).sum(rows), dz.sum(rows), dz]

    gamma, beta = gamma.requires_grad_(), beta.requires_grad_()
    y = normalize(x, mean, variance, gamma, beta, axis=axis, activation=activation, residual=residual)
    wanted = [x, gamma, beta] + ([residual] if has_residual else [])
    for name, got, e in zip(("x", "gamma", "beta", "residual"), torch.autograd.grad(y, wanted, dy), expected, strict=False):
        bound = ROUNDING[dtype] * max(1.0, np.abs(e).max(initial=0.0))
        np.testing.assert_allclose(array(got), e, rtol=0, atol=bound, err_msg=name)


def test_statistics_of_half_precision_are_widened() -> None:
    """0.001 + 1e-5 is 0.001 in bfloat16."""
    x = torch.randn(8, 3).bfloat16()
    mean, variance = torch.tensor([1.0, -2.0, 0.5]).bfloat16(), torch.tensor([1e-3, 1e-4, 1e-6]).bfloat16()
    expected = (x.double() - mean.double()) / torch.sqrt(variance.double() + 1e-5)
    for wants_gradient in (False, True):
        y = normalize(x.clone().requires_grad_(wants_gradient), mean, variance)
        torch.testing.assert_close(y.double(), expected, rtol=8e-3, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_loses_no_tangent() -> None:
    """A compiled kernel knows nothing of tangents, and does not serve where there are any."""
    x, t = torch.randn(2, 5, 3, dtype=torch.float64)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    with forward_ad.dual_level():
        y = normalize(forward_ad.make_dual(x, t), mean, variance, epsilon=0.0)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, t)


def test_running_statistics_of_other_sizes_are_not_written() -> None:
    """By address, that would be beside them."""
    moments = Moments(8, torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 4))
    assert engine.update_running_stats((torch.zeros(4), torch.zeros(4), torch.ones(3)), moments, 0.9) is None
    assert engine.update_running_stats((torch.zeros(4), torch.zeros(4), torch.ones(4)), moments, 0.9) in (True, None)
