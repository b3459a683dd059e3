"""Define the contestants on JAX, jitted: our op and layer, the formula in jax.numpy, Keras's layer, copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evennorm.tools.bench import keras_layers
from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import (
    CHEAP_COPY,
    COPY,
    EPSILON,
    KERAS,
    LIMIT,
    OUR_LAYER,
    OURS,
    Calls,
    Contestant,
    Data,
)
from evennorm.tools.bench.copies import cheap_copy

PLAIN = "jax.numpy"


def place(case: Case, data: Data) -> Data:
    """Return the case's arrays in their memory layout."""
    wide = jnp.float64 if case.dtype == "float64" else jnp.float32
    x, dy, residual = (None if a is None else jnp.asarray(a, case.dtype) for a in (data.x, data.dy, data.residual))
    return Data(x, dy, jnp.asarray(data.gamma, wide), jnp.asarray(data.beta, wide), residual)


def contestants() -> list[Contestant]:
    """Return the contestants, in the order of tables."""
    return [
        Contestant(OURS, OURS, None, _ours),
        Contestant(PLAIN, PLAIN, OURS, _plain),
        Contestant(OUR_LAYER, OUR_LAYER, None, partial(_keras, build=keras_layers.ours)),
        Contestant(KERAS, KERAS, OUR_LAYER, partial(_keras, build=keras_layers.theirs)),
        Contestant(COPY, LIMIT, None, _copy),
        Contestant(CHEAP_COPY, LIMIT, None, lambda case, data: cheap_copy(np.asarray(data.x))),
    ]


def _ours(case: Case, data: Data) -> Calls:
    from evennorm.jax import batch_norm

    activation = "relu" if case.relu else None

    def y(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        options: Any = {"axis": case.axis, "epsilon": EPSILON, "activation": activation, "residual": residual}
        return batch_norm(x, gamma, beta, **options)[0]

    return _calls(y, data)


def _plain(case: Case, data: Data) -> Calls:
    """Return the formula as a user would write it, computed in float32 or wider."""
    axes = tuple(a for a in range(len(case.shape)) if a != case.axis % len(case.shape))
    row = tuple(case.channels if a not in axes else 1 for a in range(len(case.shape)))

    def y(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        wide = x.astype(gamma.dtype)
        mean, variance = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
        found = (wide - mean) * (gamma.reshape(row) * jax.lax.rsqrt(variance + EPSILON)) + beta.reshape(row)
        if residual is not None:
            found = found + residual
        return (jax.nn.relu(found) if case.relu else found).astype(x.dtype)

    return _calls(y, data)


def _keras(case: Case, data: Data, build: Callable[[Case, Data], keras_layers.Built]) -> Calls:
    """Return a layer as a function of its weights; the moving statistics that it updates are results, too."""
    import keras

    apply, layer = build(case, data)
    moving = [variable for variable in layer.variables if variable is not layer.gamma and variable is not layer.beta]
    state = [variable.value for variable in moving]

    def y(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        known = [(layer.gamma, gamma), (layer.beta, beta), *zip(moving, state, strict=True)]
        with keras.StatelessScope(state_mapping=known) as scope:
            found = apply(x, residual)
        return found, [scope.get_current_value(variable) for variable in moving]

    return _calls(y, data, has_state=True)


def _copy(case: Case, data: Data) -> Calls:
    copy = jax.jit(jnp.copy)
    return Calls(lambda: copy(data.x).block_until_ready(), None, _values)


def _calls(y: Callable[..., Any], data: Data, has_state: bool = False) -> Calls:
    """Return `y` of x, gamma, beta and residual, and with its gradients, each as one jitted function."""

    def given(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
        return arrays if len(arrays) == 4 else (*arrays, None)

    @jax.jit
    def forward(*arrays: Any) -> Any:
        return y(*given(arrays))

    @jax.jit
    def both(dy: Any, *arrays: Any) -> Any:
        found, pull, *state = jax.vjp(lambda *arrays: y(*given(arrays)), *arrays, has_aux=has_state)
        return found, pull(dy), state

    def saved() -> int:
        _, pull, *_ = jax.vjp(lambda *arrays: y(*given(arrays)), *arrays, has_aux=has_state)
        known = {a.unsafe_buffer_pointer() for a in (data.gamma, data.beta)}
        kept = {a.unsafe_buffer_pointer(): a.nbytes for a in jax.tree.leaves(pull) if isinstance(a, jax.Array)}
        return sum(size for place, size in kept.items() if place not in known)

    arrays = [a for a in (data.x, data.gamma, data.beta, data.residual) if a is not None]
    return Calls(
        lambda: jax.block_until_ready(forward(*arrays)),
        lambda: jax.block_until_ready(both(data.dy, *arrays)),
        _values,
        saved,
    )


def _values(found: Any) -> list[np.ndarray]:
    """Return y and the gradients, without the state of a layer."""
    if not isinstance(found, tuple):
        arrays = [found]
    elif len(found) == 2:
        arrays = [found[0]]
    else:
        arrays = [found[0], *found[1]]
    return [np.asarray(a, np.promote_types(a.dtype, np.float32)) for a in arrays]
