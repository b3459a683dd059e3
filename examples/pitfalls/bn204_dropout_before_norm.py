"""Dropout in front of batch normalization: its variance is another one at inference.

`evennorm check` finds it as BN204; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Dense, Dropout, ReLU

from evennorm.tools.check import check


def wrong():
    layers = [Dense(8), ReLU(), Dropout(0.5), BatchNormalization(), Dense(10)]
    return keras.Sequential([keras.Input((16,)), *layers])


def right():
    layers = [Dense(8), ReLU(), BatchNormalization(), Dropout(0.5), Dense(10)]
    return keras.Sequential([keras.Input((16,)), *layers])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
