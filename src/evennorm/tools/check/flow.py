"""Answer questions about the neighbours of a step in a network."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from evennorm.models.network import Network, Role, Step

_SAME = ("Identity", "Activation", "Linear", "identity")
"""Steps of role RESHAPE that change nothing at all."""


def is_identity(step: Step) -> bool:
    return step.role is Role.RESHAPE and step.kind in _SAME


def source(network: Network, step: Step, through: Collection[Role] = ()) -> Step | None:
    """Return the step that makes the first input of `step`, skipping identities and the roles named; None if unknown."""
    while step.inputs:
        step = network[step.inputs[0]]
        if not is_identity(step) and step.role not in through:
            return step
    return None


def readers(network: Network, step: Step, through: Collection[Role] = ()) -> Iterator[Step]:
    """Yield the steps that take the output of `step`, skipping identities and the roles named."""
    for reader in network.consumers(step):
        if is_identity(reader) or reader.role in through:
            yield from readers(network, reader, through)
        else:
            yield reader


def leaves(network: Network, step: Step, through: Collection[Role] = ()) -> bool:
    """Return whether the output of `step` is the model's and nothing else reads it, skipping the roles named."""
    following = network.consumers(step)
    if step.name in network.outputs:
        return not following
    return (
        len(following) == 1
        and (is_identity(following[0]) or following[0].role in through)
        and leaves(network, following[0], through)
    )


def resolved_axis(step: Step) -> tuple[int, ...] | None:
    """Return the channel axes of a batch normalization, each 0 or more; None where the rank is unknown."""
    if step.shape is None or step.state is None or step.kind == "TimeDistributed":
        return None
    rank = len(step.shape)
    return tuple(sorted(axis + rank if axis < 0 else axis for axis in step.state.axis))


def declared_axis(network: Network, step: Step) -> tuple[int, Step] | None:
    """Return the channel axis at a step as the layers around it state it, and the nearest of those; None if none does."""
    if step.shape is None:
        return None
    rank = len(step.shape)
    keeps = (Role.ACTIVATION, Role.DROPOUT, Role.BATCH_NORM, Role.ADD, Role.SOFTMAX)
    at: Step | None = step
    while at is not None and at.inputs:
        at = network[at.inputs[0]]
        if at.shape is None or len(at.shape) != rank:
            break
        if at.channel_axis is not None:
            return at.channel_axis, at
        if at.role not in keeps and not is_identity(at):
            break
    for reader in readers(network, step, keeps):
        if reader.channel_axis is not None and reader.shape is not None and len(reader.shape) == rank:
            return reader.channel_axis, reader
    return None
