"""Read an opened model as a Network, with its optimizer's settings and the shape of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evennorm.core.network import Network
from evennorm.errors import EvennormError, InputError, first_line
from evennorm.tools.models import Opened


def read(opened: Opened, optimizer: Any = None, shape: Sequence[int] | None = None) -> Network:
    """The network of a model.

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
    from evennorm.torch.context import example, with_optimizer
    from evennorm.torch.network import network as torch_network

    try:
        found = torch_network(opened.model, () if shape is None else (example(opened.model, shape),))
    except EvennormError:
        raise
    except Exception as error:  # a model's own code may raise any
        sizes = ", ".join(map(str, shape or ()))
        raise InputError(f"the model does not take a batch of shape ({sizes}): {first_line(error)}") from error
    return found if optimizer is None else with_optimizer(found, optimizer)
