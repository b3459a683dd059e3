"""torch.nn.SyncBatchNorm, computed by evennorm where there is nothing to synchronize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import batchnorm

from evennorm.errors import ArgumentError
from evennorm.torch.modules import _BatchNorm


def processes(module: batchnorm.SyncBatchNorm) -> int:
    """How many processes share the statistics of a batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(module.process_group or torch.distributed.group.WORLD)


class SyncBatchNorm(_BatchNorm, batchnorm.SyncBatchNorm):
    """Batch normalization of (N, C, ...): torch's where several processes share statistics in training, else evennorm's."""

    ranks = tuple(range(2, 65))

    def synchronizes(self) -> bool:
        return self.training and processes(self) > 1

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None, slope: float | None = None
    ) -> Tensor:
        batchnorm.SyncBatchNorm._check_input_dim(self, input)
        if self.synchronizes():
            return self._shared(input, residual=residual, mask=mask, slope=slope)
        return super().forward(input, residual, mask, slope)

    def _shared(self, input: Tensor, **how: Any) -> Tensor:
        given = {**how, "activation": self.activation, "virtual_batch_size": self.virtual_batch_size}
        foreign = [name for name, value in given.items() if value is not None]
        if foreign:
            raise ArgumentError(
                f"statistics shared by {processes(self)} processes are torch's work, which takes the input alone; received "
                f"{' and '.join(foreign)} too; apply it to the result"
            )
        return batchnorm.SyncBatchNorm.forward(self, input)
