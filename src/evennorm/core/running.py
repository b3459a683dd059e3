"""Update running statistics from the moments of a batch, and protect them from bad ones.

running = running + (batch - running) * (1 - decay)

A batch whose statistics are not finite, an empty one, and one whose mask hides everything change nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from evennorm.core.moments import Moments
from evennorm.core.namespace import Array, Namespace

_HALF_UNIT = 2.0**-24  # of the last place of a float32, relative to its value


class Batch(NamedTuple):
    """What one batch says of each channel, (channel,), and whether it may be believed."""

    mean: Array
    mean_low: Array
    variance: Array
    accepted: Array
    """Scalar: the batch holds values, and its statistics are finite in every channel that holds some."""
    has_mean: Array
    """(channel,): accepted, and the channel holds at least one value."""
    has_variance: Array
    """(channel,): accepted, and the channel holds two values, the least that a variance can be told from."""


class RunningMean(NamedTuple):
    """A running mean, and the part of it that rounding took away.

    A float32 near 100000 stops moving once the step is below 0.004, so that decay 0.99 would leave it up to 0.4 beside the
    true mean. `low` keeps what was lost and gives it back to the next update; inference reads `mean` alone.
    """

    mean: Array
    low: Array


def summary(xp: Namespace, moments: Moments, unbiased: bool = False) -> Batch:
    """Summarize moments (groups, channel) as those of one batch, (channel,): the average over ghost batches that hold
    values.

    The average, not the pooled variance: a ghost batch is normalized by its own statistics, and inference is to match
    (Hoffer et al. 2017, arXiv 1705.08741; tf.keras's virtual_batch_size). `unbiased` multiplies by n / (n - 1).
    """
    dtype = xp.dtype(moments.mean)
    count = xp.broadcast_to(xp.asarray(moments.count, like=moments.mean), xp.shape(moments.mean))

    def groups(holding: Array) -> Array:
        return xp.sum(xp.astype(holding, dtype), (0,))

    def average(values: Array, holding: Array) -> Array:
        return xp.sum(xp.where(holding, values, 0.0), (0,)) / xp.maximum(groups(holding), 1.0)

    base = xp.sum(moments.mean[:1], (0,))  # not mean[0]: an empty batch has no ghost batches
    mean_low = average((moments.mean - base) + moments.mean_low, count >= 1)
    variance = moments.variance * (count / xp.maximum(count - 1, 1.0)) if unbiased else moments.variance
    variance = average(variance, count >= 2)
    has_mean = groups(count >= 1) > 0
    finite = xp.isfinite(base + mean_low) & xp.isfinite(variance)
    accepted = xp.all(finite | ~has_mean) & xp.any(has_mean)
    return Batch(base, mean_low, variance, accepted, accepted & has_mean, accepted & (groups(count >= 2) > 0))


def updated_mean(xp: Namespace, running: RunningMean, batch: Batch, decay: Any) -> RunningMean:
    """Return the running mean after one more batch; `decay` is the weight of the old one, 0 to 1."""
    # More than rounding, or NaN, is not of this mean: it was set from outside.
    own = xp.maximum(running.low, -running.low) <= _HALF_UNIT * xp.maximum(running.mean, -running.mean)
    low = xp.where(own, running.low, 0.0)
    low = low + ((batch.mean - running.mean) + (batch.mean_low - low)) * (1 - decay)
    mean = running.mean + low
    low = low - (mean - running.mean)
    return RunningMean(xp.where(batch.has_mean, mean, running.mean), xp.where(batch.has_mean, low, running.low))


def updated(xp: Namespace, running: Array, new: Array, decay: Any, where: Array) -> Array:
    """Return any other running statistic after one more batch, updated in the channels that `where` selects."""
    # From the nearer end: with decay 0, 1 + (1e-6 - 1) * 1 would have lost most of the new 1e-6.
    from_running, from_new = running + (new - running) * (1 - decay), new + (running - new) * decay
    if isinstance(decay, float):
        nearer = from_new if decay < 0.5 else from_running
    else:
        nearer = xp.where(decay < 0.5, from_new, from_running)
    return xp.where(where, nearer, running)


def cumulative_decay(xp: Namespace, batches: Array) -> Array:
    """Return the decay that gives all batches so far, this one included, the same weight: n / (n + 1) after n batches."""
    return batches / (batches + 1)
