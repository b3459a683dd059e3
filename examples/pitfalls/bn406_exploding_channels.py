"""A channel that has exploded.

`evennorm check` finds it as BN406; run this file to see what it says of both halves.
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
    """Values of channel 2 are spread over a hundred thousand."""
    return network(moving_variance=[0.6, 0.9, 1e10, 0.3, 0.7, 0.4, 1.3, 0.8])


def right():
    return network(moving_variance=[0.6, 0.9, 1.1, 0.3, 0.7, 0.4, 1.3, 0.8])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
