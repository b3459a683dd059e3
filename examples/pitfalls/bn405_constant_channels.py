"""Channels whose input has become constant.

`evennorm check` finds it as BN405; run this file to see what it says of both halves.
"""

import keras
import numpy as np
from keras.layers import BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def network(**values):
    """A network with these values in its batch normalization."""
    norm = BatchNormalization()
    hidden = [Dense(8, use_bias=False), norm, ReLU()]
    model = keras.Sequential([keras.Input((16,)), *hidden, Dense(4)])
    for name, value in values.items():
        getattr(norm, name).assign(np.asarray(value))
    return model


def wrong():
    """The units before channels 0 and 3 are dead."""
    return network(moving_variance=[0, 0.9, 0.5, 1e-9, 0.7, 0.4, 1.3, 0.8])


def right():
    return network(moving_variance=[0.6, 0.9, 0.5, 0.3, 0.7, 0.4, 1.3, 0.8])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
