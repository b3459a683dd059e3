"""Say why a batch normalization cannot be delayed until the addition after it, if it cannot.

The step that does both runs in the place of the addition, when the other operand is known. What runs before that must not
write to the input of the batch normalization, nor use its statistics.
"""

from __future__ import annotations

import operator

from torch import fx, nn
from torch.fx.graph import inplace_methods

_OPERATORS = tuple(getattr(operator, name) for name in inplace_methods)


def writes_between(norm: fx.Node, addition: fx.Node, graph: fx.Graph, module: nn.Module) -> str:
    """Return why the batch normalization cannot run as late as the addition; "" if it can."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    waiting = norm.args[0]
    read_elsewhere = isinstance(waiting, fx.Node) and len(waiting.users) > 1
    for node in graph.nodes:
        if not order[norm] < order[node] < order[addition]:
            continue
        if node.op == "call_module" and _shares(node, norm, module):
            return f"{node.target} comes in between and uses the same modules"
        for written in _written(node, module):
            # A value made after the input of the batch normalization, and no view of it, has other memory.
            if read_elsewhere or order[written] < order[norm]:
                return f"{node.name} comes in between and writes in place"
    return ""


def _shares(node: fx.Node, norm: fx.Node, module: nn.Module) -> bool:
    used, waiting = ({id(each) for each in module.get_submodule(str(call.target)).modules()} for call in (node, norm))
    return not used.isdisjoint(waiting)


def _written(node: fx.Node, module: nn.Module) -> list[fx.Node]:
    """Return the values that a node may write to."""
    if node.op == "call_module":
        inner = module.get_submodule(str(node.target)).modules()
        return node.all_input_nodes if any(getattr(each, "inplace", False) for each in inner) else []
    if node.op not in ("call_function", "call_method"):
        return []
    name = str(getattr(node.target, "__name__", node.target))
    in_place = node.target in _OPERATORS or (name.endswith("_") and not name.endswith("__"))
    return node.all_input_nodes if in_place or node.kwargs.get("out") is not None or node.kwargs.get("inplace") else []
