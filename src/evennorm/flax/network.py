"""Read an nnx model as a Network: the layers of each nnx.Sequential in their order, and others by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from evennorm.errors import InputError, first_line
from evennorm.flax.program import Program
from evennorm.jax.nnx import state_of
from evennorm.models.network import Network, Role, Step

_ROLES = (
    (nnx.BatchNorm, Role.BATCH_NORM),
    ((nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.ConvTranspose, nnx.Embed, nnx.Einsum), Role.LINEAR),
    ((nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm), Role.NORM),
    (nnx.Dropout, Role.DROPOUT),
    (nnx.PReLU, Role.ACTIVATION),
)
_FUNCTIONS = (
    (("softmax", "log_softmax"), Role.SOFTMAX),
    (("max_pool", "avg_pool", "min_pool", "pool"), Role.POOLING),
    (("ravel", "reshape", "transpose", "squeeze", "moveaxis", "swapaxes"), Role.RESHAPE),
    (("pad",), Role.PADDING),
)
_ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "swish", "sigmoid", "tanh", "softplus"),
    *("hard_tanh", "hard_sigmoid", "hard_silu", "hard_swish", "log_sigmoid", "soft_sign", "glu", "mish", "squareplus"),
)


def network(model: nnx.Module, x: Any = None) -> Network:
    """Read the layers of a model in evaluation, and what flows between them.

    An nnx.Sequential says in which order it calls its layers. The code of other modules is not followed: what they hold
    stands between steps of kind "unknown", each nnx.Sequential among it as a chain. `gaps` says where.

    Args:
        model: any nnx module.
        x: an example input, by which the steps of an nnx.Sequential get shapes.

    Raises:
        InputError: the model does not take that input.

    Example:
        >>> from flax import nnx
        >>> from evennorm.flax.network import network
        >>> model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.relu)
        >>> [(step.name, step.role.value) for step in network(model).steps]
        [('input', 'input'), ('layers.0', 'linear'), ('layers.1', 'batch normalization'), ('layers.2:relu', 'activation')]
    """
    found = _Steps()
    outputs: tuple[str, ...] = ()
    if type(model) is nnx.Sequential:
        first = found.add(Step("", "input", "Input", Role.INPUT, ()), _shape_of(x))
        with Program(model).running():
            outputs = (found.chain(model, "", first, x),)
    elif role_of(model) is not Role.OTHER:
        first = found.add(Step("", "input", "Input", Role.INPUT, ()), _shape_of(x))
        with Program(model).running():
            outputs = (found.call(model, "", first, x)[0],)
    else:
        found.inside(model, "")
    return Network(type(model).__name__, tuple(found.steps), outputs, tuple(found.gaps), "flax")


def role_of(layer: Any) -> Role:
    """Return the role of a module or a function."""
    for kinds, role in _ROLES:
        if isinstance(layer, kinds):
            return role
    name = name_of(layer)
    if name in _ACTIVATIONS and not isinstance(layer, nnx.Module):
        return Role.ACTIVATION
    return next((role for names, role in _FUNCTIONS if name in names), Role.OTHER)


def name_of(layer: Any) -> str:
    """Return the class of a module, or the name of a function, even where some of its arguments are set."""
    if isinstance(layer, nnx.Module):
        return type(layer).__name__
    while isinstance(layer, partial):
        layer = layer.func
    return str(getattr(layer, "__name__", type(layer).__name__)).strip("<>")


def _shape_of(x: Any) -> tuple[int, ...] | None:
    return None if x is None else tuple(x.shape)


@dataclass
class _Steps:
    steps: list[Step] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    _paths: dict[int, str] = field(default_factory=dict)

    def add(self, step: Step, shape: tuple[int, ...] | None = None) -> str:
        """Add a step and return its name, followed by "#2" at the layer's second call."""
        taken = {each.name for each in self.steps}
        names = (step.layer if n == 1 else f"{step.layer}#{n}" for n in range(1, len(taken) + 2))
        name = next(name for name in names if name not in taken)
        self.steps.append(replace(step, name=name, shape=shape))
        return name

    def chain(self, model: nnx.Sequential, path: str, before: str, x: Any) -> str:
        """Add the layers of a Sequential; return the name of the last step."""
        for number, layer in enumerate(model.layers):
            before, x = self.call(layer, f"{path}layers.{number}", before, x)
        return before

    def call(self, layer: Any, path: str, before: str, x: Any) -> tuple[str, Any]:
        """Add one layer; return the name of its step and its output for x."""
        if type(layer) is nnx.Sequential:
            return self.chain(layer, f"{path}.", before, x), self.made(layer, path, x)
        y = self.made(layer, path, x)
        shape = _shape_of(y) if hasattr(y, "shape") else None
        name = self.add(self.step(layer, path, (before,), shape), shape)
        if isinstance(layer, nnx.Module) and role_of(layer) is Role.OTHER:
            self.inside(layer, path)
        return name, y

    def made(self, layer: Any, path: str, x: Any) -> Any:
        if x is None or not hasattr(x, "shape"):
            return None
        try:
            return jax.eval_shape(layer, x)
        except Exception as error:  # a layer's own code may raise anything
            raise InputError(
                f"{path or type(layer).__name__} does not take what it is given for that input, an array of shape "
                f"{tuple(x.shape)}: {first_line(error)}"
            ) from error

    def step(self, layer: Any, path: str, inputs: tuple[str, ...], shape: tuple[int, ...] | None) -> Step:
        role, kind = role_of(layer), name_of(layer)
        if not isinstance(layer, nnx.Module):
            return Step("", f"{path}:{kind}", kind, role, inputs, activation=kind if role is Role.ACTIVATION else None)
        path = self._paths.setdefault(id(layer), path)
        kernel = getattr(layer, "kernel", None)
        state = state_of(layer, path) if role is Role.BATCH_NORM else None
        if state is not None:
            state = replace(state, synchronized=layer.axis_name is not None)
        simple = isinstance(layer, nnx.Linear | nnx.Conv | nnx.ConvTranspose | nnx.Embed)
        return Step(
            name="",
            layer=path,
            kind=kind,
            role=role,
            inputs=inputs,
            handle=layer,
            state=state,
            activation=getattr(layer, "activation", None) if role is Role.BATCH_NORM else None,
            bias=role is Role.LINEAR and getattr(layer, "bias", None) is not None,
            channel_axis=len(shape) - 1 if simple and shape is not None else None,
            rate=float(layer.rate) if role is Role.DROPOUT else None,
            dtype=None if kernel is None else jnp.dtype(layer.dtype or kernel[...].dtype).name,
        )

    def inside(self, module: nnx.Module, path: str) -> None:
        """Add the layers inside a module whose code is not followed."""
        self.gaps.append(
            f"{path or 'the model'}: the code of {type(module).__name__} is not followed; only nnx.Sequential says in which "
            "order it calls its layers"
        )
        for name, layer in _parts(module, path):
            if type(layer) is not nnx.Sequential and role_of(layer) is Role.OTHER:
                self.gaps.append(f"{name}: the code of {type(layer).__name__} is not followed")
                continue
            first = self.add(Step("", f"{name}:input", "unknown", Role.OTHER, ()))
            last, _ = self.call(layer, name, first, None)
            self.add(Step("", f"{name}:output", "unknown", Role.OTHER, (last,)))


def _parts(module: nnx.Module, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the modules inside one, except for those inside a Sequential."""
    inside: set[int] = set()
    for keys, found in sorted(nnx.iter_modules(module), key=lambda item: len(item[0])):
        if found is module or id(found) in inside or isinstance(found, nnx.List | nnx.Dict):
            continue
        if type(found) is nnx.Sequential:
            inside |= {id(part) for _, part in nnx.iter_modules(found)} - {id(found)}
        yield ".".join(map(str, (path, *keys) if path else keys)), found
