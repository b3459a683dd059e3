"""Find mistakes beside the layer: a bias, another normalization, the output, a dropout."""

from __future__ import annotations

from collections.abc import Iterator

from evennorm.models.network import Network, Role, Step
from evennorm.tools.check.flow import declared_axis, leaves, readers, resolved_axis, source
from evennorm.tools.check.rule import Found, Subject, each_layer, rule

_SHRINKING = ("softmax", "log_softmax", "sigmoid", "log_sigmoid", "hard_sigmoid", "tanh", "hard_tanh")
_MAPPING = ("softmax", "log_softmax")


def redundant_bias(network: Network, linear: Step) -> bool:
    """Return whether everything that reads a linear layer's output subtracts a mean per channel, at each of its calls."""
    if linear.role is not Role.LINEAR or not linear.bias or linear.activation is not None:
        return False
    for call in network.calls(linear):
        following = list(network.consumers(call))
        if not following or call.name in network.outputs or not all(_subtracts(network, call, x) for x in following):
            return False
    return True


def _subtracts(network: Network, linear: Step, norm: Step) -> bool:
    if norm.role is not Role.BATCH_NORM or norm.state is None or norm.state.mode == 1 or norm.inputs[0] != linear.name:
        return False
    axes, declared = resolved_axis(norm), declared_axis(network, norm)
    return axes is None or declared is None or declared[0] in axes


@rule(
    "BN201",
    "bias-before-norm",
    "note",
    "A bias straight before batch normalization",
    "Batch normalization subtracts the mean of each channel, and the bias with it. So the bias has no effect; beta takes "
    "its place.",
    fixable=True,
)
def bias_before_norm(subject: Subject) -> Iterator[Found]:
    network, seen = subject.network, set()
    for step in network.batch_norms():
        linear = network[step.inputs[0]] if step.inputs else None
        if linear is None or linear.layer in seen or not redundant_bias(network, linear):
            continue
        seen.add(linear.layer)
        word = "bias=False" if network.framework == "torch" else "use_bias=False"
        yield Found(
            linear.layer, f"it adds a bias that {step.layer} subtracts again", f"build it with {word}, or let --fix drop it"
        )


@rule(
    "BN202",
    "norm-after-norm",
    "warning",
    "Two normalizations in a row",
    "The input of the second one is normalized already. It only adds time, noise from the batch, and parameters that "
    "repeat those of the first.",
)
def norm_after_norm(subject: Subject) -> Iterator[Found]:
    network, kinds = subject.network, (Role.BATCH_NORM, Role.NORM)
    seen = set()
    for step in network.steps:
        if step.role not in kinds or step.layer in seen:
            continue
        first = source(network, step)
        if first is None or first.role not in kinds or Role.BATCH_NORM not in (step.role, first.role):
            continue
        if first.activation is None and "Normalization" not in (first.kind, step.kind):
            seen.add(step.layer)
            yield Found(
                step.layer,
                f"it normalizes the output of {first.layer} ({first.kind}), with nothing between them",
                "leave out one of the two",
            )


@rule(
    "BN203",
    "norm-at-output",
    "warning",
    "Normalization of the output, or right before softmax",
    "The output then has a fixed mean and spread over each batch. In training, an output depends on which samples share "
    "its batch, and the network cannot be as certain, or as far from the average, as the data requires.",
)
def norm_at_output(subject: Subject) -> Iterator[Found]:
    network = subject.network
    remedy = "leave it out: end with the linear layer, with a bias, and its activation"
    for step in each_layer(network):
        if step.activation in _MAPPING:
            yield Found(step.layer, f"it normalizes what its own {step.activation} takes", remedy)
        elif step.activation is None and leaves(network, step, (Role.RESHAPE,)):
            yield Found(step.layer, "its output is the output of the model", remedy)
        elif step.activation is None:
            for reader in readers(network, step, (Role.RESHAPE,)):
                last = reader.activation in _SHRINKING and leaves(network, reader, (Role.RESHAPE,))
                if reader.role is Role.SOFTMAX or (reader.role is Role.ACTIVATION and last):
                    yield Found(step.layer, f"it normalizes what {reader.layer} ({reader.activation}) takes", remedy)
                    break


@rule(
    "BN204",
    "dropout-before-norm",
    "warning",
    "Dropout straight before normalization",
    "Dropout raises the variance in training but not at inference, so the moving variance is too large for what the layer "
    "sees at inference (Li et al. 2018, arXiv 1801.05134).",
)
def dropout_before_norm(subject: Subject) -> Iterator[Found]:
    network = subject.network
    between = (Role.ACTIVATION, Role.POOLING, Role.PADDING, Role.RESHAPE)
    for step in each_layer(network):
        dropout = source(network, step, between)
        if dropout is not None and dropout.role is Role.DROPOUT and dropout.rate != 0:
            rate = "" if dropout.rate is None else f" (rate {dropout.rate:g})"
            yield Found(
                step.layer,
                f"it normalizes what comes out of {dropout.layer}{rate}",
                "put the dropout after the last normalization, before the output layer",
            )
