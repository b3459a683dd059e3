"""Provide torch.nn.SyncBatchNorm by its name, arguments and state: on the CPU too, fused, and exact at large means."""

from __future__ import annotations

import copy
import gc
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu
from torch.nn.modules import batchnorm

from evennorm.errors import ArgumentError, ShapeError
from evennorm.torch import agreement, arguments, collectives, counted, distributed, modules, running, synchronized
from evennorm.torch.modules import _BatchNorm

_CONVERTED = (
    *(batchnorm.BatchNorm1d, batchnorm.BatchNorm2d, batchnorm.BatchNorm3d, batchnorm.SyncBatchNorm),
    *(modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d),
)


def _tells_channels_apart(mask: Tensor, input: Tensor) -> bool:
    """Return whether a mask may hide different values of different channels, so that each channel has its own count."""
    return mask.dim() == input.dim() and mask.shape[1] > 1


ALONE = "alone"
"""Used in place of a process group: every process holds the whole batch."""


class SyncBatchNorm(_BatchNorm):
    """Batch normalization of (N, C, ...) by the statistics of all processes: torch.nn.SyncBatchNorm, and more.

    Every process holds a part of the batch, of any size, an empty one too; outputs, gradients and running statistics are
    those of one process with the whole batch. Works on the CPU (gloo) and on GPUs (nccl), under DistributedDataParallel,
    FSDP2 and torch.compile. Each training step takes one collective forward, of 3 C + 1 numbers per process, and one
    backward, of 2 C. A batch that is not finite in one process is refused in all.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in `BatchNorm2d`.
        process_group: the processes that share statistics, this one among them; None for all. Several groups make ghost
            batches of several devices, `torch.distributed.new_subgroups(4)` say.
        activation, negative_slope, alpha: as in `BatchNorm2d`.

    Call arguments and errors as in `BatchNorm2d`; an input may hold one value per channel, if other processes hold more.

    Raises:
        SynchronizationError: the processes' inputs do not fit each other, or one did not come within the group's timeout.

    Source: arguments and conventions after torch.nn.SyncBatchNorm; Chan, Golub & LeVeque 1983 for the merging.

    Example:
        >>> import torch
        >>> from evennorm.torch import SyncBatchNorm
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> SyncBatchNorm.convert_sync_batchnorm(model)[1](torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    ranks = tuple(range(2, 65))
    # Not derived from torch.nn.SyncBatchNorm, which DistributedDataParallel refuses on the CPU.

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        **unknown: Any,
    ):
        arguments.check_known(unknown)
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, device, dtype),
            bias=bias,
            activation=activation,
            negative_slope=negative_slope,
            alpha=alpha,
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ShapeError(f"expected at least 2D input (got {input.dim()}D input), with channels on axis 1")

    def synchronizes(self) -> bool:
        """Return whether a forward pass would exchange statistics now."""
        return self.training and self.process_group is not ALONE and collectives.size_of(self.process_group) > 1

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        slope: float | None = None,
        limit: float = inf,
    ) -> Tensor:
        if isinstance(input, Tensor):
            self._check_input_dim(input)
        if distributed.is_distributed(input):
            alone = copy.copy(self) if distributed.covers(input, self.process_group) else self
            if alone is not self:
                alone.process_group = ALONE
            return distributed.forward(alone, input, residual, mask=mask, slope=slope, limit=limit)
        if not self.synchronizes():
            return super().forward(input, residual, mask, slope, limit)
        arguments.check_tensors(input, residual, mask)
        if self.memory != "save":
            raise ArgumentError(
                'synchronized statistics are exchanged before anything is overwritten; received memory="inplace"; choose '
                'memory="save"'
            )
        tracks = self.track_running_stats
        gamma, beta = self.weight, self.bias
        mean, variance = (self.running_mean, self.running_var) if tracks else (None, None)
        call = self._call_of(self.__dict__, input, True, gamma, mean, variance, slope, limit, shared=True)
        arguments.check_rows(input.shape[1], gamma, beta, mean, variance)
        if residual is not None:
            arguments.check_residual(input, residual, self.memory)
        self._agree(input, mask)
        exchange = synchronized.Exchange(self.process_group, self._name)
        y, moments = synchronized.train(call, input, gamma, beta, residual, mask, exchange)
        if self.activation == "elu":
            y = elu(y, self.alpha, inplace=True)
        if tracks and (torch.compiler.is_compiling() or not counted.repeated(self)):
            running.update(self, mean, variance, moments)
        return y

    def _agree(self, input: Tensor, mask: Tensor | None) -> None:
        """Compare the input with the other processes, once for each kind; compilers skip this."""
        if torch.compiler.is_compiling():
            return
        channels = input.shape[1]
        counts = " with counts of their own" if mask is not None and _tells_channels_apart(mask, input) else ""
        facts = f"{channels} channels of {input.dtype}{counts}"
        agreed = self.__dict__.setdefault("_agreed", set())
        if facts not in agreed:
            collectives.check_backend(input, self.process_group)
            agreement.agree(self.process_group, self._name, facts)
            agreed.add(facts)

    def _name(self) -> str:
        """Return the path of this module in the largest model that holds it, which is only looked up for a message."""
        paths = [
            path
            for model in gc.get_objects()
            if issubclass(type(model), nn.Module)  # weak proxies look like their modules, and may be dead
            for path, module in model.named_modules()
            if module is self and path
        ]
        path = max(paths, key=len, default="")
        return f"SyncBatchNorm {path!r}" if path else f"SyncBatchNorm({self.num_features})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_agreed"}

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Return the model with every batch normalization, torch's or evennorm's, as one of these.

        A layer keeps its parameters, statistics, settings, activation, mode and hooks.

        Raises:
            ArgumentError: a layer of ghost batches or of memory="inplace", a lazy one, or one of a derived class.
        """
        converted: dict[int, nn.Module] = {}
        for path, layer in list(module.named_modules()):
            if type(layer) in _CONVERTED:
                converted[id(layer)] = cls._of(layer, path, process_group)
            elif isinstance(layer, batchnorm._BatchNorm) and not isinstance(layer, SyncBatchNorm):
                raise ArgumentError(
                    "layers of torch.nn's classes and evennorm's are synchronized, once they know their channels; received "
                    f"{path or 'the model'!r}, a {type(layer).__name__}; run a lazy model once first, or exchange this layer"
                )
        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                if id(child) in converted:
                    parent._modules[name] = converted[id(child)]
        return converted.get(id(module), module)

    @classmethod
    def _of(cls, layer: Any, path: str, process_group: Any) -> SyncBatchNorm:
        new = copy.copy(layer)
        for kind in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            new.__dict__[kind] = layer.__dict__[kind].copy()
        new.__class__ = cls
        if not isinstance(layer, _BatchNorm):
            new._configure(activation=None, negative_slope=0.01, alpha=1.0, virtual_batch_size=None, memory="save")
        if new.virtual_batch_size is not None or new.memory != "save":
            raise ArgumentError(
                "a synchronized layer takes its statistics over processes, and keeps its input; received "
                f"{path or 'a layer'!r} with virtual_batch_size={new.virtual_batch_size} and memory={new.memory!r}; for "
                "ghost batches of several devices give their process_group"
            )
        new.process_group = process_group
        return new
