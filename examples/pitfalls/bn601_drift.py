"""Data that the moving statistics do not know: trained on 0 to 255, used on 0 to 1.

`evennorm check` finds it as BN601; run this file to see what it says of both halves.
"""

import keras
import numpy as np
from keras.layers import BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def data(scale):
    """Batches of images as numbers of 0 to `scale`, with their classes."""
    random = np.random.default_rng(0)
    for _ in range(8):
        labels = random.integers(0, 4, 64)
        x = random.uniform(0, 0.5, (64, 16)) + 0.5 * np.eye(4)[labels].repeat(4, axis=1)
        yield (scale * x).astype("float32"), labels


def trained(scale):
    keras.utils.set_random_seed(0)
    hidden = [BatchNormalization(momentum=0.5), Dense(8, use_bias=False), BatchNormalization(momentum=0.5), ReLU()]
    model = keras.Sequential([keras.Input((16,)), *hidden, Dense(4)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for _ in range(5):
        for x, labels in data(scale):
            model.train_on_batch(x, labels)
    return model


def wrong():
    """Trained on values of 0 to 255, used on values of 0 to 1."""
    return trained(scale=255)


def right():
    return trained(scale=1)


def codes(model):
    return [finding.code for finding in check(model, data(scale=1)).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
