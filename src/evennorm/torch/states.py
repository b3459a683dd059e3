"""Read BatchNormStates from a torch model, and write them into a model or a new module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import batchnorm

from evennorm.errors import ArgumentError
from evennorm.models.state import BatchNormState, matched
from evennorm.torch import modules
from evennorm.torch.network import state_of
from evennorm.torch.program import ModuleStatistics


def read_states(model: nn.Module) -> dict[str, BatchNormState]:
    """Return the state of every batch normalization, torch's and ours, by the module's path.

    Example:
        >>> import torch
        >>> from evennorm.torch import read_states
        >>> state = read_states(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))["1"]
        >>> state.decay, state.epsilon, state.unbiased, state.variance.tolist()
        (0.9, 1e-05, True, [1.0, 1.0, 1.0])
    """
    return {path: state_of(module, path) for path, module in _modules(model).items()}


def write_states(model: nn.Module, states: Mapping[str, BatchNormState]) -> None:
    """Give the modules of a model, which is changed in place, the states of another model of any framework.

    gamma, beta and statistics as they are, epsilon and momentum in torch's convention: so the module predicts what the other
    predicted. States go to modules by their paths, or by their order where no path fits.

    Raises:
        InputError: states and modules do not fit each other.
        ArgumentError: a module without weight, bias or running statistics would have to have some.

    Example:
        >>> import keras, torch
        >>> from evennorm.keras import read_states
        >>> from evennorm.torch import write_states
        >>> keras_model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
        >>> write_states(model, read_states(keras_model))
        >>> model[0].momentum, model[0].eps
        (0.01, 0.001)
    """
    found_modules = _modules(model)
    found = matched(states, {path: module.num_features for path, module in found_modules.items()})
    for path, state in found.items():
        _check(found_modules[path], path, state)
    for path, state in found.items():
        _write(found_modules[path], path, state)


def module_of(state: BatchNormState, dimensions: int = 2, **arguments: Any) -> nn.Module:
    """Make a new BatchNorm1d, 2d or 3d of ours in this state.

    Example:
        >>> import numpy as np, torch
        >>> from evennorm import BatchNormState
        >>> from evennorm.torch.states import module_of
        >>> state = BatchNormState("bn", 0.0, 0.9, mean=np.array([1.0]), variance=np.array([4.0]))
        >>> module_of(state, 1).eval()(torch.tensor([[5.0]])).tolist()
        [[2.0]]
    """
    kind = {1: modules.BatchNorm1d, 2: modules.BatchNorm2d, 3: modules.BatchNorm3d}[dimensions]
    affine = state.gamma is not None or state.beta is not None
    made = kind(state.mean.size, affine=affine, **arguments)
    _write(made, state.name, state)
    return made


def _modules(model: nn.Module) -> dict[str, Any]:
    found = {path: module for path, module in model.named_modules() if isinstance(module, batchnorm._BatchNorm)}
    return {path: module for path, module in found.items() if not nn.parameter.is_lazy(module.running_mean)}


def _check(module: Any, path: str, state: BatchNormState) -> None:
    for name, own, neutral in (("gamma", module.weight, 1), ("beta", module.bias, 0)):
        value = getattr(state, name)
        if own is None and value is not None and (value != neutral).any():
            raise ArgumentError(f"{path!r} has no {name}, and {state.name!r} has; build it with affine=True")
    if module.running_mean is None and state.mean is not None:
        raise ArgumentError(f"{path!r} keeps no running statistics, and {state.name!r} has some; track_running_stats=True")


def _write(module: Any, path: str, state: BatchNormState) -> None:
    with torch.no_grad():
        for own, value, neutral in ((module.weight, state.gamma, 1.0), (module.bias, state.beta, 0.0)):
            if own is not None:
                values = np.full(own.shape, neutral) if value is None else np.reshape(value, own.shape)
                own.copy_(torch.from_numpy(np.array(values, "float64")))
        module.eps, module.momentum = state.epsilon, state.momentum_of_torch
        if state.mean is not None and state.variance is not None:
            ModuleStatistics(path, module).write(state.mean.astype("float64"), state.variance.astype("float64"))
        if state.updates is not None and module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(state.updates)
