"""A momentum too high for a training this short.

`evennorm check` finds it as BN302; run this file to see what it says of both halves.
"""

import keras
import numpy as np
from keras.layers import BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def trained(momentum):
    """Sixteen steps."""
    hidden = [Dense(8, use_bias=False), BatchNormalization(momentum=momentum), ReLU()]
    model = keras.Sequential([keras.Input((16,)), *hidden, Dense(1)])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(3, 2, (512, 16)).astype("float32")
    model.fit(x, x[:, :1], batch_size=32, verbose=0)
    return model


def wrong():
    """Keras's default: after 16 steps 85 % of the moving variance is the 1 that it began with."""
    return trained(momentum=0.99)


def right():
    return trained(momentum=0.7)


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
