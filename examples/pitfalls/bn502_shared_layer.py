"""One layer for the features of two sources.

`evennorm check` finds it as BN502; run this file to see what it says of both halves.
"""

import keras
from keras.layers import Add, BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def network(of_text, of_image):
    text, image = keras.Input((16,)), keras.Input((32,))
    both = [of_text(Dense(8, use_bias=False)(text)), of_image(Dense(8, use_bias=False)(image))]
    return keras.Model([text, image], Dense(4)(ReLU()(Add()(both))))


def wrong():
    """Its moving statistics are an average over text and images, which neither of them has."""
    shared = BatchNormalization()
    return network(shared, shared)


def right():
    return network(BatchNormalization(), BatchNormalization())


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
