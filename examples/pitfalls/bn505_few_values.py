"""Batches too small for their statistics.

`evennorm check` finds it as BN505; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def wrong():
    """Each mean is computed from four values: the variance is off by 80 %."""
    return keras.Sequential([keras.Input((16,)), Dense(8, use_bias=False), BatchNormalization(), ReLU(), Dense(2)])


def right():
    """Layer normalization takes its statistics from one sample."""
    return keras.Sequential(
        [keras.Input((16,)), Dense(8, use_bias=False), keras.layers.LayerNormalization(), ReLU(), Dense(2)]
    )


def codes(model):
    return [finding.code for finding in check(model, batch_size=4).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
