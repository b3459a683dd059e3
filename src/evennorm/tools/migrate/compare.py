"""Compare the layers that a file describes with those of an architecture that is given for it."""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose
from typing import Any, NamedTuple

from evennorm.tools.migrate.records import OldLayer, OldModel
from evennorm.tools.migrate.slots import slots

_DEFAULTS: dict[str, Any] = {
    "activation": "linear",
    "axis": -1,
    "center": True,
    "depth_multiplier": 1,
    "dilation_rate": 1,
    "go_backwards": False,
    "groups": 1,
    "mode": 0,
    "renorm": False,
    "return_sequences": False,
    "scale": True,
    "use_bias": True,
}
"""Settings that change outputs, with their values where a configuration is silent."""

_STATED = (
    "concat_axis", "cropping", "data_format", "dims", "dot_axes", "epsilon", "filters", "interpolation", "kernel_size",
    "mask_value", "mask_zero", "max_value", "merge_mode", "n", "negative_slope", "output_padding", "padding", "pool_size",
    "recurrent_activation", "reset_after", "size", "strides", "target_shape", "theta", "threshold", "units",
)  # fmt: skip
"""Settings that change outputs and are compared only where both state them."""

_IN_TRAINING = ("momentum", "rate")


class Differences(NamedTuple):
    """One sentence for each setting on which the two disagree."""

    outputs: tuple[str, ...]
    """Differences of settings that change outputs."""
    others: tuple[str, ...]
    """Differences of settings that only training uses, and of the order of axes, which a new architecture may change."""


def differences(old: OldModel, given: OldModel, ranks: dict[str, int] | None = None) -> Differences:
    """Compare corresponding layers: by their names, else by their order, as their weights are matched.

    Args:
        ranks: that of the input of each given layer, where it is known, by the layer's path.
    """
    outputs: list[str] = []
    others: list[str] = []
    for a, b in _pairs(old, given):
        if a.kind != b.kind:
            if _holds(a) or _holds(b):
                outputs.append(f"{b.path}: class {a.written} in the file, {b.written} in the architecture")
            continue
        turned = _differ("data_format", a, b, None) is not None
        for key in (*_DEFAULTS, *_STATED, *_IN_TRAINING):
            said = _differ(key, a, b, (ranks or {}).get(b.path))
            if said is None:
                continue
            harmless = key in _IN_TRAINING or (ranks is not None and (key == "data_format" or (key == "axis" and turned)))
            (others if harmless else outputs).append(said)
    return Differences(tuple(outputs), tuple(others))


def _pairs(old: OldModel, given: OldModel) -> Iterator[tuple[OldLayer, OldLayer]]:
    first, second = ([x for x in model.leaves() if x.kind != "InputLayer"] for model in (old, given))
    by_path = {layer.path: layer for layer in first}
    if all(layer.path in by_path for layer in second if _holds(layer)):
        return ((by_path[layer.path], layer) for layer in second if layer.path in by_path)
    if [x.kind for x in first] != [x.kind for x in second]:
        first, second = (list(filter(_holds, layers)) for layers in (first, second))
    return zip(first, second, strict=False)


def _holds(layer: OldLayer) -> bool:
    return any(True for _ in slots(layer))


def _differ(key: str, a: OldLayer, b: OldLayer, rank: int | None) -> str | None:
    default = _DEFAULTS.get(key)
    one, other = (_plain(key, layer, default) for layer in (a, b))
    if one is None or other is None or _same(key, one, other, rank):
        return None
    return f"{b.path}: {key} {_shown(one)} in the file, {_shown(other)} in the architecture"


def _plain(key: str, layer: OldLayer, default: Any) -> Any:
    """Return a setting in one form, whichever release wrote it; None where nothing tells."""
    config = layer.config
    if key == "negative_slope" and key not in config and layer.kind == "LeakyReLU":
        key = "alpha"
    value = config.get(key, default)
    if key == "activation" and key in config and value is None and layer.kind != "Activation":
        return None  # a function of the user's own
    if isinstance(value, list | tuple):
        value = tuple(tuple(x) if isinstance(x, list) else x for x in value)
        return value[0] if value and len(set(map(str, value))) == 1 else value
    if isinstance(value, dict) or (isinstance(value, str) and value.startswith("evennorm>")):
        return None
    return value


def _same(key: str, one: Any, other: Any, rank: int | None) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    if numbers and key in ("axis", "concat_axis") and (one < 0) != (other < 0):
        return rank is None or int(one) % rank == int(other) % rank
    return isclose(one, other, rel_tol=1e-5) if numbers else one == other


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
