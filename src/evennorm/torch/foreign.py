"""Refuse tools of torch that would silently replace a module by one that computes something else.

They ask a module for attributes that it does not have. The descriptors below stand under these names and look who asks.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import batchnorm

from evennorm.errors import ArgumentError

if TYPE_CHECKING:
    from evennorm.torch.modules import _BatchNorm

_CONVERTS = batchnorm.SyncBatchNorm.convert_sync_batchnorm.__func__.__code__
_QUANTIZATION = str(Path(torch.__file__).parent / "ao" / "quantization")


class AskedBySync:
    """`qconfig`, the last that SyncBatchNorm.convert_sync_batchnorm reads of a module that it replaces."""

    def __get__(self, module: _BatchNorm | None, _: Any) -> Any:
        if module is not None and sys._getframe(1).f_code is _CONVERTS:
            _check_synchronizable(module)
        raise AttributeError("qconfig")  # as for any missing attribute


class AskedByQuantization:
    """`parametrizations`, which torch.ao.quantization asks for before it takes modules by their types."""

    def __get__(self, module: _BatchNorm | None, _: Any) -> Any:
        frame = sys._getframe(1)
        for _ in range(3):
            if module is not None and frame.f_code.co_filename.startswith(_QUANTIZATION):
                raise ArgumentError(
                    "torch.ao.quantization recognizes only torch.nn's batch normalization, by its type; received "
                    f"{type(module).__module__}.{type(module).__name__}; call evennorm.torch.revert(model) first"
                )
            if frame.f_back is None:
                break
            frame = frame.f_back
        raise AttributeError("parametrizations")


def warn_of_training_export(module: _BatchNorm) -> None:
    warnings.warn(
        "a program exported in training mode holds evennorm's own operators, in which quantization-aware training "
        f"(prepare_qat_pt2e) finds no batch normalization; exporting a {type(module).__name__}; for that call "
        "evennorm.torch.revert(model) first, for inference model.eval()",
        UserWarning,
        stacklevel=2,
    )


def _check_synchronizable(module: _BatchNorm) -> None:
    settings = {"activation": None, "virtual_batch_size": None, "memory": "save"}
    lost = [f"{name}={getattr(module, name)!r}" for name, plain in settings.items() if getattr(module, name) != plain]
    if lost:
        raise ArgumentError(
            "torch.nn.SyncBatchNorm only normalizes, and would lose what else the module does; received "
            f"{type(module).__name__} with {' and '.join(lost)}; call evennorm.torch.SyncBatchNorm.convert_sync_batchnorm, "
            "which keeps all of it except ghost batches and memory"
        )
