"""Find the batch normalizations in the graph of a forward, and what each can be fused with.

Decided by data flow: nobody else reads the values in between, and nothing that runs in between writes to what is read later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from evennorm.core.activation import RELU, RELU6, Activation
from evennorm.torch.conversion.chains import last_of
from evennorm.torch.conversion.steps import fused_by, is_watched
from evennorm.torch.conversion.writes import writes_between

_ADD = (operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_, "add", "add_")
_ADD_IN_PLACE = (operator.iadd, Tensor.add_, "add_")
_RELU = (torch.relu, torch.relu_, functional.relu, functional.relu_, Tensor.relu, Tensor.relu_, "relu", "relu_")
_LEAKY_RELU = (functional.leaky_relu, functional.leaky_relu_)
_RELU6 = (functional.relu6,)
_HARDTANH = (functional.hardtanh, functional.hardtanh_)  # not clamp, whose gradient passes at both ends


@dataclass(frozen=True)
class Site:
    """One call of a module that ends in a batch normalization."""

    node: fx.Node
    unit: str
    """Path of the module that is called: the batch normalization, or the chain that it ends."""
    ends_chain: bool = False
    through: tuple[fx.Node, ...] = ()
    """Calls of nn.Identity directly after it."""
    addition: fx.Node | None = None
    activation: fx.Node | None = None
    applied: str | Activation | None = None
    """Path of the activation's module, or what its function computes."""
    reason: str = ""
    """Why nothing more is done in the same step."""

    @property
    def is_fused(self) -> bool:
        return self.addition is not None or self.activation is not None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that the fused step replaces."""
        return tuple(node for node in (self.node, *self.through, self.addition, self.activation) if node is not None)

    @property
    def residual(self) -> fx.Node | None:
        """The other operand as the graph has it now; rewriting other sites may have changed it."""
        return None if self.addition is None else _other_operand((self.node, *self.through)[-1], self.addition)

    @property
    def adds_in_place(self) -> bool:
        return self.addition is not None and self.addition.target in _ADD_IN_PLACE


def sites(graph: fx.Graph, module: nn.Module, is_norm: Callable[[nn.Module | None], bool]) -> list[Site]:
    """Return one site for each call of a module that ends in one which `is_norm` accepts; an addition of two goes to one of
    them."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    found = [_read(node, graph, module) for node in calls if is_norm(last_of(module.get_submodule(node.target)))]
    # Prefer a normalization that is called by itself to one that ends a chain, then the last: this moves the fewest steps.
    owners: dict[fx.Node | None, Site] = {None: found[0]} if found else {}
    for site in sorted(found, key=lambda site: (site.ends_chain, -found.index(site))):
        owners.setdefault(site.addition, site)
    return [site if site.addition is None or owners[site.addition] is site else _without_sum(site, owners) for site in found]


def _without_sum(site: Site, owners: dict[fx.Node | None, Site]) -> Site:
    reason = f"{owners[site.addition].unit} is added to it in the same step"
    return replace(site, addition=None, activation=None, applied=None, reason=reason)


def _read(node: fx.Node, graph: fx.Graph, module: nn.Module) -> Site:
    called = module.get_submodule(str(node.target))
    site = Site(node, str(node.target), last_of(called) is not called)
    watched = [path for path in _parts(site.unit, module) if is_watched(module.get_submodule(path))]
    if watched:
        return replace(site, reason=f"hooks on {watched[0]} see its output")
    if len(node.args) != 1 or node.kwargs:
        return replace(site, reason="it is called with more than its input")
    follower, reason = _only_reader(node)
    while follower is not None and follower.op == "call_module" and _is_identity(follower, module):
        if is_watched(module.get_submodule(str(follower.target))):
            return replace(site, reason=f"hooks on {follower.target} see its input")
        site, node = replace(site, through=(*site.through, follower)), follower
        follower, reason = _only_reader(node)
    if follower is None:
        return replace(site, reason=reason)
    if _other_operand(node, follower) is None:
        return _with_activation(site, node, follower, module)
    if follower.target in _ADD_IN_PLACE and follower.args[0] is not node:
        return replace(site, reason="the sum is written over the other operand")
    reason = writes_between(site.node, follower, graph, module)
    if reason:
        return replace(site, reason=reason)
    site = replace(site, addition=follower)
    last, reason = _only_reader(follower)
    return replace(site, reason=reason) if last is None else _with_activation(site, follower, last, module)


def _parts(unit: str, module: nn.Module) -> list[str]:
    """Return the paths of a chain, of the chain that ends it, and so on to the batch normalization."""
    paths = [unit]
    while last_of(inner := module.get_submodule(paths[-1])) is not inner:
        paths.append(f"{paths[-1]}.{list(inner._modules)[-1]}")
    return paths


def _only_reader(node: fx.Node) -> tuple[fx.Node | None, str]:
    readers = list(node.users)
    if len(readers) != 1:
        return None, f"its output is read by {len(readers)} others" if readers else "nobody reads its output"
    return readers[0], ""


def _is_identity(node: fx.Node, module: nn.Module) -> bool:
    return type(module.get_submodule(str(node.target))) is nn.Identity


def _other_operand(node: fx.Node, addition: fx.Node) -> fx.Node | None:
    """Return what is added to `node`, where this is an addition of two values."""
    plain = not addition.kwargs or addition.kwargs == {"alpha": 1}
    if addition.op not in ("call_function", "call_method") or addition.target not in _ADD or not plain:
        return None
    others = [operand for operand in addition.args if operand is not node]
    return others[0] if len(addition.args) == 2 and len(others) == 1 and isinstance(others[0], fx.Node) else None


def _with_activation(site: Site, node: fx.Node, follower: fx.Node, module: nn.Module) -> Site:
    applied = _applied(node, follower, module)
    if applied is None:
        return replace(site, reason=_followed_by(follower, module))
    if isinstance(applied, str) and is_watched(module.get_submodule(applied)):
        return replace(site, reason=f"hooks on {applied} see its input")
    return replace(site, activation=follower, applied=applied)


def _applied(node: fx.Node, activation: fx.Node, module: nn.Module) -> str | Activation | None:
    if activation.args[:1] != (node,):
        return None
    options = [*activation.args[1:], *activation.kwargs.values()]
    if activation.op == "call_module":
        path = str(activation.target)
        return path if not options and fused_by(module.get_submodule(path)) is not None else None
    if any(not isinstance(option, bool | int | float) for option in options):
        return None
    if activation.target in _RELU:
        return RELU
    if activation.target in _RELU6:
        return RELU6
    if activation.target in _HARDTANH:
        ends = _argument(activation, 1, "min_val", -1.0), _argument(activation, 2, "max_val", 1.0)
        return RELU6 if ends == (0, 6) else None
    if activation.target in _LEAKY_RELU:
        return Activation(float(_argument(activation, 1, "negative_slope", 0.01)))
    return None


def _argument(node: fx.Node, place: int, name: str, default: float) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _followed_by(node: fx.Node, module: nn.Module) -> str:
    if node.op == "output":
        return "its output is returned"
    if node.op == "call_module":
        return f"{node.target} ({type(module.get_submodule(str(node.target))).__name__}) follows"
    return f"{node.target if isinstance(node.target, str) else node.target.__name__} follows"
