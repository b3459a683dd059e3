"""Geometry: every shape, axis and mask against plain NumPy, and every error with its values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evennorm import ArgumentError, Geometry, ShapeError
from evennorm.numpy import xp


@st.composite
def arrays_and_axes(draw, min_size=0, batch=False):
    """An array of whole numbers, whose sums are exact in any order, and one or more channel axes, some negative.

    With `batch`, the first axis is averaged over.
    """
    first = 1 if batch else 0
    shape = tuple(draw(st.lists(st.integers(min_size, 4), min_size=1 + first, max_size=5)))
    axes = draw(st.lists(st.integers(first, len(shape) - 1), unique=True, min_size=1))
    return numbered(shape), tuple(a - len(shape) if draw(st.booleans()) else a for a in axes)


def numbered(shape):
    """Whole numbers in no simple order."""
    return np.arange(np.prod(shape), dtype=np.float64).reshape(shape) * 7 % 23


def plain_sum(x, geometry):
    """Sums over the reduced axes, one per channel, by NumPy alone."""
    return x.sum(axis=geometry.reduced).reshape(geometry.channel)


@given(arrays_and_axes())
def test_view_sums_like_numpy(array_and_axis):
    x, axis = array_and_axis
    geometry = Geometry(x.shape, axis)
    view = geometry.view(xp, x)
    assert view.shape == (1, geometry.outer, geometry.channel, geometry.inner)
    np.testing.assert_array_equal(view.sum(axis=(0, 1, 3)), plain_sum(x, geometry))


@given(arrays_and_axes(min_size=1))
def test_view_means_like_numpy(array_and_axis):
    x, axis = array_and_axis
    geometry = Geometry(x.shape, axis)
    expected = np.mean(x, axis=geometry.reduced)
    assert expected.shape == geometry.parameter_shape
    np.testing.assert_allclose(
        geometry.view(xp, x).mean(axis=(0, 1, 3)).reshape(geometry.parameter_shape), expected, rtol=1e-14
    )


@given(arrays_and_axes())
def test_restore_undoes_view(array_and_axis):
    x, axis = array_and_axis
    geometry = Geometry(x.shape, axis)
    np.testing.assert_array_equal(geometry.restore(xp, geometry.view(xp, x), x.shape), x)


@given(arrays_and_axes(batch=True), st.integers(0, 3), st.integers(1, 3))
def test_ghost_batches_are_consecutive_samples(array_and_axis, groups, group_size):
    like, axis = array_and_axis
    x = numbered((groups * group_size, *like.shape[1:]))
    geometry = Geometry((None, *x.shape[1:]), axis)
    view = geometry.view(xp, x, group_size)
    assert view.shape[0] == groups
    assert view.shape[2] == geometry.channel
    for group in range(groups):
        samples = x[group * group_size : (group + 1) * group_size]
        np.testing.assert_array_equal(view[group].sum(axis=(0, 2)), plain_sum(samples, geometry))
    np.testing.assert_array_equal(geometry.restore(xp, view, x.shape), x)


@given(arrays_and_axes(min_size=1))
def test_parameters_broadcast_to_their_channels(array_and_axis):
    x, axis = array_and_axis
    geometry = Geometry(x.shape, axis)
    gamma = np.arange(1.0, geometry.channel + 1)
    seen_as_view = geometry.restore(xp, geometry.view(xp, x) * gamma[:, None], x.shape)
    np.testing.assert_array_equal(seen_as_view, x * gamma.reshape(geometry.broadcast_shape))


def masked_sums(geometry, x, mask, full):
    """Sums of the values a mask keeps: by `mask_view`, and by NumPy with the mask already broadcast to x."""
    seen = geometry.mask_view(xp, mask, x.shape)
    assert seen.shape[2] in (1, geometry.channel)
    return np.where(seen, geometry.view(xp, x), 0).sum(axis=(0, 1, 3)), plain_sum(np.where(full, x, 0), geometry)


@given(arrays_and_axes(min_size=1, batch=True), st.data())
def test_position_masks_stand_for_the_reduced_axes(array_and_axis, data):
    x, axis = array_and_axis
    geometry = Geometry(x.shape, axis)
    covered = geometry.reduced[: data.draw(st.integers(1, len(geometry.reduced)))]
    sizes = tuple(data.draw(st.sampled_from([1, x.shape[a]])) for a in covered)
    mask = np.arange(np.prod(sizes)).reshape(sizes) % 3 != 1
    full = mask.reshape([sizes[covered.index(a)] if a in covered else 1 for a in range(x.ndim)])
    assert geometry.mask_axes(sizes) == covered
    ours, plain = masked_sums(geometry, x, mask, full)
    np.testing.assert_array_equal(ours, plain)


@given(arrays_and_axes(min_size=1), st.data())
def test_masks_of_full_rank_broadcast(array_and_axis, data):
    x, axis = array_and_axis
    geometry = Geometry(x.shape, axis)
    sizes = tuple(data.draw(st.sampled_from([1, size])) for size in x.shape)
    mask = np.arange(np.prod(sizes)).reshape(sizes) % 3 != 1
    assert geometry.mask_axes(sizes) == tuple(range(x.ndim))
    ours, plain = masked_sums(geometry, x, mask, mask)
    np.testing.assert_array_equal(ours, plain)


@given(arrays_and_axes(min_size=1, batch=True), st.integers(1, 3))
def test_masks_follow_ghost_batches(array_and_axis, groups):
    part, axis = array_and_axis
    x = np.concatenate([part + step for step in range(groups)])
    geometry = Geometry(x.shape, axis)
    mask = np.arange(x.shape[0]) % 2 == 0
    seen = geometry.mask_view(xp, mask, x.shape, group_size=part.shape[0])
    kept = np.where(seen, geometry.view(xp, x, part.shape[0]), 0).sum(axis=(1, 3))
    zeroed = np.where(mask.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    expected = [plain_sum(block, geometry) for block in np.split(zeroed, groups)]
    np.testing.assert_array_equal(kept, expected)


CASES = [
    # shape, axis, outer, channel, inner, count, reduced, parameter shape
    ((32, 28, 28, 3), -1, 25088, 3, 1, 25088, (0, 1, 2), (3,)),
    ((32, 3, 28, 28), 1, 32, 3, 784, 25088, (0, 2, 3), (3,)),
    ((256, 1024), -1, 256, 1024, 1, 256, (0,), (1024,)),
    ((8, 16, 128), 1, 8, 16, 128, 1024, (0, 2), (16,)),
    ((5,), 0, 1, 5, 1, 1, (), (5,)),
    ((4, 5), (1, 0), 1, 20, 1, 1, (), (4, 5)),
    ((2, 3, 4, 5), (1, 2), 2, 12, 5, 10, (0, 3), (3, 4)),
    ((2, 3, 4, 5), (-1, 1), 8, 15, 1, 8, (0, 2), (3, 5)),
    ((0, 28, 28, 3), -1, 0, 3, 1, 0, (0, 1, 2), (3,)),
    ((None, 8, 8, 64), -1, None, 64, 1, None, (0, 1, 2), (64,)),
    ((None, 3, 8, 8), 1, None, 3, 64, None, (0, 2, 3), (3,)),
    ((4, 3, None), 1, 4, 3, None, None, (0, 2), (3,)),
]


@pytest.mark.parametrize(("shape", "axis", "outer", "channel", "inner", "count", "reduced", "parameter_shape"), CASES)
def test_values(shape, axis, outer, channel, inner, count, reduced, parameter_shape):
    geometry = Geometry(shape, axis)
    assert (geometry.outer, geometry.channel, geometry.inner, geometry.count) == (outer, channel, inner, count)
    assert (geometry.reduced, geometry.parameter_shape) == (reduced, parameter_shape)
    assert geometry.broadcast_shape == tuple(s if a in geometry.axis else 1 for a, s in enumerate(shape))


def test_order_and_sign_of_axes_do_not_matter():
    assert Geometry((2, 3, 4), (2, 0)) == Geometry([2, 3, 4], [-3, -1])
    assert hash(Geometry((2, 3, 4), (2, 0))) == hash(Geometry((2, 3, 4), (0, 2)))
    assert Geometry((2, 3, 4), 1) != Geometry((2, 3, 4), 2)


def test_numbers_of_numpy_are_sizes_and_axes():
    geometry = Geometry(np.array([2, 3]), np.int64(-1))
    assert geometry == Geometry((2, 3), -1)
    assert type(geometry.shape[0]) is int
    assert type(geometry.axis[0]) is int


@pytest.mark.parametrize("axis", [0, 1, 2, 3, (0, 1), (1, 2), (2, 3), (0, 1, 2, 3)])
def test_adjacent_axes_need_no_copy(axis):
    x = np.zeros((2, 3, 4, 5))
    geometry = Geometry(x.shape, axis)
    assert geometry.permutation is None
    assert np.shares_memory(geometry.view(xp, x), x)


@pytest.mark.parametrize(
    ("axis", "permutation"), [((0, 2), (1, 3, 0, 2)), ((1, 3), (0, 2, 1, 3)), ((0, 1, 3), (2, 0, 1, 3))]
)
def test_axes_apart_are_brought_together(axis, permutation):
    assert Geometry((2, 3, 4, 5), axis).permutation == permutation


def test_empty_batch_has_no_ghost_batches():
    geometry = Geometry((None, 4, 3), -1)
    assert geometry.view(xp, np.zeros((0, 4, 3)), 2).shape == (0, 8, 3, 1)


class TestMasks:
    def test_positions_win_where_channels_and_steps_are_as_many(self):
        # (N, C, T) with C = T: a mask (N, T) holds for steps, never for channels.
        assert Geometry((2, 4, 4), 1).mask_axes((2, 4)) == (0, 2)
        x = np.arange(32.0).reshape(2, 4, 4)
        mask = np.array([[True, True, False, False], [True, False, False, False]])
        seen = Geometry(x.shape, 1).mask_view(xp, mask, x.shape)
        np.testing.assert_array_equal(seen, mask.reshape(1, 2, 1, 4))

    def test_leading_axes_where_only_those_fit(self):
        assert Geometry((2, 3, 5), 1).mask_axes((2, 3)) == (0, 1)
        x = np.arange(30.0).reshape(2, 3, 5)
        mask = np.array([[True, True, False], [True, False, False]])
        seen = Geometry(x.shape, 1).mask_view(xp, mask, x.shape)
        assert seen.shape == (1, 2, 3, 5)
        np.testing.assert_array_equal(seen, np.broadcast_to(mask[None, :, :, None], (1, 2, 3, 5)))

    def test_mask_over_samples(self):
        assert Geometry((2, 3, 5), 1).mask_axes((2,)) == (0,)
        seen = Geometry((2, 3, 5), 1).mask_view(xp, np.array([True, False]), (2, 3, 5))
        np.testing.assert_array_equal(seen[0, :, 0, :], [[True] * 5, [False] * 5])

    def test_positions_where_the_first_axis_is_the_channel(self):
        assert Geometry((3, 4, 5), 0).mask_axes((4, 5)) == (1, 2)

    def test_mask_with_one_channel_in_full_rank(self):
        assert Geometry((2, 4, 3), -1).mask_axes((2, 4, 1)) == (0, 1, 2)

    def test_unknown_sizes_fit(self):
        assert Geometry((None, 8, None), 1).mask_axes((None, 10)) == (0, 2)
        assert Geometry((None, None, 8), -1).mask_axes((4, None)) == (0, 1)

    def test_mask_over_axes_apart(self):
        x = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
        geometry = Geometry(x.shape, (1, 3))
        mask = np.arange(8).reshape(2, 4) % 3 == 0
        seen = geometry.mask_view(xp, mask, x.shape)
        assert seen.shape == (1, 8, 1, 1)
        np.testing.assert_array_equal(seen.ravel(), mask.ravel())

    @pytest.mark.parametrize("mask", [(3, 5), (2, 4), (2, 5, 3), (2, 3, 5, 1), (), (2, 0)])
    def test_others_are_refused(self, mask):
        with pytest.raises(ShapeError) as error:
            Geometry((2, 3, 5), 1).mask_axes(mask)
        received = f"({mask[0]},)" if len(mask) == 1 else str(mask)
        assert str(error.value) == (
            "a mask holds one value per position, (2, 5) here, or broadcasts against the array (2, 3, 5) (axis=1); "
            f"received a mask of shape {received}"
        )

    def test_refusal_writes_unknown_sizes(self):
        with pytest.raises(ShapeError, match=r"per position, \(\?, 5\) here, .* \(\?, 3, 5\) \(axis=1\); .* shape \(4, 7\)"):
            Geometry((None, 3, 5), 1).mask_axes((4, 7))


ERRORS = [
    ((), -1, "batch normalization needs an array with at least one axis; received the empty shape (), a single number"),
    ((2, -3), -1, "sizes are positive, 0 for an empty batch, or None where unknown; received shape (2, -3)"),
    ((2, 2.5), -1, "a size is a whole number; received 2.5; give an int"),
    ((2, "x"), -1, "a size is a whole number; received 'x'; give an int"),
    ((2, float("inf")), -1, "a size is a whole number; received inf; give an int"),
    ((2, 3), 1.5, "an axis is a whole number; received 1.5; give an int"),
    ((2, 3), None, "an axis is a whole number; received None; give an int"),
    ((2, 3), (), "at least one channel axis is needed; received axis=() for shape (2, 3); channels-last is -1"),
    (
        (2, 3, 4, 5),
        4,
        "axis 4 was asked of a shape of rank 4, (2, 3, 4, 5); valid axes are -4 to 3; channels-last is -1, "
        "channels-first is 1",
    ),
    (
        (None,),
        -2,
        "axis -2 was asked of a shape of rank 1, (?,); valid axes are -1 to 0; channels-last is -1, channels-first is 1",
    ),
    ((2, 3, 4), (1, -2), "each axis may be named once; received axis=(1, -2) for shape (2, 3, 4), which is (1, 1)"),
    (
        (32, 28, None),
        -1,
        "the channel axis needs a known size, since gamma and beta have one value per channel; axis 2 of shape "
        "(32, 28, ?) is unknown; give its size or choose another axis",
    ),
]


@pytest.mark.parametrize(("shape", "axis", "text"), ERRORS)
def test_errors(shape, axis, text):
    with pytest.raises(ShapeError) as error:
        Geometry(shape, axis)
    assert str(error.value) == text


def test_error_of_ghost_batches_over_a_channel():
    with pytest.raises(ShapeError) as error:
        Geometry((4, None), 0).view(xp, np.zeros((4, 2)), 2)
    assert str(error.value) == (
        "ghost batches divide the first axis, which axis=0 of shape (4, ?) declares a channel; "
        "drop virtual_batch_size or choose another axis"
    )


def test_error_of_a_batch_that_does_not_divide():
    with pytest.raises(ShapeError) as error:
        Geometry((None, 3), -1).view(xp, np.zeros((7, 3)), 2)
    assert str(error.value) == (
        "virtual_batch_size must divide the batch: received 7 samples and virtual_batch_size=2; "
        "drop the remainder of the data set or choose a divisor"
    )


@pytest.mark.parametrize("group_size", [0, -2])
def test_error_of_a_ghost_batch_without_samples(group_size):
    with pytest.raises(ArgumentError) as error:
        Geometry((4, 3), -1).view(xp, np.zeros((4, 3)), group_size)
    assert (
        str(error.value) == f"virtual_batch_size is a number of samples, 1 or more; received virtual_batch_size={group_size}"
    )


def test_explain_is_the_text_of_the_explanation():
    text = Geometry((32, 3, 28, 28), -1).explain()
    assert text.startswith("Batch normalization: shape (32, 3, 28, 28), axis 3 (-1)\n")
    assert "Warning [spatial-axis]: Axis 3 (-1) looks like the width of channels-first" in text
