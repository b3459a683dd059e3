"""An epsilon that half precision rounds away.

`evennorm check` finds it as BN401; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def network(epsilon):
    hidden = [Dense(8, use_bias=False), BatchNormalization(epsilon=epsilon), ReLU()]
    return keras.Sequential([keras.Input((16,)), *hidden, Dense(4)])


def with_half_precision(epsilon):
    before = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        return network(epsilon)
    finally:
        keras.mixed_precision.set_dtype_policy(before)


def wrong():
    return with_half_precision(epsilon=1e-8)


def right():
    return with_half_precision(epsilon=1e-3)


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
