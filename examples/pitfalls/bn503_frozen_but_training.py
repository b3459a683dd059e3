"""A backbone frozen by training=False, which fit does not heed.

`evennorm check` finds it as BN503; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def network():
    """A backbone, and a model that puts a new output on it."""
    hidden = [Dense(8, use_bias=False), BatchNormalization(), ReLU()]
    return keras.Sequential([keras.Input((16,)), *hidden])


def wrong():
    """Keras 3 passes training=True of fit to each layer of a functional model, the backbone's too."""
    backbone, x = network(), keras.Input((16,))
    return keras.Model(x, Dense(4)(backbone(x, training=False)))


def right():
    backbone, x = network(), keras.Input((16,))
    backbone.trainable = False
    return keras.Model(x, Dense(4)(backbone(x, training=False)))


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
