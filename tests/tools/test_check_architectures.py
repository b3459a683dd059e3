"""Reference architectures have no findings but those that are true of them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from keras.src.initializers import random_initializers

from evennorm.tools.check import check
from tests.torch.architectures import ARCHITECTURES

NETS = {
    "ResNet50": (32, {}),
    "ResNet50V2": (32, {}),
    "MobileNet": (32, {"alpha": 0.25}),
    "MobileNetV2": (32, {"alpha": 0.35}),
    "MobileNetV3Small": (32, {"include_preprocessing": False}),
    "EfficientNetB0": (32, {}),
    "EfficientNetV2B0": (32, {}),
    "DenseNet121": (32, {}),
    "InceptionV3": (75, {}),
}
OWN = {"ResNet50": {"BN201"}}
"""Its convolutions have biases in front of batch normalization."""


@pytest.fixture
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial weights by NumPy: an engine compiles its random numbers anew for each shape, for minutes."""
    random = np.random.default_rng(0)
    for name, draws in {"uniform": random.uniform, "normal": random.normal, "truncated_normal": random.normal}.items():

        def drawn(shape, *limits, dtype=None, seed=None, draw=draws, **named):
            return draw(*limits, *named.values(), shape).astype("float32")

        monkeypatch.setattr(random_initializers.random, name, drawn)


@pytest.mark.usefixtures("plain_weights")
@pytest.mark.parametrize("name", NETS)
def test_keras_applications_as_they_are_built(name: str) -> None:
    size, options = NETS[name]
    model = getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10, **options)
    report = check(model, batch_size=64)
    assert report.network.gaps == ()
    assert {finding.code for finding in report.findings} == OWN.get(name, set())


def test_an_application_after_an_epoch_of_random_data() -> None:
    """Two steps are few for a momentum of 0.99, and that is all that is found."""
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3), classes=10, alpha=0.25)
    model.compile("adam", "sparse_categorical_crossentropy")
    random = np.random.default_rng(0)
    model.fit(random.uniform(size=(64, 32, 32, 3)), random.integers(0, 10, 64), batch_size=32, verbose=0)
    report = check(model, batch_size=32)
    assert {finding.code for finding in report.findings} == {"BN302"}
    assert len(report.findings) == report.as_dict()["layers"]


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"video"}))
def test_torch_networks_after_sixty_batches(name: str) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name].make()
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(32, 3, 16, 16))
    batches = [(torch.randn(32, 3, 16, 16).numpy(), None) for _ in range(8)]
    report = check(model, batches)
    assert {finding.code for finding in report.findings} <= {"BN201"}
    assert report.measurements.output_difference < 0.4
