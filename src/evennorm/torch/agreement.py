"""Compare what the processes of a group are about to exchange, before a collective of different sizes aborts or never ends.

Once for each layer and kind of input, by the key-value store in which the processes have found each other.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d

from evennorm.errors import SynchronizationError
from evennorm.torch.collectives import Group

_agreed: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""How often the processes of a group have agreed; the number is part of the keys."""

_SAME = "same"


def agree(group: Group, layer: Callable[[], str], facts: str) -> None:
    """Wait until every process of the group has stated the same facts.

    Raises:
        SynchronizationError: on every process, what each has said; or who has not come before the store's timeout.
    """
    group = group or dist.group.WORLD
    store, rank, size = distributed_c10d._get_default_store(), dist.get_rank(group), dist.get_world_size(group)
    number = _agreed[group] = _agreed.get(group, 0) + 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # restarted processes may find the store of the earlier ones
    place = f"evennorm/{attempt}/{group.group_name}/{number}"
    store.set(f"{place}/{rank}", facts)
    try:
        if rank == 0:
            store.wait([f"{place}/{peer}" for peer in range(size)])
            said = {peer: store.get(f"{place}/{peer}").decode() for peer in range(size)}
            store.set(f"{place}/verdict", _SAME if len(set(said.values())) == 1 else _listed(said))
        verdict = store.get(f"{place}/verdict").decode()
    except RuntimeError as error:
        raise SynchronizationError(
            f"{layer()} on rank {dist.get_rank()} waited for {_missing(store, place, size)}, which did not come: a process "
            "failed, is in evaluation mode, or computes another network; see the first error among them"
        ) from error
    if verdict != _SAME:
        raise SynchronizationError(
            f"{layer()} shares its statistics with other processes, whose inputs have the same channels and dtype; received "
            f"{verdict}; build the same model in every process"
        )


def _listed(said: dict[int, str]) -> str:
    by_facts: defaultdict[str, list[str]] = defaultdict(list)
    for rank, facts in said.items():
        by_facts[facts].append(str(rank))
    return " and ".join(
        f"{facts} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}" for facts, ranks in by_facts.items()
    )


def _missing(store: Any, place: str, size: int) -> str:
    """Return the ranks that have stated nothing, as far as the store still answers."""
    try:
        ranks = [str(peer) for peer in range(size) if not store.check([f"{place}/{peer}"])]
    except RuntimeError:
        ranks = []
    return f"rank {', '.join(ranks)}" if ranks else "the other processes"
