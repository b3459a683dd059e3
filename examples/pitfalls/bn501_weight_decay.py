"""Weight decay that also draws gamma and beta to 0.

`evennorm check` finds it as BN501; run this file to see what it says of both halves.
"""

import keras
from keras.layers import BatchNormalization, Dense, ReLU

from evennorm.tools.check import check


def network(optimizer):
    hidden = [Dense(8, use_bias=False), BatchNormalization(), ReLU()]
    model = keras.Sequential([keras.Input((16,)), *hidden, Dense(4)])
    model.compile(optimizer, "mse")
    return model


def wrong():
    return network(keras.optimizers.AdamW(weight_decay=0.01))


def right():
    optimizer = keras.optimizers.AdamW(weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return network(optimizer)


def codes(model):
    return [finding.code for finding in check(model).findings]


if __name__ == "__main__":
    print("wrong:", codes(wrong()))
    print("right:", codes(right()))
