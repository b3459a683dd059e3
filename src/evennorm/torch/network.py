"""Read a torch model as a Network: its layers, and the functions that its code calls on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules import batchnorm

from evennorm.errors import InputError
from evennorm.models.network import Network, Role, Step
from evennorm.models.state import BatchNormState
from evennorm.torch.conversion.norms import checked
from evennorm.torch.fx_graph import is_leaf, model_graph
from evennorm.torch.graph_code import graph_module
from evennorm.torch.roles import (
    activation_of,
    asks_for_size,
    channel_axis_of,
    is_frozen_norm,
    name_of_function,
    role_of_function,
    role_of_module,
    word_of,
)
from evennorm.torch.sync_batch_norm import SyncBatchNorm


@dataclass(frozen=True)
class Reading:
    """A network, and where its steps stand in the model."""

    network: Network
    graph: fx.Graph | None
    """The graph of the whole model; None where its own code cannot be followed."""
    nodes: dict[str, fx.Node]
    """The node of each step of `graph`; steps inside a module that is one node have none."""


def network(model: nn.Module, inputs: Sequence[Any] = ()) -> Network:
    """Read the layers and functions of a model in evaluation, and what flows between them.

    Read by torch.fx; where it cannot follow the code of a module, that module is one step, and the chains in it
    (nn.Sequential, and what else can be followed) stand by themselves between steps of kind "unknown". `gaps` says where.
    Names are module paths; functions are named "path:function", after the module that calls them.

    Args:
        model: any module, before it is wrapped in DataParallel or the like, or compiled.
        inputs: example inputs, by which the steps get shapes.

    Raises:
        ArgumentError: no module, or one that is wrapped or compiled.

    Example:
        >>> from torch import nn
        >>> from evennorm.torch.network import network
        >>> [(step.name, step.role.value) for step in network(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))).steps]
        [('input', 'input'), ('0', 'linear'), ('1', 'batch normalization')]
    """
    return read(model, inputs).network


def read(model: nn.Module, inputs: Sequence[Any] = ()) -> Reading:
    """Read `network` together with the graph that its steps come from."""
    checked(model, "reading")
    steps = _Steps()
    found = model_graph(model)
    outputs: tuple[str, ...] = ()
    if found.graph is not None:
        if inputs:
            propagate(model, found.graph, inputs)
        outputs = steps.of_graph(model, found.graph)
    for path, why in found.opaque.items():
        steps.inside(model.get_submodule(path), path, why)
    result = Network(type(model).__name__, tuple(steps.found), outputs, tuple(steps.gaps), "torch")
    return Reading(result, found.graph, steps.nodes)


def propagate(model: nn.Module, graph: fx.Graph, inputs: Sequence[Any]) -> None:
    """Note shapes at the nodes by running them in evaluation, so that no statistic moves."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), redirect_stderr(StringIO()):  # torch prints a traceback there before it raises
            ShapeProp(graph_module(model, graph)).propagate(*inputs)
        graph.owning_module = None  # the graph is to be rewritten, and that module thrown away
    except InputError:
        raise
    except Exception as error:
        raise _unfit(inputs, error) from error
    finally:
        for module, training in modes:
            module.training = training


def _unfit(inputs: Sequence[Any], error: Exception) -> InputError:
    """Return the error that torch.fx wraps into a text of its own, in one line."""
    cause = error.__cause__ if str(error).startswith("ShapeProp error") and error.__cause__ is not None else error
    shapes = ", ".join(str(tuple(value.shape)) for value in inputs if isinstance(value, torch.Tensor))
    said = " ".join(str(cause).split()) or type(cause).__name__
    return InputError(f"the model computes inputs of the shape that is given; received {shapes}, of which it says: {said}")


@dataclass
class _Steps:
    """Steps found so far, with unique names."""

    found: list[Step] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _paths: dict[nn.Module, str] = field(default_factory=dict)

    def add(self, step: Step) -> str:
        """Add a step and return its name, followed by "#2" where it is taken."""
        names = (step.layer if n == 1 else f"{step.layer}#{n}" for n in range(1, len(self._taken) + 2))
        name = next(name for name in names if name not in self._taken)
        self._taken.add(name)
        # A function has no layer that could be called twice.
        self.found.append(replace(step, name=name, layer=step.layer if step.handle is not None else name))
        return name

    def of_graph(self, root: nn.Module, graph: fx.Graph, prefix: str = "", is_part: bool = False) -> tuple[str, ...]:
        """Add the steps of a graph; return the names of those that make its outputs."""
        names: dict[fx.Node, str] = {}
        for node in graph.nodes:
            if node.op == "output":
                return tuple(dict.fromkeys(names[each] for each in node.all_input_nodes if each in names))
            step = _step(node, root, prefix, names, is_part)
            if step is not None:
                if isinstance(step.handle, nn.Module):  # a module that is held in two places is named after the first
                    step = replace(step, layer=self._paths.setdefault(step.handle, step.layer))
                names[node] = self.add(step)
                if not is_part:
                    self.nodes[names[node]] = node
        return ()

    def inside(self, module: nn.Module, path: str, why: str) -> None:
        """Add what can be read inside a module that is one node."""
        self.gaps.append(f"{path or 'the model'}: {why}")
        for name, child in module.named_children():
            self._part(child, f"{path}.{name}" if path else name)

    def _part(self, module: nn.Module, path: str) -> None:
        found = model_graph(module)
        if found.graph is None:
            for name, child in module.named_children():
                self._part(child, f"{path}.{name}")
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                self.gaps.append(f"{path}: {found.opaque['']}")
            return
        for end in self.of_graph(module, found.graph, path, is_part=True):
            self.add(Step("", f"{path}:output", "unknown", Role.OTHER, (end,)))
        for inner, why in found.opaque.items():
            self.inside(module.get_submodule(inner), f"{path}.{inner}", why)


def _step(node: fx.Node, root: nn.Module, prefix: str, names: dict[fx.Node, str], is_part: bool) -> Step | None:
    """Return the step of a node; None for a node that is no tensor."""
    inputs = tuple(names[each] for each in node.all_input_nodes if each in names)
    step = Step("", "", "", Role.OTHER, inputs, shape=_shape(node))
    match node.op:
        case "placeholder" if is_part:
            return replace(step, layer=f"{prefix}:{node.target}", kind="unknown")
        case "placeholder":
            return replace(step, layer=str(node.target), kind="Input", role=Role.INPUT)
        case "call_module":
            module = root.get_submodule(str(node.target))
            layer = ".".join(part for part in (prefix, str(node.target)) if part)
            return replace(step, **_of_module(module, layer, step.shape))
        case "get_attr":
            is_data = any(_takes_as_data(reader, node) for reader in node.users)
            return replace(step, layer=joined(prefix, node), kind="Parameter") if is_data else None
    if asks_for_size(node.target, node.args) or not inputs:
        return None
    return replace(step, layer=joined(prefix, node), **_of_function(node, root, len(inputs)))


def _of_module(module: nn.Module, layer: str, shape: tuple[int | None, ...] | None) -> dict[str, Any]:
    role = role_of_module(module) if is_leaf(module) else Role.OTHER
    state = state_of(module, layer) if role is Role.BATCH_NORM else None
    weights = [*module.parameters()]
    return {
        "layer": layer,
        "kind": type(module).__name__,
        "role": role,
        "handle": module,
        "activation": activation_of(module),
        "state": state,
        "bias": role is Role.LINEAR and getattr(module, "bias", None) is not None,
        "channel_axis": channel_axis_of(module, None if shape is None else len(shape)),
        "trainable": not weights or any(weight.requires_grad for weight in weights),
        "training": module.training if role in (Role.BATCH_NORM, Role.DROPOUT) else None,
        "rate": getattr(module, "p", None) if role is Role.DROPOUT else None,
        "dtype": str(weights[0].dtype).removeprefix("torch.") if weights else None,
    }


def _of_function(node: fx.Node, root: nn.Module, operands: int) -> dict[str, Any]:
    name = name_of_function(node.target)
    role = role_of_function(node.target, operands)
    activation = word_of(name.removesuffix("_")) if role is Role.ACTIVATION else None
    return {"kind": name, "role": role, "activation": activation}


def joined(prefix: str, node: fx.Node) -> str:
    """Return "layer1.0:add" for an addition in the code of layer1.0, and the attribute's path for a parameter."""
    if node.op == "get_attr":
        return ".".join(part for part in (prefix, str(node.target)) if part)
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    scope = ".".join(part for part in (prefix, str(stack[-1][0]) if stack else "") if part)
    return f"{scope}:{name_of_function(node.target)}"  # such a name is never the path of a module


def _takes_as_data(reader: fx.Node, parameter: fx.Node) -> bool:
    """Return whether a tensor of the model flows like an input, rather than as a weight of a function like F.linear."""
    weights = (Role.LINEAR, Role.BATCH_NORM, Role.NORM, Role.ACTIVATION)
    if reader.op == "call_module" or reader.op == "output":
        return True
    return role_of_function(reader.target, 2) not in weights or reader.args[:1] == (parameter,)


def _shape(node: fx.Node) -> tuple[int | None, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)


def state_of(module: nn.Module, name: str) -> BatchNormState:
    """Return the settings and arrays of a batch normalization of torch, or ours."""
    frozen = is_frozen_norm(module)
    tracked = getattr(module, "num_batches_tracked", None)
    momentum = getattr(module, "momentum", None)
    return BatchNormState(
        name=name,
        epsilon=float(getattr(module, "eps", 0.0)),
        decay=1.0 if frozen else None if momentum is None else 1.0 - momentum,
        gamma=_array(module.weight),
        beta=_array(module.bias),
        mean=_array(module.running_mean),
        variance=_array(module.running_var),
        axis=(1,),
        unbiased=isinstance(module, batchnorm._BatchNorm),
        updates=None if tracked is None else int(tracked),
        mode=0 if module.running_mean is not None else 2,
        synchronized=isinstance(module, nn.SyncBatchNorm | SyncBatchNorm),
        virtual_batch_size=getattr(module, "virtual_batch_size", None),
    )


def _array(tensor: Any) -> Any:
    """Return a copy as a NumPy array, in float32 for bfloat16, which NumPy does not know; None for a tensor without values
    yet."""
    if tensor is None or nn.parameter.is_lazy(tensor):
        return None
    tensor = tensor.detach().cpu().clone()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
