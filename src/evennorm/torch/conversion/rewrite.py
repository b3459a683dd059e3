"""Turn the graph of a forward into a function that fuses the steps of its sites."""

from __future__ import annotations

import functools
import linecache
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from evennorm.torch.conversion.chains import unnormalized
from evennorm.torch.conversion.sites import Site
from evennorm.torch.conversion.steps import normalized


def rewritten(graph: fx.Graph, sites: Sequence[Site]) -> Callable[..., Any]:
    """Return a function of the module and its inputs, made from the graph, which is changed."""
    for site in sites:
        if site.is_fused:
            _rewrite(graph, site)
    code = graph.python_code("self")
    return _function(code.src, tuple(code.globals.items()))


def _rewrite(graph: fx.Graph, site: Site) -> None:
    with graph.inserting_before(site.node):
        norm, x = graph.get_attr(site.unit), site.node.args[0]
        if site.ends_chain:  # only the last module of a chain waits for the addition
            parts = graph.call_function(unnormalized, (norm, x))
            norm, x = (graph.call_function(operator.getitem, (parts, place)) for place in (0, 1))
    with graph.inserting_before(site.addition or site.node):
        activation = graph.get_attr(site.applied) if isinstance(site.applied, str) else site.applied
        through = {"through": [graph.get_attr(str(node.target)) for node in site.through]} if site.through else {}
        step = graph.call_function(normalized, (norm, x, site.residual, activation, site.adds_in_place), through)
    site.nodes[-1].replace_all_uses_with(step)
    for node in reversed(site.nodes):
        graph.erase_node(node)


@functools.lru_cache(maxsize=1024)
def _function(source: str, names: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """Compile the function `forward` of a source text, once per text, so that a compiler compiles blocks of the same code
    once."""
    file = f"<evennorm fused forward {hash(source):x}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # so that tracebacks show it
    space = dict(names)
    exec(compile(source, file, "exec"), space)
    return space["forward"]
