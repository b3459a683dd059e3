"""What is learned by the statistics of batches, and not found again with the moving ones.

`evennorm check` finds it as BN602; run this file to see what it says of both halves.
"""

import keras
import numpy as np
from keras.layers import BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def data():
    random = np.random.default_rng(0)
    for _ in range(8):
        labels = random.integers(0, 4, 64)
        yield (random.normal(20, 1, (64, 16)) + 2 * np.eye(4)[labels].repeat(4, axis=1)).astype("float32"), labels


def trained(momentum):
    keras.utils.set_random_seed(0)
    hidden = [Dense(8, use_bias=False), BatchNormalization(momentum=momentum), ReLU()]
    model = keras.Sequential([keras.Input((16,)), *hidden, Dense(4)])
    model.compile(keras.optimizers.Adam(0.03), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for _ in range(5):
        for x, labels in data():
            model.train_on_batch(x, labels)
    return model


def wrong():
    """After 40 steps the moving statistics are still far from the data's: validation looks like guessing."""
    return trained(momentum=0.999)


def right():
    return trained(momentum=0.5)


def codes(model):
    return [finding.code for finding in check(model, data()).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
