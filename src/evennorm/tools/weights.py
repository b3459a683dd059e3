"""Load a file of weights into a model without running anything in it, and write a state_dict as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from evennorm.errors import EvennormError, InputError, MissingExtra, first_line
from evennorm.tools.hdf5 import check_hdf5_file
from evennorm.tools.pickles import NotAStateDictError, check_state_dict


def as_safetensors(state: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    """Return tensors of torch, or NumPy arrays, in the format of safetensors; `metadata` goes into its header.

    Raises:
        MissingExtra: safetensors is not installed.
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise MissingExtra("writing .safetensors", "tools", "safetensors") from error
    header = {"format": "pt", **(metadata or {})}
    if state and all(hasattr(value, "detach") for value in state.values()):
        from safetensors.torch import save as save_tensors

        # Cloned, since safetensors refuses tensors that share memory.
        return save_tensors({name: x.detach().cpu().contiguous().clone() for name, x in state.items()}, header)
    return save({name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in state.items()}, header)


def load_weights(model: Any, framework: str, name: str, path: Path) -> None:
    """Load a state_dict into a model of torch, or a `.weights.h5` into one of Keras.

    Raises:
        InputError: there is no such file, it would run code, or it does not fit the model.
        MissingExtra: it is a .safetensors file, and safetensors is not installed.
    """
    if not path.is_file():
        raise InputError(f"there is no file of weights {path}")
    try:
        if framework == "keras":
            check_hdf5_file(path, str(path))
            model.load_weights(path)
        else:
            model.load_state_dict(_state_dict(path))
    except EvennormError:
        raise
    except Exception as error:
        raise InputError(f"the weights {path} do not fit {name}: {_differences(error)}") from error


def _state_dict(path: Path) -> Any:
    import torch

    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise MissingExtra("reading .safetensors", "tools", "safetensors") from error
        try:
            return load_file(path)
        except Exception as error:
            raise InputError(f"{path} is no whole safetensors file ({first_line(error)}); save it again") from error
    try:
        check_state_dict(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        why = (
            "it holds more than tensors, which only code that it brings along could read"
            if "weights_only" in str(error) or isinstance(error, NotAStateDictError)
            else f"it is damaged or cut short ({first_line(error)})"
        )
        raise InputError(f"{path} is not opened: {why}; save model.state_dict() anew") from error
    if isinstance(state, dict):
        for key in ("state_dict", "model_state_dict", "model"):  # checkpoints of training loops
            if isinstance(state.get(key), dict):
                state = state[key]
        if state and all(isinstance(value, torch.Tensor) for value in state.values()):
            prefix = "module."  # of DataParallel
            return {
                name.removeprefix(prefix) if all(n.startswith(prefix) for n in state) else name: state[name]
                for name in state
            }
    raise InputError(f"{path} holds no state_dict, which is a dictionary of tensors; save model.state_dict()")


def _differences(error: Exception) -> str:
    """Return all that torch says about a state_dict, as one line: its first line tells nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[1:4] or lines)[:400] or type(error).__name__
