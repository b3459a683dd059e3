"""Write a Keras model as a safetensors file with a torch state_dict."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evennorm.errors import InputError
from evennorm.tools.atomic import replacing
from evennorm.tools.weights import as_safetensors

if TYPE_CHECKING:
    from evennorm.keras.to_torch import StateDict


def write_state_dict(model: Any, path: str | os.PathLike[str], epsilon: float | None = None) -> StateDict:
    """Write the layers of a Keras model that torch has, for `load_state_dict(strict=False)` or a model of the same names.

    The header of the file says for each batch normalization which eps and momentum its module is to be built with.

    Args:
        model: a keras.Model.
        path: of the `.safetensors` file, written whole or not at all.
        epsilon: of the torch modules, where it is to be another than the model's; variances then make up for it.

    Raises:
        InputError: another suffix, a file that cannot be written, or no layer that torch has.
        ArgumentError: a variance is too small for that epsilon.
        MissingExtra: safetensors is not installed.

    Example:
        >>> import keras, pathlib, tempfile
        >>> from evennorm.tools.to_torch import write_state_dict
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> write_state_dict(model, path).written
        {'bn': 'BatchNorm, eps=0.001, momentum=0.01'}
    """
    if Path(path).suffix != ".safetensors":
        raise InputError(f"a state_dict for torch is written to .safetensors; received {os.fspath(path)!r}")
    from evennorm.keras.to_torch import torch_state_dict

    found = torch_state_dict(model, epsilon)
    if not found.arrays:
        left = [f"{layer}: {reason}" for layer, reason in found.left.items()]
        more = [f"and {len(left) - 3} more"] if len(left) > 3 else []
        why = "; ".join([*left[:3], *more]) or "none of its layers has weights"
        raise InputError(
            f"{model.name} has no layer to write for torch ({why}); "
            "written are Dense, convolutions, Embedding, BatchNormalization, LayerNormalization and PReLU"
        )
    content = as_safetensors(found.arrays, found.metadata)
    with replacing(path) as partial:
        partial.write_bytes(content)
    return found
