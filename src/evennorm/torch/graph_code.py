"""Make a module that runs a graph of torch.fx, and refuse names that the code of such a module cannot hold."""

from __future__ import annotations

import re

from torch import fx, nn

from evennorm.errors import InputError

_BREAKS_CODE = re.compile('[\n\r\0"\\\\\ud800-\udfff]')


def graph_module(model: nn.Module, graph: fx.Graph, class_name: str = "GraphModule") -> fx.GraphModule:
    """Return a module that runs a graph of `model`.

    Raises:
        InputError: a layer or tensor in the graph has a name that the code of a GraphModule cannot hold.
    """
    name = unwritable(graph)
    if name is not None:
        raise InputError(
            "torch.fx writes the names of layers into code, which line breaks, double quotes, backslashes, null "
            f"characters and lone surrogates break; received a layer named {name!r}; rename it"
        )
    made = fx.GraphModule(model, graph, class_name=class_name)
    held = dict(model.named_modules(remove_duplicate=False))
    for path, module in made.named_modules():  # torch.fx makes new ones of those that only hold others
        if path in held:
            module._non_persistent_buffers_set |= held[path]._non_persistent_buffers_set & module._buffers.keys()
    return made


def unwritable(graph: fx.Graph) -> str | None:
    """Return the first name in a graph that breaks the code which torch.fx writes for it, or None."""
    names = (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return next((name for name in names if _BREAKS_CODE.search(name)), None)
