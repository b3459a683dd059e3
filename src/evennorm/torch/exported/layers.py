"""Make the layer of torch.nn that an operation of a program came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from evennorm.torch.exported.operations import bound, name_of


@dataclass(frozen=True)
class Form:
    """A layer without its weights."""

    kind: type[nn.Module]
    settings: dict[str, Any]
    weights: dict[str, str]
    """Its parameters and buffers by the paths of the program's tensors."""
    training: bool | None = None
    """The mode that the operation was recorded in; None for one that knows no mode."""

    def make(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the layer with these weights; shared ones stay shared."""
        on = {"device": "meta"} if self.weights else {}  # nothing is drawn
        made = self.kind(**self.settings, **on)
        for name in [*made._parameters]:
            made._parameters[name] = tensors[self.weights[name]] if name in self.weights else None
        for name, value in made._buffers.items():
            if name == "num_batches_tracked" and value is not None:
                counter = f"{self.weights['running_mean'].rpartition('.')[0]}.{name}"
                made._buffers[name] = tensors.get(counter, value.new_zeros((), device="cpu"))
            else:
                made._buffers[name] = tensors[self.weights[name]] if name in self.weights else None
        return made

    @property
    def is_drawn(self) -> bool:
        """Whether it has parameters, which reset_parameters draws."""
        return bool(self.weights)


@dataclass(frozen=True)
class _Call:
    """A call of an operation, its arguments by their names."""

    given: dict[str, Any]
    rank: int
    """Of its first tensor."""
    channels: int
    operation: str

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def shape(self, name: str) -> tuple[int, ...]:
        node = self.given.get(name)
        return tuple(node.meta["shape"]) if isinstance(node, fx.Node) else ()

    def has(self, name: str) -> bool:
        return self.given.get(name) is not None


@dataclass(frozen=True)
class _Rule:
    settings: Callable[[_Call], tuple[type[nn.Module], dict[str, Any]]]
    weights: tuple[str, ...] = field(default=())
    mode: str | None = None
    """The argument that is true in training."""


def form_of(node: fx.Node) -> Form | None:
    """Return the layer that computes what a node does; None where none does."""
    rule = _RULES.get(name := name_of(node.target)) or _RULES.get(name.removesuffix("_"))
    if rule is None or node.op != "call_function":
        return None
    given = bound(node.target, node.args, node.kwargs)
    weights = {each: given[each] for each in rule.weights if given.get(each) is not None}
    if not all(isinstance(value, fx.Node) and value.op == "get_attr" for value in weights.values()):
        return None  # weights that are computed
    shapes = [tuple(each.meta.get("shape", ())) for each in node.all_input_nodes if each.op != "get_attr"]
    shape: tuple[int, ...] = shapes[0] if shapes else ()
    call = _Call(given, len(shape), shape[1] if len(shape) > 1 else 0, name)
    try:
        kind, settings = rule.settings(call)
    except (_NoLayerError, KeyError, ValueError):
        return None
    if name.endswith("_"):
        if "inplace" not in kind.__init__.__annotations__:
            return None
        settings = settings | {"inplace": True}
    paths = {each: str(value.target) for each, value in weights.items()}
    return Form(kind, settings, paths, None if rule.mode is None else bool(given[rule.mode]))


class _NoLayerError(Exception):
    """No layer computes this."""


_CONVOLUTIONS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}


def _convolution(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    first, second, *kernel = call.shape("weight")
    padding = call["padding"]
    settings = {
        "kernel_size": tuple(kernel),
        "stride": tuple(call["stride"]),
        "padding": padding if isinstance(padding, str) else tuple(padding),
        "dilation": tuple(call["dilation"]),
        "groups": call["groups"],
        "bias": call.has("bias"),
    }
    if "transpose" in call.operation:
        settings |= {"in_channels": first, "out_channels": second * call["groups"]}
        settings |= {"output_padding": tuple(call["output_padding"])}
    else:
        settings |= {"in_channels": second * call["groups"], "out_channels": first}
    if len(kernel) + 2 != call.rank or any(not isinstance(each, int) for each in settings["stride"]):
        raise _NoLayerError
    return _CONVOLUTIONS[call.operation], settings


def _linear(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    outputs, inputs = call.shape("weight")
    return nn.Linear, {"in_features": inputs, "out_features": outputs, "bias": call.has("bias")}


def _batch_norm(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[call.rank]
    if call.has("weight") != call.has("bias"):
        raise _NoLayerError
    # A layer that averages over all batches, by momentum None, gives 0 in evaluation.
    settings = {"num_features": call.channels, "eps": call["eps"], "momentum": call["momentum"] or None}
    return kind, settings | {"affine": call.has("weight"), "track_running_stats": call.has("running_mean")}


def _instance_norm(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[call.rank]
    if call.has("running_mean"):
        raise _NoLayerError
    return kind, {"num_features": call.channels, "eps": call["eps"], "affine": call.has("weight")}


def _layer_norm(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    settings = {"normalized_shape": tuple(call["normalized_shape"]), "eps": call["eps"]}
    return nn.LayerNorm, settings | {"elementwise_affine": call.has("weight"), "bias": call.has("bias")}


def _rms_norm(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    settings = {"normalized_shape": tuple(call["normalized_shape"]), "eps": call["eps"]}
    return nn.RMSNorm, settings | {"elementwise_affine": call.has("weight")}


def _group_norm(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    if call.has("weight") != call.has("bias"):
        raise _NoLayerError
    settings = {"num_groups": call["num_groups"], "num_channels": call.channels, "eps": call["eps"]}
    return nn.GroupNorm, settings | {"affine": call.has("weight")}


def _embedding(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    rows, width = call.shape("weight")
    padding = None if call["padding_idx"] < 0 else call["padding_idx"]
    return nn.Embedding, {"num_embeddings": rows, "embedding_dim": width, "padding_idx": padding}


def _by_rank(
    kinds: Mapping[int, type[nn.Module]], setting: str
) -> Callable[[_Call], tuple[type[nn.Module], dict[str, Any]]]:
    return lambda call: (kinds[call.rank], {"p": call[setting]})


def _elu(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    if (call["scale"], call["input_scale"]) != (1, 1):
        raise _NoLayerError
    return nn.ELU, {"alpha": call["alpha"]}


def _hardtanh(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    low, high = call["min_val"], call["max_val"]
    return (nn.ReLU6, {}) if (low, high) == (0, 6) else (nn.Hardtanh, {"min_val": low, "max_val": high})


def _softmax(kind: type[nn.Module]) -> Callable[[_Call], tuple[type[nn.Module], dict[str, Any]]]:
    def settings(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
        if call.has("dtype"):
            raise _NoLayerError
        return kind, {"dim": call["dim"]}

    return settings


def _prelu(call: _Call) -> tuple[type[nn.Module], dict[str, Any]]:
    return nn.PReLU, {"num_parameters": call.shape("weight")[0]}


def _named(kind: type[nn.Module], **settings: str) -> Callable[[_Call], tuple[type[nn.Module], dict[str, Any]]]:
    return lambda call: (kind, {name: call[argument] for name, argument in settings.items()})


_AFFINE = ("weight", "bias")
_ALPHA = {3: nn.FeatureAlphaDropout, 4: nn.FeatureAlphaDropout, 5: nn.FeatureAlphaDropout}
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_CONVOLUTIONS, _Rule(_convolution, _AFFINE)),
    "linear": _Rule(_linear, _AFFINE),
    "embedding": _Rule(_embedding, ("weight",)),
    "batch_norm": _Rule(_batch_norm, (*_AFFINE, "running_mean", "running_var"), "training"),
    "instance_norm": _Rule(_instance_norm, _AFFINE),
    "layer_norm": _Rule(_layer_norm, _AFFINE),
    "group_norm": _Rule(_group_norm, _AFFINE),
    "rms_norm": _Rule(_rms_norm, ("weight",)),
    "dropout": _Rule(_named(nn.Dropout, p="p"), mode="train"),
    "feature_dropout": _Rule(
        _by_rank({2: nn.Dropout1d, 3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}, "p"), mode="train"
    ),
    "alpha_dropout": _Rule(_named(nn.AlphaDropout, p="p"), mode="train"),
    "feature_alpha_dropout": _Rule(_by_rank(_ALPHA, "p"), mode="train"),
    "rrelu": _Rule(_named(nn.RReLU, lower="lower", upper="upper"), mode="training"),
    "prelu": _Rule(_prelu, ("weight",)),
    "relu": _Rule(_named(nn.ReLU)),
    "relu6": _Rule(_named(nn.ReLU6)),
    "hardtanh": _Rule(_hardtanh),
    "leaky_relu": _Rule(_named(nn.LeakyReLU, negative_slope="negative_slope")),
    "elu": _Rule(_elu),
    "celu": _Rule(_named(nn.CELU, alpha="alpha")),
    "selu": _Rule(_named(nn.SELU)),
    "gelu": _Rule(_named(nn.GELU, approximate="approximate")),
    "silu": _Rule(_named(nn.SiLU)),
    "mish": _Rule(_named(nn.Mish)),
    "sigmoid": _Rule(_named(nn.Sigmoid)),
    "tanh": _Rule(_named(nn.Tanh)),
    "hardswish": _Rule(_named(nn.Hardswish)),
    "hardsigmoid": _Rule(_named(nn.Hardsigmoid)),
    "hardshrink": _Rule(_named(nn.Hardshrink, lambd="lambd")),
    "softshrink": _Rule(_named(nn.Softshrink, lambd="lambd")),
    "softplus": _Rule(_named(nn.Softplus, beta="beta", threshold="threshold")),
    "log_sigmoid": _Rule(_named(nn.LogSigmoid)),
    "softmax": _Rule(_softmax(nn.Softmax)),
    "log_softmax": _Rule(_softmax(nn.LogSoftmax)),
}
