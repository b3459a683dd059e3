"""Rebuild the model that a program of torch.export was recorded from: its layers as modules of torch.nn with their names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from evennorm.errors import InputError, first_line
from evennorm.torch.exported.graph import Program, read
from evennorm.torch.exported.layers import Form, form_of
from evennorm.torch.exported.operations import CORE, bound, is_random, name_of
from evennorm.torch.graph_code import graph_module


@dataclass(frozen=True)
class Rebuilt:
    """A model as a module of torch.fx, in evaluation."""

    model: fx.GraphModule
    """Its layers are modules of torch.nn; all other operations stand in its code."""
    drawn: tuple[str, ...]
    """The layers with weights, in the order of the state_dict, in which the code of a model makes them."""
    undrawn: dict[str, str]
    """Parameters that are in no layer, and the operation that reads each: nothing tells how fresh ones are drawn."""


def rebuild(document: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Rebuilt:
    """Rebuild a model.

    Layers that a program knows in one mode alone, batch normalization and dropout, take part in both modes again. What the
    code did in the other mode besides is not in the program.

    Args:
        document, tensors, name: as for `read`.

    Raises:
        InputError: a program that cannot be read, that was decomposed, that draws random numbers in evaluation, that works
            for one number of samples, or whose layers compute something else than it.
        Exception: the document is damaged.
    """
    program = read(document, tensors, name)
    _refuse_decomposed(program, name)
    layers = _Layers(program)
    model = layers.model()
    _check(model, layers, program, name)
    order = {path: index for index, path in enumerate(program.tensors)}
    drawn = {
        path: min(order[each] for each in form.weights.values()) for path, form in layers.forms.items() if form.is_drawn
    }
    raw = {
        str(node.target): name_of(reader.target) or "output"
        for node in layers.graph.nodes
        if node.op == "get_attr" and isinstance(program.tensors.get(layers.sources[str(node.target)]), nn.Parameter)
        for reader in node.users
    }
    return Rebuilt(model.eval(), tuple(sorted(drawn, key=drawn.__getitem__)), raw)


def _refuse_decomposed(program: Program, name: str) -> None:
    for node in program.graph.nodes:
        found = name_of(node.target)
        read = any(each.op == "get_attr" for each in node.all_input_nodes)
        if found in CORE and (read or found.startswith(("native", "_"))):
            raise InputError(
                f"layers are read from programs as torch.export.export gives them; {name} computes {CORE[found]} by "
                f"aten.{found}, as after run_decompositions, where no dropout is left; save it before that"
            )


class _Layers:
    """A copy of a program's graph in which layers are modules."""

    def __init__(self, program: Program):
        self.program = program
        self.graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        self.graph.output(self.graph.graph_copy(program.graph, copied))
        self.forms: dict[str, Form] = {}
        self.sources: dict[str, str] = {}
        """The program's tensor of each one that the graph reads."""
        found = {node: form for node in self.graph.nodes if (form := form_of(node)) is not None}
        wanted = {node: _path(node, form) for node, form in found.items()}
        leaves = set(wanted.values())
        for node, form in found.items():
            self._raise(node, form, _outside(wanted[node], leaves))
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
            elif node.op == "get_attr":
                source, path = str(node.target), _outside(str(node.target), set(self.forms))
                self.sources[path], node.target = source, path

    def _raise(self, node: fx.Node, form: Form, path: str) -> None:
        unique, number = path, 1
        while unique in self.forms and self.forms[unique] != form:
            number += 1
            unique = f"{path}_{number}"
        self.forms[unique] = form
        data = [
            each for each in node.all_input_nodes if each.op != "get_attr" or str(each.target) not in form.weights.values()
        ]
        with self.graph.inserting_before(node):
            made = self.graph.call_module(unique, tuple(data))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def model(self) -> fx.GraphModule:
        """Return the module; layers are in the mode that each was recorded in."""
        root = nn.Module()
        tensors = self.program.tensors
        for path, form in self.forms.items():
            layer = form.make(tensors)
            _attach(root, path, layer.train(bool(form.training)))
        for path, source in self.sources.items():
            _attach(root, path, tensors[source])
        return graph_module(root, self.graph, self.program.class_name)


def _path(node: fx.Node, form: Form) -> str:
    """Return the path of the module of a node: the one whose class it is, that which owns the weights, or a new one in the
    module whose code calls the function."""
    scope = node.meta.get("scope") or [("", "")]
    path, kind = scope[-1]
    if path and kind.rpartition(".")[2] == form.kind.__name__:
        return path
    if form.weights:
        owner, _, name = next(iter(form.weights.values())).rpartition(".")
        if owner and name in ("weight", "running_mean"):
            return owner
        path = owner
    return ".".join(part for part in (path, name_of(node.target).rstrip("_")) if part)


def _outside(path: str, leaves: set[str]) -> str:
    """Return a path that leads into no layer: "bn_act" for the "bn.act" of a layer that had an activation of its own."""
    parts = path.split(".")
    for index in range(1, len(parts)):
        above = ".".join(parts[:index])
        if above in leaves:
            return "_".join((above, *parts[index:]))
    return path


def _attach(root: nn.Module, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for each in parents:
        if each not in root._modules:
            root.add_module(each, nn.Module())
        root = root.get_submodule(each)
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)


def _check(model: fx.GraphModule, layers: _Layers, program: Program, name: str) -> None:
    """Compare the model with the program, in the mode that it was recorded in, and in evaluation with parts of its input."""
    for node in layers.graph.nodes:
        if node.op != "call_function":
            continue
        if name_of(node.target) == "batch_norm":
            raise InputError(f"batch normalization is read with weights of its own; {name} computes those of {node.name!r}")
        if is_random(node.target) and bound(node.target, node.args, node.kwargs).get("dropout_p") != 0:
            raise InputError(
                f"{name} draws random numbers by aten.{name_of(node.target)}, in evaluation too; export it after "
                "model.eval()"
            )
    root = nn.Module()
    for path, value in program.tensors.items():
        _attach(root, path, value)
    own = graph_module(root, program.graph)
    try:
        wanted = _run(own, program.example)
    except Exception as error:  # operations raise whatever they like
        raise InputError(f"{name} fails on an input like the one it was exported with: {first_line(error)}") from error
    if not _is_close(_run(model, program.example), wanted):
        raise InputError(f"the layers that {name} was exported from compute something else than it; give module:function")
    if program.any_size or program.example.dim() == 0:
        return
    evaluated = copy.deepcopy(model).eval()
    try:
        given = _run(evaluated, program.example)
        twice = _run(evaluated, torch.cat([program.example, program.example]))
        same = _is_close(twice, torch.cat([given, given]))
    except Exception:  # whatever other sizes lead to
        same = False
    if not same:
        count = len(program.example)
        raise InputError(
            f"{name} was exported for {count} sample{'s' * (count != 1)} and takes no other number; export it with "
            'dynamic_shapes=({0: torch.export.Dim("batch")},) and two example samples or more'
        )


def _run(model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of a copy, since training steps change buffers."""
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        found = copy.deepcopy(model)(x.clone())
    if not isinstance(found, Tensor):
        raise TypeError(f"an output of type {type(found).__name__}")
    return found


def _is_close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return torch.allclose(found.double(), wanted.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
