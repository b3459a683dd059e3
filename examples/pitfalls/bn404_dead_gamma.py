"""Channels that weight decay has drawn to 0.

`evennorm check` finds it as BN404; run this file to see what it says of both halves.
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
    """Two channels return their beta for any input."""
    return network(moving_mean=np.arange(8), gamma=[1.2, 0.9, 1e-9, 1.1, 0.7, -2e-8, 1.3, 0.8])


def right():
    return network(moving_mean=np.arange(8), gamma=[1.2, 0.9, 0.2, 1.1, 0.7, -0.1, 1.3, 0.8])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
