"""Batch normalization right before the softmax of the output.

`evennorm check` finds it as BN203; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Dense, ReLU, Softmax

from evennorm.tools.check import check


def wrong():
    layers = [Dense(8), ReLU(), Dense(10, use_bias=False), BatchNormalization(), Softmax()]
    return keras.Sequential([keras.Input((16,)), *layers])


def right():
    layers = [Dense(8, use_bias=False), BatchNormalization(), ReLU(), Dense(10), Softmax()]
    return keras.Sequential([keras.Input((16,)), *layers])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
