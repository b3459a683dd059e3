"""Say what an operation of a Keras model means for batch normalization beside it: role, activation, bias, channel axis."""

from __future__ import annotations

from typing import Any

import keras
from keras import Operation, layers

from evennorm.keras.layer import BatchNormalization
from evennorm.keras.sites import ACTIVATIONS, LINEAR, OPS, activation_name
from evennorm.models.network import Role

BATCH_NORMS = (layers.BatchNormalization, BatchNormalization)

_SOFTMAX = ("softmax", "log_softmax")
_KINDS = {
    Role.INPUT: "InputLayer",
    Role.NORM: "Normalization LayerNormalization GroupNormalization UnitNormalization SpectralNormalization "
    "RMSNormalization LayerNorm RMSNorm",
    Role.SOFTMAX: "Softmax LogSoftmax",
    Role.DROPOUT: "Dropout AlphaDropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout",
    Role.ADD: "Add",
    Role.MERGE: "Concatenate Average Maximum Minimum Multiply Subtract Dot",
    Role.POOLING: " ".join(
        f"{kind}{d}D"
        for kind in (
            *("MaxPooling", "AveragePooling", "GlobalMaxPooling", "GlobalAveragePooling"),
            *("AdaptiveAveragePooling", "AdaptiveMaxPooling"),
        )
        for d in (1, 2, 3)
    ),
    Role.PADDING: "ZeroPadding1D ZeroPadding2D ZeroPadding3D",
    Role.RESHAPE: "Flatten Reshape Permute RepeatVector Identity Transpose Squeeze ExpandDims Swapaxes Moveaxis",
}
_BY_KIND = {kind: role for role, kinds in _KINDS.items() for kind in kinds.split()}


def role_of(operation: Operation) -> Role:
    """Return the role of an operation; classes of other packages are OTHER unless they derive from batch normalization."""
    if isinstance(operation, layers.TimeDistributed):
        return role_of(operation.layer)
    if isinstance(operation, BATCH_NORMS):
        return Role.BATCH_NORM
    if isinstance(operation, (*LINEAR, layers.Embedding)):
        return Role.LINEAR
    if isinstance(operation, layers.Activation):
        name = activation_of(operation)
        return Role.SOFTMAX if name in _SOFTMAX else Role.RESHAPE if name is None else Role.ACTIVATION
    if not type(operation).__module__.startswith("keras."):
        return Role.OTHER
    kind = type(operation).__name__
    if isinstance(operation, ACTIVATIONS) or kind in OPS:
        return Role.ACTIVATION
    return _BY_KIND.get(kind, Role.OTHER)


def activation_of(operation: Operation) -> str | None:
    """Return the name of the function that an operation applies last, such as "relu"; None if it applies none."""
    if isinstance(operation, layers.TimeDistributed):
        operation = operation.layer
    kind = type(operation).__name__
    if isinstance(operation, layers.ReLU):
        if operation.negative_slope:
            return "leaky_relu"
        return "relu6" if operation.max_value == 6 else "relu"
    if isinstance(operation, ACTIVATIONS) or kind in ("Softmax", "LogSoftmax"):
        return {"LeakyReLU": "leaky_relu", "PReLU": "prelu", "LogSoftmax": "log_softmax"}.get(kind, kind.lower())
    if isinstance(operation, (layers.Activation, BatchNormalization, *LINEAR)):
        activation = operation.activation
        plain = activation in (None, keras.activations.linear)
        return None if plain else activation_name(activation)
    if kind in OPS and type(operation).__module__.startswith("keras."):
        return "leaky_relu" if kind == "LeakyRelu" else kind.lower()
    return None


def has_bias(operation: Operation) -> bool:
    """Return whether a linear layer adds one value per channel."""
    if isinstance(operation, layers.TimeDistributed):
        operation = operation.layer
    if not isinstance(operation, LINEAR):
        return False
    if isinstance(operation, layers.EinsumDense):
        return operation.bias_axes is not None and len(operation.bias_axes) == 1
    return bool(operation.use_bias)


def channel_axis(operation: Operation, rank: int) -> int | None:
    """Return the channel axis of an operation's output of that rank, as its own arguments state it."""
    if isinstance(operation, layers.TimeDistributed):
        inner = channel_axis(operation.layer, rank - 1)
        return None if inner is None else inner + 1
    if isinstance(operation, layers.Dense | layers.Embedding | layers.RNN):
        return rank - 1
    if isinstance(operation, layers.Flatten | layers.Reshape | layers.Permute):
        return None
    data_format: Any = getattr(operation, "data_format", None)
    if rank < 2 or data_format not in ("channels_first", "channels_last"):
        return None
    return 1 if data_format == "channels_first" else rank - 1
