"""Build one of the two built-in networks, with fresh weights."""

from __future__ import annotations

import math

import keras
from keras import layers

from evennorm.errors import InputError
from evennorm.keras import BatchNormalization

ARTICLE_SIDE = 48
"""Side of the images that the articles' network was made for."""

FULL_PADDING_BELOW = 24
"""The least side at which three unpadded convolution blocks leave a pixel; smaller images are padded."""


def article_cnn(input_shape: tuple[int, ...], classes: int, activation: str = "softmax") -> keras.Model:
    """Build the articles' convolutional network, with batch normalization where they put it.

    At 48 x 48 x 1 and 7 classes it is exactly theirs. For other images its widths follow the side: half from 33 pixels
    down, a quarter from 16 down, no less. Images smaller than 24 pixels are padded, and pooled only while there are two
    pixels to pool.

    Args:
        input_shape: (height, width, channels).
        classes: at least 2; or how many labels or targets.
        activation: of the last layer.

    Raises:
        InputError: the samples are no images.

    Example:
        >>> article_cnn((48, 48, 1), 7).count_params()
        2354567
    """
    if len(input_shape) != 3:
        raise InputError(
            f"article-cnn takes images; received samples of shape {input_shape}; use --model paper-mlp or your own"
        )
    side = min(input_shape[:2])
    share = width_share(side)
    model = keras.Sequential([keras.Input(input_shape)], name="article_cnn")

    def convolution(filters: int) -> None:
        padding = "same" if side < FULL_PADDING_BELOW else "valid"
        model.add(layers.Conv2D(int(filters * share), 3, padding=padding, activation="relu"))

    def pooling() -> None:
        if min(model.output_shape[1:3]) >= 2:
            model.add(layers.MaxPooling2D(2))

    convolution(32)
    convolution(64)
    model.add(BatchNormalization())
    pooling()
    model.add(layers.Dropout(0.25))
    convolution(128)
    pooling()
    model.add(BatchNormalization())
    convolution(128)
    pooling()
    model.add(layers.Dropout(0.25))
    model.add(layers.Flatten())
    model.add(BatchNormalization())
    model.add(layers.Dense(int(1024 * share), activation="relu"))
    model.add(layers.Dropout(0.5))
    model.add(layers.Dense(classes, activation=activation))
    return model


def width_share(side: int) -> float:
    """Return the share of the articles' widths for images of that side: 1, 1/2 or 1/4, about in proportion to the side.

    Example:
        >>> [width_share(side) for side in (8, 28, 48, 224)]
        [0.25, 0.5, 1, 1]
    """
    return min(1, max(0.25, 2.0 ** round(math.log2(side / ARTICLE_SIDE))))


def paper_mlp(input_shape: tuple[int, ...], classes: int, activation: str = "softmax") -> keras.Model:
    """Build the network of the paper's figure 1: three layers of 100 sigmoid units and small Gaussian weights.

    It has no batch normalization of its own; placed `before`, it is the paper's second network. The paper has no number
    for "small"; a standard deviation of 0.1, one over the square root of the width, is taken.

    Args:
        input_shape: of one sample, of any rank.
        classes: at least 2; or how many labels or targets.
        activation: of the last layer.

    Example:
        >>> paper_mlp((28, 28, 1), 10).count_params()
        99710
    """
    model = keras.Sequential([keras.Input(input_shape), layers.Flatten()], name="paper_mlp")
    for _ in range(3):
        model.add(layers.Dense(100, activation="sigmoid", kernel_initializer=_small_gaussian()))
    model.add(layers.Dense(classes, activation=activation, kernel_initializer=_small_gaussian()))
    return model


def _small_gaussian() -> keras.Initializer:
    return keras.initializers.RandomNormal(stddev=0.1)
