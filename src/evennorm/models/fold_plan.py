"""Plan which batch normalization of a network is folded into which linear layers.

Decided by data flow. A scale and shift may move along a chain of steps that commute with it, each the only reader of the one
before, to a linear layer that is called once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

from evennorm.models.folding import Linear, ScaleShift, after, then
from evennorm.models.network import Network, Role, Step


@dataclass(frozen=True)
class LinearLayer:
    """What a linear layer computes."""

    maps: tuple[Linear, ...] = ()
    channel_axis: int | None = None
    """The channel axis of its output, 0 or more."""
    input_axis: int | None = None
    """The channel axis of its input."""
    border: str = ""
    """Why its outputs do not all see all taps; "" if they do."""
    obstacle: str = ""
    """Why nothing can be folded into it: a clause that begins with what the layer does."""


@dataclass(frozen=True)
class Passage:
    """A step that a scale and shift may pass."""

    if_order_kept: bool = False
    """Whether it passes only a scale and shift that keeps the order, as maxima do."""
    if_zero_kept: bool = False
    """Whether it passes only a scale and shift that keeps zeros, as padding with zeros does."""
    axes: tuple[int, int] | None = None
    """The channel axis of its input and of its output, where it drops others; None where each axis stays what it is."""
    flattens: tuple[int, ...] = ()
    """The sizes after the batch axis that it flattens into one row."""


Obstacle = str
"""Why a scale and shift cannot pass: a clause like "relu stands between"."""
Describe = Callable[[Step], LinearLayer | Passage | Obstacle]


@dataclass(frozen=True)
class Folded:
    """What becomes of one batch normalization."""

    layer: str
    into: tuple[str, ...] = ()
    """Linear layers that it becomes part of; empty where it stays, as a scale and shift."""
    side: str = ""
    """"behind" the linear layer, as in conv-BN, or "in front" of it."""
    why: str = ""
    """Why it cannot be part of a linear layer."""
    kept: bool = False
    """Whether it stays as it is, because it does not normalize by running statistics or cannot be taken out."""

    @property
    def outcome(self) -> str:
        return "folded" if self.into else "kept" if self.kept else "scale and shift"


@dataclass(frozen=True)
class Plan:
    folded: tuple[Folded, ...]
    maps: dict[str, tuple[Linear, ...]]
    """New kernels and biases of linear layers, by their paths."""

    def __getitem__(self, layer: str) -> Folded:
        return next(each for each in self.folded if each.layer == layer)


def plan(network: Network, describe: Describe, fixed: Callable[[Step], str]) -> Plan:
    """Plan where each batch normalization of `network` goes, in the order of the steps.

    Args:
        describe: what a step computes, or why a scale and shift cannot pass it.
        fixed: why a batch normalization cannot be taken out of the model at all, or "".
    """
    planner = _Planner(network, describe)
    found: dict[str, Folded] = {}
    waiting = list(dict.fromkeys(step.layer for step in network.batch_norms()))
    while waiting:  # one that is folded may open the way to another after or before it
        found |= {layer: planner.decide(layer, fixed) for layer in waiting}
        left = [layer for layer in waiting if found[layer].outcome == "scale and shift"]
        waiting = [] if len(left) == len(waiting) else left
    order = dict.fromkeys(step.layer for step in network.batch_norms())
    return Plan(tuple(found[layer] for layer in order), planner.maps)


class _NoWayError(Exception):
    """Why there is none: its text."""


@dataclass(frozen=True)
class _Position:
    """A scale and shift at some step, and the axis whose elements they belong to; 0 or more."""

    affine: ScaleShift
    axis: int

    def behind(self, step: Step, what: Passage) -> _Position:
        """Move it from the input of a step to the output."""
        self._check(step, what)
        if what.flattens:
            sizes = what.flattens
            outer, inner = prod(sizes[: self.axis - 1]), prod(sizes[self.axis :])
            return _Position(self.affine.of_elements(outer, inner), 1)
        if what.axes is None:
            return self
        if self.axis != what.axes[0]:
            raise _NoWayError(f"{step.layer} takes another axis for the channels")
        return replace(self, axis=what.axes[1])

    def in_front(self, step: Step, what: Passage) -> _Position:
        """Move it from the output of a step to the input."""
        self._check(step, what)
        if what.flattens:
            real = [1 + i for i, size in enumerate(what.flattens) if size != 1]
            if len(real) != 1:
                raise _NoWayError(f"{step.layer} flattens the channels of all positions into one row in between")
            return replace(self, axis=real[0])
        if what.axes is None:
            return self
        if self.axis != what.axes[1]:
            raise _NoWayError(f"{step.layer} takes another axis for the channels")
        return replace(self, axis=what.axes[0])

    def _check(self, step: Step, what: Passage) -> None:
        if what.if_order_kept and not self.affine.keeps_order:
            raise _NoWayError(f"{step.layer} takes maxima in between, and scales below 0 turn them into minima")
        if what.if_zero_kept and not self.affine.keeps_zero:
            raise _NoWayError(f"{step.layer} puts zeros around its input, which are not shifted")


@dataclass
class _Planner:
    network: Network
    describe: Describe
    maps: dict[str, tuple[Linear, ...]] = field(default_factory=dict)
    _gone: set[str] = field(default_factory=set)
    """Steps of batch normalizations that are folded already, and compute nothing any more."""
    _readers: dict[str, list[Step]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for step in self.network.steps:
            for name in step.inputs:
                self._readers.setdefault(name, []).append(step)

    def decide(self, layer: str, fixed: Callable[[Step], str]) -> Folded:
        """Decide about one batch normalization in all of its calls: it is folded everywhere or nowhere."""
        calls = [step for step in self.network.steps if step.layer == layer]
        why = next((reason for step in calls if (reason := _not_affine(step) or fixed(step))), "")
        if why:
            return Folded(layer, why=why, kept=True)
        before = dict(self.maps)
        reasons = []
        for direction, side in ((self._behind, "behind"), (self._in_front, "in front of")):
            try:
                into = [linear for step in calls for linear in direction(step)]
            except _NoWayError as reason:
                self.maps = dict(before)
                reasons.append(str(reason))
                continue
            self._gone |= {step.name for step in calls if step.activation is None and len(step.inputs) == 1}
            return Folded(layer, tuple(dict.fromkeys(into)), side)
        return Folded(layer, why="; ".join(dict.fromkeys(reasons)))

    def _behind(self, norm: Step) -> list[str]:
        """Fold into the linear layer whose outputs are normalized."""
        position, reader, step = _start(norm), norm, self._made_by(norm)
        while True:
            self._check_only_reader(step, reader)
            what = self._what(step)
            if isinstance(what, LinearLayer):
                self._check_layer(step, what)
                if step.activation is not None:
                    raise _NoWayError(f"{step.layer} applies {step.activation} in between")
                if position.axis != what.channel_axis or what.maps[-1].outputs != len(position.affine.scale):
                    raise _NoWayError(f"what it normalizes, axis {position.axis}, are not the channels of {step.layer}")
                self.maps[step.layer] = then(self._maps(step, what), position.affine)
                return [step.layer]
            position = position.in_front(step, what)
            reader, step = step, self._made_by(step)

    def _in_front(self, norm: Step) -> list[str]:
        """Fold into all the layers that read what is normalized."""
        if norm.activation is not None:
            raise _NoWayError(f"it applies {norm.activation} itself")
        if len(norm.inputs) != 1:
            raise _NoWayError("it adds a residual")
        return self._into_readers(norm, _start(norm))

    def _into_readers(self, step: Step, position: _Position) -> list[str]:
        if self._leaves(step):
            raise _NoWayError("the values after it leave the model")
        readers = self._readers_of(step)
        if not readers:
            raise _NoWayError("it is not known what reads it")
        found: list[str] = []
        for reader in readers:
            what = self._what(reader)
            if isinstance(what, Passage):
                found += self._into_readers(reader, position.behind(reader, what))
                continue
            self._check_layer(reader, what)
            if position.axis != what.input_axis or what.maps[0].inputs != len(position.affine.scale):
                raise _NoWayError(
                    f"what it normalizes, axis {position.axis}, are not the channels that {reader.layer} reads"
                )
            if what.border and not position.affine.keeps_zero:
                raise _NoWayError(f"{reader.layer} {what.border}")
            self.maps[reader.layer] = after(self._maps(reader, what), position.affine)
            found.append(reader.layer)
        return found

    def _what(self, step: Step) -> LinearLayer | Passage:
        if step.role is Role.BATCH_NORM:
            raise _NoWayError(f"{step.layer} stands in between")
        what = self.describe(step)
        if isinstance(what, str):
            raise _NoWayError(what)
        return what

    def _check_layer(self, step: Step, what: LinearLayer) -> None:
        if what.obstacle:
            raise _NoWayError(f"{step.layer} {what.obstacle}")
        times = len(self.network.calls(step))
        if times > 1:
            raise _NoWayError(f"{step.layer} is called {times} times, and would change everywhere")

    def _check_only_reader(self, step: Step, reader: Step) -> None:
        if self._leaves(step):
            raise _NoWayError(f"the values of {step.layer} leave the model too")
        others = [other.layer for other in self._readers_of(step) if other is not reader]
        if others:
            raise _NoWayError(f"{others[0]} reads the values of {step.layer} too")

    def _leaves(self, step: Step) -> bool:
        """Return whether the values of a step are among the model's outputs, also through steps that are folded."""
        gone = [reader for reader in self._readers.get(step.name, []) if reader.name in self._gone]
        return step.name in self.network.outputs or any(self._leaves(reader) for reader in gone)

    def _maps(self, step: Step, what: LinearLayer) -> tuple[Linear, ...]:
        return self.maps.get(step.layer, what.maps)

    def _made_by(self, step: Step) -> Step:
        """Return the step before one, skipping those that are folded."""
        while step.inputs:
            step = self.network[step.inputs[0]]
            if step.name not in self._gone:
                return step
        raise _NoWayError("what it normalizes is not known")

    def _readers_of(self, step: Step) -> list[Step]:
        found = []
        for reader in self._readers.get(step.name, []):
            found += self._readers_of(reader) if reader.name in self._gone else [reader]
        return found


def _start(norm: Step) -> _Position:
    assert norm.state is not None
    if len(norm.state.axis) != 1:
        raise _NoWayError(f"it normalizes {len(norm.state.axis)} axes")
    axis = norm.state.axis[0]
    if axis < 0 and norm.shape is None:
        raise _NoWayError("the rank of what it normalizes is not known")
    return _Position(ScaleShift.of(norm.state), axis if axis >= 0 else axis + len(norm.shape or ()))


def _not_affine(step: Step) -> str:
    """Return why a batch normalization is no scale and shift of its channels at inference; "" if it is."""
    state = step.state
    if state is None:
        return "what it is set to cannot be read"
    if state.mode:
        return "it normalizes by the batch at inference too" if state.mode == 2 else "it normalizes each sample on its own"
    if state.mean is None or state.variance is None:
        return "it has no running statistics"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the root of something below 0, or its inverse
        return "" if ScaleShift.of(state).is_finite else "its scale and shift are not finite"
