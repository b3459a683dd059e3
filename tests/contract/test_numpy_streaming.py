"""Moments of chunks, merged, are those of all values: at large means, in any split and order, with empty chunks."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evennorm import ArgumentError, ShapeError
from evennorm.numpy import Moments, batch_norm, merge, moments, normalize
from tests.cases import CASES, Case
from tests.contract import textbook


def check(found: Moments, x: np.ndarray, rounding: float) -> None:
    """Against long doubles; `rounding` is that of the dtype the chunks were read in."""
    exact = x.astype(np.longdouble)
    mean, variance = exact.mean(0), exact.var(0)
    assert found.mean.dtype == found.variance.dtype == np.float64
    total = found.mean.astype(np.longdouble) + found.mean_low
    # Relative to the deviation; the mean itself is only as good as float64 keeps it.
    allowed = rounding * np.sqrt(variance) + 2.0**-52 * np.abs(mean)
    assert (np.abs(total - mean) <= allowed).all(), (total - mean, allowed)
    np.testing.assert_allclose(found.variance, variance.astype(float), rtol=4 * rounding)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_large_mean_in_unequal_chunks(dtype: str) -> None:
    """float32 around 1e5: data of standard deviation 1 normalizes to 2e-6 of float64 over the whole."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200_000, 5)) + 1e5).astype(dtype)
    chunks = np.split(x, [1, 7, 5000, 5003, 150_000])
    found = merge(moments(chunk) for chunk in chunks)
    assert found.count == 200_000
    check(found, x, 3e-7 if dtype == "float32" else 1e-11)
    y = np.concatenate([normalize(chunk, found.mean, found.variance, epsilon=0.0) for chunk in chunks])
    exact = x.astype(np.longdouble)
    np.testing.assert_allclose(y, (exact - exact.mean(0)) / exact.std(0), rtol=0, atol=2e-6 if dtype == "float32" else 1e-10)


def test_thousands_of_chunks_lose_nothing() -> None:
    x = (np.random.default_rng(1).standard_normal((30_000, 2)) + 1e5).astype(np.float32)
    check(merge(moments(chunk) for chunk in np.split(x, 10_000)), x, 3e-7)


@given(
    parts=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    mean=st.sampled_from([0.0, 1.0, -1e3, 1e5]),
    drift=st.sampled_from([0.0, 3.0, 100.0]),
    dtype=st.sampled_from(["float32", "float64"]),
    data=st.data(),
)
def test_any_split_in_any_order(parts: list[int], mean: float, drift: float, dtype: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(sum(parts))
    chunks = [rng.normal(mean + drift * i, 1, (n, 3)).astype(dtype) for i, n in enumerate(parts)]
    whole = np.concatenate(chunks)
    shuffled = data.draw(st.permutations(chunks))
    in_order, otherwise = (merge(moments(chunk) for chunk in some) for some in (chunks, shuffled))
    half = data.draw(st.integers(1, len(chunks)))
    trees = [merge(moments(chunk) for chunk in some) for some in (chunks[:half], chunks[half:]) if some]
    for found in (in_order, otherwise, merge(trees), moments(whole)):
        assert found.count == len(whole)
        check(found, whole, 1e-6 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("case", [c for c in CASES if c.group is None], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_moments_over_the_case_table(case: Case, dtype: str) -> None:
    arrays = case.make()
    found = moments(arrays["x"].astype(dtype), axis=case.axis, mask=arrays["mask"])
    count, mean, variance = (a.reshape(case.parameter_shape) for a in textbook.statistics(case, arrays["x"], arrays["mask"]))
    rounding = 1e-12 if dtype == "float64" else 5e-7
    np.testing.assert_array_equal(np.broadcast_to(found.count, case.parameter_shape), count)
    assert found.mean.shape == found.variance.shape == case.parameter_shape
    error = np.abs(found.mean + found.mean_low - mean)
    assert (error <= rounding * np.sqrt(variance) + 2e-16 * np.abs(mean) + 1e-30).all()
    np.testing.assert_allclose(found.variance, variance, rtol=10 * rounding, atol=1e-30)


@pytest.mark.parametrize("case", [c for c in CASES if c.group is None and 0 not in c.axes and c.shape[0] > 1], ids=str)
def test_merged_parts_of_the_case_table(case: Case) -> None:
    """Cut along the first axis, masks with it."""
    arrays = case.make()
    x, mask = arrays["x"], arrays["mask"]
    cut = len(x) // 3
    parts = [(x[:cut], None if mask is None else mask[:cut]), (x[cut:], None if mask is None else mask[cut:])]
    found = merge(moments(part, axis=case.axis, mask=hidden) for part, hidden in parts)
    whole = moments(x, axis=case.axis, mask=mask)
    np.testing.assert_array_equal(
        np.broadcast_to(found.count, whole.mean.shape), np.broadcast_to(whole.count, whole.mean.shape)
    )
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found.variance, whole.variance, rtol=1e-11, atol=1e-50)


def test_counts_are_whole_numbers_where_float32_has_none() -> None:
    """More than 2^24 values behind a mask."""
    part = Moments(np.array([2**24]), np.zeros(1), np.zeros(1), np.ones(1))
    assert merge([part, moments(np.ones((1, 1)))]).count.tolist() == [2**24 + 1]


def test_moments_of_batch_norm_can_be_merged() -> None:
    x = np.random.default_rng(4).normal(1e4, 1, (64, 3)).astype(np.float32)
    check(merge(batch_norm(chunk)[1] for chunk in (x[:20], x[20:])), x, 3e-7)


def test_moments_that_were_given_have_no_low_part() -> None:
    given_ones = Moments(4, np.array([1.0]), None, np.array([0.25]))
    found = merge([given_ones, given_ones])
    assert (found.count, found.mean.tolist(), found.variance.tolist()) == (8, [1.0], [0.25])


def test_what_is_not_finite_shows() -> None:
    x = np.array([[1.0, 2.0, 3.0], [np.nan, np.inf, 5.0]])
    found = merge([moments(x[:1]), moments(x[1:])])
    assert np.isfinite(found.mean).tolist() == [False, False, True]
    hidden = moments(x, mask=np.isfinite(x))
    assert hidden.mean.tolist() == [1.0, 2.0, 4.0]
    assert hidden.count.tolist() == [1, 1, 2]


def test_what_cannot_be_merged() -> None:
    found = moments(np.ones((4, 3)))
    with pytest.raises(ArgumentError, match=r"one by one, such as .* received a single one, which is merged already"):
        merge(found)
    with pytest.raises(ArgumentError, match="received none"):
        merge([])
    with pytest.raises(ShapeError, match=re.escape("of the same channels; received means of shape (3,) and (2,)")):
        merge([found, moments(np.ones((4, 2)))])
