"""Match the layers of an old model with the groups of a weights file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evennorm.errors import InputError
from evennorm.tools.migrate.records import OldFile, OldLayer, OldModel, OldWeights
from evennorm.tools.migrate.slots import Slot, names_of, slots


@dataclass(frozen=True)
class Matched:
    """The arrays of every layer by its path, and what was concluded on the way."""

    arrays: dict[str, tuple[np.ndarray, ...]]
    notes: tuple[str, ...]

    def of(self, layer: OldLayer) -> tuple[np.ndarray, ...]:
        return self.arrays.get(layer.path, ())


def match(model: OldModel, file: OldFile) -> Matched:
    """Match layers by name where the file has all their names, else by their order, as Keras loaded them.

    Raises:
        InputError: another number of layers with weights, or of weights in a layer.
    """
    holders = [layer for layer in model.layers if layer.kind != "InputLayer" and any(True for _ in slots(layer))]
    groups = [group for group in file.weights if group.arrays]
    # Unknown classes may hold weights too: their groups are not for other layers.
    known = {layer.name for layer in model.layers}
    notes: list[str] = []
    by_name = {group.layer: group for group in groups}
    if all(layer.named and layer.name in by_name for layer in holders):
        pairs = [(layer, by_name[layer.name]) for layer in holders]
        unknown = sorted(set(by_name) - known)
        if unknown:
            notes.append(f"left unused, since the architecture has no such layers: {', '.join(unknown)}")
        others = [layer for layer in model.layers if layer not in holders and layer.name in by_name]
        pairs += [(layer, by_name[layer.name]) for layer in others]
    elif len(holders) == len(groups):
        pairs = list(zip(holders, groups, strict=True))
        why = "have other names than those of the weights" if all(x.named for x in holders) else "do not all have names"
        notes.append(f"layers of the architecture {why}; they were matched in their order")
    else:
        raise InputError(
            f"{file.path!r} has {len(groups)} layers with weights and the architecture {len(holders)}, of other names "
            f"(file: {_shown([x.layer for x in groups])}; architecture: {_shown([x.name for x in holders])}); give the "
            "architecture that the weights were saved with"
        )
    arrays = {path: values for layer, group in pairs for path, values in _split(layer, group).items()}
    return Matched(arrays, tuple(notes))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _split(layer: OldLayer, group: OldWeights) -> dict[str, tuple[np.ndarray, ...]]:
    """Return the arrays of one group by the path of the layer that holds them, in the order of that layer's slots."""
    if layer.model is None and (layer.inner is None or layer.inner.model is None):
        target = layer
        while target.inner is not None and target.kind != "Bidirectional":
            target = target.inner
        return {target.path: _ordered(target, group)}
    wanted = list(slots(layer))
    if len(wanted) != len(group.arrays):
        raise InputError(
            f"the nested model {layer.name!r} holds {len(wanted)} weights in its architecture and {len(group.arrays)} in "
            "the file; give the architecture that the weights were saved with"
        )
    order = _by_names(wanted, group.names) or range(len(wanted))
    found: dict[str, list[np.ndarray]] = {}
    # Slots are in stored order, trainable ones first, which is the layer's own order within a layer.
    for slot, index in zip(wanted, order, strict=True):
        found.setdefault(_path(slot), []).append(group.arrays[index])
    return {path: tuple(values) for path, values in found.items()}


def _path(slot: Slot) -> str:
    """Return the path of the layer that holds a slot: a Bidirectional holds those of both directions."""
    if any(owner.startswith(("forward_", "backward_")) and owner.endswith(slot.layer.name) for owner in slot.owners):
        return slot.layer.path.rsplit("/", 1)[0]
    return slot.layer.path


def _ordered(layer: OldLayer, group: OldWeights) -> tuple[np.ndarray, ...]:
    """Return the arrays of one layer in the order of `names_of`: some releases stored them in another."""
    if layer.kind == "Bidirectional":
        return group.arrays
    first, rest = names_of(layer, len(group.arrays))
    names = (*first, *rest)
    if len(names) != len(group.arrays):
        return group.arrays
    patterns = [
        re.compile(rf"(?:^|[_/])(?:{'|'.join(map(re.escape, alternatives))})(?:_\d+)?(?::\d+)?$") for alternatives in names
    ]
    order = [[k for k, name in enumerate(group.names) if pattern.search(name)] for pattern in patterns]
    if all(len(found) == 1 for found in order) and len({found[0] for found in order}) == len(names):
        return tuple(group.arrays[found[0]] for found in order)
    return group.arrays


def _by_names(wanted: list[Slot], names: Sequence[str]) -> list[int] | None:
    """Return where each slot's array is, by the names they are stored under; None where the names do not tell."""
    order = []
    for slot in wanted:
        owners, kinds = ("|".join(map(re.escape, words)) for words in (slot.owners, slot.names))
        pattern = re.compile(rf"(?:^|/)(?:{owners})[_/](?:.*/)?(?:{kinds})(?:_\d+)?(?::\d+)?$")
        found = [k for k, name in enumerate(names) if pattern.search(name)]
        if len(found) != 1:
            return None
        order.append(found[0])
    return order if len(set(order)) == len(order) else None
