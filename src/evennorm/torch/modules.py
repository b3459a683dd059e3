"""Provide torch.nn's BatchNorm1d, 2d and 3d with the same names, arguments, state and numbers, and additions."""

from __future__ import annotations

from math import inf
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.functional import elu
from torch.nn.modules import batchnorm
from torch.nn.parameter import UninitializedBuffer, is_lazy

from evennorm.core.activation import Activation
from evennorm.core.call import Call
from evennorm.kernels import choose
from evennorm.torch import arguments, compiled, counted, distributed, export, foreign, inplace, native, recompute, running
from evennorm.torch.backend import engine, train
from evennorm.torch.distributed import is_distributed
from evennorm.torch.errors import TensorError, UnsupportedError


class _BatchNorm(batchnorm._BatchNorm):
    """The common base of the three modules: everything but the ranks of their inputs."""

    ranks: ClassVar[tuple[int, ...]]
    qconfig = foreign.AskedBySync()
    parametrizations = foreign.AskedByQuantization()

    def __init__(
        self,
        num_features: int,
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
        without_bias = {} if bias else {"bias": False}  # an argument that torch has since 2.12
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **without_bias
        )
        self._configure(activation, negative_slope, alpha, virtual_batch_size, memory)

    def _configure(
        self, activation: str | None, negative_slope: float, alpha: float, virtual_batch_size: int | None, memory: str
    ) -> None:
        """Set what torch's modules do not have."""
        arguments.checked_momentum(self.momentum)
        arguments.checked_eps(self.eps)
        self.activation = arguments.checked_activation(activation, negative_slope, alpha, memory)
        self.negative_slope = negative_slope
        self.alpha = alpha
        self.virtual_batch_size = arguments.checked_virtual_batch_size(virtual_batch_size)
        self.memory = memory
        self._register_bookkeeping()

    # Computation

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        slope: float | None = None,
        limit: float = inf,
    ) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if type(input) is not Tensor and not compiling:
            if isinstance(input, Proxy):
                return export.one_node(self, input, residual, mask)
            arguments.check_tensors(input, residual, mask)
            if is_distributed(input):
                return distributed.forward(self, input, residual, mask=mask, slope=slope, limit=limit)
        own = self.__dict__  # nn.Module's attributes take longer to read than a small kernel to run
        tracks = own["training"] and own["track_running_stats"]
        updates = tracks and (compiling or not counted.repeated(self))
        if native.AVAILABLE and updates == tracks and mask is None and not (compiling or recompute.active):
            y = native.extension.forward(self, own, input, residual, slope, limit)
            if y is not None:
                return y
        parameters, buffers = own["_parameters"], own["_buffers"]
        try:
            gamma, beta = parameters["weight"], parameters["bias"]
            mean, variance = buffers["running_mean"], buffers["running_var"]
        except KeyError:  # parametrized, say
            gamma, beta, mean, variance = self.weight, self.bias, self.running_mean, self.running_var
        by_batch = own["training"] or (mean is None and variance is None)
        if by_batch and not tracks:
            mean = variance = None
        given = None if slope is None else Activation(slope, limit)
        # Compilers optimize torch's own batch normalization best, and at inference it is exact.
        if not by_batch and (export.asked_for() or (compiling and own["memory"] == "save")):
            return export.normalize(self, input, residual, given)
        if by_batch and export.asked_for() and mask is None and not (own["training"] and compiling):
            return export.normalize_by_batch(self, input, residual, given)
        if compiling and own["training"] and torch.compiler.is_exporting():
            foreign.warn_of_training_export(self)
        if compiling and by_batch and mask is None and compiled.takes(self, input, residual, given):
            return compiled.forward(self, input, residual, given, tracks and mean is not None)
        if residual is not None or mask is not None:
            arguments.check_tensors(input, residual, mask)
        call = self._call_of(own, input, by_batch, gamma, mean, variance, slope, limit)
        arguments.check_rows(input.shape[1], gamma, beta, mean, variance)
        if residual is not None:
            arguments.check_residual(input, residual, own["memory"])
        if not by_batch:
            return self._by_running_statistics(call, input, gamma, beta, residual, mean, variance)
        if mask is None and not compiling and own["memory"] == "save":
            stats = running.for_kernel(self, mean, variance) if updates else None
            y = train(call, input, gamma, beta, residual, stats)
            if y is not None:
                return elu(y, own["alpha"], inplace=True) if own["activation"] == "elu" else y
        return self._composed(call, input, gamma, beta, residual, mask, mean, variance, updates)

    def _call_of(
        self,
        own: dict[str, Any],
        input: Tensor,
        by_batch: bool,
        gamma: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        slope: float | None,
        limit: float,
        shared: bool = False,
    ) -> Call:
        """Check the arguments of a call, once for each shape and setting."""
        if (mean is None) != (variance is None):
            raise TensorError("running_mean and running_var must either both be None or neither be None; received one")
        parameter = gamma if mean is None else mean
        given = (
            input.shape,
            input.dtype,
            None if parameter is None else parameter.shape,
            None if parameter is None else parameter.dtype,
            self.ranks,
            by_batch,
            own["eps"],
            own["momentum"],
            own["activation"],
            own["negative_slope"],
            slope,
            limit,
            own["alpha"],
            own["virtual_batch_size"],
            own["memory"],
            shared,
        )
        if torch.compiler.is_compiling():
            return arguments.call_of(*given)
        try:
            return arguments.cached_call_of(*given)
        except TypeError:  # sizes that are symbols have no hash
            return arguments.call_of(*given)

    def _composed(
        self,
        call: Call,
        input: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        updates: bool,
    ) -> Tensor:
        """Normalize by the batch in steps: statistics, output, running statistics."""
        if self.memory == "inplace":
            alpha = self.alpha if self.activation == "elu" else None
            y, moments = inplace.train(call, input, gamma, beta, alpha=alpha, mask=mask)
        else:
            y, moments = engine.train(call, input, gamma, beta, residual=residual, mask=mask)
            y = elu(y, self.alpha, inplace=True) if self.activation == "elu" else y
        if updates:
            running.update(self, mean, variance, moments)
        return y

    def _by_running_statistics(
        self,
        call: Call,
        input: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        variance: Tensor,
    ) -> Tensor:
        y = engine.infer(call, input, mean, variance, gamma, beta, residual=residual)
        if self.activation == "elu":
            y = elu(y, self.alpha, inplace=True)
        # Overwrite the input as in training, so that a program which reads it again gets the same in both modes.
        return input.copy_(y) if self.memory == "inplace" else y

    # State

    def _register_bookkeeping(self) -> None:
        """Register two buffers that torch's modules do not have, and that no state_dict shows."""
        mean = self.running_mean
        low = refused = None
        if mean is not None:
            like = {"device": mean.device, "dtype": mean.dtype}
            low = UninitializedBuffer(**like) if is_lazy(mean) else torch.zeros(mean.shape, **like)
            refused = torch.zeros((), dtype=torch.long, device=mean.device)
        self.register_buffer("running_mean_low", low, persistent=False)
        self.register_buffer("skipped_batches", refused, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Apply `fn` and keep the values of the bookkeeping: `to_empty` gives memory that nobody has written to."""
        names = ("running_mean_low", "skipped_batches")
        before = {name: self._buffers.get(name) for name in names}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if new is None or new is old or new.is_meta or is_lazy(new):
                continue
            with torch.no_grad():
                if old is None or old.is_meta:
                    new.zero_()
                else:
                    new.copy_(old)
        return self

    def _reset_bookkeeping(self) -> None:
        """Reset the bookkeeping after the running statistics were set from outside, perhaps on another device."""
        mean, low = self.running_mean, self._buffers.get("running_mean_low")
        if mean is None or low is None or is_lazy(mean):
            return
        if is_lazy(low) or low.device != mean.device or low.shape != mean.shape:
            self._register_bookkeeping()
        else:
            low.zero_()
            self.skipped_batches.zero_()

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self._reset_bookkeeping()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}running_mean" in state_dict:
            self._reset_bookkeeping()

    # Words

    def extra_repr(self) -> str:
        own = {
            "activation": (self.activation, None),
            "negative_slope": (self.negative_slope, 0.01),
            "alpha": (self.alpha, 1.0),
            "virtual_batch_size": (self.virtual_batch_size, None),
            "memory": (self.memory, "save"),
        }
        words = [f"{name}={value}" for name, (value, default) in own.items() if value != default]
        return ", ".join([super().extra_repr(), *words, f"kernel={self._kernel()}"])

    def _kernel(self) -> str:
        """Return the kernel's name for inputs of the module's dtype and device."""
        parameter = self.weight if self.weight is not None else self.running_mean
        dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
        device = "cpu" if parameter is None else parameter.device.type
        kernel = choose("torch", str(dtype).removeprefix("torch."), device=device)
        return kernel if self.memory == "save" or kernel == "reference" else f"{kernel}, backward reference"

    def __prepare_scriptable__(self) -> NoReturn:
        raise UnsupportedError(
            f"torch.jit.script cannot read {type(self).__name__}; export the model by torch.export.export or "
            "torch.onnx.export, or trace it in eval mode by torch.jit.trace"
        )


class BatchNorm1d(_BatchNorm, batchnorm.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L): torch.nn.BatchNorm1d, and more.

    Arguments, errors and everything else as in `BatchNorm2d`; a mask has shape (N,) or (N, L).

    Example:
        >>> import torch
        >>> from evennorm.torch import BatchNorm1d
        >>> lengths = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
        >>> module = BatchNorm1d(3, activation="relu")
        >>> module(torch.rand(2, 3, 4), mask=lengths).shape
        torch.Size([2, 3, 4])
    """

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm, batchnorm.BatchNorm2d):
    """Batch normalization of (N, C, H, W): torch.nn.BatchNorm2d, and more.

        y = activation(weight * (x - mean) / sqrt(variance + eps) + bias [+ residual])

    In training mean and variance are those of the batch, and `running = (1 - momentum) * running + momentum * batch`, with
    the unbiased variance; after `eval()` they are the running ones. Arguments, state_dict and results of torch's module are
    the same here. Kept for the backward pass are the input and, after a residual, one bit per element.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance; above 0.
        momentum: weight of the new batch, 0 to 1; None for the plain average of all batches.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics; without them the batch's own are used after `eval()` too.
        device, dtype: of parameters and statistics; float32 also for half precision inputs.
        bias: whether there is a bias beside the weight.
        activation: None, "relu", "relu6", "leaky_relu" (of `negative_slope`) or "elu" (of `alpha`), applied last.
        virtual_batch_size: samples per ghost batch, each normalized by its own statistics (Hoffer et al. 2017).
        memory: "save" keeps the input for the backward pass; "inplace" overwrites it by the output, from which the backward
            pass finds it again (Rota Bulo et al. 2018). That needs an activation other than relu and relu6, |weight| well
            above 0 beside |bias|, and no residual; GPUs are asked once per call whether the weight is.

    Call arguments:
        input: of 16, 32 or 64 bits floating point, in any memory format, which the output has too.
        residual: a tensor like the input, added before the activation.
        mask: true where a value counts, one per position (N, H, W), or to broadcast against the input. Masked values are
            normalized, but act on no statistic.
        slope: for a module without an activation, the slope below zero of one that this call applies: 0 for relu.
        limit: with slope=0, 6 for relu6.

    A batch that would poison the running statistics (NaN or infinity in any channel, no values, everything masked) leaves
    them as they were; the buffer `skipped_batches` counts such batches. `num_batches_tracked` counts every batch, and with
    `momentum=None` those that the average holds. A forward pass that activation checkpointing takes again updates nothing.
    `skipped_batches` and `running_mean_low`, which keeps what rounding took from the running mean, stand in no state_dict.

    Raises:
        ValueError: a rank, an argument, a mask or a ghost batch that does not fit; one value per channel in training.
        RuntimeError: channels, dtypes or devices that do not fit each other.
        NotImplementedError: an input that is not of floating point; torch.jit.script.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; arguments and conventions after torch.nn.

    Example:
        >>> import torch
        >>> from evennorm.torch import BatchNorm2d
        >>> module = BatchNorm2d(3, activation="relu")
        >>> x = torch.randn(8, 3, 5, 5)
        >>> y = module(x, residual=x)
        >>> bool((y >= 0).all()), int(module.num_batches_tracked), int(module.skipped_batches)
        (True, 1, 0)
        >>> _ = torch.nn.BatchNorm2d(3).load_state_dict(module.state_dict())
    """

    ranks = (4,)


class BatchNorm3d(_BatchNorm, batchnorm.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W): torch.nn.BatchNorm3d, and more.

    Arguments, errors and everything else as in `BatchNorm2d`; a mask has shape (N, D, H, W).

    Example:
        >>> import torch
        >>> from evennorm.torch import BatchNorm3d
        >>> BatchNorm3d(3, virtual_batch_size=2)(torch.rand(4, 3, 2, 5, 5)).shape
        torch.Size([4, 3, 2, 5, 5])
    """

    ranks = (5,)
