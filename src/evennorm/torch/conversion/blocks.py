"""Run the batch normalizations of a module together with what follows them, by a graph of its forward.

The object stays the same. Its own code still runs wherever the graph does not hold: for arguments other than the tensors
that it requires, and once something was changed that the code has read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evennorm.torch.conversion.reading import Reading, read
from evennorm.torch.conversion.rewrite import rewritten
from evennorm.torch.conversion.swap import Swapped, made_of, original_class, swap, swap_back
from evennorm.torch.conversion.trace import Trace

_PLAN = "_evennorm_plan"


@dataclass(frozen=True)
class Plan:
    """What a module runs instead of its own forward, and when."""

    code: Callable[..., Any]
    """The forward that the graph was traced from."""
    forwards: Mapping[bool, Callable[..., Any]]
    """The function to run, by the module's `training`."""
    inputs: tuple[str, ...]
    constants: frozenset[str]
    """What the code has read of the module besides tensors and submodules: once one of these is set, the graph may be
    wrong."""
    structure: tuple[tuple[str, tuple[str, ...]], ...]
    """Names in the containers that hold the submodules."""

    def fits(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        given = (*args, *kwargs.values())
        return (
            original_class(module).forward is self.code
            and len(given) == len(self.inputs)
            and all(isinstance(value, Tensor) for value in given)
            and all(name in self.inputs for name in kwargs)
            and all(tuple(_at(path, module)._modules) == names for path, names in self.structure)
        )

    def __deepcopy__(self, memo: Any) -> Plan:
        return self

    def __reduce__(self) -> Any:
        return _none, ()


def _none() -> None:
    """Replace a plan in a file, which stores none: whoever loads the file plans again, from the code that he has."""


class FusedBlock(Swapped):
    """A mixin for the class of a module that runs by its graph."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if made_of(cls):
            cls.forward = _by_plan(made_of(cls)[1])

    def __setattr__(self, name: str, value: Any) -> None:
        plan = self.__dict__.get(_PLAN)
        if plan is not None and (name in plan.constants or (value is None and name in self._modules)):
            del self.__dict__[_PLAN]
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop(_PLAN, None)
        super().__delattr__(name)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if self.__dict__.get(_PLAN, self) is None:
            del self.__dict__[_PLAN]
            fuse(self, read(self, FusedBlock))


def _by_plan(kind: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plan = self.__dict__.get(_PLAN)
        if plan is None or not plan.fits(self, args, kwargs):
            return kind.forward(self, *args, **kwargs)
        return plan.forwards[self.training](self, *args, **kwargs)

    return forward


def fuse(module: nn.Module, reading: Reading) -> None:
    """Run a module by its graph from now on, where it has one with a step that can be fused."""
    trace = reading.trace
    if trace is None or not any(site.is_fused for found in reading.sites.values() for site in found):
        return
    structure = _structure(module, trace)
    forwards = {training: rewritten(graph, reading.sites[training]) for training, graph in trace.graphs.items()}
    if not isinstance(module, FusedBlock):
        swap(module, FusedBlock)
    module.__dict__[_PLAN] = Plan(original_class(module).forward, forwards, trace.inputs, trace.constants, structure)


def unfuse(module: nn.Module) -> None:
    """Restore the module's own forward."""
    module.__dict__.pop(_PLAN, None)
    if made_of(type(module))[:1] == (FusedBlock,):
        swap_back(module)


def is_fused(module: nn.Module) -> bool:
    return _PLAN in module.__dict__


def _at(path: str, module: nn.Module) -> nn.Module:
    return module.get_submodule(path) if path else module


def _structure(module: nn.Module, trace: Trace) -> tuple[tuple[str, tuple[str, ...]], ...]:
    called = {str(node.target) for graph in trace.graphs.values() for node in graph.nodes if node.op == "call_module"}
    containers = {""} | {path.rpartition(".")[0] for path in called}
    return tuple((path, tuple(module.get_submodule(path)._modules)) for path in sorted(containers))
