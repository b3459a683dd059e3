"""Exchange the batch normalization of an nnx model for evennorm's, and back.

Modules stay the objects that they are, and with them their variables: a layer's class is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from flax import nnx

from evennorm.errors import ArgumentError
from evennorm.flax.modules import BatchNorm
from evennorm.jax import layer_arguments

Model = TypeVar("Model", bound=nnx.Module)

_OWN = ("activation", "negative_slope", "virtual_batch_size", "unbiased")
"""Attributes that Flax's layer lacks."""


def convert(model: Model, inplace: bool = False) -> Model:
    """Return `model` with every flax.nnx.BatchNorm exchanged for evennorm's.

    Outputs, gradients and running statistics are the same within rounding. The state is the same: its paths, types and
    values. Classes derived from Flax's stay as they are.

    Args:
        model: any nnx module.
        inplace: change `model` itself, whose variables stay those that an optimizer knows; else a copy, made by nnx.clone.

    Raises:
        ArgumentError: no nnx module; a layer whose momentum or epsilon is outside its range.

    Example:
        >>> from flax import nnx
        >>> from evennorm.flax import convert
        >>> model = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
        >>> type(convert(model).layers[1]).__module__
        'evennorm.flax.modules'
    """
    model = _own(model, "convert", inplace)
    found = list(_of_class(model, nnx.BatchNorm))
    for path, module in found:
        try:
            layer_arguments.check(module.momentum, module.epsilon)
        except ArgumentError as error:
            raise ArgumentError(f"{path or 'the model'}: {error}") from error
    for _, module in found:
        object.__setattr__(module, "__class__", BatchNorm)
        module._configure()
    return model


def revert(model: Model, inplace: bool = False) -> Model:
    """Return `model` with every batch normalization of evennorm exchanged for Flax's: the way back from `convert`.

    Raises:
        ArgumentError: no nnx module; a layer with an activation, ghost batches or unbiased variance: Flax's has none.

    Example:
        >>> from flax import nnx
        >>> from evennorm.flax import convert, revert
        >>> model = nnx.Sequential(nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
        >>> type(revert(convert(model)).layers[0]) is nnx.BatchNorm
        True
    """
    model = _own(model, "revert", inplace)
    found = list(_of_class(model, BatchNorm))
    for path, module in found:
        given = {name: getattr(module, name) for name in ("activation", "virtual_batch_size", "unbiased")}
        if words := ", ".join(f"{name}={value!r}" for name, value in given.items() if value):
            raise ArgumentError(
                f"flax.nnx.BatchNorm cannot do what {path or 'the model'!r} does with {words}; keep that layer, or build it "
                "without"
            )
    for _, module in found:
        for name in _OWN:
            delattr(module, name)
        object.__setattr__(module, "__class__", nnx.BatchNorm)
    return model


def _own(model: Model, verb: str, inplace: bool) -> Model:
    if not isinstance(model, nnx.Module):
        raise ArgumentError(
            f"{verb} takes an nnx module; received {type(model).__name__}; of linen, import evennorm.flax.linen.BatchNorm "
            "where the model is defined"
        )
    return model if inplace else nnx.clone(model)


def _of_class(model: nnx.Module, kind: type[nnx.Module]) -> Iterator[tuple[str, Any]]:
    """Yield the layers of exactly this class, each once; a class derived from it may compute something else."""
    for path, module in nnx.iter_modules(model):
        if type(module) is kind:
            yield ".".join(map(str, path)), module
