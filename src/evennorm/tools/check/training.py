"""Find mistakes in how a layer is trained: weight decay, sharing, freezing, and too few values behind each mean."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from evennorm.explanation.findings import FEW_VALUES, percent, relative_error
from evennorm.models.network import Network, Role, Step
from evennorm.tools.check.flow import resolved_axis, source
from evennorm.tools.check.rule import Found, Subject, each_layer, rule

_APART = 1.0
"""Standard deviations between the means of two calls that one moving average cannot represent."""


@rule(
    "BN501",
    "weight-decay",
    "note",
    "Weight decay on gamma or beta",
    "The next layer can undo the scale, so decay of gamma does not regularize the network. It only pulls channels to 0, "
    "and beta away from where the activation needs it.",
)
def weight_decay(subject: Subject) -> Iterator[Found]:
    if subject.network.framework == "torch":
        remedy = "put the parameters of normalization into a parameter group with weight_decay=0"
    else:
        remedy = 'leave out the regularizer, or optimizer.exclude_from_weight_decay(var_names=["gamma", "beta"])'
    for step in each_layer(subject.network):
        if step.decayed:
            yield Found(step.layer, f"weight decay acts on its {' and '.join(step.decayed)}", remedy)


@rule(
    "BN502",
    "shared-layer",
    "warning",
    "A layer shared across inputs with different statistics",
    "In training each call normalizes by its own batch. At inference all calls use one moving average, which fits none of "
    "them.",
)
def shared_layer(subject: Subject) -> Iterator[Found]:
    network = subject.network
    remedy = "give each input a batch normalization of its own; convolutions may stay shared"
    for step in each_layer(network):
        calls = network.calls(step)
        if len(calls) < 2:
            continue
        apart = _measured_apart(subject, step)
        makers = [source(network, call) for call in calls]
        named = dict.fromkeys(maker.layer for maker in makers if maker is not None and maker.role is not Role.INPUT)
        if apart is not None:
            if apart > _APART:
                what = (
                    f"it is called {len(calls)} times, on data whose means are up to {apart:.2g} standard deviations apart"
                )
                yield Found(step.layer, what, remedy)
        elif len(named) > 1:
            yield Found(step.layer, f"it is called {len(calls)} times, after {' and after '.join(named)}", remedy)


def _measured_apart(subject: Subject, step: Step) -> float | None:
    """Return the largest root mean square distance between the means of two calls, in standard deviations; None if not
    measured."""
    if subject.measurements is None:
        return None
    seen = [subject.measurements.of(call.name) for call in subject.network.calls(step)]
    found = [layer for layer in seen if layer is not None]
    if len(found) < 2:
        return None
    first, *others = found
    deviation = np.sqrt(np.maximum(np.minimum.reduce([layer.batch_variance for layer in found]), 1e-12) + first.epsilon)
    return max(float(np.sqrt(np.mean(((x.batch_mean - first.batch_mean) / deviation) ** 2))) for x in others)


@rule(
    "BN503",
    "frozen-but-training",
    "error",
    "A frozen layer that still runs in training mode",
    "Its statistics move with the new data and each batch is normalized by itself, so that what was frozen changes with "
    "every step although no weight does.",
)
def frozen_but_training(subject: Subject) -> Iterator[Found]:
    torch = subject.network.framework == "torch"
    for step in each_layer(subject.network):
        if torch and step.training and not step.trainable:
            yield Found(
                step.layer,
                "its weight and bias take no gradient, but it is in training mode",
                "call .eval() on it after each model.train(), or use a frozen batch normalization",
            )
        elif not torch and step.asked is False and step.trainable:
            yield Found(
                step.layer,
                "it is called with training=False to freeze it, but fit passes training=True to every layer of a functional "
                "model, and it is trainable",
                "set trainable = False on it: in Keras that makes it normalize by its moving statistics",
            )


@rule(
    "BN504",
    "unfrozen-in-frozen",
    "warning",
    "An unfrozen layer inside a frozen backbone",
    "The frozen layers after it were trained for its old output. New statistics, gamma and beta change that output, and "
    "frozen layers cannot adapt.",
)
def unfrozen_in_frozen(subject: Subject) -> Iterator[Found]:
    network = subject.network
    after = _with_frozen_behind(network)
    for step in each_layer(network):
        if not step.trainable or step.asked is False:
            continue
        maker = source(network, step, (Role.ACTIVATION, Role.POOLING, Role.PADDING, Role.DROPOUT, Role.ADD, Role.MERGE))
        frozen_before = maker is not None and maker.role is Role.LINEAR and not maker.trainable
        if maker is not None and frozen_before and step.name in after:
            remedy = (
                "freeze it too, by requires_grad_(False) and .eval()" if network.framework == "torch" else "freeze it too"
            )
            yield Found(
                step.layer, f"it is trainable between frozen layers, after {maker.layer}", f"{remedy}, or unfreeze both"
            )


def _with_frozen_behind(network: Network) -> set[str]:
    """Return the steps whose output reaches a frozen linear layer through steps without weights."""
    found: set[str] = set()
    for step in reversed(network.steps):
        for reader in network.consumers(step):
            if (reader.role is Role.LINEAR and not reader.trainable) or (
                reader.role is not Role.LINEAR and reader.role is not Role.BATCH_NORM and reader.name in found
            ):
                found.add(step.name)
    return found


@rule(
    "BN505",
    "few-values",
    "warning",
    "Too few values per channel",
    "Mean and variance of so few values are noise. Training then sees another network than inference, and learns less well.",
)
def few_values(subject: Subject) -> Iterator[Found]:
    for step in each_layer(subject.network):
        values = _values(subject, step)
        if values is None or values >= FEW_VALUES or not step.trainable:
            continue
        share = _share(subject, step)
        error = relative_error(values)
        noise = "the output is always beta" if error is None else f"each variance is off by about {percent(error)}"
        remedy = "use larger batches, or group or layer normalization, which do not depend on the batch"
        if _is_split(subject, step):
            remedy = f"synchronize the statistics of the replicas, or {remedy}"
        what = f"each mean is computed from {values} value{'s' if values > 1 else ''}{share}; {noise}"
        yield Found(step.layer, what, remedy, level="error" if values == 1 else "")


def _share(subject: Subject, step: Step) -> str:
    if subject.replicas == 1:
        return ""
    split = _is_split(subject, step)
    return f" on each of {subject.replicas} replicas" if split else f" of all {subject.replicas} replicas together"


def _is_split(subject: Subject, step: Step) -> bool:
    return subject.replicas > 1 and step.state is not None and not step.state.synchronized


def _values(subject: Subject, step: Step) -> int | None:
    """Return the number of values behind each mean in training; None where a size is unknown."""
    axes = resolved_axis(step)
    if step.shape is None or axes is None or step.state is None or step.state.mode == 1:
        return None
    batch = subject.batch_size if subject.batch_size is not None else step.shape[0]
    sizes = [size for axis, size in enumerate(step.shape) if axis not in (0, *axes)]
    if batch is None or 0 in axes:
        return None
    known = [size for size in sizes if size is not None]
    if _is_split(subject, step):
        batch = max(batch // subject.replicas, 1)
    if step.state.virtual_batch_size:
        batch = min(batch, step.state.virtual_batch_size)
    return batch * prod(known) if len(known) == len(sizes) else None


@rule(
    "BN506",
    "always-training",
    "warning",
    "Batch statistics at inference",
    "A prediction depends on which samples share its batch, and each prediction moves the moving statistics.",
)
def always_training(subject: Subject) -> Iterator[Found]:
    for step in each_layer(subject.network):
        torch = subject.network.framework == "torch"
        if step.state is not None and step.state.mode == 2:
            yield Found(
                step.layer,
                f"{'it keeps no running statistics' if torch else 'it is of mode 2'}, and so normalizes by the batch at "
                "inference too",
                "keep running statistics (track_running_stats=True) and train on until they have followed the data"
                if torch
                else "use mode=0 and train on until the moving statistics have followed the data",
                why="A prediction depends on which samples share its batch.",
            )
        elif not torch and step.training and step.trainable:
            yield Found(
                step.layer,
                "its call is fixed to training=True",
                "pass on the training argument that the model is called with, or leave it out",
            )
