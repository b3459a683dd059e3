"""Read an opened model as a Network, with its optimizer's settings and the shape of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evennorm.errors import EvennormError, InputError, first_line
from evennorm.models.network import Network
from evennorm.tools.models import Opened


def read(opened: Opened, optimizer: Any = None, shape: Sequence[int] | None = None) -> Network:
    """Return the network of a model.

    Args:
        opened: a Keras model, a torch.nn.Module or an nnx module of Flax.
        optimizer: of a torch model; a compiled Keras model holds its own.
        shape: of an input batch, by which the steps of a torch or nnx model get shapes.

    Raises:
        InputError: a torch model that does not take that shape.
    """
    if opened.framework == "keras":
        from evennorm.keras.network import network

        return network(opened.model)
    if opened.framework == "flax":
        from evennorm.flax.network import network as flax_network

        return flax_network(opened.model, None if shape is None else np.zeros(tuple(shape), "float32"))
    from evennorm.torch.network import network as torch_network
    from evennorm.torch.weight_decay import with_optimizer

    try:
        found = torch_network(opened.model, () if shape is None else (_example(opened.model, shape),))
    except EvennormError:
        raise
    except Exception as error:  # a model's own code may raise any
        sizes = ", ".join(map(str, shape or ()))
        raise InputError(f"the model does not take a batch of shape ({sizes}): {first_line(error)}") from error
    return found if optimizer is None else with_optimizer(found, optimizer)


def _example(model: Any, shape: Sequence[int]) -> Any:
    """Return zeros of a shape, on the device and in the dtype of the model's first parameter."""
    import torch

    first = next(model.parameters(), None)
    return torch.zeros(*shape) if first is None else torch.zeros(*shape, device=first.device, dtype=first.dtype)
