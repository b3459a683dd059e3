"""Note which parameters of each batch normalization the weight decay of an optimizer pulls to 0."""

from __future__ import annotations

from dataclasses import replace

import torch

from evennorm.models.network import Network, Role, Step


def with_optimizer(network: Network, optimizer: torch.optim.Optimizer) -> Network:
    """Return the network with `decayed` set at its batch normalizations."""
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
