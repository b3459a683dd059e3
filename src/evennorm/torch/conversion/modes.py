"""Detect what code depends on or changes without a trace in its graph: modes, gradients, autocast, random numbers,
constants."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from evennorm.torch.conversion.untraceable import Untraceable

_DEVICES = ("cpu", "cuda")


def surroundings() -> tuple[Any, ...]:
    """Return the state that context managers change and that no graph records."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES),
    )


@contextmanager
def modes(module: nn.Module, on: bool) -> Iterator[None]:
    """Turn training of submodules, gradients and autocast all on or all off, so that code which sets them is noticed."""
    children = [(child, child.training) for child in module.modules() if child is not module]
    autocast = [(device, torch.is_autocast_enabled(device)) for device in _DEVICES]
    try:
        for child, _ in children:
            child.training = on
        for device in _DEVICES:
            torch.set_autocast_enabled(device, on)
        with torch.set_grad_enabled(on):
            yield
    finally:
        for child, training in children:
            child.training = training
        for device, enabled in autocast:
            torch.set_autocast_enabled(device, enabled)


@contextmanager
def draws_nothing() -> Iterator[None]:
    before, numpys = random.getstate(), np.random.get_state(legacy=False)
    try:
        yield
        after = np.random.get_state(legacy=False)
        drawn = random.getstate() != before or after["state"]["pos"] != numpys["state"]["pos"]
    finally:
        random.setstate(before)
        np.random.set_state(numpys)
    if drawn:
        raise Untraceable("draws random numbers")


class ComputesNothing(TorchDispatchMode):
    """A mode that refuses operations on real tensors: their results would be the same at every call."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"computes something that does not depend on its input ({func})")
