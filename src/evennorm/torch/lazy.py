"""Define modules that learn their number of channels from the first batch: LazyBatchNorm1d, 2d and 3d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import batchnorm
from torch.nn.parameter import is_lazy

from evennorm.torch import arguments, modules


class _LazyBatchNorm(modules._BatchNorm):
    """The base of the lazy modules. It precedes torch's lazy module in the order of classes, and has its arguments."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        alpha: float = 1.0,
        virtual_batch_size: int | None = None,
        memory: str = "save",
        **unknown: Any,
    ):
        arguments.check_known(unknown)
        without_bias = {} if bias else {"bias": False}
        # Skip modules._BatchNorm, which needs the number of channels.
        super(modules._BatchNorm, self).__init__(eps, momentum, affine, track_running_stats, device, dtype, **without_bias)
        self._configure(activation, negative_slope, alpha, virtual_batch_size, memory)

    def initialize_parameters(self, input: Tensor, *others: Any, **options: Any) -> None:
        low = self.running_mean_low
        if low is not None and is_lazy(low):
            low.materialize((input.shape[1],))
        super().initialize_parameters(input)


class LazyBatchNorm1d(_LazyBatchNorm, batchnorm.LazyBatchNorm1d):
    """`BatchNorm1d` without num_features, as torch.nn.LazyBatchNorm1d.

    Example:
        >>> import torch
        >>> from evennorm.torch import LazyBatchNorm1d
        >>> module = LazyBatchNorm1d()
        >>> _ = module(torch.rand(4, 7))
        >>> module.num_features
        7
    """

    ranks = modules.BatchNorm1d.ranks
    cls_to_become = modules.BatchNorm1d


class LazyBatchNorm2d(_LazyBatchNorm, batchnorm.LazyBatchNorm2d):
    """`BatchNorm2d` without num_features, as torch.nn.LazyBatchNorm2d; it becomes one with its first batch.

    Example:
        >>> import torch
        >>> from evennorm.torch import LazyBatchNorm2d
        >>> module = LazyBatchNorm2d(activation="relu")
        >>> module(torch.rand(2, 5, 3, 3)).shape, type(module).__name__, module.num_features
        (torch.Size([2, 5, 3, 3]), 'BatchNorm2d', 5)
    """

    ranks = modules.BatchNorm2d.ranks
    cls_to_become = modules.BatchNorm2d


class LazyBatchNorm3d(_LazyBatchNorm, batchnorm.LazyBatchNorm3d):
    """`BatchNorm3d` without num_features, as torch.nn.LazyBatchNorm3d.

    Example:
        >>> import torch
        >>> from evennorm.torch import LazyBatchNorm3d
        >>> module = LazyBatchNorm3d()
        >>> _ = module(torch.rand(4, 7, 2, 2, 2))
        >>> module.num_features
        7
    """

    ranks = modules.BatchNorm3d.ranks
    cls_to_become = modules.BatchNorm3d
