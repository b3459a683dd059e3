"""Say what a module, function or method of a graph does to its input, as a Role."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import nn
from torch.nn.modules import activation, batchnorm, conv, dropout, instancenorm, normalization, padding, pooling

from evennorm.models.network import Role

_SOFTMAX = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
_NOT_ELEMENTWISE = (*_SOFTMAX, nn.MultiheadAttention, nn.GLU)
_ACTIVATIONS = tuple(
    kind
    for kind in (getattr(activation, name) for name in activation.__all__)
    if isinstance(kind, type) and not issubclass(kind, _NOT_ELEMENTWISE)
)
_BY_CLASS: tuple[tuple[Any, Role], ...] = (
    (batchnorm._BatchNorm, Role.BATCH_NORM),
    (
        (instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, normalization.RMSNorm),
        Role.NORM,
    ),
    (_SOFTMAX, Role.SOFTMAX),
    (_ACTIVATIONS, Role.ACTIVATION),
    (dropout._DropoutNd, Role.DROPOUT),
    ((nn.Linear, conv._ConvNd, nn.Embedding), Role.LINEAR),
    (nn.Bilinear, Role.MERGE),
    (
        tuple(vars(padding)[name] for name in padding.__all__),
        Role.PADDING,
    ),
    (
        tuple(vars(pooling)[name] for name in pooling.__all__ if "Unpool" not in name),
        Role.POOLING,
    ),
    ((nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), Role.RESHAPE),
)

_WORDS = {
    Role.SOFTMAX: "softmax log_softmax softmin gumbel_softmax",
    Role.DROPOUT: "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout",
    Role.NORM: "layer_norm group_norm instance_norm local_response_norm rms_norm normalize",
    Role.BATCH_NORM: "batch_norm",
    Role.LINEAR: "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding",
    Role.ADD: "add iadd",
    Role.MERGE: "cat concat concatenate stack mul imul sub isub matmul bmm mm baddbmm einsum bilinear maximum minimum "
    "truediv div where",
    Role.POOLING: "mean amax amin max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d",
    Role.PADDING: "pad",
    Role.RESHAPE: "flatten unflatten reshape view reshape_as view_as permute transpose movedim swapaxes squeeze unsqueeze "
    "contiguous clone t pixel_shuffle pixel_unshuffle channel_shuffle expand to to_copy float detach alias",
    Role.ACTIVATION: "relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid "
    "hardshrink softplus softsign softshrink tanhshrink threshold rrelu prelu logsigmoid clamp clip",
}
_BY_WORD = {word: role for role, words in _WORDS.items() for word in words.split()}
_NEEDS_TWO = (Role.ADD, Role.MERGE)
_SIZES = ("size", "dim", "ndimension", "numel", "shape", "ndim", "dtype", "device", "is_cuda", "sym_size")


def role_of_module(module: nn.Module) -> Role:
    if is_frozen_norm(module):
        return Role.BATCH_NORM
    return next((role for kinds, role in _BY_CLASS if isinstance(module, kinds)), Role.OTHER)


def role_of_function(target: Any, operands: int) -> Role:
    """Return the role of a function or method, by its name and the number of its tensors."""
    name = name_of_function(target)
    role = _BY_WORD.get(name if name in _BY_WORD else name.removesuffix("_"), Role.OTHER)
    return Role.OTHER if role in _NEEDS_TWO and operands < 2 else role


def name_of_function(target: Any) -> str:
    """Return torch's name for a function: "relu" for torch.relu, F.relu, Tensor.relu and torch.ops.aten.relu.default."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).partition("::")[2].lstrip("_")
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__).lstrip("_")


def asks_for_size(target: Any, arguments: tuple[Any, ...]) -> bool:
    """Return whether a call reads nothing but the shape or dtype of a tensor."""
    if target is getattr:
        return len(arguments) > 1 and arguments[1] in _SIZES
    return name_of_function(target) in _SIZES and target not in (operator.getitem, torch.Size)


def activation_of(module: nn.Module) -> str | None:
    """Return the name of the function that a module applies last, for an activation or a layer that holds one."""
    if isinstance(module, _ACTIVATIONS):
        return word_of(type(module).__name__)
    held = getattr(module, "activation", None) if isinstance(module, batchnorm._BatchNorm) else None
    if held is None and isinstance(module, batchnorm._BatchNorm):
        act = module._modules.get("act")  # timm's
        return activation_of(act) if act is not None and not isinstance(act, nn.Identity) else None
    return held


def channel_axis_of(module: nn.Module, rank: int | None) -> int | None:
    """Return the channel axis of a module's output of that rank, where the module itself says which it is."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return None if rank is None else rank - 1
    if isinstance(module, conv._ConvNd):
        return None if rank is None or len(module.kernel_size) + 2 != rank else 1
    return 1 if isinstance(module, batchnorm._BatchNorm) else None


def word_of(name: str) -> str:
    """Return the name of a class in snake case: "LeakyReLU" as "leaky_relu"."""
    known = {"LeakyReLU": "leaky_relu", "PReLU": "prelu", "RReLU": "rrelu", "LogSigmoid": "logsigmoid"}
    return known.get(name, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "", name).lower())


def is_frozen_norm(module: nn.Module) -> bool:
    """Return whether a module is torchvision's or detectron's FrozenBatchNorm2d, known by its name and its buffers."""
    named = type(module).__name__.startswith("FrozenBatchNorm")
    return named and {"weight", "bias", "running_mean", "running_var"} <= set(module._buffers)


def computes_like_torch(module: nn.Module) -> bool:
    """Return whether a batch normalization, of torch's class or a derived one, runs torch's forward, or ours."""
    forward = type(module).forward
    return forward in (batchnorm._BatchNorm.forward, batchnorm.SyncBatchNorm.forward) or (
        forward.__module__.startswith("evennorm.")
    )
