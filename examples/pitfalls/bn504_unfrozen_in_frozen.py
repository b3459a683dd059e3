"""A backbone whose convolutions are frozen and whose batch normalizations are not.

`evennorm check` finds it as BN504; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Conv2D, Dense, GlobalAveragePooling2D, ReLU

from evennorm.tools.check import check


def network(frozen):
    """A model with those layers frozen that `frozen` answers True for."""
    block = [Conv2D(8, 3, use_bias=False), BatchNormalization(), ReLU(), Conv2D(8, 3), ReLU(), GlobalAveragePooling2D()]
    for layer in block:
        layer.trainable = not frozen(layer)
    return keras.Sequential([keras.Input((28, 28, 3)), *block, Dense(4)])


def wrong():
    return network(frozen=lambda layer: isinstance(layer, Conv2D))


def right():
    return network(frozen=lambda layer: True)


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
