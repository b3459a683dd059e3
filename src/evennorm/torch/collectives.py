"""Exchange numbers between all devices by the collectives of torch.distributed, which compilers can record.

A process that fails leaves its peers waiting until the process group's timeout. What torch raises then names no layer; here
it becomes one line that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evennorm.errors import ArgumentError, SynchronizationError, reason_of

Group = Any
"""A torch.distributed.ProcessGroup; None for that of all processes."""

_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
"""Under its name since torch 2.13, or the one before."""


def size_of(group: Group) -> int:
    """Return the number of processes that synchronize: 1 where torch.distributed is not initialized.

    Raises:
        ArgumentError: this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 0:
        raise ArgumentError(
            "process_group holds the processes that share statistics, this one among them; received a group without rank "
            f"{dist.get_rank()}; give every process the group that it is in, as torch.distributed.new_subgroups does"
        )
    return size


def gathered(row: Tensor, group: Group) -> Tensor:
    """Return the rows of all processes, (process, number), in the order of their ranks."""
    size = dist.get_world_size(group)
    rows = row.new_empty(size * row.shape[0])
    _all_gather(rows, row, group=group)
    return rows.reshape(size, -1)


def added(values: Tensor, group: Group, participants: Sequence[int] | None = None) -> Tensor:
    """Return the sum of `values` over all processes, or over the `participants` among them, which are ranks in the group."""
    if participants is not None:
        return _added_among(values, group, participants)
    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


def _added_among(values: Tensor, group: Group, participants: Sequence[int]) -> Tensor:
    """Send to each participant and receive from each, without the other processes; add in the order of the ranks."""
    here, ranks = dist.get_rank(group), dist.get_process_group_ranks(group or dist.group.WORLD)
    parts = {peer: values if peer == here else torch.empty_like(values) for peer in participants}
    others = [peer for peer in participants if peer != here]
    operations = [dist.P2POp(dist.isend, values, ranks[peer], group) for peer in others]
    operations += [dist.P2POp(dist.irecv, parts[peer], ranks[peer], group) for peer in others]
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    total = torch.zeros_like(values)
    for part in parts.values():
        total += part
    return total


def check_backend(x: Tensor, group: Group) -> None:
    """Check that the group can send tensors of x's device.

    Raises:
        ArgumentError: the group cannot send tensors of x's device.
    """
    backends = dist.get_backend_config(group)
    if f"{x.device.type}:" not in backends and ":" in backends:
        advice = "gloo" if x.device.type == "cpu" else "nccl"
        raise ArgumentError(
            f"a process group sends tensors of the devices that it has a backend for; received a tensor on {x.device} and a "
            f"group of {backends}; make one by torch.distributed.new_group(backend={advice!r})"
        )


@contextmanager
def named(layer: Callable[[], str], doing: str, group: Group) -> Iterator[None]:
    """Prefix the error of a failed collective with the layer that waited, and for what."""
    try:
        yield
    except SynchronizationError:
        raise
    except RuntimeError as error:
        raise SynchronizationError(
            f"{layer()} on rank {dist.get_rank()} waited for {doing} of the {dist.get_world_size(group)} processes of its "
            "group, which did not come: a process failed, is in evaluation mode, or computes another network; see the "
            f"first error among them ({reason_of(error)})"
        ) from error
