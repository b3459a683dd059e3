"""Run a model on example inputs, and record how often each layer ran, what it returned and what the code read of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Run:
    times: int = 0
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


def runs(model: nn.Module, inputs: Sequence[Any]) -> dict[nn.Module, Run]:
    """Record one forward pass in evaluation and without gradients; modules that did not run are left out."""
    found: dict[nn.Module, Run] = {}

    def note(module: nn.Module) -> Callable[..., None]:
        def seen(_: Any, __: Any, output: Any) -> None:
            run = found.setdefault(module, Run())
            run.times += 1
            if isinstance(output, Tensor):
                run.shape, run.dtype = tuple(output.shape), output.dtype

        return seen

    handles = [module.register_forward_hook(note(module)) for module in model.modules()]
    try:
        _run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def reads(model: nn.Module, inputs: Sequence[Any], modules: Collection[nn.Module]) -> dict[nn.Module, set[str]]:
    """Record what code outside of these modules reads of them in one forward pass: names of attributes, except for calls."""
    found: dict[nn.Module, set[str]] = {}
    with _noting(modules, found):
        _run(model, inputs)
    return found


def _run(model: nn.Module, inputs: Sequence[Any]) -> None:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            model(*inputs)
    finally:
        for module, training in modes:
            module.training = training


_OF_EVERY_MODULE = frozenset(dir(nn.Module())) | {"__class__", "__dict__", "training"}


@contextmanager
def _noting(modules: Collection[nn.Module], found: dict[nn.Module, set[str]]) -> Iterator[None]:
    """Give the modules classes that note what is read of them while they do not run themselves."""
    inside: set[int] = set()
    before = {module: type(module) for module in modules}

    def noting(kind: type[nn.Module]) -> type[nn.Module]:
        def get(self: Any, name: str) -> Any:
            if name not in _OF_EVERY_MODULE and not name.startswith("_") and id(self) not in inside:
                found.setdefault(self, set()).add(name)
            return object.__getattribute__(self, name)  # Module.__getattr__ finds what that does not

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            inside.add(id(self))
            try:
                return kind.__call__(self, *args, **kwargs)
            finally:
                inside.discard(id(self))

        return type(kind.__name__, (kind,), {"__getattribute__": get, "__call__": call, "__module__": kind.__module__})

    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    try:
        for module, kind in before.items():
            if kind not in kinds:
                kinds[kind] = noting(kind)
            module.__class__ = kinds[kind]
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind
