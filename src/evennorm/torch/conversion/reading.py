"""Find the sites in a module's forward, or the reason why a graph cannot replace it."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.utils import parametrize

from evennorm.torch.conversion.sites import Site, sites
from evennorm.torch.conversion.steps import takes_more
from evennorm.torch.conversion.swap import derived, original_class
from evennorm.torch.conversion.trace import Trace, trace
from evennorm.torch.conversion.untraceable import Untraceable


@dataclass(frozen=True)
class Reading:
    trace: Trace | None = None
    sites: dict[bool, list[Site]] = field(default_factory=dict)
    """The sites, by the module's `training`."""
    failure: str = ""
    """Why there is no graph: a sentence."""

    def calls_of(self, module: nn.Module, unit: nn.Module) -> list[Site]:
        """Return the sites at which the forward of `module` calls `unit`, in training if there are any, else in
        evaluation."""
        for training in (True, False):
            found = [site for site in self.sites.get(training, ()) if module.get_submodule(site.unit) is unit]
            if found:
                return found
        return []


def read(module: nn.Module, mixin: type[nn.Module]) -> Reading:
    """Return the sites in the forward of a module whose class could get the mixin `mixin`."""
    failure = fixed(module, mixin)
    if failure:
        return Reading(failure=failure)
    try:
        found = trace(module)
    except Untraceable as reason:
        return Reading(failure=f"the forward of {original_class(module).__name__} {reason}")
    return Reading(found, {training: sites(graph, module, takes_more) for training, graph in found.graphs.items()})


def fixed(module: nn.Module, mixin: type[nn.Module]) -> str:
    """Return why the class of a module has to stay as it is; "" if it can be changed."""
    kind = original_class(module)
    if "forward" in module.__dict__:
        return f"this {kind.__name__} has a forward of its own, set on the object"
    if parametrize.is_parametrized(module):
        return f"{kind.__name__} holds parametrized tensors"
    if isinstance(module, fx.GraphModule):
        return "its code is a graph already (torch.fx.GraphModule); convert before tracing"
    if type(kind) not in (type, abc.ABCMeta):
        return f"{kind.__name__} has a metaclass of its own"
    for name in ("__call__", "__reduce__", "__reduce_ex__", "__deepcopy__"):
        if getattr(kind, name, None) is not getattr(nn.Module, name, None):
            return f"{kind.__name__} has a {name} of its own"
    try:
        derived(mixin, kind)
    except Exception as error:  # a class may forbid, or do with classes derived from it, what it likes
        return f"no class can be derived from {kind.__name__} ({error})"
    return ""
