"""A model and example inputs go in; how often each of its layers ran, and the shape and dtype it gave, come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """One forward pass in evaluation and without gradients; those that did not run are not in it."""
    found: dict[nn.Module, Run] = {}

    def note(module: nn.Module) -> Callable[..., None]:
        def seen(_: Any, __: Any, output: Any) -> None:
            run = found.setdefault(module, Run())
            run.times += 1
            if isinstance(output, Tensor):
                run.shape, run.dtype = tuple(output.shape), output.dtype

        return seen

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(note(module)) for module, _ in modes]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return found
