"""Trace the forward of one module, submodules as leaves, or say why a graph cannot replace that code.

torch.fx runs the code once and records what is done to tensors. All else that the code does or asks is lost, or fixed to the
answer of that one run. So the code is run under different modes, and whatever the graph would not repeat is refused.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from evennorm.torch.conversion.modes import ComputesNothing, draws_nothing, modes, surroundings
from evennorm.torch.conversion.shadow import check_kept, shadow_of
from evennorm.torch.conversion.steps import fused_by
from evennorm.torch.conversion.untraceable import Untraceable
from evennorm.torch.graph_code import unwritable

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_OF_EVERY_MODULE = {*dir(nn.Module), *vars(nn.Module())}


@dataclass(frozen=True)
class Trace:
    """What a forward does to its required arguments, if these are tensors and the others are left out."""

    graphs: dict[bool, fx.Graph]
    """The graphs, by the module's own `training`."""
    inputs: tuple[str, ...]
    constants: frozenset[str]
    """Attributes of the module, neither tensors nor modules, that the code has read."""


def trace(module: nn.Module) -> Trace:
    """Trace the forward of a module in both modes.

    Raises:
        Untraceable: the code does or asks what the graph would not repeat.
    """
    reads: set[str] = set()
    graphs: dict[bool, fx.Graph] = {}
    sources: dict[bool, str] = {}
    for training, others in itertools.product((True, False), repeat=2):
        graphs[training], source = _traced(module, training, others, reads)
        if sources.setdefault(training, source) != source:
            raise Untraceable("depends on the modes of its submodules, on autocast or on whether gradients are recorded")
    held = {*module._parameters, *module._buffers, *(name for name, child in module._modules.items() if child is not None)}
    inputs = tuple(node.target for node in graphs[True].nodes if node.op == "placeholder")
    return Trace(graphs, inputs, frozenset(reads - held - _OF_EVERY_MODULE))


def _traced(module: nn.Module, training: bool, others: bool, reads: set[str]) -> tuple[fx.Graph, str]:
    """Return the graph of one run, and its source text."""
    tracer = _Tracer()
    shadow = shadow_of(module, training, reads)
    with modes(module, others), draws_nothing(), ComputesNothing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = tracer.record(shadow)
            next(node for node in graph.nodes if node.op == "output").type = None
            if (name := unwritable(graph)) is not None:
                raise Untraceable(f"uses {name!r}, a name that torch.fx cannot write into code")
            source = graph.python_code("self").src
        except Untraceable:
            raise
        except Exception as error:  # code may raise anything when it gets symbols instead of tensors
            lines = str(error).strip().splitlines()
            words = ": ".join([type(error).__name__, *lines[:1]])
            raise Untraceable(f"cannot be traced ({words})") from error
    check_kept(module, shadow)
    if tracer.values_in_use():
        raise Untraceable("keeps values beyond the call")
    return graph, source


class _Proxy(fx.Proxy):
    """A symbol that refuses to be taken for anything but the tensor it stands for."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class that isinstance asks for where the real type does not answer."""
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") in ("abc", "typing", "_py_abc") and frame.f_back:
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").split(".")[0] != "torch":
            raise Untraceable("asks for the type of a value")
        return type(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise Untraceable(f"sets .{name} of a value")
        super().__setattr__(name, value)


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


# torch.fx knows none of them, and would record x += y as x = x + y, which leaves x as it was for all others.
for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class _Tracer(fx.Tracer):
    """A tracer for which all submodules are leaves; required arguments are symbols, others keep their defaults."""

    proxy_buffer_attributes = True

    def record(self, module: nn.Module) -> fx.Graph:
        self._values: list[weakref.ref[fx.Proxy]] = []
        self._surroundings = surroundings()
        return self.trace(module)

    def values_in_use(self) -> bool:
        """Return whether anything still holds a symbol after the trace."""
        if any(value() is not None for value in self._values):
            gc.collect()
        return any(value() is not None for value in self._values)

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        parameters = [*inspect.signature(root_fn).parameters.values()][1:]
        required = [each for each in parameters if each.default is each.empty and each.kind not in _VARIABLE]
        for each in required:
            if each.kind is each.KEYWORD_ONLY:
                raise Untraceable(f"requires {each.name} as a keyword")
        return root_fn, [self.root, *(self.create_proxy("placeholder", each.name, (), {}) for each in required)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Proxy(node, self)
        self._values.append(weakref.ref(value))
        return value

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if surroundings() != self._surroundings:
            raise Untraceable("changes autocast, gradient mode or what is saved for backward")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        held = itertools.chain(self.root.parameters(), self.root.buffers())
        if issubclass(type(a), torch.Tensor) and not any(a is each for each in held):
            raise Untraceable("uses a tensor that is neither parameter nor buffer")
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.submodule_paths.get(m)
        if path is None and fused_by(m) is not None:  # made on the spot: nn.ReLU()(x)
            return forward(*args, **kwargs)
        if not path:
            raise Untraceable(f"calls a {type(m).__name__} that is not registered in it")
        return self.create_proxy("call_module", path, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Untraceable("branches on a value")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise Untraceable("iterates over a value")

    def keys(self, obj: fx.Proxy) -> Any:
        raise Untraceable("iterates over a value")
