"""Channels-first images under Keras's default axis, which is the last one.

`evennorm check` finds it as BN102; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Conv2D, ReLU

from evennorm.tools.check import check


def wrong():
    """Axis -1 of (batch, channel, height, width) is the width."""
    convolution = Conv2D(8, 3, use_bias=False, data_format="channels_first")
    return keras.Sequential([keras.Input((3, 28, 28)), convolution, BatchNormalization(), ReLU()])


def right():
    convolution = Conv2D(8, 3, use_bias=False, data_format="channels_first")
    return keras.Sequential([keras.Input((3, 28, 28)), convolution, BatchNormalization(axis=1), ReLU()])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
