"""What the tests of placement share: models, how they are read, and textbook normalization."""

import keras
import numpy as np
from keras import layers

from evennorm.keras.layer import BatchNormalization

RNG = np.random.default_rng(7)


def names(model):
    return [layer.name for layer in model.layers if not isinstance(layer, layers.InputLayer)]


def normalizations(model):
    return [
        layer.name for layer in model._flatten_layers() if isinstance(layer, BatchNormalization | layers.BatchNormalization)
    ]


def output(model, *inputs, training=False):
    found = model(list(inputs) if len(inputs) > 1 else inputs[0], training=training)
    return keras.ops.convert_to_numpy(found)


def randomize(model):
    """Weights as after some training: nothing is 0 or 1 that started so, variances are positive."""
    for weight in model.weights:
        weight.assign(RNG.uniform(0.2, 1.0, weight.shape))
    return model


def normalized(x, epsilon=1e-3):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + epsilon)


def mlp():
    return randomize(
        keras.Sequential(
            [keras.Input((6,)), layers.Dense(5, activation="tanh", name="hidden"), layers.Dense(2, name="out")], name="mlp"
        )
    )


def article_cnn():
    """The articles' network, narrowed."""
    conv = {"kernel_size": 3, "activation": "relu"}
    return keras.Sequential(
        [
            keras.Input((48, 48, 1), name="face"),
            layers.Conv2D(2, name="conv1", **conv),
            layers.Conv2D(3, name="conv2", **conv),
            layers.BatchNormalization(name="bn1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Dropout(0.25, name="drop1"),
            layers.Conv2D(3, name="conv3", **conv),
            layers.MaxPooling2D(name="pool2"),
            layers.BatchNormalization(name="bn2"),
            layers.Conv2D(3, name="conv4", **conv),
            layers.MaxPooling2D(name="pool3"),
            layers.Dropout(0.25, name="drop2"),
            layers.Flatten(name="flatten"),
            layers.BatchNormalization(name="bn3"),
            layers.Dense(8, activation="relu", name="dense"),
            layers.Dropout(0.5, name="drop3"),
            layers.Dense(7, activation="softmax", name="emotion"),
        ]
    )


def hidden_and(*ends):
    return keras.Sequential([keras.Input((6,)), layers.Dense(4, activation="relu", name="hidden"), *ends])
