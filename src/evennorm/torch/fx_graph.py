"""Trace all layers of a model in evaluation mode into one graph, as far as torch.fx can follow its code.

A module whose code cannot be followed is one node of the graph, with the reason; what it does inside is then unknown. The
graph is for reading, and for rewriting what is verified afterwards: unlike the conversion's, it may rest on what the code
happened to ask.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm

from evennorm.torch.conversion.norms import closed
from evennorm.torch.conversion.steps import is_watched
from evennorm.torch.roles import computes_like_torch, is_frozen_norm

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class ModelGraph:
    """The graph of a module's forward."""

    graph: fx.Graph | None
    """The graph; None where the forward of the module itself cannot be followed."""
    opaque: dict[str, str]
    """Why modules that hold others are single nodes, by their path; "" is the module itself."""


def model_graph(module: nn.Module, training: bool = False) -> ModelGraph:
    """Trace a module in evaluation, or in training; the module is left as it was."""
    tracer = _Tracer()
    if is_leaf(module):
        graph = fx.Graph(tracer_cls=_Tracer)
        graph.output(graph.call_module("", (graph.placeholder("input"),)))
        return ModelGraph(graph, {})
    try:
        with _mode(module, training), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(module)
    except Exception as error:  # whatever the code makes of symbols instead of tensors
        return ModelGraph(None, {"": _reason(module, error)})
    return ModelGraph(graph, tracer.opaque)


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is one step: torch's own layers, ours, and other batch normalizations that compute like
    them."""
    if isinstance(module, batchnorm._BatchNorm):
        return computes_like_torch(module)
    if is_frozen_norm(module):
        return True
    home = type(module).__module__
    return home.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential | nn.ModuleList)


class _Symbol(fx.Proxy):
    """A symbol that records changes in place."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


# torch.fx would record x += y as x = x + y, which leaves x as it was for all others.
for _name in ("add", "sub", "mul", "truediv"):
    setattr(_Symbol, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class _Tracer(fx.Tracer):
    """A tracer that enters every module but the leaves and those it cannot follow; arguments with defaults keep them."""

    module_stack: OrderedDict[str, tuple[str, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.opaque: dict[str, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or module_qualified_name in self.opaque

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        parameters = [*inspect.signature(root_fn).parameters.values()][1:]
        required = [each for each in parameters if each.default is each.empty and each.kind not in _VARIABLE]
        return root_fn, [self.root, *(self.create_proxy("placeholder", each.name, (), {}) for each in required)]

    def create_arg(self, a: Any) -> Any:
        """Refuse values that the graph would fix to those of this one run, since they may be random or depend on a size."""
        made = isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs
        if made and not any(a is buffer for buffer in self.root.buffers()):
            raise _NotFollowedError("makes a tensor in its code")
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.submodule_paths is not None and m not in self.submodule_paths:  # made on the spot: nn.ReLU()(x)
            return forward(*args, **kwargs)
        if is_leaf(m):
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        before = set(self.graph.nodes)
        known = dict(self.opaque)
        callers = copy.copy(self.module_stack)
        try:
            refusal = _closed(m)
            if refusal:
                raise _NotFollowedError(refusal)
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            for node in reversed([node for node in self.graph.nodes if node not in before]):
                self.graph.erase_node(node)
            self.opaque = {**known, path: _reason(m, error)}
            self.module_stack = callers  # torch.fx leaves on it what the error came through
            return super().call_module(m, forward, args, kwargs)


class _NotFollowedError(Exception):
    """Why a module is one node; the text follows the module's class."""


def _closed(module: nn.Module) -> str:
    if is_watched(module):
        return "has hooks, which see its input and output"
    return closed(module)


def _reason(module: nn.Module, error: Exception) -> str:
    if isinstance(error, _NotFollowedError):
        return f"{type(module).__name__} {error}"
    lines = str(error).strip().splitlines()
    words = ": ".join([type(error).__name__, *lines[:1]])
    return f"the code of {type(module).__name__} cannot be followed ({words})"


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put the module in evaluation or training, and undo what its code sets on itself."""
    before = [(each, dict(vars(each))) for each in module.modules()]
    try:
        for each, _ in before:
            vars(each)["training"] = training
        yield
    finally:
        for each, content in before:
            vars(each).clear()
            vars(each).update(content)
