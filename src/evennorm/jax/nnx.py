"""Read BatchNormStates from a Flax nnx model, and write them back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from evennorm.errors import ArgumentError, MissingExtra
from evennorm.models.state import BatchNormState, matched

try:
    import jax.numpy as jnp
    from flax import nnx
except ImportError as error:
    raise MissingExtra("evennorm.jax.nnx", "flax", error.name) from error


def read_states(model: nnx.Module) -> dict[str, BatchNormState]:
    """Return the state of every nnx.BatchNorm, by the module's path.

    Example:
        >>> from flax import nnx
        >>> from evennorm.jax.nnx import read_states
        >>> state = read_states(nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0))))["layers.0"]
        >>> state.decay, state.epsilon, state.unbiased
        (0.99, 1e-05, False)
    """
    return {path: state_of(module, path) for path, module in modules_of(model).items()}


def write_states(model: nnx.Module, states: Mapping[str, BatchNormState]) -> None:
    """Give the modules of a model, which is changed in place, the states of another model of any framework.

    gamma, beta and statistics as they are, epsilon and momentum in Flax's convention. States go to modules by their paths,
    or by their order where no path fits.

    Raises:
        InputError: states and modules do not fit each other.
        ArgumentError: a module without scale or bias would have to have one, or to average cumulatively.

    Example:
        >>> import torch
        >>> from flax import nnx
        >>> from evennorm.jax.nnx import write_states
        >>> from evennorm.torch import read_states
        >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> write_states(model, read_states(torch.nn.Sequential(torch.nn.BatchNorm1d(3, momentum=0.25))))
        >>> model.layers[0].momentum
        0.75
    """
    modules = modules_of(model)
    found = matched(states, {path: module.num_features for path, module in modules.items()})
    for path, state in found.items():
        _check(modules[path], path, state)
    for path, state in found.items():
        _write(modules[path], state)


def modules_of(model: nnx.Module) -> dict[str, Any]:
    """Return every nnx.BatchNorm, by its path."""
    return {
        ".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)
    }


def state_of(module: Any, path: str) -> BatchNormState:
    """Return the state of one nnx.BatchNorm."""
    axis = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)

    def array(variable: Any) -> np.ndarray | None:
        return None if variable is None or variable.get_value() is None else np.array(variable.get_value())

    return BatchNormState(
        name=path,
        epsilon=float(module.epsilon),
        decay=float(module.momentum),
        gamma=array(module.scale),
        beta=array(module.bias),
        mean=array(module.mean),
        variance=array(module.var),
        axis=tuple(int(a) for a in axis),
    )


def _check(module: Any, path: str, state: BatchNormState) -> None:
    for name, own, neutral in (("gamma", module.scale, 1), ("beta", module.bias, 0)):
        value = getattr(state, name)
        if own is None and value is not None and (value != neutral).any():
            word = "use_scale" if name == "gamma" else "use_bias"
            raise ArgumentError(f"{path!r} has no {name}, and {state.name!r} has; build it with {word}=True")
    if state.decay is None:
        raise ArgumentError(
            f"{state.name!r} averages all batches alike, which nnx.BatchNorm cannot; replace decay in the state"
        )


def _write(module: Any, state: BatchNormState) -> None:
    for own, value, neutral in ((module.scale, state.gamma, 1.0), (module.bias, state.beta, 0.0)):
        if own is not None:
            assign(own, np.full(own.get_value().shape, neutral) if value is None else value)
    for own, value in ((module.mean, state.mean), (module.var, state.variance)):
        if value is not None:
            assign(own, value)
    module.epsilon, module.momentum = state.epsilon, state.decay


def assign(variable: Any, value: np.ndarray) -> None:
    """Set a variable's value, in the shape and dtype that it has."""
    old = variable.get_value()
    variable.set_value(jnp.asarray(np.reshape(value, old.shape), old.dtype))
