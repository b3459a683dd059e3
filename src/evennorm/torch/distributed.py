"""Normalize DTensors by the statistics of the whole batch, as torch.nn's modules do: on a copy that every device holds."""

from __future__ import annotations

import sys
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from evennorm.torch.modules import _BatchNorm


def is_distributed(x: Any) -> bool:
    """Return whether a tensor is a DTensor, without loading `torch.distributed.tensor`, which only its maker needs."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(x, loaded.DTensor)


def local(tensor: Any) -> Any:
    """Return the whole tensor on this device, differentiably; one that every device holds already shares its memory."""
    if not is_distributed(tensor):
        return tensor
    return tensor.redistribute(placements=_everywhere(tensor)).to_local()


def like(y: Tensor, x: Any) -> Any:
    """Return what every device has computed as a tensor that is sharded like `x`."""
    from torch.distributed.tensor import DTensor

    spread = DTensor.from_local(y, x.device_mesh, _everywhere(x), run_check=False)
    placements = [to if to.is_shard() else whole for to, whole in zip(x.placements, _everywhere(x), strict=True)]
    return spread.redistribute(placements=placements)


def forward(module: _BatchNorm, input: Any, *args: Any, **options: Any) -> Any:
    """Call a module on the whole tensors; running statistics are updated in the memory that this device holds."""
    whole = copy(module)
    for kind in ("_parameters", "_buffers"):
        whole.__dict__[kind] = {name: local(tensor) for name, tensor in module.__dict__[kind].items()}
    given = {name: local(value) for name, value in options.items()}
    return like(whole.forward(local(input), *map(local, args), **given), input)


def covers(x: Any, group: Any) -> bool:
    """Return whether all processes of a group hold parts of the batch `x`."""
    ranks = torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)
    return set(ranks) <= set(x.device_mesh.mesh.flatten().tolist())


def _everywhere(x: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate

    return [Replicate()] * x.device_mesh.ndim
