"""The moments of all devices together are those of the whole batch, on every device, and so are their derivatives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evennorm.core.exchange import local_derivatives, local_tangents, merged, packed
from evennorm.core.moments import Moments, moments
from evennorm.numpy import xp


def view(x: np.ndarray) -> np.ndarray:
    return x[None, :, :, None]


def exchanged(local: list[Moments]) -> Moments:
    groups, channel = local[0].mean.shape
    return merged(xp, np.stack([packed(xp, m) for m in local]), groups, channel)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any),
    mean=st.sampled_from([0.0, 1e4]),
    dtype=st.sampled_from(["float64", "float32"]),
)
def test_devices_together_are_the_whole(sizes: list[int], mean: float, dtype: str) -> None:
    """Of different sizes, empty ones and single values too."""
    rng = np.random.default_rng(len(sizes))
    shards = [rng.normal(mean + i, 1, (n, 3)).astype(dtype) for i, n in enumerate(sizes)]
    got = exchanged([moments(xp, view(shard)) for shard in shards])
    whole = np.concatenate(shards).astype(np.longdouble)
    rtol = 1e-11 if dtype == "float64" else 1e-6
    deviation = np.sqrt(whole.var(0)) + rtol
    assert (abs(got.mean.astype(np.longdouble) + got.mean_low - whole.mean(0)) <= rtol * deviation).all()
    np.testing.assert_allclose(got.variance[0], whole.var(0).astype(float), rtol=10 * rtol, atol=10 * rtol**2)
    np.testing.assert_array_equal(got.count, [[sum(sizes)]])
    assert got.variance.dtype == dtype


def test_one_row_holds_three_numbers_per_channel_and_one_count() -> None:
    assert packed(xp, moments(xp, np.ones((1, 5, 7, 2)))).shape == (3 * 7 + 1,)
    assert packed(xp, moments(xp, np.ones((2, 5, 7, 2)))).shape == (2 * (3 * 7 + 1),)
    every_channel = moments(xp, np.ones((1, 5, 7, 2)), np.ones((1, 5, 7, 2), bool))
    assert packed(xp, every_channel).shape == (4 * 7,)


def test_a_device_whose_mask_hides_all_weighs_nothing() -> None:
    x = np.random.default_rng(1).normal(1e4, 1, (40, 3))
    mask = np.random.default_rng(8).random((40, 3)) < 0.5
    mask[:15] = mask[:, 2] = False
    parts = [moments(xp, view(x[rows]), view(mask[rows])) for rows in (slice(15), slice(15, 40))]
    got, whole = exchanged(parts), moments(xp, view(x), view(mask))
    np.testing.assert_array_equal(got.count, whole.count)
    np.testing.assert_allclose(got.mean + got.mean_low, whole.mean + whole.mean_low, rtol=1e-15)
    np.testing.assert_allclose(got.variance, whole.variance, rtol=1e-12)
    assert got.variance[0, 2] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_on_one_device_is_seen_on_all(bad: float) -> None:
    x = np.random.default_rng(2).normal(0, 1, (12, 3))
    x[3, 1] = bad
    with np.errstate(invalid="ignore"):
        got = exchanged([moments(xp, view(part)) for part in np.split(x, 3)])
        assert not np.isfinite(got.mean + got.mean_low + got.variance)[0, 1]
    assert np.isfinite(got.mean + got.mean_low + got.variance)[0, [0, 2]].all()


def test_derivatives_are_those_of_the_whole() -> None:
    """Against differences of the exchange itself, in both directions."""
    rng = np.random.default_rng(3)
    local = [moments(xp, view(rng.normal(i, 1 + i, (n, 2)))) for i, n in enumerate((3, 0, 1, 9))]
    whole = exchanged(local)
    d_mean, d_variance = rng.normal(size=(2, 1, 2))
    t_mean, t_variance = rng.normal(size=(2, 4, 1, 2))

    def along(step: float) -> tuple[np.ndarray, np.ndarray]:
        moved = [
            m._replace(mean_low=m.mean_low + step * t, variance=m.variance + step * v)
            for m, t, v in zip(local, t_mean, t_variance, strict=True)
        ]
        got = exchanged(moved)
        return got.mean + got.mean_low, got.variance

    step = 1e-5
    expected = [(a - b) / (2 * step) for a, b in zip(along(step), along(-step), strict=True)]
    parts = [local_tangents(xp, m, whole, t, v) for m, t, v in zip(local, t_mean, t_variance, strict=True)]
    found = [sum(part[i] for part in parts) for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    back = [local_derivatives(xp, m, whole, d_mean, d_variance) for m in local]
    there = (d_mean * found[0] + d_variance * found[1]).sum()
    again = sum((b[0] * t + b[1] * v).sum() for b, t, v in zip(back, t_mean, t_variance, strict=True))
    np.testing.assert_allclose(again, there, rtol=1e-12)
