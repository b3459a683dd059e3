"""Two normalizations with nothing between them.

`evennorm check` finds it as BN202; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Dense, LayerNormalization, ReLU

from evennorm.tools.check import check


def wrong():
    layers = [Dense(8, use_bias=False), LayerNormalization(), BatchNormalization(), ReLU()]
    return keras.Sequential([keras.Input((16,)), *layers])


def right():
    layers = [Dense(8, use_bias=False), BatchNormalization(), ReLU()]
    return keras.Sequential([keras.Input((16,)), *layers])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
