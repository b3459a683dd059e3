"""Check the arguments and shapes of a module's call, and raise errors of torch's types that explain."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from evennorm.core.activation import LINEAR, RELU6, activation_of
from evennorm.core.call import COMPLEX, Call
from evennorm.core.geometry import Geometry
from evennorm.errors import ArgumentError, ShapeError
from evennorm.torch.errors import NoTensorError, TensorError, UnknownArgumentError, UnsupportedError
from evennorm.torch.tensors import NAMES

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "elu")
INVERTIBLE = (None, "leaky_relu", "elu")
MEMORY = ("save", "inplace")


def checked_activation(name: str | None, negative_slope: float, alpha: float, memory: str) -> str | None:
    """Return the activation's name, or None for "identity".

    Raises:
        ArgumentError: a name that is not known, or one that `memory="inplace"` cannot invert.
    """
    name = None if name == "identity" else name
    if memory not in MEMORY:
        raise ArgumentError(f"memory is one of {_listed(MEMORY)}; received memory={memory!r}")
    if name not in ACTIVATIONS:
        raise ArgumentError(
            f"activation is one of {_listed(ACTIVATIONS)}; received {name!r}; apply any other one to the result"
        )
    if memory == "inplace":
        if name not in INVERTIBLE:
            lost = "what was below zero" + (" or above 6" if name == "relu6" else "")
            raise ArgumentError(
                f'memory="inplace" recovers the input from the output, where {name} has lost {lost}; '
                f'choose activation among {_listed(INVERTIBLE)}, or memory="save"'
            )
        for parameter, value, used in (("negative_slope", negative_slope, "leaky_relu"), ("alpha", alpha, "elu")):
            if name == used and not value > 0:
                raise ArgumentError(
                    f'memory="inplace" inverts {used}, whose {parameter} must be above 0; received {parameter}={value}'
                )
    return name


def activation_of_call(
    activation: str | None, negative_slope: float, slope: float | None, limit: float = inf
) -> tuple[str | None, float]:
    """Return the activation and slope of the module, or those that a call passes.

    Raises:
        ArgumentError: there are both; a limit that no kernel knows.
    """
    if limit not in (inf, RELU6.limit) or (limit != inf and slope != RELU6.slope):
        raise ArgumentError(
            f"limit bounds the activation of a call from above: 6 beside slope=0, which is relu6, or none; received "
            f"slope={slope} and limit={limit}; apply any other bound to the result"
        )
    if slope is None:
        return activation, negative_slope
    if activation is not None:
        raise ArgumentError(
            f"slope applies an activation in one call of a module that has none; received slope={slope} and a module "
            f"with activation={activation!r}; leave one of them out"
        )
    return "leaky_relu" if limit == inf else "relu6", slope


def checked_momentum(momentum: float | None) -> float | None:
    """Return `momentum`, the weight of the new batch in the running statistics; None for the plain average."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ArgumentError(
            "momentum is the weight of the new batch, from 0 to 1, or None for the average of all batches (Keras's momentum "
            f"is 1 minus it); received momentum={momentum}"
        )
    return momentum


def checked_eps(eps: float) -> float:
    """Return `eps`, added to the variance."""
    if not eps >= 0:
        raise ArgumentError(
            f"batch_norm eps must be non-negative: it is added to the variance before its root is taken; received eps={eps}"
        )
    return eps


def check_known(unknown: Mapping[str, Any]) -> None:
    """Refuse unknown arguments, with a translation for those of other frameworks.

    Raises:
        UnknownArgumentError: an argument that the modules do not have; that of another framework is translated.
    """
    for name, value in unknown.items():
        advice = _ELSEWHERE.get(name, "see help(evennorm.torch.BatchNorm2d) for those that there are")
        raise UnknownArgumentError(f"torch's modules have no argument {name!r}: {advice}; received {name}={value!r}")


_CHANNELS = "channels are axis 1 of every input, as in torch.nn; permute a channels-last input, by x.movedim(-1, 1)"
_ELSEWHERE = {
    "epsilon": "it is called eps here",
    "axis": _CHANNELS,
    "dim": _CHANNELS,
    "decay": "momentum is 1 minus it: the weight of the new batch",
    "center": "give bias=False for center=False",
    "scale": "scale and shift go together, as affine=True or False",
    "units": "it is called num_features here",
    "negative_slopes": "it is called negative_slope here",
    "virtual_batch_size": "ghost batches of synchronized layers are groups of processes: give their process_group",
    "memory": "synchronized layers keep their input",
    "synchronized": "evennorm.torch.SyncBatchNorm shares statistics between processes",
}


def check_tensors(*given: Any) -> None:
    """Refuse arguments that are no tensors.

    Raises:
        NoTensorError: something that is no tensor.
    """
    for name, value in zip(("input", "residual", "mask"), given, strict=True):
        if value is not None and not isinstance(value, Tensor):
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            advice = "torch.from_numpy" if kind == "numpy.ndarray" else "torch.as_tensor"
            raise NoTensorError(
                f"{name} is a torch.Tensor, and a {kind!r} object has no attribute of one; give {advice}({name})"
            )


def check_rows(
    channels: int, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, variance: Tensor | None
) -> None:
    """Check that parameters and running statistics have one value per channel.

    Raises:
        TensorError: one has not.
    """
    if mean is not None and variance is not None and mean.shape != variance.shape:
        raise TensorError(
            f"running_mean and running_var have one value per channel each; received shapes {tuple(mean.shape)} and "
            f"{tuple(variance.shape)}; assign tensors of shape ({channels},)"
        )
    for name, row in (("weight", gamma), ("bias", beta), ("running_mean", mean)):
        if row is not None and (row.ndim != 1 or row.shape[0] != channels):
            raise TensorError(
                f"{name} has one value per channel, shape ({channels},); received shape {tuple(row.shape)}; make the module "
                f"with num_features={channels}, or assign a tensor of that shape"
            )


def checked_virtual_batch_size(value: int | None) -> int | None:
    """Return `virtual_batch_size`, the number of samples per ghost batch."""
    if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
        raise ArgumentError(
            f"virtual_batch_size counts the samples of a ghost batch, 1 or more; received virtual_batch_size={value!r}"
        )
    return None if value is None else int(value)


def call_of(
    shape: torch.Size,
    dtype: torch.dtype,
    parameter_shape: torch.Size | None,
    parameter_dtype: torch.dtype | None,
    ranks: tuple[int, ...],
    by_batch: bool,
    eps: float,
    momentum: float | None,
    activation: str | None,
    negative_slope: float,
    slope: float | None,
    limit: float,
    alpha: float,
    virtual_batch_size: int | None,
    memory: str,
    shared: bool = False,
) -> Call:
    """Return the settings of a module's call for an input of this shape and dtype, with the activation that kernels fuse.

    `parameter_shape` and `parameter_dtype` are those of a running statistic, or of the weight; None where the module has
    neither. `by_batch` says whether the input is normalized by its own statistics, and `shared` that other devices hold more
    of them.

    Raises:
        ShapeError: wrong rank, or one value per channel to normalize by.
        ArgumentError: eps, momentum or activation, which programs set on modules that they did not make.
        TensorError: another number of channels than the module's, or dtypes that do not go together.
        UnsupportedError: an input that is not of floating point.
    """
    if len(shape) not in ranks:
        expected = " or ".join(f"{rank}D" for rank in ranks)
        raise ShapeError(
            f"expected {expected} input (got {len(shape)}D input), with channels on axis 1; received shape {tuple(shape)}"
        )
    if by_batch:
        if not shared:
            _check_values(shape, virtual_batch_size)
        checked_momentum(momentum)
    if eps < 0 or (by_batch and eps == 0):
        rule = "positive during training" if by_batch else "non-negative"
        raise ArgumentError(
            f"batch_norm eps must be {rule}: it keeps a constant channel from dividing by 0; received eps={eps}"
        )
    if parameter_shape is not None:
        _check_parameter(shape, dtype, parameter_shape, parameter_dtype)
    if dtype.is_complex:
        raise UnsupportedError(COMPLEX.format(name="input", dtype=dtype))
    if not dtype.is_floating_point:
        raise UnsupportedError(
            f"batch normalization takes a mean, which is rarely a whole number; input is of a floating dtype; received "
            f"{dtype}; call input.float() first"
        )
    known = [size if isinstance(size, int) else None for size in shape]
    if parameter_shape is not None:
        known[1] = parameter_shape[0]  # the input's may be a symbol
    activation, negative_slope = activation_of_call(activation, negative_slope, slope, limit)
    activation = checked_activation(activation, negative_slope, alpha, memory)
    fused = LINEAR if activation == "elu" else activation_of(activation, negative_slope)
    group_size = virtual_batch_size if by_batch else None
    return Call(Geometry(known, 1), NAMES.get(dtype) or str(dtype), eps, fused, group_size, not by_batch)


# Checking takes longer than normalizing a small tensor.
cached_call_of = lru_cache(maxsize=4096)(call_of)


def check_residual(input: Tensor, residual: Tensor, memory: str) -> None:
    """Check that `residual` can be added to the normalized `input`.

    Raises:
        TensorError: another shape, dtype or device.
        ArgumentError: the sum is to be inverted.
    """
    if memory == "inplace":
        raise ArgumentError(
            'memory="inplace" recovers its input from the output alone, which cannot tell a residual apart; received a '
            'residual; add it to the result, or choose memory="save"'
        )
    for what in ("shape", "dtype", "device"):
        expected, received = getattr(input, what), getattr(residual, what)
        if expected != received:
            expected, received = (tuple(v) if what == "shape" else v for v in (expected, received))
            raise TensorError(
                f"residual is added to the normalized input and has its shape, dtype and device: {what} {expected}; "
                f"received {what} {received}"
            )


def _check_values(shape: torch.Size, virtual_batch_size: int | None) -> None:
    values = prod(shape[2:], start=shape[0] if virtual_batch_size is None else virtual_batch_size)
    if values == 1:
        batch = "" if virtual_batch_size is None else f" and virtual_batch_size={virtual_batch_size}"
        raise ShapeError(
            "Expected more than 1 value per channel when training: one value alone has no variance, and is normalized to 0; "
            f"received shape {tuple(shape)}{batch}; use larger batches, or eval() to normalize by the running statistics"
        )


def _check_parameter(
    shape: torch.Size, dtype: torch.dtype, expected: torch.Size, parameter_dtype: torch.dtype | None
) -> None:
    if shape[1] != expected[0]:
        raise TensorError(
            f"the module was made for {expected[0]} channels, which torch keeps on axis 1; received {shape[1]} channels in "
            f"an input of shape {tuple(shape)}; give num_features={shape[1]}, or permute a channels-last input"
        )
    half = dtype in (torch.float16, torch.bfloat16)
    if parameter_dtype is not dtype and dtype.is_floating_point and not (half and parameter_dtype is torch.float32):
        raise TensorError(
            "parameters and running statistics have the dtype of the input, or float32 beside a half precision one; "
            f"received an input of {dtype} and parameters of {parameter_dtype}; convert one, by input.to or module.to"
        )


def _listed(values: Any) -> str:
    return ", ".join(map(repr, values))
