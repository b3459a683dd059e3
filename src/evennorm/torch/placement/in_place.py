"""Rewrite a graph so that nothing is computed in place.

A step may write over what another one reads as soon as a normalization between them is taken out or put in: in
`relu_(norm(x))`, with x read again by a shortcut. Whoever read the overwritten tensor reads the new one instead.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from evennorm.errors import ArgumentError
from evennorm.torch.roles import name_of_function

_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_KEPT = ("requires_grad_", "retain_grad_")


def functional(model: nn.Module, graph: fx.Graph) -> None:
    """Change `graph`, and the settings of its modules, in place.

    Raises:
        ArgumentError: a step writes into a tensor that it is given for that.
    """
    called = {model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    writing = {module for module in called if _is_in_place(module)}
    for module in writing:
        vars(module).update({"inplace": False} if hasattr(module, "inplace") else {"memory": "save"})
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if not (model.get_submodule(str(node.target)) in writing if node.op == "call_module" else _wrote(node, model)):
            continue
        written = node.args[0] if node.args else node.kwargs.get("input")
        later = False
        for reader in graph.nodes:
            later = later or reader is node
            if later and reader is not node and isinstance(written, fx.Node) and written in reader.all_input_nodes:
                reader.replace_input_with(written, node)


def _is_in_place(module: Any) -> bool:
    return getattr(module, "inplace", None) is True or getattr(module, "memory", None) == "inplace"


def _wrote(node: fx.Node, model: nn.Module) -> bool:
    """Return whether a function or method wrote over its input, and change it so that it does not."""
    if node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
        return True
    name = name_of_function(node.target)
    if node.kwargs.get("out") is not None:  # F.normalize passes on its out=None
        raise ArgumentError(
            f"only models whose steps return new tensors can be rewritten, and the code of {type(model).__name__} passes "
            f"out= to {name!r}; leave that argument out"
        )
    if node.kwargs.get("inplace") is True:
        node.update_kwarg("inplace", False)
        return True
    index = _index_of_inplace(node.target)
    if index is not None and len(node.args) > index and node.args[index] is True:
        node.update_arg(index, False)
        return True
    if node.op == "call_method" and name.endswith("_") and not name.endswith("__") and name not in _KEPT:
        if hasattr(Tensor, name[:-1]):
            node.target = name[:-1]
            return True
    elif node.op == "call_function" and name.endswith("_"):
        plain = _plain(node.target, name)
        if plain is not None:
            node.target = plain
            return True
    return False


def _index_of_inplace(function: Any) -> int | None:
    """Return where a function of torch.nn.functional takes `inplace`, as F.relu(x, True) has it."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a method's name, or a builtin
        return None
    return names.index("inplace") if "inplace" in names else None


def _plain(function: Any, name: str) -> Any:
    """Return the function that writes nothing in place: torch.relu for torch.relu_, and F.relu for F.relu_."""
    if isinstance(function, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, name[:-1], None)
        return getattr(packet, function._overloadname, None)
    for home in (torch, nn.functional):
        if getattr(home, name, None) is function:
            return getattr(home, name[:-1], None)
    return None
