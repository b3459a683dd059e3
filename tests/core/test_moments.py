"""Moments of parts merge to the moments of the whole, over chunks and over devices."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from evennorm.core.moments import Moments, merge, moments
from evennorm.core.summation import BLOCK, channel_sum
from evennorm.numpy import xp


def view(x: np.ndarray) -> np.ndarray:
    """Rows of channels as (groups, outer, channel, inner)."""
    return x[None, :, :, None]


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.longdouble)
    return x.mean(0).astype(float), x.var(0).astype(float)


def check(got: Moments, x: np.ndarray, rtol: float) -> None:
    mean, variance = exact(x)
    total = got.mean.astype(np.float64) + got.mean_low
    assert (np.abs(total - mean) <= rtol * (np.sqrt(variance) + 1e-30)).all()
    np.testing.assert_allclose(got.variance[0], variance, rtol=10 * rtol, atol=1e-300)


@given(
    parts=st.lists(st.integers(0, 40), min_size=2, max_size=6).filter(any),
    mean=st.sampled_from([0.0, 1.0, -1e3, 1e5]),
    seed=st.integers(0, 10**6),
)
def test_merged_parts_are_the_whole(parts: list[int], mean: float, seed: int) -> None:
    """Empty ones, too."""
    rng = np.random.default_rng(seed)
    chunks = [rng.normal(mean + 5 * rng.normal(), 1, (n, 3)) for n in parts]
    merged = moments(xp, view(chunks[0]))
    for chunk in chunks[1:]:
        merged = merge(xp, merged, moments(xp, view(chunk)))
    assert merged.count == sum(parts)
    check(merged, np.concatenate(chunks), rtol=1e-9)


def test_merged_counts_of_every_channel() -> None:
    """Behind a mask of elements each channel has its own count, and may have none."""
    x = np.random.default_rng(7).normal(1e4, 1, (40, 3))
    mask = np.random.default_rng(8).random((40, 3)) < 0.5
    mask[:15, 1] = mask[:, 2] = False
    parts = [moments(xp, view(x[rows]), view(mask[rows])) for rows in (slice(15), slice(15, 40))]
    merged, whole = merge(xp, *parts), moments(xp, view(x), view(mask))
    np.testing.assert_array_equal(merged.count, whole.count)
    np.testing.assert_allclose(merged.mean + merged.mean_low, whole.mean + whole.mean_low, rtol=1e-15)
    np.testing.assert_allclose(merged.variance, whole.variance, rtol=1e-12)
    assert merged.variance[0, 2] == 0


@given(n=st.integers(1, 5 * BLOCK), inner=st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 200]))
def test_blocked_sums_lose_no_value(n: int, inner: int) -> None:
    x = np.arange(n * 2 * inner, dtype=np.float64).reshape(1, n, 2, inner)
    np.testing.assert_array_equal(channel_sum(xp, x), x.sum((1, 3)))


def test_blocked_sums_of_a_million_float32() -> None:
    """NumPy's own sum along the slow axis is off by 5e-4 here."""
    x = np.random.default_rng(0).standard_normal((1, 1 << 20, 2, 1)).astype(np.float32) ** 2
    expected = x.astype(np.float64).sum((1, 3))
    np.testing.assert_allclose(channel_sum(xp, x), expected, rtol=2e-7)


def test_float32_moments_at_a_large_mean() -> None:
    x = (np.random.default_rng(0).standard_normal((5000, 4)) + 1e5).astype(np.float32)
    check(moments(xp, view(x)), x, rtol=2e-7)


def test_a_shift_far_off_costs_little() -> None:
    """One sample far away from all the others drags the mean, and the shift with it, to where no value is."""
    x = np.random.default_rng(0).standard_normal((1000, 1)).astype(np.float32)
    x[0] = 1e5
    check(moments(xp, view(x)), x, rtol=1e-6)


def test_mask_hides_values_from_the_moments() -> None:
    x = np.array([[1.0], [2.0], [np.nan], [6.0], [np.inf]])
    mask = np.array([True, True, False, True, False])[:, None]
    got = moments(xp, view(x), view(mask))
    assert got.count.tolist() == [[3.0]]
    assert (got.mean + got.mean_low).tolist() == [[3.0]]
    np.testing.assert_allclose(got.variance, [[14 / 3]], rtol=1e-15)
