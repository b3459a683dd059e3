"""An epsilon larger than the variances it is added to.

`evennorm check` finds it as BN402; run this file to see what it says of both halves.
"""

import keras
import numpy as np
from keras.layers import BatchNormalization, Dense

from evennorm.tools.check import check


def network(scale, epsilon=1e-3):
    """A network whose first layer has seen data of this standard deviation."""
    first = BatchNormalization(epsilon=epsilon)
    model = keras.Sequential([keras.Input((4,)), first, Dense(2)])
    first.moving_mean.assign(np.full(4, 5 * scale))
    first.moving_variance.assign(np.full(4, scale**2))
    return model


def wrong():
    """Lengths in kilometres: their variance is 1e-6, epsilon 1e-3."""
    return network(scale=1e-3)


def right():
    """The same lengths in metres."""
    return network(scale=1.0)


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
