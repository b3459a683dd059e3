"""Translate the class and configuration of a layer of any Keras 1 or 2 to the words of Keras 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {
    "Convolution1D": "Conv1D",
    "Convolution2D": "Conv2D",
    "Convolution3D": "Conv3D",
    "AtrousConvolution1D": "Conv1D",
    "AtrousConvolution2D": "Conv2D",
    "AtrousConv1D": "Conv1D",
    "AtrousConv2D": "Conv2D",
    "Deconvolution2D": "Conv2DTranspose",
    "Deconv2D": "Conv2DTranspose",
    "Convolution2DTranspose": "Conv2DTranspose",
    "Convolution3DTranspose": "Conv3DTranspose",
    "SeparableConvolution1D": "SeparableConv1D",
    "SeparableConvolution2D": "SeparableConv2D",
    "DepthwiseConvolution2D": "DepthwiseConv2D",
    "MaxPool1D": "MaxPooling1D",
    "MaxPool2D": "MaxPooling2D",
    "MaxPool3D": "MaxPooling3D",
    "AvgPool1D": "AveragePooling1D",
    "AvgPool2D": "AveragePooling2D",
    "AvgPool3D": "AveragePooling3D",
    "GlobalMaxPool1D": "GlobalMaxPooling1D",
    "GlobalMaxPool2D": "GlobalMaxPooling2D",
    "GlobalMaxPool3D": "GlobalMaxPooling3D",
    "GlobalAvgPool1D": "GlobalAveragePooling1D",
    "GlobalAvgPool2D": "GlobalAveragePooling2D",
    "GlobalAvgPool3D": "GlobalAveragePooling3D",
    "TimeDistributedDense": "Dense",
    "BatchNormalizationV1": "BatchNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "SyncBatchNormalization": "BatchNormalization",
    "LSTMV1": "LSTM",
    "LSTMV2": "LSTM",
    "GRUV1": "GRU",
    "GRUV2": "GRU",
    "DenseV1": "Dense",
}
"""Classes that had another name."""

ARGUMENTS = {
    "output_dim": "units",
    "init": "kernel_initializer",
    "inner_init": "recurrent_initializer",
    "W_regularizer": "kernel_regularizer",
    "U_regularizer": "recurrent_regularizer",
    "b_regularizer": "bias_regularizer",
    "W_constraint": "kernel_constraint",
    "U_constraint": "recurrent_constraint",
    "b_constraint": "bias_constraint",
    "bias": "use_bias",
    "nb_filter": "filters",
    "border_mode": "padding",
    "subsample": "strides",
    "subsample_length": "strides",
    "stride": "strides",
    "pool_length": "pool_size",
    "filter_length": "kernel_size",
    "atrous_rate": "dilation_rate",
    "dim_ordering": "data_format",
    "inner_activation": "recurrent_activation",
    "dropout_W": "dropout",
    "dropout_U": "recurrent_dropout",
    "input_dtype": "dtype",
    "beta_init": "beta_initializer",
    "gamma_init": "gamma_initializer",
    "pointwise_init": "pointwise_initializer",
    "depthwise_init": "depthwise_initializer",
}
"""Arguments that Keras 2 renamed, whatever the class."""

KEPT = {
    "Embedding": {"output_dim": "output_dim", "init": "embeddings_initializer", "dropout": "embedding_dropout"}
    | {"W_regularizer": "embeddings_regularizer", "W_constraint": "embeddings_constraint"},
    "Dropout": {"p": "rate"},
    "SpatialDropout1D": {"p": "rate"},
    "SpatialDropout2D": {"p": "rate"},
    "SpatialDropout3D": {"p": "rate"},
    "GaussianDropout": {"p": "rate"},
    "GaussianNoise": {"sigma": "stddev"},
    "UpSampling1D": {"length": "size"},
    "PReLU": {"init": "alpha_initializer"},
    "Merge": {"output_shape": "output_shape"},
    "Conv2DTranspose": {"output_shape": "output_shape"},
}
"""Arguments that one class renamed, or kept where others did not."""

DATA_FORMATS = {"th": "channels_first", "tf": "channels_last", "default": None}


def in_words_of_keras_2(kind: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return class and configuration as Keras 2 would have written them; unknown ones stay as they are.

    Example:
        >>> in_words_of_keras_2("Convolution2D", {"nb_filter": 8, "nb_row": 3, "nb_col": 5, "dim_ordering": "th"})
        ('Conv2D', {'filters': 8, 'data_format': 'channels_first', 'kernel_size': (3, 5)})
    """
    new_kind = KINDS.get(kind, kind)
    renamed = {**ARGUMENTS, **KEPT.get(new_kind, {})}
    new: dict[str, Any] = {}
    for key, value in config.items():
        if key not in ("nb_row", "nb_col", "kernel_dim1", "kernel_dim2", "kernel_dim3"):
            new[renamed.get(key, key)] = value
    for keys in (("nb_row", "nb_col"), ("kernel_dim1", "kernel_dim2", "kernel_dim3")):
        if keys[0] in config:
            new["kernel_size"] = tuple(config[key] for key in keys)
    if isinstance(new.get("data_format"), str):
        new["data_format"] = DATA_FORMATS.get(new["data_format"], new["data_format"])
    return new_kind, new
