"""What a torch model does not say of itself: which of its parameters an optimizer decays, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from evennorm.core.network import Network, Role, Step


def with_optimizer(network: Network, optimizer: torch.optim.Optimizer) -> Network:
    """The network, each batch normalization with the parameters that the optimizer's weight decay draws to 0."""
    decayed = {
        id(parameter)
        for group in optimizer.param_groups
        if group.get("weight_decay")
        for parameter in group["params"]
        if parameter.requires_grad
    }

    def told(step: Step) -> Step:
        if step.role is not Role.BATCH_NORM or step.handle is None:
            return step
        named = {"gamma": getattr(step.handle, "weight", None), "beta": getattr(step.handle, "bias", None)}
        return replace(step, decayed=tuple(name for name, value in named.items() if id(value) in decayed))

    return replace(network, steps=tuple(map(told, network.steps)))


def example(model: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    """Zeros of a shape, where and as the model's first parameter is."""
    first = next(model.parameters(), None)
    return torch.zeros(*shape) if first is None else torch.zeros(*shape, device=first.device, dtype=first.dtype)
