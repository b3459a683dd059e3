"""Find mistakes about the axis: one that is not the channel axis, and channels-first data under axis -1."""

from __future__ import annotations

from collections.abc import Iterator

from evennorm.explanation.data_format import DataFormat
from evennorm.models.network import Network, Role, Step
from evennorm.tools.check.averages import moved, never_updated, updates
from evennorm.tools.check.flow import declared_axis, resolved_axis
from evennorm.tools.check.rule import Found, Subject, each_layer, rule


def _right_axis(network: Network, step: Step) -> tuple[int, str] | None:
    """Return the channel axis at a layer, and how that is known."""
    declared = declared_axis(network, step)
    if declared is not None:
        axis, layer = declared
        return axis, f"{layer.layer} has its channels on axis {axis}"
    if step.shape is None or len(step.shape) < 3 or not step.inputs:
        return None
    if network[step.inputs[0]].role is not Role.INPUT:
        return None
    looks = DataFormat.of(step.shape)
    return (looks.channel_axis, f"the input looks like {looks.name}") if looks.certainty == "clear" else None


def _wrong(subject: Subject) -> Iterator[tuple[Step, int, int, str]]:
    """Yield layers whose one axis is not the channel axis: the step, its axis, the right one, and how that is known."""
    for step in each_layer(subject.network):
        axes = resolved_axis(step)
        right = _right_axis(subject.network, step)
        mode_1 = step.state is not None and step.state.mode == 1
        if axes is not None and right is not None and len(axes) == 1 and not mode_1 and axes[0] != right[0]:
            yield step, axes[0], right[0], right[1]


def _is_channels_first(step: Step, axis: int, right: int) -> bool:
    return right == 1 and step.shape is not None and axis == len(step.shape) - 1


def _what(step: Step, axis: int, known: str) -> str:
    size = step.shape[axis] if step.shape else None
    positions = "each position" if size is None else f"each of its {size:,} positions"
    return f"it normalizes along axis {axis}, so that {positions} has its own mean and gamma, but {known}"


def _trained(subject: Subject, step: Step) -> str:
    """Return a warning where a layer was trained as it is: its arrays belong to its axis."""
    state = step.state
    if state is None or not (
        updates(subject, step) or moved(state) or (state.mean is not None and not never_updated(state))
    ):
        return ""
    return (
        "; it was trained so, and its gamma, beta and statistics belong to that axis: changing it breaks the model until it "
        "is trained anew"
    )


@rule(
    "BN101",
    "wrong-axis",
    "error",
    "An axis that is not the channel axis",
    "Different channels then share one mean, and equivalent positions have different means. Nothing fails, but the model "
    "learns less well and is tied to one input size.",
)
def wrong_axis(subject: Subject) -> Iterator[Found]:
    for step, axis, right, known in _wrong(subject):
        if not _is_channels_first(step, axis, right):
            rank = len(step.shape or ())
            if subject.network.framework == "torch":
                remedy = "move the channels to axis 1 before the layer (x.transpose(1, -1)) and back after it"
            else:
                remedy = f"use axis={-1 if right == rank - 1 else right}"
            yield Found(step.layer, _what(step, axis, known) + _trained(subject, step), remedy)


@rule(
    "BN102",
    "channels-first-axis",
    "error",
    "Channels-first data under axis -1",
    "Axis -1 of channels-first data is a position, the columns of an image. So each mean mixes the channels, and the same "
    "pattern is normalized differently in each column.",
)
def channels_first_axis(subject: Subject) -> Iterator[Found]:
    for step, axis, right, known in _wrong(subject):
        if _is_channels_first(step, axis, right):
            remedy = "use axis=1, or move the channels to the end and keep axis=-1"
            yield Found(step.layer, _what(step, axis, known) + _trained(subject, step), remedy)
