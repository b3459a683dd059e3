"""One batch with a NaN, and Keras's moving statistics are NaN for good.

`evennorm check` finds it as BN403; run this file to see what it says of both halves.
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
    """A NaN in the data of channel 5."""
    return network(moving_mean=[0, 1, 2, 3, 4, np.nan, 6, 7])


def right():
    return network(moving_mean=[0, 1, 2, 3, 4, 5, 6, 7])


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
