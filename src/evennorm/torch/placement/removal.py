"""Take every batch normalization out of a graph, and keep the activation that it applies."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules import batchnorm

from evennorm.errors import ArgumentError
from evennorm.models.network import Role
from evennorm.torch.conversion.steps import is_watched
from evennorm.torch.fold import activation_in, operands
from evennorm.torch.placement.sites import LINEAR, Graph
from evennorm.torch.placement.tracing import unused_name
from evennorm.torch.roles import is_frozen_norm, name_of_function


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, batchnorm._BatchNorm) or is_frozen_norm(module)


def relying_on_beta(graph: Graph) -> set[nn.Module]:
    """Return the linear layers whose every output is read only by batch normalizations that have a beta."""
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        module = graph.module(node)
        if type(module) in LINEAR:
            calls.setdefault(module, []).append(node)
    return {module for module, nodes in calls.items() if all(_is_shifted(graph, node) for node in nodes)}


def _is_shifted(graph: Graph, node: fx.Node) -> bool:
    readers = list(node.users)
    while len(readers) == 1 and _swaps_channels(readers[0]):
        readers = list(readers[0].users)
    return bool(readers) and all(
        isinstance(norm := graph.module(each), batchnorm._BatchNorm) and norm.bias is not None for each in readers
    )


def remove(graph: Graph) -> None:
    """Take out batch normalization, and nn.Identity, which often stands where some was.

    Raises:
        ArgumentError: one is called with a residual, a mask or a slope, which nothing else could take.
    """
    for node in list(graph.graph.nodes):
        if graph.role(node) is Role.BATCH_NORM:
            _take_out(graph, node)
        elif type(module := graph.module(node)) is nn.Identity and not is_watched(module):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    for path, module in list(graph.model.named_modules()):
        if _is_norm(module) and not _is_named(graph, path):  # its name is free again
            parent, name = _parent_of(graph.model, path)[0], path.rpartition(".")[2]
            parent._modules.pop(name, None)


def _is_named(graph: Graph, path: str) -> bool:
    return any(
        f"{node.target}.".startswith(f"{path}.") for node in graph.graph.nodes if node.op in ("call_module", "get_attr")
    )


def _take_out(graph: Graph, node: fx.Node) -> None:
    module: Any = graph.module(node)
    if module is not None and (len(node.args) + len(node.kwargs)) > 1:
        given = ", ".join(sorted(node.kwargs)) or "several tensors"
        raise ArgumentError(
            f"batch normalization is taken out before it is placed anew, and {str(node.target)!r} is called with {given}, "
            "which nothing else could take; write the addition as a step of its own"
        )
    y = operands(node)[0]
    users = list(node.users)
    if _swaps_channels(y) and len(y.users) == 1 and users and all(map(_swaps_channels, users)):  # as place inserts them
        source = y.args[0]
        for user in users:
            user.replace_all_uses_with(source)
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        graph.graph.erase_node(y)
        return
    activation = None if module is None else activation_in(module)
    if activation is not None:
        parent, path = _parent_of(graph.model, str(node.target))
        name = unused_name(parent, f"{str(node.target).rpartition('.')[2]}_{type(activation).__name__.lower()}")
        parent.add_module(name, activation.train(module.training))
        with graph.graph.inserting_before(node):
            y = graph.graph.call_module(f"{path}.{name}" if path else name, (y,))
            y.meta = dict(node.meta)
    node.replace_all_uses_with(y)
    graph.graph.erase_node(node)


def _parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent = path.rpartition(".")[0]
    return model.get_submodule(parent), parent


def _swaps_channels(node: fx.Node) -> bool:
    return node.op == "call_method" and name_of_function(node.target) == "movedim" and set(node.args[1:]) == {1, -1}
