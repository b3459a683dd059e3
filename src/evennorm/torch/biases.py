"""Copy a torch module without the biases that batch normalization subtracts; predictions stay the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn


def without_biases(model: nn.Module, biased: Mapping[nn.Module, Sequence[nn.Module]]) -> nn.Module:
    """Return a copy of `model` in which some layers have no bias, with the bias subtracted from the running means after
    them.

    Args:
        model: any module that can be copied.
        biased: linear layers, each with the batch normalizations that read it; these read nothing else.
    """
    memo: dict[int, object] = {}
    result: nn.Module = copy.deepcopy(model, memo)
    with torch.no_grad():
        for linear, norms in biased.items():
            for norm in norms:
                fresh = memo[id(norm)]
                mean = norm.running_mean.cpu().double() - linear.bias.cpu().double()
                fresh.running_mean.copy_(mean)  # type: ignore[attr-defined]
            memo[id(linear)].bias = None  # type: ignore[attr-defined]
    return result
