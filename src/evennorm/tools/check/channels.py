"""Find mistakes in single channels: NaN and infinity, gamma or variance near 0, exploding ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from evennorm.models.network import Role
from evennorm.models.state import BatchNormState
from evennorm.monitor.measures import dead_below
from evennorm.tools.check.averages import moved, never_updated
from evennorm.tools.check.flow import source
from evennorm.tools.check.rule import Found, Subject, channels, each_layer, rule

_CONSTANT = 1e-4
"""A variance below this fraction of epsilon leaves less than 1 % of the output's spread."""
_HUGE = 1e8
_LARGEST_HALF = 65504.0
_ARRAYS = {"gamma": "gamma", "beta": "beta", "mean": "the moving mean", "variance": "the moving variance"}


def _indices(wanted: np.ndarray) -> list[int]:
    return np.flatnonzero(wanted).tolist()


def _finite(state: BatchNormState) -> bool:
    arrays = [getattr(state, name) for name in _ARRAYS]
    return all(values is None or bool(np.all(np.isfinite(values))) for values in arrays)


@rule(
    "BN403",
    "not-finite",
    "error",
    "NaN, infinity or a negative variance",
    "A moving average that holds NaN keeps it for good, and one such channel makes every prediction NaN.",
    fixable=True,
)
def not_finite(subject: Subject) -> Iterator[Found]:
    for step in each_layer(subject.network):
        for name, words in _ARRAYS.items():
            values = None if step.state is None else getattr(step.state, name)
            if values is None:
                continue
            bad = ~np.isfinite(values) | ((values < 0) if name == "variance" else False)
            if np.any(bad):
                kind = "is not finite" if np.any(~np.isfinite(values)) else "is negative"
                if name in ("gamma", "beta"):
                    remedy = "go back to the last checkpoint that is finite; lower the learning rate or clip gradients"
                else:
                    remedy = (
                        "run `evennorm recalibrate`, or --fix with --data, and look for the batch that held NaN; "
                        "evennorm's layers leave their statistics alone on such a batch"
                    )
                yield Found(step.layer, f"{words} {kind} in {channels(_indices(bad), values.size)}", remedy)


@rule(
    "BN404",
    "dead-gamma",
    "note",
    "Channels whose gamma is near 0",
    "Such a channel returns beta for any input. Its computation is wasted, and the layers before it learn nothing from it.",
)
def dead_gamma(subject: Subject) -> Iterator[Found]:
    for step in each_layer(subject.network):
        state = step.state
        if state is None or state.gamma is None or not moved(state) or not _finite(state):
            continue
        size = np.abs(np.asarray(state.gamma, np.float64))
        least = dead_below(size)
        dead = size < least
        if np.any(dead):
            yield Found(
                step.layer,
                f"gamma is below {least:.1g} in {channels(_indices(dead), size.size)}",
                "take weight decay off gamma if they are more than a few, or prune these channels",
            )


@rule(
    "BN405",
    "constant-channels",
    "note",
    "Channels that are constant",
    "Their moving variance is tiny compared with epsilon, so they return beta for any input. Usually the unit before "
    "them, often a ReLU, is dead.",
)
def constant_channels(subject: Subject) -> Iterator[Found]:
    for step in each_layer(subject.network):
        state = step.state
        if state is None or state.variance is None or never_updated(state) or state.mode or not _finite(state):
            continue
        variance = np.asarray(state.variance, np.float64)
        limit = _CONSTANT * state.epsilon
        dead = (variance <= limit) & (variance >= 0)
        if np.any(dead):
            yield Found(
                step.layer,
                f"the moving variance is at most {limit:.1g} in {channels(_indices(dead), variance.size)}",
                "look for dead units before the layer: a lower learning rate, normalization before the activation, or "
                "a LeakyReLU keeps them alive",
            )


@rule(
    "BN406",
    "exploding-channels",
    "warning",
    "Channels that explode",
    "Values this large lose precision and overflow in float16. The layers before did not stay in range.",
)
def exploding_channels(subject: Subject) -> Iterator[Found]:
    network = subject.network
    for step in each_layer(network):
        state = step.state
        if state is None or state.variance is None or state.mean is None or not _finite(state) or state.mode:
            continue
        deviation = np.sqrt(np.maximum(np.asarray(state.variance, np.float64), 0))
        reach = np.abs(np.asarray(state.mean, np.float64)) + 6 * deviation
        half = step.dtype == "float16"
        above = reach > _LARGEST_HALF if half else deviation**2 > _HUGE
        first = source(network, step)
        raw = first is not None and first.role is Role.INPUT and not half
        if np.any(above) and not raw:
            limit = (
                f"reaches beyond {_LARGEST_HALF:g}, the largest float16," if half else f"has a variance above {_HUGE:.0g}"
            )
            yield Found(
                step.layer,
                f"what comes in {limit} in {channels(_indices(above), deviation.size)}",
                "scale the inputs, lower the learning rate, or normalize earlier; check the weights before the layer",
            )
