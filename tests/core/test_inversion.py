"""The gradient that is found from the output is the one that is found from the input."""

import numpy as np
import pytest

from evennorm.core.inversion import gradients_from_output, least_gamma
from evennorm.core.moments import moments
from evennorm.core.normalize import gradients, normalize
from evennorm.numpy import xp


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_gradients(affine: bool, masked: bool) -> None:
    rng = np.random.default_rng(0)
    x, dz = rng.normal(1e3, 2, (2, 6, 3, 4)), rng.normal(size=(2, 6, 3, 4))
    gamma, beta = (rng.uniform(0.5, 2, 3) * [1, -1, 1], rng.normal(size=3)) if affine else (None, None)
    mask = rng.random((2, 6, 1, 4)) < 0.7 if masked else None
    d_variance = rng.normal(size=(2, 3))
    m = moments(xp, x, mask)
    expected = gradients(xp, dz, x, m, gamma, beta, 1e-3, mask=mask, d_variance=d_variance)
    z = normalize(xp, x, m, gamma, beta, 1e-3)
    got = gradients_from_output(xp, dz, z, m.count, m.variance, gamma, beta, 1e-3, mask, d_variance)
    np.testing.assert_allclose(got.x, expected.x, rtol=0, atol=1e-11)
    if affine:
        np.testing.assert_allclose(got.gamma, expected.gamma, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(got.beta, expected.beta, rtol=1e-12)


def test_half_of_the_digits_are_left_at_the_least_gamma() -> None:
    """z in float32, of a channel whose gamma is just as small as it may be."""
    beta = np.array([1.0, -3.0, 1e-3, 0.0])
    unit = np.finfo(np.float32).eps / 2
    least = least_gamma(xp, np.ones(4), beta, unit, float(np.finfo(np.float32).tiny))
    np.testing.assert_allclose(least[:3], np.abs(beta[:3]) * np.sqrt(unit), rtol=1e-12)
    assert 0 < least[3] < 1e-38
    xhat = np.random.default_rng(0).normal(size=(1000, 3))
    z = (xhat * least[:3] + beta[:3]).astype(np.float32).astype(np.float64)
    error = np.abs((z - beta[:3]) / least[:3] - xhat).max(0)
    assert (error < 1.01 * np.sqrt(unit)).all()
    assert (error > 0.1 * np.sqrt(unit)).all()
