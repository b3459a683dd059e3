"""Batch statistics at inference: what is predicted for a sample depends on its neighbours.

`evennorm check` finds it as BN506; run this file to see what it says of both halves.
"""

import keras
import numpy as np
from keras.layers import BatchNormalization, Dense

from evennorm.tools.check import check


class Network(keras.Model):
    def __init__(self, always):
        super().__init__()
        self.hidden, self.norm, self.out = Dense(8, "relu"), BatchNormalization(), Dense(2)
        self.always = always

    def call(self, x, training=None):
        return self.out(self.norm(self.hidden(x), training=True if self.always else training))


def built(model):
    model(np.zeros((2, 16), "float32"))
    return model


def wrong():
    return built(Network(always=True))


def right():
    return built(Network(always=False))


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
