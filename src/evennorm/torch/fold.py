"""Copy a torch model for inference with its batch normalizations folded into neighbouring layers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from evennorm.errors import ArgumentError, EvennormError, first_line
from evennorm.models.fold_plan import Folded, Plan, plan
from evennorm.models.folding import ScaleShift
from evennorm.models.network import Role, Step
from evennorm.torch.conversion.norms import checked
from evennorm.torch.conversion.steps import is_watched
from evennorm.torch.graph_code import graph_module
from evennorm.torch.linear import Describer, write
from evennorm.torch.network import Reading, read
from evennorm.torch.recording import Run, reads, runs


def fold(model: nn.Module, inputs: Sequence[Any], others: Sequence[Sequence[Any]] = ()) -> tuple[nn.Module, Plan]:
    """Return a copy of `model` that computes the same in evaluation with fewer layers, and a plan of what became of each
    batch normalization.

    Each batch normalization becomes part of the convolution, linear layer or embedding before or after it,
    where that is exact; else one scale and shift. Computed in float64. Activations that our modules apply stay, as
    modules of their own.

    The copy is for inference. Where torch.fx can follow the model's code it is a torch.fx.GraphModule, in which the batch
    normalizations are gone and all that is left keeps its key in the state_dict. Where it cannot, the copy is of the model's
    own class, and an nn.Identity stands in the place of what is gone.

    The channels of nn.Linear are the last axis and those of nn.BatchNorm1d axis 1, and both take rows as well as sequences:
    what may be folded depends on the rank. It is that of the example inputs, and where a layer that takes several ranks is
    gone, the copy refuses the others. What is not right for `others` too is kept.

    Args:
        model: any module, before it is wrapped in DataParallel or the like, or compiled.
        inputs: example inputs, a tuple of tensors with at least two samples.
        others: example inputs of other ranks that the copy is to be right for as well.

    Raises:
        ArgumentError: no module; one that is wrapped or compiled; one that cannot be copied or run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from evennorm.torch.fold import fold
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> folded, plan = fold(model, (torch.zeros(2, 3, 5, 5),))
        >>> sorted(folded.state_dict()), plan.folded[0].side
        (['0.bias', '0.weight'], 'behind')
    """
    checked(model, "fold")
    try:
        model = copy.deepcopy(model).eval()
    except Exception as error:  # a module may hold anything that cannot be copied
        raise ArgumentError(
            f"fold works on a copy of the model, which copy.deepcopy could not make ({first_line(error)}); give the "
            "model as it is before it is wrapped or run"
        ) from error
    try:
        views = [_View.of(model, example) for example in (inputs, *others)]
    except EvennormError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"fold runs the model on example inputs, which fails ({first_line(error)}); give inputs that fit it"
        ) from error
    made = _agreed(views)
    ranks = {layer: {len(view.shape(layer)) for view in views} for layer in (each.layer for each in made.folded)}
    return _Rewriting(model, views[0], ranks).by(made), made


@dataclass(frozen=True)
class _View:
    """The graph and shapes of a model on one example."""

    rank: int
    """The rank of the example's first tensor."""
    reading: Reading
    ran: Mapping[nn.Module, Run]
    describer: Describer
    read: Mapping[nn.Module, Collection[str]]
    """What the model's code reads of its layers, besides calling them."""

    @classmethod
    def of(cls, model: nn.Module, example: Sequence[Any]) -> _View:
        ran = runs(model, example)
        reading = read(model, example)
        found = _read_in(model, reading)
        if reading.network.gaps:  # code that has no graph
            leaves = {step.handle for step in reading.network.steps if step.role in (Role.LINEAR, Role.BATCH_NORM)} - {None}
            for module, names in reads(model, example, leaves).items():
                found.setdefault(module, set()).update(names)
        rank = next((each.dim() for each in example if isinstance(each, Tensor)), 0)
        return cls(rank, reading, ran, Describer(model, reading, ran, found), found)

    def shape(self, layer: str) -> tuple[int, ...]:
        """Return the shape of a layer's output; () where it is not known."""
        step = next(each for each in self.reading.network.steps if each.layer == layer)
        run = self.ran.get(step.handle)
        return () if run is None or run.shape is None else run.shape

    def plan(self, kept: Mapping[str, str]) -> Plan:
        def fixed(step: Step) -> str:
            clause = self.describer.miscounted(step)
            return kept.get(step.layer) or self._fixed(step) or (f"it {clause}" if clause else "")

        return plan(self.reading.network, self.describer, fixed)

    def _fixed(self, step: Step) -> str:
        """Return why a batch normalization cannot be taken out of the model; "" if it can."""
        if step.handle is None:
            return "it is a function call in the model's code"
        if is_watched(step.handle):
            return "it has hooks, which see its input and output"
        if not hasattr(step.handle, "eps"):
            return "its epsilon stands in its code alone"
        if names := sorted(self.read.get(step.handle, ())):
            return f"the model's code reads its {' and '.join(names)}"
        node = self.reading.nodes.get(step.name)
        if node is None and len(step.inputs) > 1:
            return "it adds a residual in code that cannot be followed"
        if node is not None and len(operands(node)) != len(set(operands(node))):
            return "its residual is its own input"
        return ""


def _read_in(model: nn.Module, reading: Reading) -> dict[nn.Module, set[str]]:
    """Return which parameters and buffers of which layers the graph of a model reads."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            holders.setdefault(id(tensor), []).append((module, name))
    found: dict[nn.Module, set[str]] = {}
    for node in [] if reading.graph is None else reading.graph.nodes:
        if node.op == "get_attr":
            tensor = reduce(getattr, str(node.target).split("."), model)
            for module, name in holders.get(id(tensor), ()):
                found.setdefault(module, set()).add(name)
    return found


def _agreed(views: Sequence[_View]) -> Plan:
    """Return the plan that is right for all examples: layers on which they disagree are kept."""
    kept: dict[str, str] = {}
    while True:
        plans = [view.plan(kept) for view in views]
        apart = {
            each.layer: _apart(views, plans, each.layer)
            for each in plans[0].folded
            if len({_fate(view, made, each.layer) for view, made in zip(views, plans, strict=True)}) > 1
        }
        if not apart:
            return plans[0]
        kept |= apart


def _fate(view: _View, made: Plan, layer: str) -> tuple[Any, ...]:
    """Return what becomes of a layer, for comparison; a scale and shift has the rank of its input."""
    found = made[layer]
    return found.outcome, found.into, found.side, len(view.shape(layer)) if found.outcome == "scale and shift" else 0


def _apart(views: Sequence[_View], plans: Sequence[Plan], layer: str) -> str:
    fates = [
        f"at rank {view.rank} " + (f"it is part of {' and '.join(found.into)}" if found.into else "it is not")
        for view, found in ((view, made[layer]) for view, made in zip(views, plans, strict=True))
    ]
    return (
        f"the model takes inputs of several ranks ({', '.join(dict.fromkeys(fates))}); give the shape of those it will get"
    )


class _Scaled(nn.Module):
    """scale * x + shift of each channel, which replaces a batch normalization that could not be folded."""

    def __init__(self, scale: Tensor, shift: Tensor, ranks: Collection[int] = ()):
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self._ranks = ranks

    def forward(self, input: Tensor) -> Tensor:
        _check_rank(input, self._ranks)
        return torch.addcmul(self.shift, input, self.scale)


class _OfRanks(nn.Identity):
    """A check that replaces a batch normalization which took more ranks than it was folded for."""

    def __init__(self, ranks: Collection[int]):
        super().__init__()
        self._ranks = ranks

    def forward(self, input: Tensor) -> Tensor:
        _check_rank(input, self._ranks)
        return input


def _check_rank(input: Tensor, ranks: Collection[int]) -> None:
    if ranks:
        torch._assert(input.dim() in ranks, _refusal(ranks))


def _refusal(ranks: Collection[int]) -> str:
    named = " or ".join(map(str, sorted(ranks)))
    return f"batch normalization was folded where its input is of rank {named}; fold the model again for the other"


def _takes_several_ranks(norm: Any) -> bool:
    """Return whether a batch normalization takes both (N, C) and (N, C, L), as nn.BatchNorm1d and nn.SyncBatchNorm do."""
    check = getattr(norm, "_check_input_dim", None)
    if check is None:
        return False

    def takes(rank: int) -> bool:
        try:
            check(torch.empty((1,) * rank, device="meta"))
        except Exception:  # a class may raise anything for a rank that it does not take
            return False
        return True

    return sum(map(takes, range(2, 6))) > 1


class _Rewriting:
    """Changes to a model, which nobody else holds, by a plan."""

    def __init__(self, model: nn.Module, view: _View, ranks: Mapping[str, Collection[int]]):
        self._model = model
        self._reading = view.reading
        self._ran = view.ran
        self._ranks = ranks
        self._steps = {step.layer: step for step in reversed(view.reading.network.steps)}

    def by(self, plan: Plan) -> nn.Module:
        for path, maps in plan.maps.items():
            write(self._steps[path].handle, maps)
        for found in plan.folded:
            if not found.kept:
                self._replace(found)
        if self._reading.graph is None:
            return self._model
        folded = graph_module(self._model, self._reading.graph, type(self._model).__name__)
        folded.graph.lint()
        return folded.eval()

    def _replace(self, found: Folded) -> None:
        step = self._steps[found.layer]
        calls = self._reading.network.calls(step)
        activation = activation_in(step.handle)
        ranks = tuple(sorted(self._ranks[found.layer])) if _takes_several_ranks(step.handle) else ()
        scaled = None if found.into else self._scaled(step, ranks)
        first = scaled or (_OfRanks(ranks) if ranks else None)
        rest = [each for each in (first, activation) if each is not None]
        nodes = [self._reading.nodes[each.name] for each in calls if each.name in self._reading.nodes]
        if len(nodes) == len(calls):
            for node in nodes:
                self._rewrite(node, str(node.target), scaled is not None, activation is not None, ranks)
            holder = scaled or nn.Module()
            if activation is not None:
                holder.add_module("activation", activation)
            self._put(step.handle, holder)
        else:
            self._put(step.handle, nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest))

    def _put(self, old: nn.Module, new: nn.Module) -> None:
        """Replace the old module wherever it is held."""
        for module in list(self._model.modules()):
            for name, child in module._modules.items():
                if child is old:
                    module._modules[name] = new

    def _rewrite(self, node: fx.Node, path: str, scaled: bool, activated: bool, ranks: Sequence[int]) -> None:
        graph = node.graph
        y, *residual = operands(node)
        with graph.inserting_before(node):
            if ranks:
                rank = graph.call_method("dim", (y,))
                right = reduce(
                    lambda a, b: graph.call_function(operator.or_, (a, b)),
                    [graph.call_function(operator.eq, (rank, each)) for each in ranks],
                )
                graph.call_function(torch._assert, (right, _refusal(ranks)))
            if scaled:  # by torch's own operations, so that the graph needs no evennorm
                scale, shift = (graph.create_node("get_attr", f"{path}.{name}") for name in ("scale", "shift"))
                y = graph.call_function(torch.addcmul, (shift, y, scale))
            if residual:
                y = graph.call_function(operator.add, (y, residual[0]))
            if activated:
                y = graph.call_module(f"{path}.activation", (y,))
        node.replace_all_uses_with(y)
        graph.erase_node(node)

    def _scaled(self, step: Step, ranks: Sequence[int]) -> _Scaled:
        assert step.state is not None
        affine = ScaleShift.of(step.state)
        run = self._ran[step.handle]
        assert run.shape is not None
        shape = [-1 if axis in step.state.axis else 1 for axis in range(1, len(run.shape))]
        like = {"dtype": run.dtype, "device": step.handle.running_mean.device}
        scale, shift = (torch.from_numpy(values).reshape(shape).to(**like) for values in (affine.scale, affine.shift))
        return _Scaled(scale, shift, ranks)


def operands(node: fx.Node) -> list[fx.Node]:
    """Return the input, and the residual if there is one."""
    residual = node.kwargs.get("residual", node.args[1] if len(node.args) > 1 else None)
    input = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    return [each for each in (input, residual) if isinstance(each, fx.Node)]


def activation_in(norm: Any) -> nn.Module | None:
    """Return the activation that a batch normalization applies last, as a module."""
    match getattr(norm, "activation", None):
        case "relu":
            return nn.ReLU()
        case "relu6":
            return nn.ReLU6()
        case "leaky_relu":
            return nn.LeakyReLU(norm.negative_slope)
        case "elu":
            return nn.ELU(norm.alpha)
    act = norm._modules.get("act")  # timm's
    return None if act is None or type(act) is nn.Identity else act
