"""Batch normalization along an axis that is not the channels'.

`evennorm check` finds it as BN101; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Conv2D, ReLU

from evennorm.tools.check import check


def wrong():
    """Axis 1 of channels-last images is their rows: each row gets a mean of its own, shared by all channels."""
    return keras.Sequential([keras.Input((28, 28, 3)), Conv2D(8, 3, use_bias=False), BatchNormalization(axis=1), ReLU()])


def right():
    return keras.Sequential([keras.Input((28, 28, 3)), Conv2D(8, 3, use_bias=False), BatchNormalization(axis=-1), ReLU()])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
