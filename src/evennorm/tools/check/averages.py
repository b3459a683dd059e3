"""Find mistakes in the moving statistics: never updated, not yet converged, a momentum in the other framework's
convention."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from evennorm.models.network import Network, Step
from evennorm.models.state import BatchNormState
from evennorm.tools.check.rule import Found, Subject, each_layer, rule, written

LEFT = 0.01
"""Fraction of the initial values that may be left in the moving statistics."""


def never_updated(state: BatchNormState) -> bool:
    """Return whether the moving statistics are exactly those that a new layer has."""
    if state.mean is None or state.variance is None or state.mode or not state.mean.size:
        return False
    return bool(np.all(state.mean == 0) and np.all(state.variance == 1))


def moved(state: BatchNormState) -> bool:
    """Return whether training has changed gamma or beta, which in a new layer are the same in all channels."""
    return any(values is not None and np.any(values != values.reshape(-1)[:1]) for values in (state.gamma, state.beta))


def updates(subject: Subject, step: Step) -> int | None:
    """Return how many batches a layer's averages have seen, as far as it is known."""
    if subject.steps is not None:
        return subject.steps
    if step.state is not None and step.state.updates is not None:
        return step.state.updates
    taken = subject.network.iterations
    return None if taken is None else taken * len(subject.network.calls(step))


@rule(
    "BN301",
    "statistics-never-updated",
    "error",
    "Moving statistics that were never updated",
    "At inference the layer normalizes by mean 0 and variance 1, which is no normalization at all. So the model predicts "
    "something other than what it learned.",
    fixable=True,
)
def statistics_never_updated(subject: Subject) -> Iterator[Found]:
    for step in each_layer(subject.network):
        state = step.state
        if state is None or not never_updated(state):
            continue
        taken = updates(subject, step)
        if taken or moved(state):
            trained = f"after {taken:,} training steps" if taken else "while gamma or beta have been trained"
            yield Found(
                step.layer,
                f"its moving mean is exactly 0 and its moving variance exactly 1 {trained}",
                _update(subject.network, step),
            )


def _update(network: Network, step: Step) -> str:
    if not step.trainable and network.framework == "keras":
        return "load its weights before it is frozen, or leave it trainable; or set the statistics by `evennorm recalibrate`"
    loop = {
        "torch": "train it in model.train() mode",
        "keras": "let the training loop call the model with training=True and keep its non-trainable variables",
    }.get(network.framework, "train it in training mode")
    return f"{loop}; `evennorm recalibrate`, or --fix with --data, sets the statistics from data"


@rule(
    "BN302",
    "statistics-not-converged",
    "warning",
    "Moving statistics that have not converged for the steps taken",
    "The moving averages still contain part of their initial values, 0 and 1. Inference then normalizes by a mixture of "
    "these and the data's statistics, and validation looks worse than training.",
    fixable=True,
)
def statistics_not_converged(subject: Subject) -> Iterator[Found]:
    for step in each_layer(subject.network):
        state, taken = step.state, updates(subject, step)
        if state is None or not taken or not step.trainable or state.mean is None or never_updated(state) or state.mode:
            continue
        decay = state.decay
        if decay is None or not 0 < decay < 1 or decay**taken <= LEFT or _began_elsewhere(state, decay**taken):
            continue
        if _measured_to_fit(subject, step):
            continue
        needed = math.ceil(math.log(LEFT) / math.log(decay))
        lower = math.floor(100 * LEFT ** (1 / taken)) / 100
        change = f"a lower weight of the old average ({written(subject.network, lower)})" if lower else "more steps"
        yield Found(
            step.layer,
            f"with {written(subject.network, decay)}, {100 * decay**taken:.2g} % of the initial values are left after "
            f"{taken:,} step{'s' if taken > 1 else ''}; it needs {needed:,} until {100 * LEFT:g} % is left",
            f"train for at least {needed:,} steps, or use {change}, or run `evennorm recalibrate`",
        )


def _began_elsewhere(state: BatchNormState, left: float) -> bool:
    """Return whether variances are too small for `left` parts of 1 and something positive: they were loaded from
    elsewhere."""
    return state.variance is not None and bool(np.any(np.asarray(state.variance, float) < 0.99 * left))


def _measured_to_fit(subject: Subject, step: Step) -> bool:
    """Return whether data shows that the remaining initial values do no harm: few are left, or the layer was
    recalibrated."""
    measured = None if subject.measurements is None else subject.measurements.of(step.name)
    return measured is not None and measured.drift < 0.1 and 0.8 < measured.variance_ratio < 1.25


@rule(
    "BN303",
    "momentum-convention",
    "warning",
    "A momentum written in the other framework's convention",
    "Keras's momentum is the weight of the old average (0.99), torch's that of the new batch (0.01). If you mix them up, "
    "the moving statistics follow only the last few batches, and inference is as noisy as these.",
)
def momentum_convention(subject: Subject) -> Iterator[Found]:
    network = subject.network
    for step in each_layer(network):
        decay = None if step.state is None else step.state.decay
        if decay is not None and decay < 0.5:
            here, other = ("torch", "Keras") if network.framework == "torch" else ("Keras", "torch")
            yield Found(
                step.layer,
                f"{written(network, decay)} gives the last batch a weight of {1 - decay:.4g}, as if it were {other}'s",
                f"in {here} write {written(network, round(1 - decay, 12))}",
            )
