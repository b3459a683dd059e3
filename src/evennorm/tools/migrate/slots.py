"""List the weights that an old layer stored, in their order, from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evennorm.tools.migrate.records import OldLayer, OldModel


@dataclass(frozen=True)
class Slot:
    """One weight of one layer."""

    layer: OldLayer
    owners: tuple[str, ...]
    """Names of layers that may be part of the weight's name."""
    names: tuple[str, ...]
    """The names that Keras 1 and Keras 2 gave it."""
    trainable: bool


_LSTM = tuple((f"{letter}_{gate}",) for gate in "icfo" for letter in "WUb")
_GRU = tuple((f"{letter}_{gate}",) for gate in "zrh" for letter in "WUb")
_KERNEL, _BIAS = ("W", "kernel"), ("b", "bias")
_STATISTICS = (("running_mean", "moving_mean"), ("running_std", "moving_variance"))
_RENORM = (("moving_stddev",), ("renorm_mean",), ("renorm_stddev",))

_WITH_BIAS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("Dense", "Conv1D", "Conv2D", "Conv3D", "Conv2DTranspose", "Conv3DTranspose"), (_KERNEL,)),
    **dict.fromkeys(("LocallyConnected1D", "LocallyConnected2D", "MaxoutDense"), (_KERNEL,)),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), (("depthwise_kernel",), ("pointwise_kernel",))),
    "DepthwiseConv2D": (("depthwise_kernel",),),
    "SimpleRNN": (_KERNEL, ("U", "recurrent_kernel")),
}
_PLAIN: dict[str, tuple[tuple[str, ...], ...]] = {
    "Embedding": (("W", "embeddings"),),
    "PReLU": (("alphas", "alpha"),),
    "ParametricSoftplus": (("alphas",), ("betas",)),
    "SReLU": (("t_left",), ("a_left",), ("t_right",), ("a_right",)),
}


def names_of(layer: OldLayer, count: int | None = None) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """Return the names of the trainable weights of a layer that holds no other, and of the rest, in stored order.

    Args:
        count: how many arrays there are, where that is known: recurrent layers of Keras 1 stored one array per gate or one
            for all.
    """
    config, kind = layer.config, layer.kind
    bias = (_BIAS,) if config.get("use_bias", True) else ()
    if kind in _WITH_BIAS:
        return (*_WITH_BIAS[kind], *bias), ()
    if kind in _PLAIN:
        return _PLAIN[kind], ()
    if kind in ("LSTM", "GRU", "ConvLSTM2D", "CuDNNLSTM", "CuDNNGRU"):
        gates = _GRU if kind == "GRU" else _LSTM
        apart = "kernel_initializer" not in config or "units" not in config or "consume_less" in config
        apart = apart if count is None else count == len(gates)
        if count is None and config.get("consume_less") == "gpu":
            apart = False
        if count is None and "consume_less" not in config:
            apart = kind == "ConvLSTM2D" and "nb_filter" in config
        return (gates if apart else (_KERNEL, ("U", "recurrent_kernel"), *bias)), ()
    if kind == "Highway":
        return (("W",), ("W_carry",), *((("b",), ("b_carry",)) if bias else ())), ()
    if kind == "BatchNormalization":
        parameters = [("gamma",)] if config.get("scale", True) else []
        parameters += [("beta",)] if config.get("center", True) else []
        return tuple(parameters), (*_STATISTICS, *(_RENORM if config.get("renorm") else ()))
    return (), ()


def slots(layer: OldLayer, trainable: bool = True, owners: tuple[str, ...] = ()) -> Iterator[Slot]:
    """Yield the weights of a layer that is no model, wrapped ones included, trainable ones first as Keras stored them."""
    trainable = trainable and layer.trainable
    if layer.kind == "Bidirectional" and layer.inner is not None:
        for side in ("forward_", "backward_"):
            yield from slots(layer.inner, trainable, (f"{side}{layer.inner.name}",))
        return
    if layer.inner is not None:
        yield from slots(layer.inner, trainable, (layer.name, *owners))
        return
    if layer.model is not None:
        yield from model_slots(layer.model, trainable)
        return
    first, rest = names_of(layer)
    for names in first:
        yield Slot(layer, (layer.name, *owners), names, trainable)
    for names in rest:
        yield Slot(layer, (layer.name, *owners), names, False)


def model_slots(model: OldModel, trainable: bool = True) -> Iterator[Slot]:
    """Yield the weights of a nested model: all trainable ones first, then the others, as Keras stored them."""
    trainable = trainable and model.trainable
    found = [slot for layer in model.layers for slot in slots(layer, trainable)]
    yield from (slot for slot in found if slot.trainable)
    yield from (slot for slot in found if not slot.trainable)
