"""Keras's own test file for its layer, as its wheel ships it, run on ours; deviations.toml holds the exceptions."""

from types import SimpleNamespace

import keras.src.layers.normalization.batch_normalization_test as upstream
import pytest
from keras import layers

from evennorm.keras import BatchNormalization

# Only this module's name for keras.layers changes; Keras itself keeps its layer.
upstream.layers = SimpleNamespace(**{**vars(layers), "BatchNormalization": BatchNormalization})

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Keras runs its tests with warnings as they come


class TestBatchNormalization(upstream.BatchNormalizationTest):
    """The cases, under a name of our own."""
