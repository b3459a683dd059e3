"""Copy an nnx.Sequential for inference with its batch normalizations folded into neighbouring layers."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from evennorm.errors import ArgumentError
from evennorm.flax.modules import BatchNorm
from evennorm.flax.network import network
from evennorm.models.fold_plan import LinearLayer, Passage, Plan, plan
from evennorm.models.folding import Layout, Linear
from evennorm.models.network import Role, Step


def fold(model: nnx.Module, x: Any) -> tuple[nnx.Module, Plan]:
    """Return a copy of `model` that computes the same in evaluation with fewer layers, and a plan of what became of each
    batch normalization.

    Each batch normalization becomes part of the nnx.Linear or nnx.Conv before or after it, where that is exact, and a
    function that returns its input replaces it: all other paths in the state stay. The others are kept. Computed in
    float64. The copy is for inference.

    Args:
        model: an nnx.Sequential, of others in it too: it says in which order it calls its layers, and nothing else does.
        x: an example input.

    Raises:
        ArgumentError: another module, whose code is not followed.
        InputError: the model does not take the input.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from evennorm.flax.fold import fold
        >>> model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.relu)
        >>> folded, plan = fold(model, jnp.ones((3, 4)))
        >>> plan.folded[0].into, folded.layers[1].__name__
        (('layers.0',), 'identity')
    """
    if type(model) is not nnx.Sequential:
        raise ArgumentError(
            f"fold follows an nnx.Sequential, which says in which order it calls its layers; received "
            f"{type(model).__name__}, whose code is not followed; fold the nnx.Sequential in it"
        )
    copy: Any = nnx.clone(model)
    copy.eval()
    found = network(copy, x)
    made = plan(found, _describe, _fixed)
    folded = tuple(each if each.into else replace(each, kept=True) for each in made.folded)
    for path, maps in made.maps.items():
        _write(_at(copy, path), maps[0])
    for each in folded:
        if each.into:
            *above, number = each.layer.split(".")
            layers, norm = _at(copy, ".".join(above)), _at(copy, each.layer)
            layers[int(number)] = activation_of(norm)
    return copy, replace(made, folded=folded)


def identity(x: Any) -> Any:
    """Return the input, in place of a batch normalization."""
    return x


def activation_of(norm: Any) -> Any:
    """Return what is left of a folded batch normalization: the activation that ours applies."""
    if getattr(norm, "activation", None) == "relu":
        return nnx.relu
    if getattr(norm, "activation", None) == "relu6":
        return nnx.relu6
    if getattr(norm, "activation", None) == "leaky_relu":
        slope = norm.negative_slope
        return lambda x: nnx.leaky_relu(x, slope)
    return identity


def _at(model: Any, path: str) -> Any:
    return reduce(lambda at, key: at[int(key)] if key.isdigit() else getattr(at, key), path.split("."), model)


def _fixed(step: Step) -> str:
    """Return why a batch normalization cannot be taken out."""
    if type(step.handle) not in (nnx.BatchNorm, BatchNorm):
        return f"it is a {step.kind}, which may compute something else"
    return ""


def _describe(step: Step) -> LinearLayer | Passage | str:
    layer = step.handle
    if type(layer) in (nnx.Linear, nnx.Conv):
        return _linear(layer, step)
    if type(layer) is nnx.Dropout:
        return Passage()
    if step.role is Role.ACTIVATION:
        return f"the activation {step.layer} stands in between"
    if step.role is Role.INPUT:
        return f"the input {step.layer} is no linear layer"
    return f"{step.layer} ({step.kind}) is neither nnx.Linear nor nnx.Conv, nor lets a scale and shift pass"


def _linear(layer: Any, step: Step) -> LinearLayer:
    if step.shape is None:
        return LinearLayer(obstacle="has an output whose shape is not known")
    if getattr(layer, "mask", None) is not None:
        return LinearLayer(obstacle="masks its kernel")
    axis = len(step.shape) - 1
    bias = None if layer.bias is None else np.asarray(layer.bias[...], "float64")
    maps = (Linear(_layout(layer).canonical(np.asarray(layer.kernel[...], "float64")), bias),)
    return LinearLayer(maps, axis, axis, _border(layer))


def _layout(layer: Any) -> Layout:
    """Return the memory layout of kernels: (inputs, outputs) for nnx.Linear, (taps, inputs of a group, outputs of all) for
    nnx.Conv."""
    groups = getattr(layer, "feature_group_count", 1)
    *taps, inputs, outputs = layer.kernel[...].shape
    sizes = {"t": int(np.prod(taps, dtype=int)), "i": inputs, "g": groups, "o": outputs // groups}
    return Layout("tigo", sizes)


def _border(layer: Any) -> str:
    """Return why outputs do not all see all taps."""
    if type(layer) is nnx.Linear:
        return ""
    dilation = layer.input_dilation
    if any(each not in (None, 1) for each in (dilation if isinstance(dilation, tuple | list) else (dilation,))):
        return "puts zeros between its inputs, which are not shifted"
    if layer.padding in ("VALID", "CIRCULAR", "REFLECT") or all(size == 1 for size in layer.kernel_size):
        return "" if isinstance(layer.padding, str) else "puts zeros around its input, which are not shifted"
    return "puts zeros around its input, which are not shifted"


def _write(layer: Any, linear: Linear) -> None:
    kernel = layer.kernel[...]
    layer.kernel[...] = jnp.asarray(_layout(layer).restored(linear.kernel, kernel.shape), kernel.dtype)
    bias = jnp.asarray(linear.bias, kernel.dtype)
    if layer.bias is None:
        layer.bias, layer.use_bias = nnx.Param(bias), True
    else:
        layer.bias[...] = bias
