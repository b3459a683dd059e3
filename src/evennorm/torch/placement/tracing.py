"""Trace a whole torch model into a graph that is right in training and in evaluation, and compare it with the model.

torch.fx records one run of the code, in one mode. What differs between the modes by a constant, such as the `training` of
`F.dropout(x, 0.5, self.training)`, becomes a module that gives the one or the other. Where torch.fx cannot follow the code,
or steps differ, torch.export records the model, and gradients are compared too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm
from torch.utils import _pytree as pytree

from evennorm.errors import ArgumentError, EvennormError, first_line
from evennorm.torch.conversion.norms import checked
from evennorm.torch.conversion.steps import is_watched
from evennorm.torch.fx_graph import ModelGraph, is_leaf, model_graph
from evennorm.torch.graph_code import graph_module
from evennorm.torch.network import propagate
from evennorm.torch.placement.in_place import functional
from evennorm.torch.placement.recorded import recorded
from evennorm.torch.roles import is_frozen_norm


class _UnfollowedError(ArgumentError):
    """No graph stands for the model; `why` not."""

    def __init__(self, model: nn.Module, why: str):
        super().__init__(
            f"only models whose code torch.fx can follow can be rewritten; received {type(model).__name__}: {why}; put "
            "evennorm.torch.BatchNorm1d, 2d or 3d into that code"
        )
        self.why = why


class ByMode(nn.Module):
    """One value in training and another one in evaluation."""

    def __init__(self, in_training: Any, in_evaluation: Any):
        super().__init__()
        self.in_training = in_training
        self.in_evaluation = in_evaluation

    def forward(self) -> Any:
        return self.in_training if self.training else self.in_evaluation


def traced(model: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, ModelGraph]:
    """Return a copy of a model, and a graph of it without operations in place and with shapes at its nodes.

    Raises:
        ArgumentError: no module, one that is wrapped, compiled or has hooks, that cannot be copied, run on `inputs`, or
            followed by torch.fx or torch.export.
    """
    checked(model, "place")
    if is_leaf(model):
        raise ArgumentError(
            f"place needs a model that calls its layers; received the layer {type(model).__name__}; put it into an "
            "nn.Sequential"
        )
    if is_watched(model):
        raise _UnfollowedError(model, "it has hooks, which see its input and output")
    try:
        model = copy.deepcopy(model)
    except Exception as error:  # whatever a module holds that cannot be copied
        raise ArgumentError(
            f"place works on a copy of the model, which copy.deepcopy could not make ({first_line(error)}); give the model "
            "as it is before it is wrapped or run"
        ) from error
    example = _Example(model, inputs)
    try:
        found = _followed(model, example)
    except ArgumentError as error:
        model, found = _recorded(model, example, error)
    assert found.graph is not None
    propagate(model, found.graph, inputs)
    return model, found


def scope_of(node: fx.Node) -> str:
    """Return the path of the module whose code makes a call; "" for the model's own."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module":
        stack = stack[:-1]
    return str(stack[-1][0]) if stack else ""


def _followed(model: nn.Module, example: _Example) -> ModelGraph:
    """Return the graph of torch.fx, without operations in place."""
    found = _in_both_modes(model)
    assert found.graph is not None
    _refuse_hidden(model, found.opaque)
    functional(model, found.graph)
    example.check(model, found.graph)
    return found


def _recorded(model: nn.Module, example: _Example, unfollowed: ArgumentError) -> tuple[nn.Module, ModelGraph]:
    """Return what torch.export records of a model that torch.fx cannot follow, and its graph."""
    reasons = []
    if any(is_watched(module) for module in model.modules()):
        raise unfollowed  # a program has no hooks
    for training in (False, True):
        try:
            made = recorded(model, example.inputs, training)
            found = _followed(made, example)
            example.check_gradients(model, made)
        except Exception as error:  # torch.export refuses in many ways
            reasons.append(_reason(error))
        else:
            return made, found
    raise ArgumentError(f"{unfollowed}; torch.export does not record it either: {reasons[0]}") from unfollowed


def _reason(error: Exception) -> str:
    if isinstance(error, _UnfollowedError):
        return error.why
    return str(error).partition(";")[0] if isinstance(error, EvennormError) else first_line(error)


def _refuse_hidden(model: nn.Module, opaque: dict[str, str]) -> None:
    for path, why in opaque.items():
        module = model.get_submodule(path)
        inner = [
            name for name, each in module.named_modules() if isinstance(each, batchnorm._BatchNorm) or is_frozen_norm(each)
        ]
        if inner:
            raise ArgumentError(
                f"batch normalization is taken out before it is placed anew, and that cannot be done inside {path!r}, which "
                f"holds {inner[0]!r}: {why}; write that module so that torch.fx can follow it"
            )


def _in_both_modes(model: nn.Module) -> ModelGraph:
    evaluation, training = model_graph(model), model_graph(model, training=True)
    for found in (evaluation, training):
        if found.graph is None:
            raise _UnfollowedError(model, found.opaque[""])
    assert evaluation.graph is not None
    assert training.graph is not None
    pairs = list(zip(evaluation.graph.nodes, training.graph.nodes, strict=False))
    same = len(evaluation.graph.nodes) == len(training.graph.nodes)
    if not same or any((a.op, a.target) != (b.op, b.target) for a, b in pairs):
        raise _UnfollowedError(model, "it takes other steps in training than in evaluation")
    merging = _Merging(model, {b: a for a, b in pairs})
    for a, b in pairs:
        a.args, a.kwargs = merging.of(a, a.args, b.args), merging.of(a, a.kwargs, b.kwargs)
    return evaluation


class _Merging:
    """The replacement of constants that depend on the mode by modules that give them."""

    def __init__(self, model: nn.Module, twins: dict[fx.Node, fx.Node]):
        self._model = model
        self._twins = twins

    def of(self, node: fx.Node, a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and self._twins[b] is a:
            return a
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
            merged = [self.of(node, x, y) for x, y in zip(a, b, strict=True)]
            return tuple(merged) if isinstance(a, tuple) else merged
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self.of(node, a[key], b[key]) for key in a}
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(*(self.of(node, getattr(a, each), getattr(b, each)) for each in ("start", "stop", "step")))
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            raise _UnfollowedError(self._model, "it takes other steps in training than in evaluation")
        if type(a) is type(b) and a == b:
            return a
        return self._by_mode(node, a, b)

    def _by_mode(self, node: fx.Node, a: Any, b: Any) -> fx.Node:
        scope = scope_of(node)
        parent = self._model.get_submodule(scope)
        name = unused_name(parent, "by_mode")
        parent.add_module(name, ByMode(b, a).train(parent.training))
        with node.graph.inserting_before(node):
            return node.graph.call_module(f"{scope}.{name}" if scope else name, ())


def unused_name(parent: nn.Module, name: str) -> str:
    """Return `name`, or `name_2` where the module has something of that name."""
    unique, number = name, 1
    while hasattr(parent, unique):
        number += 1
        unique = f"{name}_{number}"
    return unique


class _Example:
    """The model's outputs for example inputs, before it is changed."""

    def __init__(self, model: nn.Module, inputs: Sequence[Any]):
        self.inputs = inputs
        if any(nn.parameter.is_lazy(x) for x in [*model.parameters(), *model.buffers()]):
            modes = [(module, module.training) for module in model.modules()]
            _run(model, inputs, False)  # which gives lazy modules their shapes
            for module, mode in modes:
                module.training = mode
        self._given = {training: _run(copy.deepcopy(model), inputs, training) for training in (False, True)}

    def check(self, model: nn.Module, graph: fx.Graph) -> None:
        """Check that the graph computes what the model computes.

        Raises:
            ArgumentError: the graph computes something else.
        """
        for training, wanted in self._given.items():
            found = _run(copy.deepcopy(graph_module(model, copy.deepcopy(graph))), self.inputs, training)
            same = len(found) == len(wanted) and all(_is_close(x, y) for x, y in zip(found, wanted, strict=True))
            if not same:
                raise _UnfollowedError(model, "its graph computes something else than the model")

    def check_gradients(self, model: nn.Module, other: nn.Module) -> None:
        """Check that both modules, which share their parameters, give these the same gradients in training.

        Raises:
            ArgumentError: a parameter gets another gradient, or one of the modules gives it none.
        """
        wanted, found = _gradients(model, self.inputs), _gradients(other, self.inputs)
        if found.keys() != wanted.keys() or not all(_is_close(found[each], wanted[each]) for each in wanted):
            raise _UnfollowedError(model, "its graph gives parameters other gradients in training than the model")


def _gradients(model: nn.Module, inputs: Sequence[Any]) -> dict[int, Tensor]:
    """Return the gradients in training of a sum of outputs, by the identity of the parameters."""
    copied = copy.deepcopy(model)
    outputs = [y for y in _run(copied, inputs, True, gradients=True) if isinstance(y, Tensor) and y.requires_grad]
    pairs = [(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True) if b.requires_grad]
    generator = torch.Generator().manual_seed(0)
    if not outputs or not pairs:
        return {}
    along = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    found = torch.autograd.grad(outputs, [b for _, b in pairs], along, allow_unused=True)
    return {id(a): gradient for (a, _), gradient in zip(pairs, found, strict=True) if gradient is not None}


def _run(model: nn.Module, inputs: Sequence[Any], training: bool, gradients: bool = False) -> list[Any]:
    devices = [x.device for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"]
    with torch.random.fork_rng(devices), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        for module in model.modules():
            module.training = training
        try:
            return pytree.tree_leaves(model(*(x.clone() if isinstance(x, Tensor) else x for x in inputs)))
        except Exception as error:  # code may raise anything for these inputs
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs if isinstance(x, Tensor))
            raise ArgumentError(
                f"the model is run on an example, and fails on inputs of shape {shapes}: {first_line(error)}; give an "
                "input_shape (of one sample) or inputs that fit it"
            ) from error


def _is_close(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return type(found) is type(wanted) and bool(found == wanted)
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return torch.allclose(found.cpu().double(), wanted.cpu().double(), rtol=1e-3, atol=1e-5, equal_nan=True)
