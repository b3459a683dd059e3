"""A bias that batch normalization subtracts again.

`evennorm check` finds it as BN201; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def wrong():
    return keras.Sequential([keras.Input((16,)), Dense(8), BatchNormalization(), ReLU()])


def right():
    return keras.Sequential([keras.Input((16,)), Dense(8, use_bias=False), BatchNormalization(), ReLU()])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
