"""Running statistics follow the formula, and nothing poisons them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evennorm.core import renorm, running
from evennorm.core.moments import Moments, moments
from evennorm.numpy import xp


def batch(x: np.ndarray, groups: int = 1, mask: np.ndarray | None = None, unbiased: bool = False) -> running.Batch:
    """The summary of rows of channels."""
    shape = (groups, -1, x.shape[1], 1)
    view_of_mask = None if mask is None else np.broadcast_to(mask[:, None], x.shape).reshape(shape)
    return running.summary(xp, moments(xp, x.reshape(shape), view_of_mask), unbiased)


def follow(xs: list[np.ndarray], decay: float, dtype: type = np.float64) -> tuple[running.RunningMean, np.ndarray]:
    c = xs[0].shape[1]
    mean, variance = running.RunningMean(np.zeros(c, dtype), np.zeros(c, dtype)), np.ones(c, dtype)
    for x in xs:
        b = batch(x.astype(dtype))
        mean = running.updated_mean(xp, mean, b, decay)
        variance = running.updated(xp, variance, b.variance, decay, b.has_variance)
    return mean, variance


@given(decay=st.floats(0, 1), steps=st.integers(1, 8), seed=st.integers(0, 999))
def test_exponential_average(decay: float, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    xs = [rng.normal(3, 2, (9, 2)) for _ in range(steps)]
    got_mean, got_variance = follow(xs, decay)
    mean, variance = np.zeros(2), np.ones(2)
    for x in xs:
        mean, variance = decay * mean + (1 - decay) * x.mean(0), decay * variance + (1 - decay) * x.var(0)
    np.testing.assert_allclose(got_mean.mean, mean, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(got_variance, variance, rtol=1e-12)


def test_a_float32_average_does_not_get_stuck() -> None:
    """The plain float32 update, decay * old + (1 - decay) * new, ends 0.02 to 0.4 standard deviations beside."""
    rng = np.random.default_rng(0)
    xs = [(rng.standard_normal((64, 8)) + 1e5).astype(np.float32) for _ in range(1500)]
    got, _ = follow(xs, 0.99, np.float32)
    expected, plain = np.zeros(8), np.zeros(8, np.float32)
    for x in xs:
        expected = 0.99 * expected + 0.01 * x.astype(np.float64).mean(0)
        plain = np.float32(0.99) * plain + np.float32(0.01) * x.astype(np.float64).mean(0).astype(np.float32)
    unit = np.spacing(np.float32(1e5))
    assert np.abs(got.mean - expected).max() <= unit
    assert np.abs(plain - expected).max() > 2 * unit


def test_a_mean_set_from_outside_is_believed() -> None:
    """What was kept of an old mean moves a new one by no more than its rounding."""
    stale = running.RunningMean(np.array([3.0], np.float32), np.array([0.0035], np.float32))
    got = running.updated_mean(xp, stale, batch(np.full((4, 1), 3.0, np.float32)), 0.5)
    assert abs(float(got.mean[0]) - 3.0) <= np.spacing(np.float32(3.0))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's word on infinity - infinity
@pytest.mark.parametrize(
    "x",
    [
        np.array([[1.0, np.nan], [2.0, 3.0]]),
        np.array([[1.0, np.inf], [2.0, 3.0]]),
        np.zeros((0, 2)),
    ],
    ids=["nan in one channel", "infinity", "empty"],
)
def test_a_bad_batch_changes_nothing(x: np.ndarray) -> None:
    b = batch(x)
    assert not b.accepted
    before = running.RunningMean(np.array([1.0, 2.0]), np.array([1e-9, 0.0]))
    after = running.updated_mean(xp, before, b, 0.9)
    assert after.mean.tolist() == [1.0, 2.0]
    assert after.low.tolist() == [1e-9, 0.0]
    assert running.updated(xp, np.array([5.0, 6.0]), b.variance, 0.9, b.has_variance).tolist() == [5.0, 6.0]


def test_a_batch_masked_throughout_changes_nothing() -> None:
    b = batch(np.ones((4, 2)), mask=np.zeros(4, bool))
    assert not b.accepted
    assert not b.has_mean.any()


def test_a_channel_masked_throughout_is_left_alone() -> None:
    x = np.array([[1.0, 7.0], [3.0, 8.0]])
    mask = np.array([[True, False], [True, False]])
    b = running.summary(xp, moments(xp, x[None, :, :, None], mask[None, :, :, None]))
    assert b.accepted
    assert b.has_mean.tolist() == [True, False]
    assert running.updated_mean(xp, running.RunningMean(np.zeros(2), np.zeros(2)), b, 0.5).mean.tolist() == [1.0, 0.0]


def test_one_value_tells_a_mean_and_no_variance() -> None:
    b = batch(np.array([[4.0, 6.0]]))
    assert b.accepted
    assert b.has_mean.all()
    assert not b.has_variance.any()


def test_unbiased_variance() -> None:
    x = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(batch(x, unbiased=True).variance, x.var(0, ddof=1), rtol=1e-14)


def test_ghost_batches_count_by_their_average() -> None:
    x = np.random.default_rng(0).normal(2, 3, (12, 3))
    b = batch(x, groups=3)
    parts = x.reshape(3, 4, 3)
    np.testing.assert_allclose(b.mean + b.mean_low, parts.mean(1).mean(0), rtol=1e-14)
    np.testing.assert_allclose(b.variance, parts.var(1).mean(0), rtol=1e-14)


def test_empty_ghost_batches_do_not_count() -> None:
    x = np.random.default_rng(0).normal(2, 3, (8, 3))
    b = batch(x, groups=2, mask=np.arange(8) >= 4)
    np.testing.assert_allclose(b.mean + b.mean_low, x[4:].mean(0), rtol=1e-14)
    np.testing.assert_allclose(b.variance, x[4:].var(0), rtol=1e-14)


def test_cumulative_average_weighs_all_batches_the_same() -> None:
    rng = np.random.default_rng(0)
    xs, variance = [rng.normal(size=(6, 2)) for _ in range(7)], np.full(2, 99.0)
    for n, x in enumerate(xs):
        b = batch(x)
        variance = running.updated(xp, variance, b.variance, running.cumulative_decay(xp, float(n)), b.has_variance)
    np.testing.assert_allclose(variance, np.mean([x.var(0) for x in xs], axis=0), rtol=1e-14)


def test_renorm_correction_and_its_clipping() -> None:
    x = np.random.default_rng(0).normal(5, 4, (50, 3))
    b = batch(x)
    mean, stddev = np.array([0.0, 5.0, 4.0]), np.array([1.0, 4.0, 1e-9])
    r, d = renorm.correction(xp, b, mean, stddev, 0.01, {})
    sigma = np.array([1.0, 4.0, 0.1])
    np.testing.assert_allclose(r, np.sqrt(x.var(0) + 0.01) / sigma, rtol=1e-12)
    np.testing.assert_allclose(d, (x.mean(0) - mean) / sigma, rtol=1e-12)
    clipped_r, clipped_d = renorm.correction(xp, b, mean, stddev, 0.01, {"rmin": 1.5, "rmax": 3.0, "dmax": 0.5})
    np.testing.assert_allclose(clipped_r, np.clip(r, 1.5, 3.0))
    np.testing.assert_allclose(clipped_d, np.clip(d, -0.5, 0.5))


def test_moments_of_ghost_batches_keep_their_own_means() -> None:
    m = moments(xp, np.array([1.0, 3.0, 10.0, 20.0]).reshape(2, 2, 1, 1))
    assert isinstance(m, Moments)
    assert (m.mean + m.mean_low).ravel().tolist() == [2.0, 15.0]
    assert m.variance.ravel().tolist() == [1.0, 25.0]
