"""Keras's own test file for its layer, as its wheel ships it, run on ours; deviations.toml holds the exceptions."""

from types import SimpleNamespace

import keras.src.layers.normalization.batch_normalization_test as upstream
import pytest
from keras.src import layers

from evennorm.keras import BatchNormalization

# Only this module's name for Keras's layers changes; Keras itself keeps its own.
upstream.layers = SimpleNamespace(**{**vars(layers), "BatchNormalization": BatchNormalization})

pytestmark = [
    # Ours, where the file hands masks of keras.layers.Masking to a layer with axis=1.
    pytest.mark.filterwarnings("ignore:.*the mask of shape .* covers the channel axis:UserWarning"),
    # Keras's own, of run_layer_test: it trains on a generator, and layers without trainable weights.
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed, but will be ignored:UserWarning"),
    pytest.mark.filterwarnings("ignore:The model does not have any trainable weights:UserWarning"),
]


class TestBatchNormalization(upstream.BatchNormalizationTest):
    """The cases, under a name of our own."""
